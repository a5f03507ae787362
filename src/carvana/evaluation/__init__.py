"""What checkpoints are worth on images that they have not seen."""

from carvana.evaluation.evaluate import (
    best_settings,
    by_threshold,
    evaluate,
    gains,
    predict_out_of_fold,
    write_results,
)
from carvana.evaluation.label_issues import label_issues

__all__ = [
    "best_settings", "by_threshold", "evaluate", "gains", "label_issues", "predict_out_of_fold", "write_results",
]  # fmt: skip
