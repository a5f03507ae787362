"""What a machine has for a run, and what to do about what it lacks. Contacts nobody, writes nothing."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from carvana.data.competition import Competition
from carvana.errors import UserError
from carvana.files import project_root, resolve
from carvana.kaggle.credentials import credentials_source, scrub
from carvana.kaggle.inside import unfit_version
from carvana.parallel import SHARED_MEMORY, cores
from carvana.preflight import check_recipe
from carvana.profiles import Values, load_profile, with_defaults

IMAGES, VIEWS, RESERVE = 5088, 16, 2 << 30  # of the training set, of a car; bytes of disk for all but the cache


class NoteError(UserError):
    """What a person may want to correct, though a run goes on."""


def examine(profile: Path | None = None, overrides: dict[str, str] | None = None) -> Iterator[tuple[str, str, str]]:
    """What a run of `profile` (default: of no profile) finds here: "ok", "note" or "STOP", its name, what is there."""
    values: Values = {}

    def parameters() -> str:
        if not profile and not (project_root() / "notebooks").is_dir():
            raise NoteError("no notebooks here. Call it in the project's folder to see disk, data and weights too")
        values.update(with_defaults(load_profile(profile, overrides) if profile else {}))
        return f"{profile or 'defaults'}, run {values['run_name']}"

    checks: dict[str, Callable[[], str]] = {"profile": parameters, "Python": _python, "packages": _packages}
    checks |= {"device": lambda: _device(values), "cores": lambda: f"{cores()}", "memory": _memory}
    checks |= {"disk": lambda: _disk(values), SHARED_MEMORY: _shared_memory, "credentials": _credentials}
    checks |= {"data": lambda: _data(values), "weights": lambda: _weights(values)}
    for name, check in checks.items():
        if not values and name in ("disk", "data", "weights"):
            continue  # nobody knows which
        try:
            yield "ok", name, check()
        except UserError as error:
            yield "note" if isinstance(error, NoteError) else "STOP", name, scrub(error)
        except Exception as error:  # a package may fail to be imported in any way
            of_file = isinstance(error, OSError) and error.filename
            advice = "Correct the path or its rights" if of_file else "Install what is needed again: make setup"
            yield "STOP", name, f"{type(error).__name__}: {scrub(error)}. {advice}"


def _noted(seen: str, noteworthy: bool, advice: str) -> str:
    if noteworthy:
        raise NoteError(f"{seen}. {advice}")
    return seen


def _python() -> str:
    version = platform.python_version()
    wanted = metadata.metadata("carvana")["Requires-Python"] if _distributed() else ""
    if version not in SpecifierSet(wanted):
        raise UserError(f"{version}, but {wanted} is needed. Try: make clean setup PYTHON=python3.12")
    return f"{version}, {platform.system()} {platform.machine()}"


def _distributed() -> bool:
    return any(metadata.distributions(name="carvana"))


def _packages() -> str:
    import torch

    wanted = [Requirement(line) for line in metadata.requires("carvana") or ()] if _distributed() else []
    wanted = [need for need in wanted if not need.marker]  # else it is for the tests
    unfit = [f"{need} ({there or 'absent'})" for need in wanted if (there := unfit_version(need)) is not None]
    if unfit:
        raise UserError(f"{', '.join(unfit)}. Install what is needed: make setup, or pip install -r requirements.txt")
    return f"torch {torch.__version__}, and {len(wanted)} that are needed fit"


def _device(values: Values) -> str:
    from carvana.device import check_device, precision, use_device  # torch takes seconds

    wanted = values.get("device", "auto")
    check_device(wanted)  # before the other checks take it for chosen
    device = use_device(wanted)
    seen = f"{device}, precision {precision('auto').replace('no', 'float32')}"
    advice = "Real images take hours on it. Is there a GPU? Then look at its driver: nvidia-smi"
    return _noted(seen, device.type == "cpu", advice)


def _memory() -> str:
    free = psutil.virtual_memory().available / 2**30
    return _noted(f"{free:.1f} GB free", free < 6, "End other programs, or lower batch_size and workers")


def _disk(values: Values) -> str:
    folder = resolve(values["runs_dir"])
    folder = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    free = shutil.disk_usage(folder).free
    if free < RESERVE or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free or cannot be written. Free space or give a runs_dir")
    images = values["demo_cars"] * VIEWS or IMAGES
    cache = images * values["height"] * values["width"] * 4  # see data.dataset, which leaves half of the disk free
    advice = f"The cache of {images} images takes {cache / 1e9:.0f} GB, and is written where twice as much is free"
    return _noted(f"{free / 1e9:.0f} GB free at {folder}", free < 2 * cache + RESERVE, advice)


def _shared_memory() -> str:
    if not Path(SHARED_MEMORY).exists():
        return "none, and this system needs none"
    free = shutil.disk_usage(SHARED_MEMORY).free / 1e9
    return _noted(f"{free:.1f} GB free", free < 1, "Start docker with --shm-size 8g, or run with -p workers 0")


def _credentials() -> str:
    try:
        return f"from {credentials_source()}"
    except UserError as error:
        raise NoteError(str(error)) from None


def _data(values: Values) -> str:
    competition = Competition(values["data_dir"], values["hq"])
    if values["demo_cars"]:
        return f"01_download draws the demo into {competition.folder}"
    if competition.has_train_images:
        return f"{len(competition.train_images.names)} images to train on in {competition.folder}"
    seen = f"none in {competition.folder}"
    try:
        credentials_source()
    except UserError:
        raise UserError(f"{seen}, nor credentials to fetch them. Give data_dir, or get a token") from None
    raise NoteError(f"{seen}. 01_download fetches about 10 GB, or give the folder that has them: data_dir")


def _weights(values: Values) -> str:
    check_recipe(values)
    from carvana.models import in_cache  # torch takes seconds

    wanted, encoder = values["encoder_weights"], values["encoder"]
    if wanted != "imagenet":
        return wanted or "none needed"
    there, advice = in_cache(encoder), "03_train fetches them; without internet give a file: encoder_weights"
    return _noted(f"imagenet of {encoder}, {'' if there else 'not '}cached", not there, advice)
