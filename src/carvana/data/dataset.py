"""Training samples at network size: the uint8 cache, and albumentations with random states that never repeat."""

import os
import random
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from carvana.data.images import Archive, mask_of, read_image
from carvana.errors import UserError
from carvana.files import UNREADABLE, atomic, fingerprint, locked
from carvana.grid import Grid
from carvana.parallel import overlapped, progress

LAYOUT = "image, target"  # of a cached item: another layout is another cache
Key = tuple[int, int]  # of an augmented sample: epoch, and its place among those to learn from
Item = tuple[np.ndarray, np.ndarray]  # image (height, width, 3) uint8 RGB, soft target (height, width) uint8, 255 = car


class DecodedSamples(Dataset[Item]):
    """Images and soft targets read again each time: item i is ((height, width, 3), (height, width)) uint8.

    `key` changes when the images, names, masks or the size change.
    """

    def __init__(self, images: Archive, samples: pd.DataFrame, height: int, width: int):
        self.images, self.height, self.width = images, height, width
        self.samples: list[Any] = list(samples.itertuples())
        names, masks = samples["img"].tolist(), samples["rle"].tolist()
        self.key = f"{height}x{width}-{fingerprint(images.stamp(names), masks, LAYOUT)}"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Item:
        """Decode one image, and its mask from the run lengths, on the same grid."""
        image, full = read_image(self.images, self.samples[i].img, self.height, self.width)
        return image, Grid(*full, self.height, self.width).soft_target(mask_of(self.samples[i]))


class PseudoSamples(DecodedSamples):
    """Test images with the soft masks that `inference.predict.keep_soft_masks` has written into `folder`; same items.

    labels: the index there; its crc32 follows from image, PNG and number of rows. UserError where one of them changed.
    """

    def __init__(self, images: Archive, labels: pd.DataFrame, folder: Path, height: int, width: int):
        self.images, self.folder, self.height, self.width = images, folder, height, width
        sums = {name: crc for name, _, crc in images.stamp(name for name in labels["img"] if name in images.members)}
        self.samples = [(row.img, sums.get(row.img, 0) ^ len(labels), row.crc32) for row in labels.itertuples()]
        self.key = f"{height}x{width}-{fingerprint(self.samples, LAYOUT)}"

    def __getitem__(self, i: int) -> Item:
        """Decode one image and its soft mask, which is brought to the same size where it has another."""
        name, before, crc = self.samples[i]
        path = self.folder / f"{name}.png"
        png = path.read_bytes() if path.is_file() else b""
        if zlib.crc32(png, before) != crc:
            reason = f"{path}, its image in {self.images.path} or its row in the csv is lost or has changed"
            raise UserError(f"{reason}. Give the same hq, or delete {self.folder} and run its 05_predict again.")
        image, full = read_image(self.images, name, self.height, self.width)
        soft = np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE))
        if soft.shape != image.shape[:2]:
            soft = Grid(*full, self.height, self.width).reduce(Grid(*full, *soft.shape).enlarge(soft))
        return image, soft


class CachedSamples(Dataset[Item]):
    """The same from one memory-mapped file of (n, 4, height, width) uint8, each item in one piece.

    The first three quarters of an item are the image as (height, width, 3), the last is the target. A file beside it
    holds the items' CRC-32, (n,) uint32. ValueError or one of UNREADABLE where either is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.key = path, path.stem
        self.array, self.sums = np.load(path, mmap_mode="r"), np.load(path.with_suffix(".crc32"))
        if self.sums.shape != self.array.shape[:1]:
            raise ValueError(f"{path} has {len(self.array)} items and {self.sums.shape} sums")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Item:
        """One image and its target, not copied, so not to be written to; UserError where a bit of them has changed."""
        item = self.array[i]
        if zlib.crc32(item) != self.sums[i]:  # takes 1 ms at 512x512
            raise UserError(f"{self.path} is damaged. Delete it: the same command builds it again and goes on.")
        return item[:3].reshape(*item.shape[1:], 3), item[3]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for another process maps the file again."""
        return CachedSamples, (self.path,)


def cached(source: DecodedSamples, folder: Path) -> DecodedSamples | CachedSamples:
    """`source` through a cache file in `folder`, built once; `source` itself where the cache would fill half the disk.

    The file's name holds what it depends on. Folds that start together wait for the one that builds it.
    """
    path = folder / f"{source.key}.npy"
    with locked(path.with_suffix(".lock"), "the cache"):
        try:
            return CachedSamples(path)
        except (*UNREADABLE, ValueError):  # not there, or damaged
            path.with_suffix(".tmp").unlink(missing_ok=True)  # of a killed build, as large as the cache
            if (size := len(source) * source.height * source.width * 4) > shutil.disk_usage(folder).free / 2:
                reason = f"{folder} has less than twice the {size / 1e9:.1f} GB of a cache free"
                print(f"carvana: {reason}: every image is decoded again in each epoch.", file=sys.stderr)
                return source
            _build(source, path)
    return CachedSamples(path)


def _build(source: DecodedSamples, path: Path) -> None:
    temporary, sums = path.with_suffix(".tmp"), np.empty(len(source), np.uint32)
    shape = len(source), 4, source.height, source.width
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # where a disk that fills later would end the process without a word
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        items = overlapped(source.__getitem__, ((i,) for i in range(len(source))))  # the decoder frees the interpreter
        for i, (image, target) in enumerate(progress(items, "caching", total=len(source))):
            array[i, :3].reshape(-1)[:], array[i, 3] = image.reshape(-1), target
            sums[i] = zlib.crc32(array[i])
        array.flush()
        with atomic(path.with_suffix(".crc32")) as file:
            np.save(file, sums)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror}. Free space or choose another runs_dir."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class TrainDataset(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Augmented samples of one fold; an item is named by (epoch, i), so that its random state is its own.

    Returns the image (h, w, 3) uint8, the target (h, w) uint8 with 255 = car, and its row in `source`.
    """

    def __init__(self, source: Dataset[Item], rows: np.ndarray, augment: A.Compose, seed: int):
        self.source, self.rows, self.augment, self.seed = source, rows, augment, seed

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Resuming, or another number of workers, gives the same sample for the same key."""
        epoch, i = key
        row = int(self.rows[i])
        image, target = self.source[row]
        state = [self.seed, epoch, row]  # one for all transforms: equal seeds would make them choose alike
        self.augment.set_random_state(np.random.default_rng(state), random.Random(str(state)))
        augmented = self.augment(image=np.array(image), mask=np.array(target))
        return torch.from_numpy(augmented["image"]), torch.from_numpy(augmented["mask"]), torch.tensor(row)


def batches(n: int, batch_size: int, group_size: int, epochs: int, seed: int) -> list[list[Key]]:
    """Keys (epoch, i) of every batch of a whole training on `n` samples, each epoch in an order of its own.

    Only whole batches, in whole groups of `group_size` batches that make one step of the optimiser: no batch statistics
    of a single image, and an epoch ends with such a step. What is left over sits out this epoch; a fold too small for
    one group repeats.
    """
    group = batch_size * group_size
    used = max(1, n // group) * group
    keys = []
    for epoch in range(epochs):
        order = np.resize(np.random.default_rng([seed, epoch]).permutation(n), used).tolist()
        keys += [[(epoch, i) for i in order[first : first + batch_size]] for first in range(0, used, batch_size)]
    return keys


def add_pseudo(true: list[list[Key]], n: int, n_pseudo: int, count: int, seed: int) -> list[list[Key]]:
    """The batches of `n` true samples, as of `batches`, each with `count` keys (turn, i) more, n <= i < n + n_pseudo.

    Each pseudo-labelled sample comes once a turn, every turn in an order of its own; turns take no notice of epochs.
    """
    turns = -(-len(true) * count // max(1, n_pseudo))
    drawn = [(turn, n + i) for ((turn, i),) in batches(n_pseudo, 1, 1, turns, seed)]
    return [batch + drawn[k * count : (k + 1) * count] for k, batch in enumerate(true)]


def resized(images: torch.Tensor, targets: torch.Tensor, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch at another size, on its device: (B, h, w, 3) and (B, h, w) uint8 -> the same of (height, width)."""
    stacked = torch.cat([images, targets.unsqueeze(-1)], -1).permute(0, 3, 1, 2).float()
    smooth = interpolate(stacked, size, mode="bilinear", antialias=True).round().to(torch.uint8).permute(0, 2, 3, 1)
    return smooth[..., :3], smooth[..., 3]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training sample; 0 leaves one out.

    hflip: probability of a mirror image. crop_height, crop_width: a random crop of that many network pixels.
    brightness: largest change as a share of white. contrast, saturation: largest change, 0.2 = 20 %. hue: largest turn
    of the colour circle as a share of it. scale, shift: largest change as a share of the image. rotate: largest angle
    in degrees.
    """

    hflip: float = 0.0
    crop_height: int = 0
    crop_width: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    rotate: float = 0.0

    def compose(self) -> A.Compose:
        """The albumentations pipeline."""
        steps = []
        if self.hflip:
            steps.append(A.HorizontalFlip(p=self.hflip))
        if self.scale or self.shift or self.rotate:
            steps.append(self._affine())
        if self.crop_height and self.crop_width:
            steps.append(A.RandomCrop(self.crop_height, self.crop_width, pad_if_needed=True))
        if self.brightness or self.contrast:
            steps.append(A.RandomBrightnessContrast(self.brightness, self.contrast, p=0.5))
        if self.hue or self.saturation:
            steps.append(A.ColorJitter((1, 1), (1, 1), self.saturation, self.hue, p=0.5))
        return A.Compose(steps)

    def _affine(self) -> A.Affine:
        return A.Affine(
            scale=(1 - self.scale, 1 + self.scale),
            keep_ratio=True,
            translate_percent=(-self.shift, self.shift),
            rotate=(-self.rotate, self.rotate),
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_LINEAR,  # targets are soft
            border_mode=cv2.BORDER_REPLICATE,
            p=0.5,
        )
