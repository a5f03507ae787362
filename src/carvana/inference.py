"""Photographs -> run lengths: decode, every member x every view, blend, enlarge, encode; written in parts.

Members are blended by their logits: an average of logits at network size, enlarged, is the average of enlarged logits.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from carvana import rle
from carvana.files import (
    UserError,
    fingerprint,
    listed,
    overlapped,
    progress,
    read_json,
    sha256,
    write_json,
    write_text,
)
from carvana.grid import STRIDE, Grid
from carvana.models import load_checkpoint
from carvana.photos import Archive, picture
from carvana.recipe import precision

Size = tuple[int, int]  # height and width at a network
PART_SIZE = 512  # pictures a part: some seconds on a GPU, a minute on a CPU


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

    def write(self, path: Path) -> None:
        """To an ensemble.json that `read` reads."""
        names = [os.path.relpath(member, path.parent) for member in self.paths]
        members = [{"path": name, "weight": weight} for name, weight in zip(names, self.weights, strict=True)]
        write_json(path, {"members": members, "views": self.views, "threshold": self.threshold})

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


def blend(each: Sequence[torch.Tensor], weights: Sequence[float]) -> list[np.ndarray]:
    """Weighted mean of members (views, B, h, w): a (B, h, w) sum for every distinct size; their enlarged sum counts."""
    sums: dict[Size, torch.Tensor] = {}
    for weight, logits in zip(weights, each, strict=True):
        part = weight * logits.mean(0)
        sums[part.shape[1:]] = sums[part.shape[1:]] + part if part.shape[1:] in sums else part
    return [logits.cpu().numpy() for logits in sums.values()]


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
    """Photographs at every size that an ensemble needs; item i is (sizes -> (h, w, 3) uint8, full size, i)."""

    def __init__(self, photos: Archive, names: list[str], sizes: list[Size]):
        self.photos, self.names, self.sizes = photos, names, sizes

    def __getitem__(self, i: int) -> tuple[dict[Size, np.ndarray], Size, int]:
        """UserError with the picture's name where it cannot be decoded."""
        images = {}
        for size in self.sizes:
            images[size], full = picture(self.photos, self.names[i], *size)
        return images, full, i


def _collate(items: list) -> tuple[dict[Size, torch.Tensor], list[Size], list[int]]:
    images, full, rows = zip(*items, strict=True)
    return {size: torch.from_numpy(np.stack([i[size] for i in images])) for size in images[0]}, list(full), list(rows)


def batched(
    ensemble: Ensemble, photos: Archive, names: list[str], batch_size: int, workers: int = -1
) -> Iterator[tuple[list[torch.Tensor], list[Size], list[int]]]:
    """Logits of all members for batches of photographs: ((views, B, h, w) for each member, full sizes, rows)."""
    on_gpu, rows = ensemble.device.type == "cuda", list(range(len(names)))
    if workers < 0:
        workers = min(16, os.cpu_count()) if on_gpu else 1  # decoding takes a tenth of a small network's time on a CPU
    loader = DataLoader(
        Photographs(photos, names, ensemble.sizes),
        batch_sampler=[rows[first : first + batch_size] for first in rows[::batch_size]],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=on_gpu,
    )
    for pictures, full, rows in loader:
        with _memory_advice():
            each = ensemble.each(pictures)
        if not all(logits.isfinite().all() for logits in each):
            listed = ", ".join(names[row] for row in rows)
            raise UserError(f"A network gives logits that are not finite for one of {listed}. Train it with amp no.")
        yield each, full, rows


@contextmanager
def _memory_advice() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("The device is out of memory. Lower batch_size, or use fewer members or views.") from error


def enlarged(blended: Sequence[np.ndarray], full: Size) -> np.ndarray:
    """Full-size logits (H, W) of one picture: the sum of its logits of every size, each enlarged on its own grid."""
    return sum(Grid(*full, *logits.shape).enlarge(logits) for logits in blended)


def predict(
    ensemble: Ensemble, photos: Archive, names: list[str], folder: Path,
    batch_size: int = 8, workers: int = -1, max_hours: float = 0,
) -> pd.DataFrame:  # fmt: skip
    """Write run lengths of all photographs to whole parts in `folder`; computes only the parts that are missing.

    Another member, view, threshold or photograph starts anew. Returns a table of the finished parts' pictures: img,
    area (share of the picture), part (path); shorter than `names` where `max_hours` ended before the last part.
    """
    members = [sha256(path) for path in ensemble.paths], ensemble.weights, ensemble.views, ensemble.threshold
    key = fingerprint(*members, photos.stamp(), names)
    slices = [names[first : first + PART_SIZE] for first in range(0, len(names), PART_SIZE)]
    paths = [folder / f"part-{number:05d}.csv" for number in range(len(slices))]
    missing = [number for number, path in enumerate(paths) if not _finished(path, key)]
    began = time.monotonic()
    with progress(None, "predicting", total=len(names)) as bar:
        bar.update(len(names) - sum(len(slices[number]) for number in missing))
        for number in missing:
            _write_part(ensemble, photos, slices[number], paths[number], key, batch_size, workers, bar)
            if 0 < max_hours * 3600 < time.monotonic() - began:
                break
    return _finished_table([path for path in paths if _finished(path, key)])


def _write_part(ensemble, photos, names, path, key, batch_size, workers, bar) -> None:
    masked = overlapped(_encode, _blended(ensemble, photos, names, batch_size, workers))
    encoded = []
    for result in masked:
        encoded.append(result)
        bar.update()
    write_text(path, pd.DataFrame({"img": names, "rle_mask": [text for text, _ in encoded]}).to_csv(index=False))
    areas = [area for _, area in encoded]
    write_json(path.with_suffix(".json"), {"key": key, "sha256": sha256(path), "names": names, "areas": areas})


def _blended(ensemble, photos, names, batch_size, workers) -> Iterator[tuple[list[np.ndarray], Size, float]]:
    """What `_encode` takes for each photograph; the network works on while threads encode what it gave before."""
    for each, full, _ in batched(ensemble, photos, names, batch_size, workers):
        blended = blend(each, ensemble.weights)
        for i in range(len(full)):
            yield [logits[i] for logits in blended], full[i], ensemble.cut


def _encode(blended: list[np.ndarray], full: Size, cut: float) -> tuple[str, float]:
    mask = enlarged(blended, full) > cut
    return rle.encode(mask), round(float(mask.mean()), 6)


def _finished(path: Path, key: str) -> bool:
    """Whether a part is whole and was made with the same members, views, threshold and photographs."""
    note = path.with_suffix(".json")
    if not (path.exists() and note.exists()):
        return False
    found = read_json(note)
    return found["key"] == key and found["sha256"] == sha256(path)


def _finished_table(paths: list[Path]) -> pd.DataFrame:
    tables = []
    for path in paths:
        note = read_json(path.with_suffix(".json"))
        tables.append(pd.DataFrame({"img": note["names"], "area": note["areas"], "part": str(path)}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["img", "area", "part"])


def masks(ensemble: Ensemble, photos: Archive, names: list[str], batch_size: int = 4) -> Iterator[np.ndarray]:
    """Probabilities at full size, (H, W) float32 in [0, 1], of a few photographs to look at."""
    for logits, full, _ in _blended(ensemble, photos, names, batch_size, workers=0):
        yield 1 / (1 + np.exp(-enlarged(logits, full)))
