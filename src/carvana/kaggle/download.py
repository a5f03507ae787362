"""Bytes from Kaggle and to it: resumed after any cut or kill, verified, and only then under their names.

The client would append an error page to half a file, hang on a silent line, and send a cut upload anew from its start.
"""

import contextlib
import fcntl
import json
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from carvana.files import (
    BROKEN,
    UserError,
    atomic,
    nearest,
    need_space,
    progress,
    read_json,
    sha256,
    stamp,
    write_json,
)
from carvana.kaggle.client import COMPETITION, ask, call, client, tamed

PIECE = 1 << 16  # bytes written at once, at most lost when a line is cut
TABLES = ("train_masks.zip", "train_masks.csv.zip", "metadata.csv.zip", "sample_submission.csv.zip")


def download(data_dir: str | Path, files: list[str] | None = None, hq: bool = False) -> list[Path]:
    """Bring the files of the competition into `data_dir` (hq: the pictures in high quality); returns their paths.

    What is there and sound is kept; what arrives is checked before it gets its name, and listed in `download.json`.
    """
    data_dir, kind = Path(data_dir), "_hq" if hq else ""
    wanted = files or [f"train{kind}.zip", *TABLES, f"test{kind}.zip"]
    known = _manifest(data_dir)
    if {*wanted} <= {*known}:  # no account is needed to find that nothing is missing
        return [data_dir / name for name in wanted]
    api = client()
    sizes = list_files(api)
    names = [_listed(name, sizes) for name in wanted]
    print("\n".join(f"{'*' if name in names else ' '} {name:28}{size / 1e6:10.1f} MB" for name, size in sizes.items()))
    with _alone(data_dir):
        return _bring(api, data_dir, {name: sizes[name] for name in names})


def _bring(api: Any, data_dir: Path, sizes: dict[str, int]) -> list[Path]:
    known = _manifest(data_dir)
    here = {name: _present(data_dir, name, size, known) for name, size in sizes.items()}
    missing = {name: sizes[name] for name, path in here.items() if not path}
    arrived = sum(_length(_part(data_dir, name)) for name in missing)
    need_space(data_dir, sum(missing.values()) - arrived)
    with progress(None, "downloading", "B", total=sum(missing.values()), initial=arrived, unit_scale=True) as bar:
        for name, path in here.items():
            here[name] = path = path or _fetch(api, data_dir, name, sizes[name], bar)
            if path.name not in known:
                entry = dict(zip(("name", "size", "time"), *stamp(path), strict=True)) | {"sha256": sha256(path)}
                known[path.name] = entry
                write_json(data_dir / "download.json", list(known.values()))
            bar.write(f"{path}: {'has arrived' if name in missing else 'was there'}, verified")
    return list(here.values())


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Two downloads into one folder would write into each other's files: the second waits for the first."""
    folder = data_dir / ".download"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def verify(data_dir: str | Path) -> list[Path]:
    """Read every zip of a folder that was filled by hand, or attached on Kaggle; UserError names a broken one."""
    data_dir = Path(data_dir)
    known, paths = _manifest(data_dir), sorted(data_dir.glob("*.zip"))
    for path in progress([path for path in paths if path.name not in known], "verifying", "zips"):
        if fault := _fault(path, 0):
            raise UserError(f"{path} {fault}. Download it again.")
    return paths


def list_files(api: Any) -> dict[str, int]:
    """Name -> bytes of every file of the competition, from all pages of the listing."""
    sizes, token, seen = {}, "", set()
    while token not in seen:  # a server that repeats a page must not hold us for ever
        seen.add(token)
        page = ask("The list of files", api.competition_list_files, COMPETITION, page_token=token)
        sizes |= {file.name: file.total_bytes for file in page.files}
        token = page.next_page_token or ""
    return sizes


def _listed(name: str, sizes: dict[str, int]) -> str:
    """Kaggle has served the same file as NAME and as NAME.zip."""
    for known in (name, f"{name}.zip", name.removesuffix(".zip")):
        if known in sizes:
            return known
    raise UserError(f"{name} is no file of the competition{nearest(name, sizes)} It has {', '.join(sizes)}.")


def _manifest(data_dir: Path) -> dict[str, dict]:
    """Entries of `download.json` whose files have not changed since they were verified."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        entries = {entry["name"]: entry for entry in read_json(data_dir / "download.json")}
        now = {name: size_and_time for name, *size_and_time in stamp(data_dir)}
        return {name: entry for name, entry in entries.items() if now.get(name) == [entry["size"], entry["time"]]}
    return {}


def _present(data_dir: Path, name: str, size: int, known: dict) -> Path | None:
    paths = [data_dir / Path(name).name, data_dir / f"{Path(name).name}.zip"]
    return next((path for path in paths if path.name in known or (path.is_file() and not _fault(path, size))), None)


def _fault(path: Path, size: int) -> str:
    """What is wrong with a file, "" if nothing; size: bytes by the listing, packed or unpacked, 0 unknown."""
    try:
        sizes, broken = [path.stat().st_size], "not a zip file" if path.suffix == ".zip" else ""
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                sizes.append(sum(member.file_size for member in archive.infolist()))
                broken = archive.testzip()
    except BROKEN as error:
        broken = str(error)
    if broken:
        return f"is broken: {broken}"
    return "" if size in (0, *sizes) else f"has {sizes[0]} bytes, not {size}"


def _fetch(api: Any, data_dir: Path, name: str, size: int, bar: tqdm) -> Path:
    """Download into a file of its own, where a killed download goes on; verified before it is renamed."""
    part = _part(data_dir, name)
    ask(name, _receive, api, part, name, size, bar, grown=lambda: _length(part))
    final = part.name + ".zip" * (zipfile.is_zipfile(part) and part.suffix != ".zip")
    _tag(part).unlink(missing_ok=True)
    return part.replace(data_dir / final)


def _receive(api: Any, part: Path, name: str, size: int, bar: tqdm) -> None:
    """Ask once for what is missing; ValueError where the whole file is not there yet, broken pieces being dropped."""
    had = _length(part) if _tag(part).exists() else 0
    checkable = size or zipfile.is_zipfile(part)  # else half a table would look like a whole one
    fault = _fault(part, size) if had and checkable else "has to come"
    if fault:
        _append(api, part, name, had * bool(checkable), bar)
        fault = _fault(part, size)
    if fault:
        if not had < _length(part) < size:  # else the line ended early, and what has come may be sound
            bar.update(-_length(part))
            part.unlink()
        raise ValueError(f"what arrived {fault}")


def _append(api: Any, part: Path, name: str, had: int, bar: tqdm) -> None:
    """One request, each with a freshly signed address: bytes go behind the `had` ones or in place of them."""
    headers = {"Accept-Encoding": "identity"}  # packed on the way, a file could not go on in its middle
    if had:
        headers |= {"Range": f"bytes={had}-", "If-Range": _tag(part).read_text()}
    with tamed(**headers):
        response = call(api, "competitions", "download_data_file", competition_name=COMPETITION, file_name=name)
    with response:
        first = _offset(response, had, part)
        bar.update(first - _length(part))
        with part.open("r+b" if first else "wb") as file:
            file.seek(first)
            for piece in response.iter_content(PIECE):
                bar.update(file.write(piece))


def _offset(response: requests.Response, had: int, part: Path) -> int:
    """Where in the file this answer begins, 0 or `had`; ValueError where it is a page or another piece.

    Notes the mark of the server's version of the file, by which it is asked for the rest of the same one.
    """
    kind = response.headers.get("Content-Type", "")
    if any(page in kind for page in ("html", "json", "xml")):
        raise ValueError(f"a page arrived instead of the file ({kind})")
    mark = response.headers.get("ETag", "W/")
    mark = response.headers.get("Last-Modified", "") if mark.startswith("W/") else mark
    if response.status_code != 206:
        _tag(part).write_text(mark) if mark else _tag(part).unlink(missing_ok=True)
        return 0
    if mark != _tag(part).read_text() or not response.headers.get("Content-Range", "").startswith(f"bytes {had}-"):
        _tag(part).unlink()  # so that the next try starts at 0
        raise ValueError("another piece arrived than was asked for")
    return had


def _part(data_dir: Path, name: str) -> Path:
    return data_dir / ".download" / Path(name).name


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


class Upload:
    """A file on its way to Kaggle's storage, noted in a file beside it, so that a killed upload goes on.

    `mark` names the upload in what is made of it, so that a lost answer can be looked up.
    """

    def __init__(self, path: Path):
        self.path, self.note = path, path.with_name(f".{path.name}.upload")
        self.stamp = [list(entry) for entry in stamp(path)]
        known = read_json(self.note) if self.note.exists() else {}
        self.resumed = known.get("stamp") == self.stamp
        self.facts = known if self.resumed else {"stamp": self.stamp, "mark": secrets.token_hex(4)}
        self.cut, self.arrived = self.resumed, 0

    @property
    def mark(self) -> str:
        """Eight hex digits, the same after a restart."""
        return self.facts["mark"]

    def send(self, start: Callable[[], tuple[str, str]]) -> str:
        """Bring every byte there; returns the token that stands for the file. start: asks for (token, address)."""
        what = f"Upload of {self.path}"
        for again in (False, True):
            if "token" not in self.facts:
                self.facts |= dict(zip(("token", "address"), start(), strict=True))
                self.save()
            if ask(what, self._put, grown=lambda: self.arrived):
                return self.facts["token"]
            if not again:
                print(f"{what} cannot go on where it was cut: once more, in full")
            del self.facts["token"]
            self.cut, self.arrived = False, 0
        raise UserError(f"{what}: the line to Kaggle's storage breaks again and again. Start again later.")

    def save(self) -> None:
        """Note what has been agreed on; only the owner can read it."""
        with atomic(self.note) as file:
            file.write(json.dumps(self.facts).encode())
        self.note.chmod(0o600)

    def done(self) -> None:
        """Forget it."""
        self.note.unlink(missing_ok=True)

    def _put(self) -> bool:
        """One try from where the storage has it; False where it does not say where that is."""
        size = self.path.stat().st_size
        if self.cut:
            where = self._where(size)
            if where is None:
                return False
            self.arrived = where
        self.cut = True
        first, headers = self.arrived, {}
        if first == size:
            return True
        if first:
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        with self.path.open("rb") as file, progress(None, "uploading", "B", total=size, initial=first) as bar:
            file.seek(first)
            response = requests.put(self.facts["address"], data=CallbackIOWrapper(bar.update, file), headers=headers)
        return self._taken(response)

    def _where(self, size: int) -> int | None:
        """Bytes that the storage has; None where it does not say."""
        headers = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
        response = requests.put(self.facts["address"], headers=headers)
        if response.status_code in (200, 201):
            return size
        if response.status_code == 308:
            last = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
            return int(last[1]) + 1 if last else 0
        if response.status_code == 429 or response.status_code >= 500:
            response.raise_for_status()
        return None

    def _taken(self, response: requests.Response) -> bool:
        status = response.status_code
        if status in (200, 201):
            return True
        if status in (408, 429) or status >= 500:
            response.raise_for_status()
        if status == 308:
            raise requests.ConnectionError("not all has arrived")
        self.done()
        raise UserError(f"Upload of {self.path}: Kaggle's storage refused it ({status}). Start again later.")
