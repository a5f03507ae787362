"""The recipe of a training: what decides its weights, and what its names mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import psutil

from carvana.data.dataset import Augmentation
from carvana.device import best, precision
from carvana.errors import UserError
from carvana.grid import STRIDE
from carvana.models import ModelConfig, check_names, check_optimizer
from carvana.profiles import check

BYTES_A_PIXEL = 300  # of a batch in a training step: a third of the least that was measured (profiles/README.md)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of a fold, beside the data; meanings and defaults stand in 03_train."""

    arch: str
    encoder: str
    encoder_weights: str
    init_from: str
    decoder_channels: str
    height: int
    width: int
    epochs: int
    start_size: float
    batch_size: int
    accumulate: int
    lr: float
    optimizer: str
    weight_decay: float
    schedule: str
    warmup: float
    clip_norm: float
    loss: str
    ema: float
    amp: str
    hflip: float
    crop_height: int
    crop_width: int
    brightness: float
    contrast: float
    hue: float
    saturation: float
    scale: float
    shift: float
    rotate: float
    pseudo_labels: str
    pseudo_batch: float
    validate_every: int
    seed: int

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any]) -> "Recipe":
        """Pick the recipe out of a notebook's parameters: `Recipe.from_parameters(globals())`.

        Names and ranges are checked before work.
        """
        check(parameters)
        # A YAML file's 2e-3 is text to papermill, and its 1 a whole number where a float is meant.
        recipe = cls(**{name: kind(parameters[name]) for name, kind in get_type_hints(cls).items()})
        check_names(recipe.model_config)
        check_optimizer(recipe.optimizer)
        precision(recipe.amp)
        recipe._check_crop()
        if recipe.pseudo_labels and recipe.batch_size < 2:
            raise UserError("batch_size is 1, but with pseudo_labels it must be 2 or more: a true and a soft mask.")
        return recipe

    def check_memory(self) -> None:
        """UserError where a training step on the CPU cannot fit into the memory that is free."""
        size = (self.crop_height or self.height) * (self.crop_width or self.width)
        need, free = self.batch_size * size * BYTES_A_PIXEL, psutil.virtual_memory().available
        if best().type == "cpu" and need > free:
            needed = f"A step of batch_size {self.batch_size} needs more than {need / 1e9:.0f} GB"
            advice = "Halve batch_size and double accumulate, or lower height and width."
            raise UserError(f"{needed}, and {free / 1e9:.0f} GB are free. {advice}")

    def _check_crop(self) -> None:
        crop = self.crop_height, self.crop_width
        fits = self.crop_height <= self.height and self.crop_width <= self.width
        if crop != (0, 0) and not (all(crop) and fits and not any(side % STRIDE for side in crop)):
            size = f"at most {self.height} x {self.width}"
            raise UserError(f"crop_height and crop_width are {crop}: both 0, or multiples of {STRIDE}, {size}.")

    @property
    def model_config(self) -> ModelConfig:
        """The part that prediction needs to know."""
        return ModelConfig.of(vars(self))

    @property
    def pseudo_count(self) -> int:
        """Pseudo-labelled images in a batch: `pseudo_batch` of it, at least one and at most all but one; or none."""
        return min(max(1, round(self.batch_size * self.pseudo_batch)), self.batch_size - 1) if self.pseudo_labels else 0

    @property
    def augmentation(self) -> Augmentation:
        """The random changes of training samples."""
        return Augmentation(**{field.name: getattr(self, field.name) for field in fields(Augmentation)})


def learning_rate(schedule: str, done: float, warmup: float) -> float:
    """Share of the full learning rate after the share `done` of a training, both in [0, 1].

    "onecycle" rises over its first 30 % (or `warmup`, if longer); the others rise linearly over the share `warmup`.
    "plateau" is "constant" here: `TrainState.lr` halves it when the Dice stalls.
    """
    rise = max(warmup, 0.3) if schedule == "onecycle" else warmup
    if done < rise:
        share = done / rise
        return 0.04 + 0.96 * (1 - math.cos(math.pi * share)) / 2 if schedule == "onecycle" else max(share, 1e-3)
    if schedule in ("cosine", "onecycle"):
        return (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2
    return 1.0


def size_at(full: Sequence[int], start: float, done: float) -> tuple[int, ...]:
    """Height and width of images after the share `done` of a training, multiples of 32: progressive resizing.

    They grow from the share `start` of the full size, and reach it after 70 % of the training, where edges are learnt.
    """
    share = min(1.0, start + (1 - start) * done / 0.7)
    return tuple(min(side, max(STRIDE, round(side * share / STRIDE) * STRIDE)) for side in full)


def plateaus(dices: Sequence[float], patience: int = 2) -> int:
    """How often the best Dice was not beaten for `patience` validations in a row."""
    best, waited, count = -1.0, 0, 0
    for dice in dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited == patience:
            waited, count = 0, count + 1
    return count
