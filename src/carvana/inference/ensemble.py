"""Photographs -> logits -> run lengths: decode once, every member x every view, blend, find the edges.

Members are blended by their logits: an average of logits at network size, enlarged, is the average of enlarged logits.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset

from carvana import rle
from carvana.data.competition import Archive, picture
from carvana.files import UserError, listed, read_json, write_json
from carvana.grid import STRIDE, Grid
from carvana.models import load_checkpoint
from carvana.training.recipe import precision

Size = tuple[int, int]  # height and width
BROKEN = 0, 0  # the size of a photograph that cannot be decoded


@dataclass
class Ensemble:
    """Networks whose logits are blended with `weights` (sum 1), over test-time `views`, cut at `threshold`."""

    paths: list[Path]
    weights: list[float]
    views: list[str]
    threshold: float = 0.5

    def __post_init__(self):
        """Read every member, so that a missing or broken one is an error before any work."""
        if not self.paths:
            raise UserError("The ensemble has no members. Train a fold with 03_train first.")
        for view in self.views:
            view_logits(lambda pictures: pictures[..., 0].float(), torch.zeros(1, STRIDE, STRIDE, 3).byte(), view)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = [load_checkpoint(path) for path in self.paths]
        self.models = [model.to(self.device) for model, _ in loaded]
        kinds = ["no" if facts.get("amp") == "no" else precision("auto") for _, facts in loaded]
        self.dtypes = [{"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}[kind] for kind in kinds]

    @classmethod
    def read(cls, path: Path) -> "Ensemble":
        """From an ensemble.json; the members' paths are relative to its folder."""
        found = read_json(path)
        try:
            members = found["members"]
            paths = [path.parent / member["path"] for member in members]
            return cls(paths, [member["weight"] for member in members], found["views"], found["threshold"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not an ensemble: {error} is missing. Write it with 04_evaluate.") from error

    @property
    def sizes(self) -> list[Size]:
        """The distinct network sizes of the members."""
        return sorted({(model.network.height, model.network.width) for model in self.models})

    def each(self, pictures: dict[Size, torch.Tensor]) -> list[torch.Tensor]:
        """Logits of every member over every view, (views, B, h, w) float32 on the device for each member.

        pictures: for every size a batch (B, h, w, 3) uint8 of the same photographs.
        """
        moved = {size: batch.to(self.device, non_blocking=True) for size, batch in pictures.items()}
        logits = []
        for model, dtype in zip(self.models, self.dtypes, strict=True):
            batch = moved[model.network.height, model.network.width]
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits.append(torch.stack([view_logits(model, batch, view).float() for view in self.views]))
        return logits

    @property
    def cut(self) -> float:
        """The threshold as a logit."""
        return math.log(self.threshold / (1 - self.threshold))


def write_ensemble(path: Path, members: list[tuple[Path, float]], views: list[str], threshold: float) -> None:
    """An ensemble.json that `Ensemble.read` reads; members: (checkpoint, weight), paths relative to its folder."""
    listed = [{"path": os.path.relpath(member, path.parent), "weight": weight} for member, weight in members]
    write_json(path, {"members": listed, "views": views, "threshold": threshold})


def blend(each: Sequence[torch.Tensor], weights: Sequence[float]) -> list[torch.Tensor]:
    """Weighted mean of members (views, B, h, w): a (B, h, w) sum for every distinct size; their enlarged sum counts."""
    sums: dict[Size, torch.Tensor] = {}
    for weight, logits in zip(weights, each, strict=True):
        part = weight * logits.mean(0)
        sums[part.shape[1:]] = sums[part.shape[1:]] + part if part.shape[1:] in sums else part
    return list(sums.values())


def view_logits(model: Callable, pictures: torch.Tensor, view: str) -> torch.Tensor:
    """Logits of one test-time view, turned back onto the picture's grid.

    view: "none", "hflip", or "scaleX" with X from 0.25 to 4, the picture made X times as large at the network.
    pictures: (B, h, w, 3) uint8. Returns (B, h, w).
    """
    if view == "none":
        return model(pictures)
    if view == "hflip":
        return model(pictures.flip(2)).flip(2)
    size = pictures.shape[1:3]
    scaled = [max(STRIDE, round(side * _scale(view) / STRIDE) * STRIDE) for side in size]
    resized = interpolate(pictures.permute(0, 3, 1, 2).float(), scaled, mode="bilinear", antialias=True)
    logits = model(resized.round().byte().permute(0, 2, 3, 1))
    return interpolate(logits.float()[:, None], size, mode="bilinear", antialias=True)[:, 0]


def _scale(view: str) -> float:
    try:
        factor = float(view.removeprefix("scale"))
        if view.startswith("scale") and 0.25 <= factor <= 4:
            return factor
    except ValueError:
        pass
    raise UserError(f'tta "{view}" is unknown. Choose from: none, hflip, scale0.75, scale1.25, ... up to scale4.')


def views_named(tta: str) -> list[str]:
    """Views of a parameter such as "none,hflip"."""
    return listed(tta) or ["none"]


class Photographs(Dataset):
    """Photographs at every size that an ensemble needs; item i is (sizes -> (h, w, 3) uint8, full size, i).

    One that cannot be decoded is a UserError with its name, or with `skip_broken` black and BROKEN in size.
    """

    def __init__(self, photos: Archive, names: list[str], sizes: list[Size], skip_broken: bool = False):
        self.photos, self.names, self.sizes, self.skip_broken = photos, names, sizes, skip_broken

    def __getitem__(self, i: int) -> tuple[dict[Size, np.ndarray], Size, int]:
        """Decode photograph i once for every size."""
        images = {}
        try:
            for size in self.sizes:
                images[size], full = picture(self.photos, self.names[i], *size)
        except UserError:
            if not self.skip_broken:
                raise
            return {size: np.zeros((*size, 3), np.uint8) for size in self.sizes}, BROKEN, i
        return images, full, i


def _collate(items: list) -> tuple[dict[Size, torch.Tensor], list[Size], list[int]]:
    images, full, rows = zip(*items, strict=True)
    return {size: torch.from_numpy(np.stack([i[size] for i in images])) for size in images[0]}, list(full), list(rows)


def batched(
    ensemble: Ensemble, photographs: Photographs, batches: Iterable[list[int]], workers: int = -1, spent: Counter = None
) -> Iterator[tuple[list[torch.Tensor], list[Size], list[int]]]:
    """Logits of all members for `batches` of rows: ((views, B, h, w) for each member, full sizes, rows).

    workers: processes that decode; -1 for what suits the device. Seconds that were waited for "decode" and "network"
    are added to `spent`.
    """
    on_gpu, spent = ensemble.device.type == "cuda", Counter() if spent is None else spent
    if workers < 0:
        workers = min(16, os.cpu_count()) if on_gpu else 1  # decoding takes a tenth of a small network's time on a CPU
    options = {"num_workers": workers, "collate_fn": _collate, "pin_memory": on_gpu}
    began = time.monotonic()
    for pictures, full, rows in DataLoader(photographs, batch_sampler=batches, **options):
        decoded = time.monotonic()
        with _memory_advice():
            each = ensemble.each(pictures)
            finite = all(logits.isfinite().all() for logits in each)
        if not finite:
            listed = ", ".join(photographs.names[row] for row in rows)
            raise UserError(f"A network gives logits that are not finite for one of {listed}. Train it with amp no.")
        spent.update({"decode": decoded - began, "network": time.monotonic() - decoded})
        yield each, full, rows
        began = time.monotonic()


def in_batches(n: int, batch_size: int) -> list[list[int]]:
    """Rows 0 to n - 1, `batch_size` at a time."""
    return [list(range(first, min(first + batch_size, n))) for first in range(0, n, batch_size)]


@contextmanager
def _memory_advice() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("The device is out of memory. Lower batch_size, or use fewer members or views.") from error


def enlarged(blended: Sequence[np.ndarray], full: Size) -> np.ndarray:
    """Full-size logits (H, W) of one picture: the sum of its logits of every size, each enlarged on its own grid."""
    return sum(Grid(*full, *logits.shape).enlarge(logits) for logits in blended)


def edges(blended: Sequence[torch.Tensor], full: Size, cut: float) -> np.ndarray:
    """`rle.edges` of a picture's blended logits, enlarged and cut, without the mask where that is possible."""
    if blended[0].is_cuda:
        return _edges_on_device(blended, full, cut)
    logits = [part.numpy() for part in blended]
    if len(logits) == 1:
        return Grid(*full, *logits[0].shape).edges(logits[0], cut)
    return rle.edges(enlarged(logits, full) > cut)


def unsure(blended: Sequence[torch.Tensor], cut: float) -> float:
    """Width of the band along a picture's outline where its blended logits are within 1 of `cut`, in network pixels.

    0.36 for the middle picture of a trained ensemble at 512x512, 0.74 for one whose lower edge is lost in its shadow.
    Without any outline it is the number of such pixels.
    """
    logits = blended[0]
    for part in blended[1:]:
        logits = logits + interpolate(part[None, None], logits.shape, mode="bilinear")[0, 0]
    logits, count = (logits, torch.count_nonzero) if logits.is_cuda else (logits.numpy(), np.count_nonzero)
    car, near = logits > cut, (logits > cut - 1) & (logits < cut + 1)
    outline = count(car[1:] != car[:-1]) + count(car[:, 1:] != car[:, :-1])
    return round(int(count(near)) / max(1, int(outline)), 3)


def _edges_on_device(blended: Sequence[torch.Tensor], full: Size, cut: float) -> np.ndarray:
    """The same where the logits are: only the positions leave the device."""
    large = 0
    for logits in blended:
        padded = Grid(*full, *logits.shape).padded
        large = large + interpolate(logits[None, None], padded, mode="bilinear")[0, 0, : full[0], : full[1]]
    flat = pad((large > cut).flatten(), (1, 1))
    return torch.nonzero(flat[1:] != flat[:-1]).flatten().cpu().numpy()


def masks(ensemble: Ensemble, photos: Archive, names: list[str], batch_size: int = 4) -> Iterator[np.ndarray]:
    """Probabilities at full size, (H, W) float32 in [0, 1], of a few photographs to look at."""
    photographs = Photographs(photos, names, ensemble.sizes)
    for each, full, _ in batched(ensemble, photographs, in_batches(len(names), batch_size), workers=0):
        blended = [logits.cpu().numpy() for logits in blend(each, ensemble.weights)]
        for i in range(len(full)):
            yield 1 / (1 + np.exp(-enlarged([logits[i] for logits in blended], full[i])))
