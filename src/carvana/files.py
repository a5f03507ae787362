"""Files that are never half-written, fingerprints of what a result depends on, and the error that a user sees."""

import contextlib
import difflib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

# What reading a damaged or wrong archive raises; RuntimeError: a zip with a password.
BROKEN = OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error


class UserError(Exception):
    """What a user can mend: one line that says what is wrong, in which file or parameter, and what to do."""

    def __str__(self) -> str:
        """Our line alone: a worker process of torch hands its whole traceback on as the message."""
        return super().__str__().rpartition("carvana.files.UserError: ")[2].strip()

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class OutOfTimeError(UserError):
    """The hours that were given are over; what was done is kept, and the same command goes on."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Write `path` whole or not at all: a temporary file beside it, flushed to the disk, then renamed.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written: {reason}. Free space or choose another folder.") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented so that a person can read it, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; UserError where the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def fingerprint(*values: Any) -> str:
    """Sixteen hex digits that change when any of the JSON-like values (or paths, by their text) changes."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """Hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: str | Path) -> list:
    """Name, size and time of a file or of each file right in a folder: cheap to compare, no contents read."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat()) and file.is_file()]


def project_root() -> Path:
    """The nearest folder upwards from the working directory that holds `notebooks/`, else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "notebooks").is_dir()), here)


def resolve(path: str | Path) -> Path:
    """An absolute path; relative ones start at `project_root()`, in Jupyter and under papermill alike."""
    return project_root() / Path(path).expanduser()


def given(path: str) -> Path | None:
    """`resolve` for a parameter that may be left empty."""
    return resolve(path) if path else None


def listed(text: str) -> list[str]:
    """The names in a parameter such as "none, hflip"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def write_run(run_dir: Path, parameters: dict, data: str) -> None:
    """Write run.json: parameters, versions, commit, machine and the fingerprint of the data that a run started with."""
    packages = ("torch", "segmentation-models-pytorch", "timm", "accelerate", "albumentations", "numpy", "simplejpeg")
    facts = {
        "parameters": parameters,
        "data": data,
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "commit": _commit(),
        "machine": {"system": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count()},
    }
    write_json(run_dir / "run.json", facts)


def _commit() -> str | None:
    if not shutil.which("git"):
        return None
    git = ["git", "-C", str(project_root()), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None


def need_space(folder: str | Path, size: int) -> None:
    """Raise UserError unless the disk that holds `folder` has `size` bytes free."""
    folder = Path(folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        need = f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise UserError(f"{folder}: {need}. Free space or choose another folder.")


def overlapped(function: Callable, items: Iterable[tuple]) -> Iterator:
    """`function(*item)` of every item, in order, on as many threads as cores.

    At most four results a core wait, so that memory stays flat where the items come faster than they are worked on.
    """
    cores, waiting = os.cpu_count(), deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > 4 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def progress(items: Iterable, what: str, unit: str = "pictures", **options: Any) -> tqdm:
    """A progress bar with rate and time left; outside a terminal it is renewed every 10 s, so that logs stay short."""
    live = sys.stderr.isatty()
    interval = 0.2 if live else 10
    return tqdm(items, desc=what, unit=" " + unit, mininterval=interval, ascii=not live, ncols=100, **options)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: `, did you mean "x"?` where something similar is known, else `.`"""
    close = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f', did you mean "{close[0]}"?' if close else "."
