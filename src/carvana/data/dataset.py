"""Training pictures at network size: the uint8 cache, and albumentations with random states that never repeat."""

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from carvana import rle
from carvana.data.competition import Archive, picture
from carvana.files import UserError, fingerprint, overlapped, progress
from carvana.grid import Grid

LAYOUT = "picture, target"  # of a cached item: another layout is another cache


class Decoded(Sequence):
    """Pictures and soft targets read anew each time: item i is ((height, width, 3), (height, width)) uint8.

    `key` changes when the photographs, names, masks or the size change.
    """

    def __init__(self, photos: Archive, pictures: pd.DataFrame, height: int, width: int):
        self.photos, self.height, self.width = photos, height, width
        self.names, self.rles = pictures["img"].tolist(), pictures["rle"].tolist()
        self.key = f"{height}x{width}-{fingerprint(photos.stamp(), self.names, self.rles, LAYOUT)}"

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode one picture, and its mask from the run lengths, on the same grid."""
        image, full = picture(self.photos, self.names[i], self.height, self.width)
        return image, Grid(*full, self.height, self.width).soft_target(rle.decode(self.rles[i], *full))


class Cached(Sequence):
    """The same from one memory-mapped file of (n, 4, height, width) uint8, each item in one piece.

    The first three quarters of an item are the picture as (height, width, 3), the last is the target.
    """

    def __init__(self, path: Path):
        self.path, self.key = path, path.stem
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.array)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """One picture and its target, not copied, so not to be written to."""
        item = self.array[i]
        return item[:3].reshape(*item.shape[1:], 3), item[3]

    def __reduce__(self):
        """A copy for another process maps the file again."""
        return Cached, (self.path,)


def cached(source: Decoded, folder: Path) -> Sequence:
    """`source` through a cache file in `folder`, built once; `source` itself where the cache would fill half the disk.

    The file's name holds what it depends on. Folds that start together wait for the one that builds it.
    """
    path = folder / f"{source.key}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            if len(source) * source.height * source.width * 4 > shutil.disk_usage(folder).free / 2:
                return source
            _build(source, path)
    return Cached(path)


def _build(source: Decoded, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    shape = len(source), 4, source.height, source.width
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        with temporary.open("r+b") as file:  # a disk that fills later would end the process without a word
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written: {error.strerror}. Free space or choose another runs_dir."
        ) from error
    items = overlapped(source.__getitem__, ((i,) for i in range(len(source))))  # the decoder releases the interpreter
    for i, (image, target) in enumerate(progress(items, "caching", total=len(source))):
        array[i, :3].reshape(-1)[:], array[i, 3] = image.reshape(-1), target
    array.flush()
    temporary.replace(path)


class TrainingPictures(Dataset):
    """Augmented pictures of one fold; an item is chosen by (epoch, i), so that its random state is its own.

    Returns the picture (h, w, 3) uint8, the target (h, w) uint8 with 255 = car, and its row in `source`.
    """

    def __init__(self, source: Sequence, rows: np.ndarray, augment: A.Compose, seed: int):
        self.source, self.rows, self.augment, self.seed = source, rows, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Resuming, or another number of workers, gives the same picture for the same key."""
        epoch, i = key
        row = int(self.rows[i])
        image, target = self.source[row]
        self.augment.set_random_seed(int(np.random.SeedSequence([self.seed, epoch, row]).generate_state(1)[0]))
        made = self.augment(image=np.array(image), mask=np.array(target))
        return torch.from_numpy(made["image"]), torch.from_numpy(made["mask"]), row


def batches(n: int, batch_size: int, accumulate: int, epochs: int, seed: int) -> list[list[tuple[int, int]]]:
    """Keys (epoch, i) of every batch of a whole training, each epoch in an order of its own.

    Only whole batches, in whole groups of `accumulate`: no batch statistics of a rest of one picture, and no gradient
    under way where an epoch ends. What is left over sits out this epoch; a fold too small for one group repeats.
    """
    group = batch_size * accumulate
    used = max(1, n // group) * group
    made = []
    for epoch in range(epochs):
        order = np.resize(np.random.default_rng([seed, epoch]).permutation(n), used).tolist()
        made += [[(epoch, i) for i in order[first : first + batch_size]] for first in range(0, used, batch_size)]
    return made


def resized(pictures: torch.Tensor, targets: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch at another size, on its device: (B, h, w, 3) and (B, h, w) uint8 -> the same of (height, width)."""
    stacked = torch.cat([pictures, targets.unsqueeze(-1)], -1).permute(0, 3, 1, 2).float()
    made = interpolate(stacked, size, mode="bilinear", antialias=True).round().to(torch.uint8).permute(0, 2, 3, 1)
    return made[..., :3], made[..., 3]


def augmentation(
    hflip: float, crop_height: int, crop_width: int, brightness: float, contrast: float,
    scale: float, shift: float, rotate: float,
) -> A.Compose:  # fmt: skip
    """The albumentations pipeline; every argument at 0 leaves its part out.

    hflip: probability of a mirror image. crop_height, crop_width: a random cut of that many network pixels.
    brightness, contrast: largest change, 0.2 = 20 %. scale, shift: largest change as a share of the picture.
    rotate: largest angle in degrees.
    """
    steps = []
    if hflip:
        steps.append(A.HorizontalFlip(p=hflip))
    if scale or shift or rotate:
        steps.append(_affine(scale, shift, rotate))
    if crop_height and crop_width:
        steps.append(A.RandomCrop(crop_height, crop_width, pad_if_needed=True))
    if brightness or contrast:
        steps.append(A.RandomBrightnessContrast(brightness, contrast, p=0.5))
    return A.Compose(steps)


def _affine(scale: float, shift: float, rotate: float) -> A.Affine:
    return A.Affine(
        scale=(1 - scale, 1 + scale),
        translate_percent=(-shift, shift),
        rotate=(-rotate, rotate),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_LINEAR,  # targets are soft
        border_mode=cv2.BORDER_REPLICATE,
        p=0.5,
    )
