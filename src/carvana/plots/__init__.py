"""Figures and pages, for notebooks only: `from carvana import plots`."""

from carvana.plots.browser import browse
from carvana.plots.explore import (
    NEAR,
    areas,
    areas_by_make,
    contrasts,
    fold_balance,
    mean_mask,
    odd_masks,
    test_areas,
    turntable,
)
from carvana.plots.overlays import error_overlays, hesitations, predicted_outlines, save_errors
from carvana.plots.report import gallery, write_report
from carvana.plots.scores import (
    dice_by_car,
    dice_by_threshold,
    dice_by_view,
    dice_distribution,
    error_maps,
    error_parts,
    gains,
    variant_text,
)
from carvana.plots.style import save
from carvana.plots.training import edge_strip, train_live, training_curves

__all__ = [
    "NEAR", "areas", "areas_by_make", "browse", "contrasts", "dice_by_car", "dice_by_threshold", "dice_by_view",
    "dice_distribution", "edge_strip", "error_maps", "error_overlays", "error_parts", "fold_balance", "gains",
    "gallery", "hesitations", "mean_mask", "odd_masks", "predicted_outlines", "save", "save_errors", "test_areas",
    "train_live", "training_curves", "turntable", "variant_text", "write_report",
]  # fmt: skip
