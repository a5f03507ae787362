"""The competition's files: training images with their masks, the test set, and the lists that name them."""

import contextlib
import csv
import io
import shlex
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from carvana import rle
from carvana.data.images import Archive, Size, check_gif_size, gif_mask, gif_name, image_size
from carvana.errors import UserError, did_you_mean
from carvana.files import optional_path, resolve
from carvana.parallel import progress

MOUNTS = Path("/kaggle/input")  # where Kaggle's notebooks find data, today in competitions/ and datasets/ below it


@dataclass(frozen=True)
class TestSet:
    """Images to predict, and the names that a submission must hold, in order."""

    __test__ = False  # no test of pytest's

    images: Archive
    names: list[str]

    def size_of(self, name: str) -> Size:
        """Height and width of an image; (0, 0) of one that is not there or cannot be decoded."""
        try:
            return image_size(self.images, name)
        except (KeyError, UserError):
            return 0, 0


class Competition:
    """The files of the competition in `data_dir`, unpacked or as zips.

    hq: take the _hq images. exclude: a file that names training images to leave out, as `excluded_names` reads it; ""
    for none. Nothing is read before it is asked for.
    """

    def __init__(self, data_dir: str | Path, hq: bool = False, exclude: str | Path = ""):
        self.folder, self.hq, self.exclude = resolve(data_dir), hq, optional_path(exclude)
        if self.folder.parent == MOUNTS and not self.folder.exists():
            self.folder = next(MOUNTS.glob(f"*/{self.folder.name}"), self.folder)

    @property
    def parameters(self) -> dict[str, str | bool]:
        """The parameters that open it again from anywhere."""
        return {"data_dir": str(self.folder), "hq": self.hq, "exclude": str(self.exclude or "")}

    @property
    def training_files(self) -> list[Path]:
        """The places that a training reads, there or not."""
        return [self.folder, *(self.folder / name for name in ("train", "train_hq", "train_masks"))]

    @property
    def test_files(self) -> list[Path]:
        """The places of the competition's own test set, there or not."""
        return [self.folder, self.folder / "test", self.folder / "test_hq"]

    @property
    def has_train_images(self) -> bool:
        """Whether a folder or zip of training images is there."""
        return self.place("train").exists()

    def place(self, split: str) -> Path:
        """The folder or zip of the images of "train" or "test"; where neither is there, the zip."""
        name = self._images_name(split)
        return self._path(name) or self.folder / f"{name}.zip"

    @cached_property
    def train_images(self) -> Archive:
        """The training JPEGs."""
        return self._archive(self._images_name("train"), ".jpg")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row a training image: img, car, view, height, width, rle, area (share of the image), sorted by img.

        Masks come from train_masks.csv, or from the GIFs where there is no csv. UserError for an image without a mask,
        a name that is not CAR_VIEW.jpg, or a mask of another size.
        """
        excluded = excluded_names(self.exclude, self.train_images)
        names = [name for name in self.train_images.names if name not in excluded]
        if not names:
            raise UserError(f"exclude {self.exclude} names every image of {self.train_images.path}. Leave some.")
        sizes = {name: image_size(self.train_images, name) for name in names}
        masks = self._masks(sizes)
        samples = pd.DataFrame([(name, *sizes[name]) for name in names], columns=["img", "height", "width"])
        samples["car"], samples["view"] = zip(*map(car_and_view, names), strict=True)
        samples["rle"] = [masks[name] for name in names]
        samples["area"] = [self._area(sample) for sample in samples.itertuples()]
        return samples

    @property
    def makes(self) -> pd.Series:
        """Make by car, of the cars with samples whose make metadata.csv names."""
        path = self._path("metadata.csv")
        metadata = _read_table(path) if path else pd.DataFrame()
        if not {"id", "make"} <= set(metadata):
            return pd.Series(dtype=str)
        makes = metadata.drop_duplicates("id").set_index("id")["make"].str.strip()
        return makes[makes.index.isin(self.samples["car"]) & makes.ne("")]

    @property
    def truth(self) -> Path | None:
        """The file of true test masks, which only the demo and folders of one's own have."""
        path = self.folder / "truth.csv"
        return path if path.exists() else None

    def test(self, test_dir: str | Path = "", sample: str | Path = "") -> TestSet:
        """The images to predict: those of `test_dir` (a folder or zip), by default the competition's own.

        Names are those of the csv `sample`, by default of sample_submission.csv. All images by name where there is
        none, or where it was not given and does not name just the images of `test_dir`. UserError where a name has no
        image (an extension in other case is another name).
        """
        usual = self._images_name("test")
        images = Archive(resolve(test_dir), ".jpg") if test_dir else self._archive(usual, ".jpg")
        path = optional_path(sample) or self._path("sample_submission.csv")
        if not path:
            return TestSet(images, images.names)
        names = _read_table(path, "img")["img"].tolist()
        if not sample and images.path != self._path(usual) and set(names) != set(images.names):
            return TestSet(images, images.names)
        if missing := [name for name in names if name not in images.members]:
            near = {name.lower(): name for name in images.names}.get(missing[0].lower())
            hint = f", which is {near} there" if near else ""
            share = f"{len(missing)} of {len(names)} images that {path} names, first {missing[0]}{hint}"
            raise UserError(f"{images.path} lacks {share}. Give the sample of these images, or download them again.")
        return TestSet(images, names)

    def _images_name(self, split: str) -> str:
        return f"{split}_hq" if self.hq else split

    def _path(self, name: str) -> Path | None:
        """The folder or file `name`, or its zip, whichever is there."""
        return next((path for path in (self.folder / name, self.folder / f"{name}.zip") if path.exists()), None)

    def _archive(self, name: str, suffix: str) -> Archive:
        if not self.folder.is_dir():
            raise UserError(f"data_dir {self.folder} does not exist. Run 01_download, or give the folder of the data.")
        path, packed = self._path(name), self.folder / f"{name}.zip"
        if not path:
            if not self.has_train_images or (self.folder / "demo.json").exists():
                advice = "Run 01_download, as with the profile that made it."
            else:
                own = "; for images of your own give test_dir" if name.startswith("test") else ""
                command = f"carvana download --data-dir {shlex.quote(str(self.folder))} --files {packed.name}"
                advice = f"Fetch Carvana's: {command}{own}."
            raise UserError(f"data_dir {self.folder} holds neither {name}/ nor {packed.name}. {advice}")
        files, whole = Archive(path, suffix), {}
        if path != packed and packed.exists():
            with contextlib.suppress(UserError):  # a broken zip says nothing of the folder
                whole = Archive(packed, suffix).members
        if missing := [name for name in whole if name not in files.members]:
            share = f"{len(missing)} of the {len(whole)} files of {packed.name}, first {missing[0]}"
            raise UserError(f"{path} lacks {share}: it was not unpacked whole. Unpack it again, or delete one of them.")
        return files

    def _masks(self, sizes: dict[str, Size]) -> dict[str, str]:
        """Run lengths by image."""
        if table := self._path("train_masks.csv"):
            if self._path("train_masks"):
                self._gifs(sizes)
            rows = _read_table(table, "img", "rle_mask")
            masks = dict(zip(rows["img"], rows["rle_mask"], strict=True))
            self._check_pairs(sizes, masks, str, table)
            return masks
        gifs = self._gifs(sizes)
        self._check_pairs(sizes, gifs.members, gif_name, gifs.path)
        return {name: rle.encode(gif_mask(gifs, name)) for name in progress(sizes, "reading masks")}

    def _gifs(self, sizes: dict[str, Size]) -> Archive:
        """The GIF masks, those that are there of the size of their images."""
        gifs = self._archive("train_masks", ".gif")
        for name in (name for name in sizes if gif_name(name) in gifs.members):
            check_gif_size(gifs, name, sizes[name])
        return gifs

    def _check_pairs(
        self, images: Iterable[str], masks: Iterable[str], mask_of_image: Callable[[str], str], place: Path
    ) -> None:  # fmt: skip
        masks = set(masks)
        if missing := [name for name in images if mask_of_image(name) not in masks]:
            share = f"{len(missing)} of {len(list(images))} images"
            raise UserError(f"{share} have no mask in {place.name}, first {missing[0]}. Exclude them, or add masks.")
        if spare := sorted(masks - {mask_of_image(name) for name in self.train_images.names}):
            share = f"{len(spare)} of {len(masks)} masks in {place.name} have no image in {self.train_images.path}"
            print(f"{share}, first {spare[0]}: what follows is of a part of the images.")  # perhaps just what is wanted

    def _area(self, sample: Any) -> float:
        try:
            return rle.area(sample.rle, sample.height, sample.width) / (sample.height * sample.width)
        except ValueError as error:
            place = f"its image in {self.train_images.path}"
            raise UserError(f"mask of {sample.img} does not fit {place}: {error}.") from error


def _read_table(path: Path, *columns: str) -> pd.DataFrame:
    """A csv, also in a zip, all columns as text; UserError where it is damaged.

    Of a table that must have `columns`, the first one holds each name once.
    """
    try:
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            packed = Archive(path, ".csv")
            data = packed.read(packed.names[0])
        table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("rows have more columns than the header")
        if lacking := [name for name in columns if name not in table]:
            raise ValueError(f"it has no column {lacking[0]}")
        if columns and (table.empty or table[columns[0]].duplicated().any()):
            raise ValueError(f"a name in {columns[0]} stands there twice" if len(table) else "it has no rows")
        return table
    except (OSError, ValueError) as error:
        kind = f"a table of {', '.join(columns)}" if columns else "a table"
        reason = f"{path} is not {kind}: {' '.join(str(error).split())}"
        raise UserError(f"{reason}. Correct it or download it.") from error


def excluded_names(path: Path | None, images: Archive) -> set[str]:
    """Names in an exclude list; UserError where it names an image that is not there.

    A table with the columns img and exclude, such as a run's quality.csv, names the images with a mark in `exclude`.
    """
    if not path:
        return set()
    if not path.is_file():
        raise UserError(f"exclude {path} does not exist. Give a file with an image's name in each line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets may put a mark of their own in front
        rows = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"exclude {path} cannot be read: {error}. Give an image's name in each line.") from error
    if rows and {"img", "exclude"} <= set(rows[0]):
        lines = [row["img"] for row in rows if (row["exclude"] or "").strip()]
    names = {line.split(",")[0].strip() for line in lines} - {"", "img"}
    unknown = sorted(names - set(images.names))
    if unknown:
        hint = did_you_mean(unknown[0], images.names)
        raise UserError(f"exclude {path} names {unknown[0]}, which is not in {images.path}{hint}")
    return names


def car_and_view(name: str) -> tuple[str, int]:
    """Car and view (1 to 16) of a file name like 00087a6bd4dc_01.jpg."""
    car, _, view = name.partition(".")[0].rpartition("_")
    if not car or not view.isdecimal():
        raise UserError(f"image {name} is not named CAR_VIEW.jpg, so it has no car to put into a fold. Rename it.")
    return car, int(view)
