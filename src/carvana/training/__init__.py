"""From images and folds to checkpoints."""

from carvana.training.recipe import Recipe
from carvana.training.trainer import Trainer

__all__ = ["Recipe", "Trainer"]
