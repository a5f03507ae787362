"""What checkpoints are worth on images that they have not seen."""

from carvana.evaluation.evaluate import (
    by_threshold,
    choose_settings,
    evaluate,
    gains,
    log_scores,
    predict_out_of_fold,
    write_results,
)
from carvana.evaluation.label_issues import label_issues

__all__ = [
    "by_threshold", "choose_settings", "evaluate", "gains", "label_issues", "log_scores", "predict_out_of_fold",
    "write_results",
]  # fmt: skip
