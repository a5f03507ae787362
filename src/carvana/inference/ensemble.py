"""An ensemble: as a file says it, and as loaded networks that give logits.

Checkpoints are blended by their logits: an average of logits at network size, enlarged, is that of enlarged logits.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from carvana import device
from carvana.data.images import Size
from carvana.errors import UserError
from carvana.files import parse_list, read_json, write_json
from carvana.grid import STRIDE
from carvana.models import load_checkpoint
from carvana.profiles import check
from carvana.run import EnsembleNote

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}  # of autocast, by precision


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
            raise UserError(f"{path}: the weights sum to {sum(weights):.6g}, but must to 1. Correct them.")
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

    @property
    def sizes(self) -> list[Size]:
        """The distinct network sizes of the checkpoints."""
        return sorted({(model.config.height, model.config.width) for model in self.models})

    def predict_logits(self, images: dict[Size, torch.Tensor], full_precision: bool = False) -> list[torch.Tensor]:
        """Logits of every checkpoint with every tta, (tta, B, h, w) float32 on the device for each checkpoint.

        images: for every size a batch (B, h, w, 3) uint8 of the same images. full_precision: float32 throughout.
        """
        on_device = {size: batch.to(self.device, non_blocking=True) for size, batch in images.items()}
        logits = []
        for model, dtype in zip(self.models, self.dtypes, strict=True):
            batch = on_device[model.config.height, model.config.width]
            mixed = dtype is not None and not full_precision
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=mixed):
                logits.append(torch.stack([tta_logits(model, batch, name).float() for name in self.spec.tta]))
        return logits


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
