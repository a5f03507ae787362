"""Figures and pages, for notebooks only: `from carvana import plots`.

A name is imported when it is first used: who draws masks or writes a report need not wait for torch.
"""

from importlib import import_module
from typing import Any

NAMES = {  # by the module that has them
    "browser": ("browse",),
    "explore": (
        "NEAR", "areas", "areas_by_make", "contrasts", "fold_balance", "mean_mask", "odd_masks", "test_areas",
        "turntable",
    ),
    "overlays": ("error_overlays", "hesitations", "predicted_outlines", "save_errors"),
    "report": ("gallery", "write_report"),
    "scores": (
        "dice_by_car", "dice_by_threshold", "dice_by_view", "dice_distribution", "error_maps", "error_parts", "gains",
        "variant_text",
    ),
    "style": ("save",),
    "training": ("edge_strip", "train_live", "training_curves"),
}  # fmt: skip
MODULE_OF = {name: module for module, names in NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"carvana.plots has no {name}")
    return getattr(import_module(f"carvana.plots.{MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(MODULE_OF)
