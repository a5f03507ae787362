"""From checkpoints to logits and run lengths."""

from carvana.inference.ensemble import Ensemble, EnsembleSpec, parse_tta
from carvana.inference.predict import Options, predict_probabilities, predict_run_lengths

__all__ = ["Ensemble", "EnsembleSpec", "Options", "parse_tta", "predict_probabilities", "predict_run_lengths"]
