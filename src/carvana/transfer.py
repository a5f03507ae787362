"""The competition's files from Kaggle into a folder: resumed, verified, and only then under their names."""

import contextlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

from carvana.files import BROKEN, UserError, nearest, need_space, read_json, sha256, stamp, write_json
from carvana.kaggle_api import COMPETITION, ask, client

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
    paths = {name: _present(data_dir, name, sizes[name], known) for name in names}
    need_space(data_dir, sum(sizes[name] for name in names if not paths[name]))
    for name in names:
        what = "is there" if paths[name] else "has arrived"
        path = paths[name] = paths[name] or _fetch(api, data_dir, name, sizes[name])
        print(f"{path} {what}, {path.stat().st_size / 1e6:.1f} MB, verified")
        if path.name not in known:
            known[path.name] = dict(zip(("name", "size", "time"), *stamp(path), strict=True)) | {"sha256": sha256(path)}
            write_json(data_dir / "download.json", list(known.values()))
    return list(paths.values())


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


def _fetch(api: Any, data_dir: Path, name: str, size: int) -> Path:
    """Download into a folder of its own, where a killed download goes on; verified before it is moved."""
    folder = data_dir / ".download" / Path(name).name

    def grown() -> int:
        return sum(file.stat().st_size for file in folder.glob("*"))

    arrived = ask(name, _transfer, api, folder, name, size, grown=grown)
    final = Path(name).name + ".zip" * (zipfile.is_zipfile(arrived) and not name.endswith(".zip"))
    path = arrived.replace(data_dir / final)
    shutil.rmtree(folder)
    return path


def _transfer(api: Any, folder: Path, name: str, size: int) -> Path:
    """One try; ValueError where what arrived is not the file, of which then nothing is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        api.competition_download_file(COMPETITION, name, path=str(folder), quiet=False)
        arrived = next((file for file in folder.iterdir() if file.suffix != ".kaggle-partial"), folder / name)
        if fault := _fault(arrived, size):
            raise ValueError(f"what arrived {fault}")
    except ValueError:
        shutil.rmtree(folder)
        raise
    return arrived
