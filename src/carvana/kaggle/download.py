"""Files from Kaggle: a download is resumed after any cut or kill, verified, and only then gets its name.

The client would append an error page to half a file, and hang on a silent line.
"""

import base64
import contextlib
import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from carvana.data.competition import Competition
from carvana.errors import UserError, did_you_mean
from carvana.files import locked, need_space, read_json, sha256, stamp, write_json
from carvana.kaggle.client import COMPETITION, PIECE, call, listed, paced, patched_http, sign_in, with_retries
from carvana.kaggle.credentials import scrub
from carvana.parallel import progress

LONGEST = 1 << 36  # bytes of a file whose size is not listed
TABLES = ("train_masks.zip", "train_masks.csv.zip", "metadata.csv.zip", "sample_submission.csv.zip")


def fetch(competition: Competition) -> None:
    """Download what is missing in a folder that is new or was filled by `download`; verify one that was filled by hand.

    UserError names a broken file.
    """
    if (competition.folder / "download.json").exists() or not competition.has_train_images:
        download(competition.folder, hq=competition.hq)
    else:
        verify(competition.folder)


def download(data_dir: str | Path, files: list[str] | None = None, hq: bool = False) -> list[Path]:
    """Bring the files of the competition into `data_dir` (hq: the images in high quality); returns their paths.

    What is there and sound is kept; what arrives is checked before it gets its name, and listed in `download.json`.
    """
    data_dir, kind = Path(data_dir), "_hq" if hq else ""
    usual = [f"train{kind}.zip", *TABLES, f"test{kind}.zip"]  # but what somebody has unpacked, and then deleted
    unpacked = [] if files else [name for name in usual if (data_dir / name.removesuffix(".zip")).exists()]
    wanted = files or [name for name in usual if name not in unpacked]
    if unpacked:
        print(f"{data_dir}: unpacked, so not fetched: {', '.join(unpacked)}. To have one again: --files NAME")
    if {*wanted} <= {*_manifest(data_dir)}:  # no account is needed to find that nothing is missing
        return [data_dir / name for name in wanted]
    need_space(data_dir)
    api = sign_in()
    sizes = list_files(api)
    names = [_listed(name, sizes) for name in wanted]
    if len({Path(name).name for name in names}) < len({*names}):
        raise UserError(
            f"{data_dir}: two of {', '.join(names)} would get the same name. Give each a folder of its own."
        )
    print("\n".join(f"{'*' if name in names else ' '} {name:28}{size / 1e6:10.1f} MB" for name, size in sizes.items()))
    with locked(data_dir / ".download" / "lock", "a download"):
        return _bring(api, data_dir, {name: sizes[name] for name in names})


def _bring(api: Any, data_dir: Path, sizes: dict[str, int]) -> list[Path]:
    verified, paths = _manifest(data_dir), []
    here = {name: _present(data_dir, name, size, verified) for name, size in sizes.items()}
    missing = {name: sizes[name] for name, path in here.items() if not path}
    arrived = sum(_length(_part(data_dir, name)) for name in missing)
    need_space(data_dir, sum(missing.values()) - arrived)
    with progress(None, "downloading", "B", total=sum(missing.values()), initial=arrived, unit_scale=True) as bar:
        for name in sizes:
            path = here[name] or _fetch(api, data_dir, name, sizes[name], bar)
            paths.append(path)
            if path.name not in verified:
                [(_, size, time)] = stamp(path)
                verified[path.name] = {"name": path.name, "size": size, "time": time, "sha256": sha256(path)}
                write_json(data_dir / "download.json", list(verified.values()))
            bar.write(f"{path}: {'has arrived' if name in missing else 'was there'}, verified")
    return paths


def verify(data_dir: str | Path) -> list[Path]:
    """Read every zip of a folder that was filled by hand, or attached on Kaggle; UserError names a broken one."""
    data_dir = Path(data_dir)
    verified, paths = _manifest(data_dir), sorted(data_dir.glob("*.zip"))
    for path in progress([path for path in paths if path.name not in verified], "verifying", "zips"):
        if fault := _fault(path, 0):
            raise UserError(f"{path} {fault}. Download it again.")
    return paths


def list_files(api: Any) -> dict[str, int]:
    """Name -> bytes of every file of the competition, from all pages of the listing."""
    entries = listed(api, "ListDataFiles", "files", "name")
    return {scrub(entry["name"]): entry.get("totalBytes") or 0 for entry in entries}


def _listed(name: str, sizes: dict[str, int]) -> str:
    """Kaggle has served the same file as NAME and as NAME.zip."""
    for served in (name, f"{name}.zip", name.removesuffix(".zip")):
        if served in sizes:
            return served
    raise UserError(f"{name} is no file of the competition{did_you_mean(name, sizes)} It has {', '.join(sizes)}.")


def _manifest(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Entries of `download.json` whose files have not changed since they were verified."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        entries = {entry["name"]: entry for entry in read_json(data_dir / "download.json")}
        now = {name: size_and_time for name, *size_and_time in stamp(data_dir)}
        return {name: entry for name, entry in entries.items() if now.get(name) == [entry["size"], entry["time"]]}
    return {}


def _present(data_dir: Path, name: str, size: int, verified: dict[str, Any]) -> Path | None:
    paths = [data_dir / Path(name).name, data_dir / f"{Path(name).name}.zip"]
    return next((path for path in paths if path.name in verified or (path.is_file() and not _fault(path, size))), None)


def _fault(path: Path, size: int) -> str:
    """What is wrong with a file, "" if nothing; size: bytes by the listing, packed or unpacked, 0 unknown."""
    try:
        sizes, broken = [path.stat().st_size], "not a zip file" if path.suffix == ".zip" else ""
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                sizes.append(sum(member.file_size for member in archive.infolist()))
                broken = archive.testzip() or ""
    except Exception as error:  # a damaged archive makes zipfile raise whatever its bytes lead to
        broken = str(error) or type(error).__name__
    if broken:
        return f"is broken: {broken}"
    return "" if size in (0, *sizes) else f"has {sizes[0]} bytes, not {size}"


def _fetch(api: Any, data_dir: Path, name: str, size: int, bar: tqdm) -> Path:
    """Download into a file of its own, where a killed download goes on; verified before it is renamed."""
    part = _part(data_dir, name)
    with_retries(name, _receive, api, part, name, size, bar, grown=lambda: _length(part))
    final = part.name + ".zip" * (zipfile.is_zipfile(part) and part.suffix != ".zip")
    _tag(part).unlink(missing_ok=True)
    return part.replace(data_dir / final)


def _receive(api: Any, part: Path, name: str, size: int, bar: tqdm) -> None:
    """Ask once for what is missing; ValueError where the whole file is not there yet, broken pieces being dropped."""
    if not size and not zipfile.is_zipfile(part):  # half a table would look like a whole one
        _tag(part).unlink(missing_ok=True)
    had = _length(part) if _tag(part).exists() else 0
    fault = _fault(part, size) if had else "has to come"
    if fault:
        md5 = _append(api, part, name, size, bar)
        fault = _fault(part, size) or _other_hash(part, "" if size else md5)
    if fault:
        if not had < _length(part) < size:  # else the line ended early, and what has come may be sound
            bar.update(-_length(part))
            part.unlink()
        raise ValueError(f"what arrived {fault}")


def _other_hash(part: Path, md5: str) -> str:
    """What is wrong with a file whose MD5 should be this one, in base64; "" if nothing, or where it is not known."""
    with part.open("rb") as file:
        there = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() if md5 else ""
    return "" if there == md5 else "has another MD5 than Kaggle's storage says"


def _append(api: Any, part: Path, name: str, size: int, bar: tqdm) -> str:
    """One request, each with a freshly signed address: bytes go behind those that are there or in place of them.

    Returns the whole file's MD5 in base64, "" where the storage does not say it.
    """
    had = _length(part) if _tag(part).exists() else 0
    longest = LONGEST if not size else 2 * size + PIECE  # it may come packed, or packed in vain
    headers = {"Accept-Encoding": "identity"}  # packed on the way, a file could not go on in its middle
    if had:
        headers |= {"Range": f"bytes={had}-", "If-Range": _tag(part).read_text()}
    with patched_http(**headers):
        fields = {"competitionName": COMPETITION, "fileName": name}
        try:
            response = call(api, "competitions", "DownloadDataFile", fields, streamed=True)
        except requests.HTTPError as error:
            if error.response.status_code == 416:  # what is here is not the beginning of what is there
                _tag(part).unlink(missing_ok=True)
            raise
    with response:
        first = _offset(response, had, part)
        bar.update(first - _length(part))
        with part.open("r+b" if first else "wb") as file:
            file.seek(first)
            for piece in paced(response, name):
                bar.update(file.write(piece))
                if file.tell() > longest:
                    file.truncate(0)
                    raise ValueError("what arrives does not end")
    said = re.search(r"\bmd5=([\w+/=]+)", response.headers.get("x-goog-hash", ""))
    return said[1] if said and "Content-Encoding" not in response.headers else ""  # it is of the file as it is stored


def _offset(response: requests.Response, had: int, part: Path) -> int:
    """Where in the file this answer begins, 0 or `had`; ValueError where it is a page or another piece.

    Notes the mark of the server's version of the file, by which it is asked for the rest of the same one.
    """
    kind = response.headers.get("Content-Type", "")
    if any(page in kind for page in ("html", "json", "xml")):
        raise ValueError(f"a page arrived instead of the file ({kind})")
    mark = response.headers.get("ETag", "W/")
    mark = response.headers.get("Last-Modified", "") if mark.startswith("W/") else mark
    packed = response.headers.get("Content-Encoding", "identity") != "identity"  # could not go on in its middle
    if response.status_code == 206:
        fits = response.headers.get("Content-Range", "").startswith(f"bytes {had}-") and not packed
        if not fits or (had and mark != _tag(part).read_text()):
            _tag(part).unlink(missing_ok=True)  # so that the next try starts at 0
            raise ValueError("another piece arrived than was asked for")
        if had:
            return had
    _tag(part).write_text(mark) if mark and not packed else _tag(part).unlink(missing_ok=True)
    return 0


def _part(data_dir: Path, name: str) -> Path:
    return data_dir / ".download" / Path(name).name


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
