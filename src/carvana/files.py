"""Files that are never half-written, fingerprints of what a result depends on, and where paths start."""

import contextlib
import hashlib
import json
import lzma
import os
import platform
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from carvana.errors import UserError

# What reading a damaged or wrong archive raises; RuntimeError: a zip with a password.
UNREADABLE = OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError
os.umask(UMASK := os.umask(0))  # once: to ask for it changes it for a moment, for all threads
MARK = f".{platform.node()}-"  # of temporary files: .NAME.HOST-PROCESS-xxxxxxxx


@contextlib.contextmanager
def atomic(path: str | Path, rights: int = 0o666) -> Iterator[IO[bytes]]:
    """Write `path` whole or not at all: a temporary file beside it, flushed to the disk, then renamed.

    A link is followed. rights: of the file, less those that the umask takes. Raises UserError where the disk is full,
    the folder cannot be written, or `path` is no file.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is a folder or a device, not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}{MARK}{os.getpid()}-"
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=prefix, delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(rights & ~UMASK)
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written: {reason}. Free space or choose another folder.") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def sweep(hidden: Iterable[Path]) -> None:
    """Delete those of the files that `atomic` left in processes of this machine that were killed."""
    for path in hidden:
        process = path.name.rpartition(MARK)[2].partition("-")[0]
        if MARK in path.name and process.isdecimal() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | Path, what: str, hours: int = 12) -> Iterator[None]:
    """Hold a lock file, which even a killed process gives up; says so where another process holds it, and waits."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, is_singleton=True)  # may be taken again inside
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"{path.parent}: waiting for {what} of another process, {hours} hours at most", flush=True)
            lock.acquire(timeout=3600 * hours)
    except Timeout:
        raise UserError(f"{path.parent}: {what} of another process has not ended. End it, then start again.") from None
    except OSError as error:
        raise UserError(f"{path} could not be locked: {error.strerror or error}. Choose another folder.") from error
    with lock:
        lock.release()  # of the two holds, the one that waited
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented so that a person can read it, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, schema: Any = Any) -> Any:
    """Read JSON; UserError where the file is missing or broken, or its value is not of the type `schema`."""
    try:
        data = Path(path).read_bytes()
        TypeAdapter(schema).validate_json(data, strict=True)
        return json.loads(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = " in " + ".".join(map(str, first["loc"])) if first["loc"] else ""
        reason = f"{first['msg']}{place}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read as JSON: {reason}. Correct or delete it, then start again.")


def fingerprint(*values: Any) -> str:
    """Sixteen hex digits that change when any of the JSON-like values (or paths, by their text) changes."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """Hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: str | Path) -> list[list]:
    """Name, size and time of a file or of each one right in a folder, as JSON keeps them; cheap, no contents read."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file in files if file.is_file() and (stat := file.stat())]


def project_root() -> Path:
    """The nearest folder upwards from the working directory that holds `notebooks/`, else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "notebooks").is_dir()), here)


def resolve(path: str | Path) -> Path:
    """An absolute path; relative ones start at `project_root()`, in Jupyter and under papermill alike."""
    try:
        return project_root() / Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user. Correct the path.") from error


def optional_path(path: str | Path) -> Path | None:
    """`resolve` for a parameter that may be left empty."""
    return resolve(path) if path else None


def parse_list(text: str) -> list[str]:
    """The names in a parameter such as "none, hflip"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def need_space(folder: str | Path, size: int = 0) -> None:
    """Make `folder`; UserError where nothing can be written there, or its disk has less than `size` bytes free."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{folder} cannot be written into: {error.strerror}. Choose another folder.") from error
    if free < size:
        need = f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise UserError(f"{folder}: {need}. Free space or choose another folder.")
