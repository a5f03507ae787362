"""Reading images and masks, from folders or straight from the competition's zips."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from carvana import rle
from carvana.errors import UserError
from carvana.files import UNREADABLE
from carvana.grid import Grid, pad, resize
from carvana.parallel import overlapped

Size = tuple[int, int]  # height and width


class Archive:
    """The files of a folder or of a zip, by their bare names. Cheap to copy into worker processes."""

    def __init__(self, path: str | Path, suffix: str):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist. Give a folder or a zip with {suffix} files.")
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        members = self._zip().namelist() if self.path.is_file() else [file.name for file in self.path.iterdir()]
        by_name = {Path(member).name: member for member in sorted(members) if member.lower().endswith(suffix)}
        self.members = {name: member for name, member in by_name.items() if not name.startswith(".")}
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
            with self._zip().open(self.members[name]) as member:
                return member.read(size)
        except UNREADABLE as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error}). Download it again.") from error

    def _zip(self) -> zipfile.ZipFile:
        """One handle a process: forked workers that shared one would move each other's position in the file."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except UNREADABLE as error:
                raise UserError(f"{self.path} is not a whole zip ({error}). Download it again.") from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process opens the zip itself."""
        return self.__dict__ | {"_opened": None}

    def stamp(self, names: Iterable[str]) -> list[Any]:
        """Name, size and CRC-32 of these files: what changes when contents change, and only then, wherever they lie."""
        if self.path.is_file():
            infos = {info.filename: info for info in self._zip().infolist()}
            return [[name, infos[self.members[name]].file_size, infos[self.members[name]].CRC] for name in names]
        return list(overlapped(self._sum, ((name,) for name in names)))

    def _sum(self, name: str) -> list[Any]:
        data = self.read(name)
        return [name, len(data), zlib.crc32(data)]


def image_size(images: Archive, name: str) -> Size:
    """Height and width of a JPEG, from its header."""
    for length in (1 << 16, -1):
        try:
            height, width = simplejpeg.decode_jpeg_header(images.read(name, length))[:2]
            return height, width
        except ValueError as error:
            reason = error
    raise _undecodable(images, name, reason)


def _undecodable(images: Archive, name: str, error: Exception) -> UserError:
    return UserError(f"{images.path}: image {name} cannot be decoded ({error}). Replace it or exclude it.")


def read_image(images: Archive, name: str, height: int, width: int) -> tuple[np.ndarray, Size]:
    """An image as `at_size` returns it; UserError with its name where it cannot be decoded."""
    try:
        return at_size(images.read(name), height, width)
    except ValueError as error:
        raise _undecodable(images, name, error) from error


def at_size(image: bytes | np.ndarray, height: int, width: int) -> tuple[np.ndarray, Size]:
    """An image on the network's grid, (height, width, 3) uint8 RGB, and its full height and width.

    image: (H, W, 3) uint8 RGB, or the bytes of a JPEG, of which natural sizes are decoded at that scale by the JPEG
    library itself, which averages k x k pixels on the padded grid. ValueError where it is neither.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"it is an array {image.shape} of {image.dtype}")
        full_height, full_width = image.shape[:2]
        return Grid(full_height, full_width, height, width).reduce(image), (full_height, full_width)
    full_height, full_width = simplejpeg.decode_jpeg_header(image)[:2]
    grid = Grid(full_height, full_width, height, width)
    scale = grid.factor or _exact_scale(grid)
    least = -(-full_height // scale), -(-full_width // scale)
    decoded = simplejpeg.decode_jpeg(image, min_height=least[0], min_width=least[1])
    return pad(decoded, height, width) if grid.factor else resize(decoded, height, width), (full_height, full_width)


def _exact_scale(grid: Grid) -> int:
    """The smallest JPEG scale that divides the image evenly and leaves it no smaller than the network."""
    for k in (8, 4, 2):
        even = grid.full_height % k == 0 and grid.full_width % k == 0
        if even and grid.full_height >= k * grid.height and grid.full_width >= k * grid.width:
            return k
    return 1


def read_full_image(images: Archive, name: str) -> np.ndarray:
    """An image at its own size, (H, W, 3) uint8 RGB."""
    return read_image(images, name, *image_size(images, name))[0]


def mask_of(sample: Any) -> np.ndarray:
    """The mask (H, W) bool of a row of `Competition.samples`: anything with rle, height and width."""
    return rle.decode(sample.rle, sample.height, sample.width)


def gif_name(name: str) -> str:
    """File name of the GIF mask of an image."""
    return f"{Path(name).stem}_mask.gif"


def gif_mask(gifs: Archive, name: str) -> np.ndarray:
    """Mask of the image `name` from its GIF, (H, W) bool."""
    try:
        return np.asarray(Image.open(io.BytesIO(gifs.read(gif_name(name)))).convert("L")) > 0
    except OSError as error:
        raise UserError(f"{gifs.path}: mask {gif_name(name)} cannot be decoded ({error}). Replace it.") from error


def check_gif_size(gifs: Archive, name: str, size: Size) -> None:
    """UserError where the GIF mask of the image `name` is not of `size`."""
    header = gifs.read(gif_name(name), 10)
    width, height = np.frombuffer(header[6:].ljust(4, b"\0"), "<u2")  # the GIF header's logical screen
    if (height, width) != size:
        sizes = f"{width}x{height}, its image {size[1]}x{size[0]}"
        raise UserError(f"{gifs.path}: mask {gif_name(name)} is {sizes}. Replace one of them.")
