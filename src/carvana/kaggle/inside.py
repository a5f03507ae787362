"""What the kernel does first when it runs on Kaggle: install what is missing, find data and weights.

Importing this needs nothing but what every image has.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from carvana.errors import UserError

# There already, or for the network:
NOT_NEEDED = "torch", "torchvision", "jupyterlab", "kaggle", "kagglesdk", "six", "urllib3"
DEPTH = 5  # folders below the input folder in which Kaggle may mount something


def requirements(path: Path) -> list[Requirement]:
    """What the package needs to run on Kaggle."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return [requirement for requirement in wanted if requirement.name not in NOT_NEEDED]


def install(suite: Path, dataset: Path) -> list[str]:
    """On Kaggle: install the wheels for what is missing there, or of an unfit version; returns what was installed.

    suite: the unpacked suite.zip. dataset: folder of the wheels. Needs nothing but pip and packaging.
    """
    lacking = [str(wanted) for wanted in requirements(suite / "requirements.txt") if unfit_version(wanted) is not None]
    modules = metadata.packages_distributions().items() if lacking else ()
    imported = {name for module, names in modules if module in sys.modules for name in names}
    if spoilt := [wanted for wanted in lacking if Requirement(wanted).name in imported]:
        reason = "another version is imported already, and replacing it would break this session"
        raise UserError(f"{', '.join(spoilt)}: {reason}. Choose another image (Settings, Environment).")
    if lacking and (said := pip("install", "--no-index", "--no-deps", "--find-links", str(dataset), *lacking)):
        advice = "Build with the --python of Kaggle, or choose another image (Settings, Environment)."
        raise UserError(f"{', '.join(lacking)} cannot be installed: {said}. {advice}")
    return lacking


def pip(*arguments: str) -> str:
    """Run pip; returns what it said at its end where it failed, "" where it did its work."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if not ended.returncode:
        return ""
    return ([line for line in ended.stderr.splitlines() if line.strip()] or ["it was killed"])[-1]


def unfit_version(need: Requirement) -> str | None:
    """The version that is installed where it does not do, "" where there is none, None where it does."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return ""
    return None if need.specifier.contains(version, prereleases=True) else version


def prepare(suite: Path, dataset: Path, input_dir: Path, working_dir: Path, gpus: int) -> dict[str, str]:
    """On Kaggle: find data and weights, bring back an earlier output; returns the parameters that differ there.

    UserError that names everything that is missing, within seconds instead of hours.
    """
    from carvana.device import gpu_count  # torch takes seconds
    from carvana.profiles import load_profile, with_defaults  # needs what `install` has brought

    shutil.copytree(suite / "notebooks", working_dir / "notebooks", dirs_exist_ok=True)
    profile, missing = with_defaults(load_profile(suite / "profile.yaml")), []
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
