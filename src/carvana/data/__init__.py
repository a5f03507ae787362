"""Images, masks, folds, and what is read from them."""

from carvana.data.competition import Competition, TestSet
from carvana.data.folds import HOLDOUT

__all__ = ["HOLDOUT", "Competition", "TestSet"]
