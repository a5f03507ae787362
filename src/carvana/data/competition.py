"""The competition's files: training images with their masks, the test set, and the lists that name them."""

import csv
import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from carvana import rle
from carvana.data.images import Archive, Size, check_gif_size, gif_mask, gif_name, image_size, mask_of
from carvana.errors import UserError, did_you_mean
from carvana.files import optional_path, resolve
from carvana.parallel import progress


@dataclass(frozen=True)
class TestSet:
    """Images to predict, and the names that a submission must hold, in order."""

    __test__ = False  # no test of pytest's

    images: Archive
    names: list[str]

    @property
    def size(self) -> Size:
        """Height and width of the first image."""
        return image_size(self.images, self.names[0])


class Competition:
    """The files of the competition in `data_dir`, unpacked or as zips.

    hq: take the _hq images. exclude: a file that names training images to leave out, as `excluded_names` reads it; ""
    for none. Nothing is read before it is asked for.
    """

    def __init__(self, data_dir: str | Path, hq: bool = False, exclude: str | Path = ""):
        self.folder, self.hq, self.exclude = resolve(data_dir), hq, optional_path(exclude)

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
        return self._path(self._images_name("train")) is not None

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
        metadata = self._table("metadata")
        if metadata is None or not {"id", "make"} <= set(metadata):
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
        none, or where it does not name just the images of `test_dir`. UserError where the competition's test images,
        or a sample given by hand, do not fit together.
        """
        images = Archive(resolve(test_dir), ".jpg") if test_dir else self._archive(self._images_name("test"), ".jpg")
        path = optional_path(sample)
        if path and not path.exists():
            raise UserError(f"sample {path} does not exist. Give a csv with the names wanted in its column img.")
        rows = _read_table(path) if path else self._table("sample_submission")
        if rows is not None and "img" not in rows:
            table = path or self.folder / "sample_submission.csv"
            raise UserError(f"sample {table} has no column img. Give a csv that has.")
        names = [] if rows is None else rows["img"].tolist()
        missing = [name for name in names if name not in images.members]
        elsewhere = images.path.parent != self.folder
        if not names or (missing and elsewhere and not sample) or len(missing) == len(names):
            return TestSet(images, images.names)
        if missing:
            share = f"{len(missing)} of {len(names)} images that the sample names"
            raise UserError(f"{images.path} lacks {share}, first {missing[0]}. Download the test set again.")
        return TestSet(images, names)

    def _images_name(self, split: str) -> str:
        return f"{split}_hq" if self.hq else split

    def _path(self, name: str) -> Path | None:
        """The folder or file `name`, or its zip, whichever is there."""
        return next((path for path in (self.folder / name, self.folder / f"{name}.zip") if path.exists()), None)

    def _archive(self, name: str, suffix: str) -> Archive:
        if not self.folder.is_dir():
            raise UserError(f"data_dir {self.folder} does not exist. Run 01_download, or give the folder of the data.")
        if path := self._path(name):
            return Archive(path, suffix)
        raise UserError(f"data_dir {self.folder} holds neither {name}/ nor {name}.zip. Run 01_download, or unpack it.")

    def _table(self, name: str) -> pd.DataFrame | None:
        """`name`.csv, also from its zip, all columns as text; None where there is none."""
        path = self._path(f"{name}.csv")
        return _read_table(path) if path else None

    def _masks(self, sizes: dict[str, Size]) -> dict[str, str]:
        """Run lengths by image."""
        table = self._table("train_masks")
        if table is not None and not {"img", "rle_mask"} <= set(table):
            columns = "train_masks.csv must have the columns img, rle_mask"
            raise UserError(f"data_dir {self.folder}: {columns}. Download it again.")
        gifs = self._archive("train_masks", ".gif") if self._path("train_masks") else None
        if table is not None:
            masks, place = dict(zip(table["img"], table["rle_mask"], strict=True)), "train_masks.csv"
            missing = [name for name in sizes if name not in masks]
        elif gifs:
            masks, place = {}, str(gifs.path)
            missing = [name for name in sizes if gif_name(name) not in gifs.members]
        else:
            raise UserError(f"data_dir {self.folder} holds no train_masks.csv and no train_masks. Run 01_download.")
        if missing:
            raise UserError(f"{len(missing)} of {len(sizes)} images have no mask in {place}, first {missing[0]}.")
        for name in sizes if gifs else ():
            if gif_name(name) in gifs.members:
                check_gif_size(gifs, name, sizes[name])
        return masks or {name: rle.encode(gif_mask(gifs, name)) for name in progress(sizes, "reading masks")}

    def _area(self, sample) -> float:
        try:
            return float(mask_of(sample).mean())
        except ValueError as error:
            place = f"its image in {self.train_images.path}"
            raise UserError(f"mask of {sample.img} does not fit {place}: {error}.") from error


def _read_table(path: Path) -> pd.DataFrame:
    try:
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            packed = Archive(path, ".csv")
            data = packed.read(packed.names[0])
        return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a table: {error}. Download it again.") from error


def excluded_names(path: Path | None, images: Archive) -> set[str]:
    """Names in an exclude list; UserError where it names an image that is not there.

    A table with the columns img and exclude, such as a run's quality.csv, names the images with a mark in `exclude`.
    """
    if not path:
        return set()
    if not path.is_file():
        raise UserError(f"exclude {path} does not exist. Give a file with an image's name in each line.")
    lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets may put a mark of their own in front
    rows = list(csv.DictReader(lines))
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
    if not car or not view.isdigit():
        raise UserError(f"image {name} is not named CAR_VIEW.jpg, so it has no car to put into a fold. Rename it.")
    return car, int(view)
