"""A run inside Kaggle's notebooks: a folder to push, the push itself, and what the notebook does first when it runs.

The kernel needs no internet: the package, wheels of what it may lack and encoder weights come as a dataset of its own.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from carvana.errors import UserError
from carvana.files import atomic, need_space, project_root, read_json, write_json, write_text
from carvana.kaggle.client import COMPETITION, LostAnswerError, call, once, remedy, sign_in, status_of, with_retries
from carvana.kaggle.credentials import scrub
from carvana.kaggle.upload import Upload

NOT_NEEDED = "torch", "torchvision", "jupyterlab", "kaggle", "kagglesdk", "six"  # there already, or for the network
PLATFORMS = "manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"
POLL, LOOKS = 5, 120  # seconds between two looks at a dataset that is not ready, and how many
SETTLING = 6  # looks at a new version for as long as Kaggle may still tell of the old one
CODE = "https://www.kaggle.com/code"
DEPTH = 5  # folders below the input folder in which Kaggle may mount something


@dataclass(frozen=True)
class KernelPlan:
    """What runs on Kaggle, and as whose.

    user: owner there. weights: file of encoder weights, for a profile that would fetch them. python: version that
    Kaggle runs, for the wheels; wheels: bring what Kaggle may lack.
    """

    profile: Path
    user: str
    weights: Path | None = None
    python: str = "3.12"
    wheels: bool = True


def build(plan: KernelPlan, folder: Path) -> Path:
    """Write `folder`/dataset and `folder`/kernel, ready for `push` or for `kaggle kernels push`; returns `folder`.

    UserError where the profile could not run there.
    """
    profile, weights = _parameters(plan.profile), plan.weights
    slug = re.sub(r"[^a-z0-9]+", "-", f"carvana {profile['run_name']}".lower())[:40].strip("-")  # as of the title
    title = slug.replace("-", " ")
    if profile["encoder_weights"] == "imagenet" and not weights:
        reason = "fetches encoder weights, but the kernel has no internet"
        raise UserError(f"{plan.profile} {reason}. Give a file: --weights.")
    if weights and not weights.is_file():
        raise UserError(f"--weights {weights} is no file. Give one of encoder weights (.safetensors or .pth).")
    if not re.fullmatch(r"[\w-]+", plan.user, re.ASCII):
        raise UserError(
            f"--user {plan.user!r} is no name on Kaggle. Take the one in the address of your profile there."
        )
    if (folder / "dataset").exists() and not (folder / "dataset" / "dataset-metadata.json").is_file():
        raise UserError(f"{folder / 'dataset'} was not made by `kernel build`, and stays. Choose another --folder.")
    need_space(folder)
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    described = {"id": f"{plan.user}/{slug}-suite", "title": f"{title} suite", "licenses": [{"name": "other"}]}
    write_json(folder / "dataset" / "dataset-metadata.json", described)  # first: tells that the folder is ours
    _write_suite(folder / "dataset" / "suite.zip", plan.profile)
    if weights:
        shutil.copyfile(weights, folder / "dataset" / f"encoder{weights.suffix}")
    if plan.wheels:
        _fetch_wheels(folder / "dataset", plan.python)
    write_text(folder / "kernel" / "carvana.ipynb", (resources.files("carvana.kaggle") / "kernel.ipynb").read_text())
    write_json(folder / "kernel" / "kernel-metadata.json", _kernel(plan.user, slug, title))
    return folder


def _parameters(profile: str | Path) -> dict[str, Any]:
    """All parameters of a profile, defaults included."""
    from carvana.profiles import load_profile, with_defaults  # only now: on Kaggle it needs what `install` has brought

    return with_defaults(load_profile(profile))


def _kernel(user: str, slug: str, title: str) -> dict:
    """Every field, since the client's own defaults differ from what its manual says."""
    return {
        "id": f"{user}/{slug}", "title": title, "code_file": "carvana.ipynb", "language": "python",
        "kernel_type": "notebook", "is_private": True, "enable_gpu": True, "enable_tpu": False,
        "enable_internet": False, "machine_shape": "NvidiaTeslaT4", "keywords": [],
        "dataset_sources": [f"{user}/{slug}-suite"], "competition_sources": [COMPETITION],
        "kernel_sources": [], "model_sources": [],
    }  # fmt: skip


def _write_suite(path: Path, profile: Path) -> None:
    """The package, the notebooks, the requirements and the profile, equal bytes for equal files."""
    root, package = project_root(), Path(__file__).parents[1]
    files = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    members = {f"src/carvana/{file.relative_to(package).as_posix()}": file for file in files}
    members |= {f"notebooks/{file.name}": file for file in (root / "notebooks").glob("*.ipynb")}
    members |= {"requirements.txt": root / "requirements.txt", "profile.yaml": profile}
    with atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name), source.read_bytes(), zipfile.ZIP_DEFLATED)


def _fetch_wheels(folder: Path, python: str) -> None:
    wanted = [str(requirement) for requirement in requirements(project_root() / "requirements.txt")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    ended = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"wheels for Python {python} could not be fetched: {ended.stderr.splitlines()[-1]}")


def requirements(path: Path) -> list[Requirement]:
    """What the package needs to run on Kaggle."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return [requirement for requirement in wanted if requirement.name not in NOT_NEEDED]


def push(folder: str | Path, resume: bool = False) -> str:
    """Bring dataset and kernel of `build` to Kaggle and start the kernel; returns its id with the version.

    resume: attach the output of the kernel's last version, so that the run goes on. UserError where Kaggle refuses
    anything, also where its client would not say so.
    """
    folder, api = Path(folder), sign_in()
    path = folder / "kernel" / "kernel-metadata.json"
    kernel = read_json(path)
    kernel["kernel_sources"] = [kernel["id"]] if resume else []
    write_json(path, kernel)
    _look_for_a_session(api, kernel["id"])
    _push_dataset(api, folder / "dataset")
    answer = _once(kernel["id"], api.kernels_push, str(path.parent))
    kinds = "dataset", "competition", "kernel", "model"
    invalid = {kind: getattr(answer, f"invalid_{kind}_sources") for kind in kinds}
    refused = [f"{kind} {', '.join(names)} is unknown to it" for kind, names in invalid.items() if names]
    refused += [answer.error] if answer.error else []
    if refused:
        said = scrub("; ".join(refused))
        runs = (
            "" if answer.error or not answer.version_number else f" It runs without: stop it at {CODE}/{kernel['id']}."
        )
        raise UserError(f"{path}: Kaggle refused it: {said}.{runs} {remedy(said, 'Mend the file and push again.')}")
    return f"{kernel['id']}/{answer.version_number}"


def _look_for_a_session(api: Any, kernel: str) -> None:
    """UserError where the kernel runs already: a push whose answer was lost may have started it."""
    (user, slug), state = kernel.split("/"), None
    with contextlib.suppress(UserError):  # where the look fails, the push will, or Kaggle has changed its ways
        state = _state(api, "kernels", "GetKernelSessionStatus", {"userName": user, "kernelSlug": slug})
    if state in ("QUEUED", "RUNNING", "NEW_SCRIPT"):
        raise UserError(f"{kernel} runs on Kaggle already ({state}). Wait for it or stop it at {CODE}/{kernel}.")


def _push_dataset(api: Any, folder: Path) -> None:
    """A new dataset, or a new version of it, with every file of the folder; waits until Kaggle has unpacked it."""
    described = read_json(folder / "dataset-metadata.json")
    ref, (owner, slug) = described["id"], described["id"].split("/")
    dataset = {"ownerSlug": owner, "datasetSlug": slug}
    exists = _state(api, "datasets", "GetDatasetStatus", dataset) is not None
    paths = [path for path in sorted(folder.iterdir()) if path.suffix != ".json" and path.name[0] != "."]
    uploads = [Upload(path) for path in paths]
    begin = [(api, "blobs", "StartBlobUpload", {"type": "DATASET", "name": path.name}) for path in paths]
    files = [{"token": upload.send(*asked)} for upload, asked in zip(uploads, begin, strict=True)]
    if exists:
        body = {"versionNotes": "carvana kernel push", "files": files}
        answer = _once(ref, call, api, "datasets", "CreateDatasetVersion", dataset | {"body": body})
    else:
        fields = {"title": described["title"], "licenseName": described["licenses"][0]["name"], "isPrivate": True}
        fields |= {"ownerSlug": owner, "slug": slug, "files": files}
        answer = _once(ref, call, api, "datasets", "CreateDataset", fields)
    if error := scrub(answer.get("error") or ""):
        raise UserError(f"{folder}: Kaggle refused it: {error}. {remedy(error, 'Mend dataset-metadata.json.')}")
    for upload in uploads:
        upload.done()
    _wait_until_ready(api, dataset, SETTLING if exists else 0)


def _wait_until_ready(api: Any, dataset: dict[str, str], settling: int) -> None:
    """Look until the dataset is unpacked; the first `settling` times that it is ready may still be the old version."""
    ref = "/".join(dataset.values())
    print(f"dataset {ref}: waiting until Kaggle has unpacked it, {POLL * LOOKS // 60} minutes at most", flush=True)
    for look in range(LOOKS):
        state = _state(api, "datasets", "GetDatasetStatus", dataset)
        if state == "READY" and look >= settling:
            return
        if state in ("FAILED", "DELETED"):
            break
        settling = settling if state == "READY" else 0  # the new version has been seen
        time.sleep(POLL)
    raise UserError(f"dataset {ref}: Kaggle says {state}. Look at it on the site, then push again.")


def _once(what: str, request: Callable, *values: Any) -> Any:
    """`once`; a lost answer says where to look, since it may have made a version or started a session."""
    try:
        return once(f"Push of {what}", request, *values)
    except (LostAnswerError, KeyboardInterrupt) as error:
        said = str(error) or f"Push of {what}: stopped."
        raise UserError(f"{said} A kernel may run. Look at {CODE}/{what} before you push again.") from None


def _state(api: Any, *asked: Any) -> str | None:
    """READY, RUNNING and the like; None for a dataset or kernel that does not exist."""

    def look() -> str | None:
        try:
            return scrub(str(call(api, *asked).get("status"))).upper()
        except Exception as error:
            if status_of(error) in (403, 404):  # what is not there is nobody's to see
                return None
            raise

    return with_retries(f"{asked[1]} of {'/'.join(asked[2].values())}", look)


def install(suite: Path, dataset: Path) -> list[str]:
    """On Kaggle: install the wheels for what is missing there, or of an unfit version; returns what was installed.

    suite: the unpacked suite.zip. dataset: folder of the wheels. Needs nothing but pip and packaging.
    """
    lacking = [str(wanted) for wanted in requirements(suite / "requirements.txt") if not _is_there(wanted)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--find-links", str(dataset)]
    if lacking:
        ended = subprocess.run([*command, *lacking], capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = ended.stderr.strip().splitlines()[-1]
            raise UserError(f"{', '.join(lacking)} cannot be installed: {reason}. Build with the --python of Kaggle.")
    return lacking


def _is_there(wanted: Requirement) -> bool:
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def prepare(suite: Path, dataset: Path, input_dir: Path, working_dir: Path, gpus: int) -> dict[str, str]:
    """On Kaggle: find data and weights, bring back an earlier output; returns the parameters that differ there.

    UserError that names everything that is missing, within seconds instead of hours.
    """
    from carvana.device import gpu_count  # torch takes seconds

    shutil.copytree(suite / "notebooks", working_dir / "notebooks", dirs_exist_ok=True)
    profile, missing = _parameters(suite / "profile.yaml"), []
    data = _below(input_dir, "train.zip") or _below(input_dir, "train")
    if not data:
        missing.append(f"the competition's data below {input_dir} (Add Input, Competition)")
    weights = next(dataset.glob("encoder.*"), None)
    if profile["encoder_weights"] and not weights:
        missing.append("encoder weights (build again with --weights FILE)")
    if (available := gpu_count()) < gpus:
        missing.append(f"{gpus - available} of {gpus} GPUs (Settings, Accelerator, GPU T4 x2)")
    if missing:
        raise UserError(f"This session lacks {'; '.join(missing)}.")
    _bring_back(input_dir, working_dir / "runs", profile["run_name"])
    paths = {"data_dir": data, "runs_dir": working_dir / "runs", "submissions_dir": working_dir}
    return {name: str(path) for name, path in (paths | ({"encoder_weights": weights} if weights else {})).items()}


def _bring_back(input_dir: Path, runs: Path, run_name: str) -> None:
    """An earlier session's run, to go on with; the cache lies where Kaggle does not save it."""
    runs.mkdir(parents=True, exist_ok=True)
    earlier = _below(input_dir, f"runs/{run_name}")
    if earlier and not (runs / run_name).exists():
        shutil.copytree(earlier / "runs" / run_name, runs / run_name)
    if not (runs / "cache").exists():
        (runs / "cache").symlink_to(tempfile.mkdtemp(prefix="carvana"), target_is_directory=True)


def _below(folder: Path, name: str) -> Path | None:
    """The folder that holds `name`, at most DEPTH below `folder`."""
    matches = (path for depth in range(DEPTH) for path in sorted(folder.glob("*/" * depth + name)))
    match = next(matches, None)
    return match and match.parents[name.count("/")]
