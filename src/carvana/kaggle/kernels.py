"""A run inside Kaggle's notebooks: a folder to push, and the push itself.

The kernel needs no internet: the package, wheels of what it lacks and encoder weights come as a dataset of its own.
"""

import contextlib
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from carvana.errors import UserError
from carvana.files import atomic, need_space, optional_path, project_root, read_json, write_json, write_text
from carvana.kaggle.client import COMPETITION, LostAnswerError, call, once, remedy, sign_in, status_of, with_retries
from carvana.kaggle.credentials import scrub
from carvana.kaggle.inside import pip, requirements
from carvana.kaggle.upload import Upload
from carvana.profiles import load_profile, with_defaults

LACKING = "segmentation-models-pytorch", "simplejpeg"  # in Kaggle's image, which has all else
PLATFORMS = "manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"
POLL, LOOKS = 5, 120  # seconds between two looks at a dataset that is not ready, and how many
SETTLING = 6  # looks at a new version for as long as Kaggle may still tell of the old one
NOTE = "session.json"  # beside the kernel: what `push --wait` follows
CODE = "https://www.kaggle.com/code"
MAY_BE_THERE = "Its files may be there. Look at https://www.kaggle.com/datasets"


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
    user, profile = plan.user, with_defaults(load_profile(plan.profile))
    slug = re.sub(r"[^a-z0-9]+", "-", f"carvana {profile['run_name']}".lower())[:40].strip("-")  # as of the title
    title = slug.replace("-", " ")
    if not re.fullmatch(r"[\w-]+", user, re.ASCII):
        raise UserError(f"--user {user!r} is no name on Kaggle. Take the one in the address of your profile there.")
    if (folder / "dataset").exists() and not (folder / "dataset" / "dataset-metadata.json").is_file():
        raise UserError(f"{folder / 'dataset'} was not made by `kernel build`, and stays. Choose another --folder.")
    need_space(folder)
    weights = _encoder_file(plan.weights, profile, folder)
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    (folder / "kernel" / NOTE).unlink(missing_ok=True)
    described = {"id": f"{user}/{slug}-suite", "title": f"{title} suite", "licenses": [{"name": "other"}]}
    write_json(folder / "dataset" / "dataset-metadata.json", described)  # first: tells that the folder is ours
    _write_suite(folder / "dataset" / "suite.zip", plan.profile)
    if weights:
        shutil.copyfile(weights, folder / "dataset" / f"encoder{weights.suffix}")
    if plan.wheels:
        _fetch_wheels(folder / "dataset", plan.python)
    write_text(folder / "kernel" / "carvana.ipynb", (resources.files("carvana.kaggle") / "kernel.ipynb").read_text())
    write_json(folder / "kernel" / "kernel-metadata.json", _kernel(user, slug, title))
    return folder


def _encoder_file(given: Path | None, profile: dict[str, Any], folder: Path) -> Path | None:
    """The encoder weights that the kernel needs as a file, as it has no internet: given, of the profile, or fetched."""
    if not given and profile["encoder_weights"] == "imagenet":
        from carvana import models  # torch takes seconds, and on Kaggle not all is installed yet

        try:
            return models.fetch_encoder(profile["encoder"], folder / "encoder.safetensors")
        except UserError as error:
            raise UserError(f"{error} Here: --weights FILE, as the kernel has no internet.") from None
    weights = given or optional_path(profile["encoder_weights"])
    if weights and not (weights.is_file() and weights.suffix in (".safetensors", ".pth")):
        raise UserError(f"--weights {weights} is no .safetensors or .pth file. Give one of encoder weights.")
    return weights


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
    wanted = requirements(project_root() / "requirements.txt")
    wheels = [str(requirement) for requirement in wanted if requirement.name in LACKING]
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "--dest", str(folder)]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    if said := pip("download", *options, *wheels):
        raise UserError(f"wheels for Python {python} could not be fetched: {said}")


def push(folder: str | Path, resume: bool = False) -> str:
    """Bring dataset and kernel of `build` to Kaggle and start the kernel; returns its id and version.

    resume: attach the output of the kernel's last version, so that the run goes on. UserError where Kaggle refuses
    anything, also where its client would not say so.
    """
    folder, api = Path(folder), sign_in()
    path = folder / "kernel" / "kernel-metadata.json"
    kernel = read_json(path)
    kernel["kernel_sources"] = [kernel["id"]] if resume else []
    write_json(path, kernel)
    if running(folder):
        raise UserError(f"{kernel['id']} runs on Kaggle already. Add --wait, or stop it at {CODE}/{kernel['id']}.")
    _push_dataset(api, folder / "dataset")
    answer = _once(kernel["id"], f"A kernel may run. Look at {CODE}", api.kernels_push, str(path.parent))
    kinds = "dataset", "competition", "kernel", "model"
    invalid = {kind: getattr(answer, f"invalid_{kind}_sources") for kind in kinds}
    refused = [f"{kind} {', '.join(names)} is unknown to it" for kind, names in invalid.items() if names]
    refused += [answer.error] if answer.error else []
    if refused:
        said = scrub("; ".join(refused))
        runs = answer.version_number and not answer.error
        stop = f" It runs without: stop it at {CODE}/{kernel['id']}." if runs else ""
        raise UserError(f"{path}: Kaggle refused it: {said}.{stop} {remedy(said, 'Fix the file and push again.')}")
    session = f"{kernel['id']}/{answer.version_number}" if answer.version_number else kernel["id"]
    note_session(folder, session)
    return session


def note_session(folder: Path, session: str) -> None:
    """Note beside the kernel which session is to be followed, and what of it has been fetched."""
    write_json(folder / "kernel" / NOTE, {"kernel": session, "started": time.time(), "fetched": []})


def running(folder: Path) -> str | None:
    """The id of the folder's kernel where it runs already: a push whose answer was lost may have started it."""
    kernel, state = read_json(folder / "kernel" / "kernel-metadata.json")["id"], None
    with contextlib.suppress(UserError):  # where the look fails, the push will, or Kaggle has changed its ways
        state = kernel_state(sign_in(), dict(zip(("userName", "kernelSlug"), kernel.split("/"), strict=True)))
    return kernel if state in ("QUEUED", "RUNNING", "NEW_SCRIPT") else None


def kernel_state(api: Any, asked: dict[str, Any]) -> str | None:
    """QUEUED, RUNNING, COMPLETE, ERROR and the like of a kernel's session; None where there is none."""
    return _state(api, "kernels", "GetKernelSessionStatus", asked)


def _push_dataset(api: Any, folder: Path) -> None:
    """A new dataset, or a new version of it, with every file of the folder; waits until Kaggle has unpacked it."""
    described = read_json(folder / "dataset-metadata.json")
    ref, (owner, slug) = described["id"], described["id"].split("/")
    dataset = {"ownerSlug": owner, "datasetSlug": slug}
    exists = _state(api, "datasets", "GetDatasetStatus", dataset) is not None
    uploads = [Upload(path) for path in sorted(folder.iterdir()) if path.suffix != ".json" and path.name[0] != "."]
    begin = api, "blobs", "StartBlobUpload"
    files = [{"token": upload.send(*begin, {"type": "DATASET", "name": upload.path.name})} for upload in uploads]
    if exists:
        body = {"versionNotes": "carvana kernel push", "files": files}
        answer = _once(ref, MAY_BE_THERE, call, api, "datasets", "CreateDatasetVersion", dataset | {"body": body})
    else:
        fields = {"title": described["title"], "licenseName": described["licenses"][0]["name"], "isPrivate": True}
        fields |= {"ownerSlug": owner, "slug": slug, "files": files}
        answer = _once(ref, MAY_BE_THERE, call, api, "datasets", "CreateDataset", fields)
    if error := scrub(answer.get("error") or ""):
        raise UserError(f"{folder}: Kaggle refused it: {error}. {remedy(error, 'Fix dataset-metadata.json.')}")
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


def _once(what: str, look: str, request: Callable, *values: Any) -> Any:
    """`once`; a lost answer says where to look, since it may have made a version or started a session."""
    try:
        return once(f"Push of {what}", request, *values)
    except (LostAnswerError, KeyboardInterrupt) as error:
        said = str(error) or f"Push of {what}: stopped."
        raise UserError(f"{said} {look}/{what} before you push again.") from None


def _state(api: Any, *asked: Any) -> str | None:
    """READY, RUNNING and the like; None for a dataset or kernel that does not exist."""

    def look() -> str | None:
        try:
            status = scrub(str(call(api, *asked).get("status") or "QUEUED"))  # the one that may be left out
            return re.sub("(?<=[a-z])(?=[A-Z])", "_", status).upper()  # cancelAcknowledged is a way to write it too
        except Exception as error:
            if status_of(error) in (403, 404):  # what is not there is nobody's to see
                return None
            raise

    return with_retries(f"{asked[1]} of {'/'.join(asked[2].values())}", look)
