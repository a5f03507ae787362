"""An ensemble: as a file says it, and as loaded networks that give logits.

Checkpoints are blended by their logits: an average of logits at network size, enlarged, is that of enlarged logits.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from carvana import device
from carvana.data.images import Size, at_size
from carvana.errors import UserError
from carvana.files import parse_list, read_json, write_json
from carvana.grid import STRIDE
from carvana.inference.logits import blend
from carvana.models import load_checkpoint
from carvana.profiles import check
from carvana.run import EnsembleNote

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}  # of autocast, by precision
Item = tuple[dict[Size, np.ndarray], Size, int]  # an image at every network size, its full size, its row


@dataclass(frozen=True)
class EnsembleSpec:
    """Checkpoints whose logits are blended with `weights` (sum 1), each the mean over `tta`; car above `threshold`."""

    checkpoints: Sequence[Path]
    weights: Sequence[float]
    tta: Sequence[str]
    threshold: float = 0.5

    @classmethod
    def equal(cls, checkpoints: Sequence[Path], tta: Sequence[str]) -> "EnsembleSpec":
        """Of checkpoints with equal weights."""
        return cls(tuple(checkpoints), (1 / len(checkpoints),) * len(checkpoints), tuple(tta))

    @classmethod
    def read(cls, path: Path) -> "EnsembleSpec":
        """From an ensemble.json, which people may edit; the checkpoints' paths are relative to its folder."""
        note = read_json(path, EnsembleNote)
        checkpoints, weights = zip(*((path.parent / m["path"], m["weight"]) for m in note["members"]), strict=True)
        if not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise UserError(f"{path}: the weights sum to {sum(weights):.6g}, but must sum to 1. Correct them.")
        return cls(checkpoints, weights, tuple(note["views"]), note["threshold"])

    def write(self, path: Path) -> None:
        """As the ensemble.json that `read` reads."""
        weighted = zip(self.checkpoints, self.weights, strict=True)
        members = [{"path": os.path.relpath(file, path.parent), "weight": weight} for file, weight in weighted]
        write_json(path, {"members": members, "views": self.tta, "threshold": self.threshold})

    @property
    def logit_threshold(self) -> float:
        """The threshold as a logit."""
        return math.log(self.threshold / (1 - self.threshold))


class Ensemble:
    """The networks of a spec, loaded to the device; a missing or broken one is a UserError before any work."""

    def __init__(self, spec: EnsembleSpec):
        if not spec.checkpoints:
            raise UserError("The ensemble has no checkpoints. Train a fold with 03_train first.")
        parse_tta(",".join(spec.tta))
        self.spec = spec
        self.device = device.best()
        loaded = [load_checkpoint(path) for path in spec.checkpoints]
        self.models = [model.to(self.device) for model, _ in loaded]
        self.dtypes = [DTYPES["no" if facts.get("amp") == "no" else device.precision("auto")] for _, facts in loaded]
        self.recorder = device.Recorder(self.device)

    @classmethod
    def read(cls, path: str | Path) -> "Ensemble":
        """The ensemble that an ensemble.json says."""
        return cls(EnsembleSpec.read(Path(path)))

    @property
    def sizes(self) -> list[Size]:
        """The distinct network sizes of the checkpoints."""
        return sorted({(model.config.height, model.config.width) for model in self.models})

    def predict(
        self, images: Sequence[np.ndarray | bytes] | np.ndarray, probabilities: bool = False, batch_size: int = 8
    ) -> list[np.ndarray]:  # fmt: skip
        """Masks of images of any sizes, (H, W) bool each, or their `probabilities` of car, (H, W) float32.

        images: a list of (H, W, 3) uint8 RGB arrays, or one of them, or the bytes of JPEG files, whose masks have just
        the run lengths that `predict_run_lengths` writes. An array that was decoded from a JPEG may differ from it at
        the edge, by 98 to 185 of 2.5 M pixels at an eighth of the size, since the JPEG library averages in its own
        way. UserError for anything else.
        """
        images = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else images
        masks = []
        for first in range(0, len(images), batch_size):
            chunk = enumerate(images[first : first + batch_size], first)
            batch, full_sizes, rows = collate([_item(image, i, self.sizes) for i, image in chunk])
            logits = self.predict_logits(batch, [f"image {i}" for i in rows])
            for blended, full in zip(blend(logits, self.spec.weights), full_sizes, strict=True):
                threshold = self.spec.logit_threshold
                masks.append(blended.probabilities(full) if probabilities else blended.mask(full, threshold))
        return masks

    def predict_logits(self, images: dict[Size, torch.Tensor], names: Sequence[str]) -> list[torch.Tensor]:
        """Logits of every checkpoint with every tta, (tta, B, h, w) float32 on the device for each checkpoint.

        images: for every size a batch (B, h, w, 3) uint8 of the same images, called `names`. UserError where logits
        are not finite, or the device's memory is full.
        """
        try:
            for full_precision in (False, True):  # what overflows in half precision may not overflow in float32
                logits = self.forward(images, full_precision)
                if all(bool(of_checkpoint.isfinite().all()) for of_checkpoint in logits):
                    return logits
        except torch.OutOfMemoryError as error:
            raise UserError("The device is out of memory. Lower batch_size, or use fewer members or tta.") from error
        reason = f"A network gives logits that are not finite for one of {', '.join(names)}"
        raise UserError(f"{reason}, even in float32. Its weights are spoilt: train it again with a lower lr.")

    def forward(self, images: dict[Size, torch.Tensor], full_precision: bool = False) -> list[torch.Tensor]:
        """`predict_logits` unchecked, so that nothing waits for the device; full_precision: float32 throughout."""
        on_device = {size: device.moved(batch, self.device) for size, batch in images.items()}
        logits = []
        for i, model in enumerate(self.models):
            batch = on_device[model.config.height, model.config.width]
            half = partial(self._stacked, i)
            logits.append(self._stacked(i, batch, half=False) if full_precision else self.recorder(i, half, batch))
        return logits

    def _stacked(self, i: int, batch: torch.Tensor, half: bool = True) -> torch.Tensor:
        """Logits of checkpoint i with every tta; half: in the precision that its training had."""
        model, dtype = self.models[i], self.dtypes[i] if half else None
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return torch.stack([tta_logits(model, batch, name).float() for name in self.spec.tta])


def collate(items: list[Item]) -> tuple[dict[Size, torch.Tensor], list[Size], list[int]]:
    """A batch (B, h, w, 3) of each size, the images' full sizes, and their rows."""
    images, full_sizes, rows = zip(*items, strict=True)
    stacked = {size: torch.from_numpy(np.stack([by_size[size] for by_size in images])) for size in images[0]}
    return stacked, list(full_sizes), list(rows)


def _item(image: np.ndarray | bytes, i: int, sizes: list[Size]) -> Item:
    try:
        at_sizes = {size: at_size(image, *size) for size in sizes}
    except (TypeError, ValueError) as error:
        raise UserError(f"image {i} is no image: {error}. Give (H, W, 3) uint8 arrays or bytes of JPEGs.") from error
    return {size: small for size, (small, _) in at_sizes.items()}, at_sizes[sizes[0]][1], i


def parse_tta(text: str) -> list[str]:
    """The names in a parameter such as "none,hflip"; UserError for one that is unknown."""
    check({"tta": text})
    return parse_list(text) or ["none"]


def tta_logits(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, name: str) -> torch.Tensor:
    """Logits of images changed as a tta says, turned back onto the images' grid.

    name: "none", "hflip", or "scaleX" with X from 0.25 to 4, the image made X times as large at the network.
    images: (B, h, w, 3) uint8. Returns (B, h, w).
    """
    if name == "none":
        return model(images)
    if name == "hflip":
        return model(images.flip(2)).flip(2)
    size, factor = images.shape[1:3], float(name.removeprefix("scale"))
    scaled = [max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in size]
    resized = interpolate(images.permute(0, 3, 1, 2).float(), scaled, mode="bilinear", antialias=True)
    logits = model(resized.round().byte().permute(0, 2, 3, 1))
    return interpolate(logits.float()[:, None], size, mode="bilinear", antialias=True)[:, 0]
