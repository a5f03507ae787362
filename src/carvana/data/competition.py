"""Where photographs and masks are, and reading them at a size; from folders or straight from the competition's zips."""

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import simplejpeg
from PIL import Image

from carvana import rle
from carvana.files import BROKEN, UserError, nearest, progress
from carvana.grid import Grid, pad, resize


class Archive:
    """The files of a folder or of a zip, by their bare names. Cheap to copy into worker processes."""

    def __init__(self, path: str | Path, suffix: str):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist. Give a folder or a zip with {suffix} files.")
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        members = self._zip().namelist() if self.path.is_file() else [file.name for file in self.path.iterdir()]
        names = {Path(member).name: member for member in sorted(members) if member.lower().endswith(suffix)}
        self.members = {name: member for name, member in names.items() if not name.startswith(".")}
        if not self.members:
            raise UserError(f"{self.path} holds no {suffix} files. Is it the right folder, and was it unpacked whole?")

    @property
    def names(self) -> list[str]:
        """Bare file names, sorted."""
        return sorted(self.members)

    def read(self, name: str, size: int = -1) -> bytes:
        """The first `size` bytes of a file, all by default."""
        try:
            if self.path.is_dir():
                with (self.path / self.members[name]).open("rb") as file:
                    return file.read(size)
            with self._zip().open(self.members[name]) as file:
                return file.read(size)
        except BROKEN as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error}). Download it again.") from error

    def _zip(self) -> zipfile.ZipFile:
        """One handle a process: forked workers that shared one would move each other's position in the file."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except BROKEN as error:
                raise UserError(f"{self.path} is not a whole zip ({error}). Download it again.") from error
        return self._opened[1]

    def __getstate__(self) -> dict:
        """A copy for another process opens the zip itself."""
        return self.__dict__ | {"_opened": None}

    def stamp(self) -> list:
        """What changes when the files change, wherever they lie: size of the zip, or names and sizes of the folder."""
        if self.path.is_file():
            return [self.path.stat().st_size]
        return [[name, (self.path / name).stat().st_size] for name in self.names]


def photographs(data_dir: Path, part: str, hq: bool = False) -> Archive:
    """The JPEGs of `part` ("train" or "test") in a folder or zip of the competition's name."""
    return _archive(data_dir, _folder_name(part, hq), ".jpg")


def has_photographs(data_dir: Path, part: str, hq: bool = False) -> bool:
    """Whether a folder or zip of photographs is there."""
    return _found(data_dir, _folder_name(part, hq)) is not None


def _folder_name(part: str, hq: bool) -> str:
    return f"{part}_hq" if hq else part


def _found(data_dir: Path, name: str) -> Path | None:
    """The folder `name`, or its zip, whichever is there."""
    return next((path for path in (data_dir / name, data_dir / f"{name}.zip") if path.exists()), None)


def _archive(data_dir: Path, name: str, suffix: str) -> Archive:
    if not data_dir.is_dir():
        raise UserError(f"data_dir {data_dir} does not exist. Run 01_download, or give the folder that holds the data.")
    if path := _found(data_dir, name):
        return Archive(path, suffix)
    raise UserError(f"data_dir {data_dir} holds neither {name}/ nor {name}.zip. Run 01_download, or unpack them there.")


def table(data_dir: Path, name: str) -> pd.DataFrame | None:
    """`name`.csv, also from its zip, all columns as text; None where there is none."""
    path = _found(data_dir, f"{name}.csv")
    return _read_table(path) if path else None


def _read_table(path: Path) -> pd.DataFrame:
    try:
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            packed = Archive(path, ".csv")
            data = packed.read(packed.names[0])
        return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a table: {error}. Download it again.") from error


def rows_wanted(data_dir: Path, tests: Archive, sample: Path | None = None) -> list[str]:
    """Names that a submission must have, in order: those of `sample`, by default data_dir's sample_submission.csv.

    All of `tests` by name where there is no sample, or where it does not name just the pictures of a folder of the
    user's own. UserError where data_dir's test pictures, or a sample given by hand, do not fit together.
    """
    if sample and not sample.exists():
        raise UserError(f"sample {sample} does not exist. Give a csv with the names wanted in its column img.")
    own = tests.path.parent != data_dir
    rows = _read_table(sample) if sample else table(data_dir, "sample_submission")
    if rows is not None and "img" not in rows:
        raise UserError(
            f"sample {sample or data_dir / 'sample_submission.csv'} has no column img. Give a csv that has."
        )
    wanted = [] if rows is None else rows["img"].tolist()
    missing = [name for name in wanted if name not in tests.members]
    if not wanted or (missing and own and not sample) or len(missing) == len(wanted):
        return tests.names
    if missing:
        of = f"{len(missing)} of {len(wanted)} photographs that the sample names"
        raise UserError(f"{tests.path} lacks {of}, first {missing[0]}. Download the test set again.")
    return wanted


def size(photos: Archive, name: str) -> tuple[int, int]:
    """Height and width of a JPEG, from its header."""
    for length in (1 << 16, -1):
        try:
            return simplejpeg.decode_jpeg_header(photos.read(name, length))[:2]
        except ValueError as error:
            reason = error
    raise _unreadable(photos, name, reason)


def _unreadable(photos: Archive, name: str, error: Exception) -> UserError:
    return UserError(f"{photos.path}: photograph {name} cannot be decoded ({error}). Replace it or exclude it.")


def picture(photos: Archive, name: str, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A photograph on the network's grid, (height, width, 3) uint8 RGB, and its full height and width.

    Natural sizes are decoded at that scale by the JPEG library itself, which averages k x k pixels on the padded grid.
    """
    data = photos.read(name)
    try:
        full_height, full_width = simplejpeg.decode_jpeg_header(data)[:2]
        grid = Grid(full_height, full_width, height, width)
        scale = grid.factor or _exact_scale(grid)
        least = -(-full_height // scale), -(-full_width // scale)
        image = simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1])
    except ValueError as error:
        raise _unreadable(photos, name, error) from error
    image = pad(image, height, width) if grid.factor else resize(image, height, width)
    return image, (full_height, full_width)


def _exact_scale(grid: Grid) -> int:
    """The smallest JPEG scale that divides the picture evenly and leaves it no smaller than the network."""
    for k in (8, 4, 2):
        even = grid.full_height % k == 0 and grid.full_width % k == 0
        if even and grid.full_height >= k * grid.height and grid.full_width >= k * grid.width:
            return k
    return 1


def full_picture(photos: Archive, name: str) -> np.ndarray:
    """A photograph at its own size, (H, W, 3) uint8 RGB."""
    return picture(photos, name, *size(photos, name))[0]


def index(data_dir: Path, hq: bool = False, exclude: Path | None = None) -> pd.DataFrame:
    """The training pictures: img, car, view, height, width, rle, area (share of the picture), sorted by name.

    Masks come from train_masks.csv, or from the GIFs where there is no csv. UserError for a picture without a mask, a
    name that is not CAR_VIEW.jpg, or a mask of another size. `exclude` is a list as `excluded` reads it.
    """
    photos = photographs(data_dir, "train", hq)
    left_out = excluded(exclude, photos)
    names = [name for name in photos.names if name not in left_out]
    if not names:
        raise UserError(f"exclude {exclude} names every picture of {photos.path}. Leave some to train on.")
    sizes = [size(photos, name) for name in names]
    masks = _masks(data_dir, names, dict(zip(names, sizes, strict=True)))
    pictures = pd.DataFrame({"img": names, "height": [s[0] for s in sizes], "width": [s[1] for s in sizes]})
    pictures["car"], pictures["view"] = zip(*map(car_and_view, names), strict=True)
    pictures["rle"] = [masks[name] for name in names]
    pictures["area"] = [_area(photos.path, row) for row in pictures.itertuples()]
    return pictures


def excluded(path: Path | None, photos: Archive) -> set[str]:
    """Names in an exclude list; UserError where it names a picture that is not there.

    A table with the columns img and exclude, such as a run's quality.csv, names the pictures with a mark in `exclude`.
    """
    if not path:
        return set()
    if not path.is_file():
        raise UserError(f"exclude {path} does not exist. Give a file with a picture's name in each line.")
    lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets may put a mark of their own in front
    rows = list(csv.DictReader(lines))
    if rows and {"img", "exclude"} <= set(rows[0]):
        lines = [row["img"] for row in rows if (row["exclude"] or "").strip()]
    names = {line.split(",")[0].strip() for line in lines} - {"", "img"}
    unknown = sorted(names - set(photos.names))
    if unknown:
        hint = nearest(unknown[0], photos.names)
        raise UserError(f"exclude {path} names {unknown[0]}, which is not in {photos.path}{hint}")
    return names


def car_and_view(name: str) -> tuple[str, int]:
    """Car and view (1 to 16) of a file name like 00087a6bd4dc_01.jpg."""
    car, _, view = name.partition(".")[0].rpartition("_")
    if not car or not view.isdigit():
        raise UserError(f"photograph {name} is not named CAR_VIEW.jpg, so it has no car to put into a fold. Rename it.")
    return car, int(view)


def _masks(data_dir: Path, names: list[str], sizes: dict[str, tuple[int, int]]) -> dict[str, str]:
    listed = table(data_dir, "train_masks")
    if listed is not None and not {"img", "rle_mask"} <= set(listed):
        raise UserError(f"data_dir {data_dir}: train_masks.csv must have the columns img, rle_mask. Download it again.")
    has_gifs = _found(data_dir, "train_masks") is not None
    if listed is None and not has_gifs:
        raise UserError(f"data_dir {data_dir} holds no train_masks.csv and no train_masks. Run 01_download.")
    gifs = _archive(data_dir, "train_masks", ".gif") if has_gifs else None
    masks = None if listed is None else dict(zip(listed["img"], listed["rle_mask"], strict=True))
    known = masks if masks is not None else {name for name in names if gif_name(name) in gifs.members}
    missing = [name for name in names if name not in known]
    if missing:
        where = "train_masks.csv" if masks is not None else gifs.path
        raise UserError(f"{len(missing)} of {len(names)} pictures have no mask in {where}, first {missing[0]}.")
    for name in names:
        if gifs and gif_name(name) in gifs.members:
            _check_gif_size(gifs, name, sizes[name])
    if masks is None:
        masks = {name: rle.encode(gif_mask(gifs, name)) for name in progress(names, "reading masks")}
    return masks


def gif_name(name: str) -> str:
    """File name of the GIF mask of a photograph."""
    return f"{Path(name).stem}_mask.gif"


def gif_mask(gifs: Archive, name: str) -> np.ndarray:
    """Mask of the photograph `name` from its GIF, (H, W) bool."""
    try:
        return np.asarray(Image.open(io.BytesIO(gifs.read(gif_name(name)))).convert("L")) > 0
    except OSError as error:
        raise UserError(f"{gifs.path}: mask {gif_name(name)} cannot be decoded ({error}). Replace it.") from error


def _check_gif_size(gifs: Archive, name: str, expected: tuple[int, int]) -> None:
    width, height = np.frombuffer(gifs.read(gif_name(name), 10)[6:10], "<u2")  # the GIF header's logical screen
    if (height, width) != expected:
        found, wanted = f"{width}x{height}", f"{expected[1]}x{expected[0]}"
        raise UserError(f"{gifs.path}: mask {gif_name(name)} is {found}, its photograph {wanted}. Replace one of them.")


def _area(path: Path, row) -> float:
    try:
        return float(rle.decode(row.rle, row.height, row.width).mean())
    except ValueError as error:
        raise UserError(f"mask of {row.img} does not fit its photograph in {path}: {error}.") from error
