"""Losses by name, thin over segmentation_models_pytorch, always in float32."""

from collections.abc import Callable

import torch
from segmentation_models_pytorch import losses as smp
from torch.nn.functional import max_pool2d

from carvana.profiles import check


def _bce_dice() -> Callable:
    bce, dice = smp.SoftBCEWithLogitsLoss(), smp.DiceLoss("binary")
    return lambda logits, target: bce(logits, target) + dice(logits, target)


def _lovasz() -> Callable:
    loss = smp.LovaszLoss("binary")
    return lambda logits, target: loss(logits, (target > 0.5).float())  # defined for hard masks only


def _boundary() -> Callable:
    bce, dice = smp.SoftBCEWithLogitsLoss(reduction="none"), smp.DiceLoss("binary")

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        near = max_pool2d(target, 7, 1, 3) + max_pool2d(-target, 7, 1, 3)  # 1 within 3 pixels of an edge, else 0
        weight = 1 + 4 * near
        return (weight * bce(logits, target)).mean() + dice(logits, target)

    return loss


LOSSES = {
    "dice": lambda: smp.DiceLoss("binary"),
    "bce": smp.SoftBCEWithLogitsLoss,
    "bce_dice": _bce_dice,
    "boundary": _boundary,
    "lovasz": _lovasz,
    "focal": lambda: smp.FocalLoss("binary"),
}


def loss_named(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of logits (B, H, W) and soft targets (B, H, W) in [0, 1], any float type, to a float32 scalar.

    Half precision sums of a million pixels overflow or stall, so both are cast first. UserError for an unknown name.
    """
    check({"loss": name})
    loss = LOSSES[name]()
    return lambda logits, target: loss(logits.float().unsqueeze(1), target.float().unsqueeze(1))
