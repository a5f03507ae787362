"""Runs whose folds are blended: which they are, and what they must share."""

from pathlib import Path

import pandas as pd

from carvana.errors import UserError
from carvana.files import parse_list
from carvana.profiles import Values
from carvana.run import Run


def members_of(values: Values) -> list[Run]:
    """The runs that the parameter `members` names."""
    return [Run(values["runs_dir"], name) for name in parse_list(values["members"])]


def shared_folds(runs: list[Run]) -> pd.DataFrame:
    """Table car, fold that all runs share; UserError where one has other folds."""
    folds = runs[0].folds()
    for run in runs[1:]:
        if not run.folds().equals(folds):
            raise UserError(
                f"members: {run.folder} has other folds than {runs[0].folder}, so a blend would score cars that it has "
                "seen. Train them with the same n_folds, holdout_cars and seed."
            )
    return folds


def shared_checkpoints(runs: list[Run]) -> dict[int, list[Path]]:
    """Best checkpoints of the folds that all runs have trained, by fold, in the order of the runs."""
    by_run = [run.checkpoints() for run in runs]
    shared = sorted(set.intersection(*(set(by_fold) for by_fold in by_run)))
    return {fold: [by_fold[fold] for by_fold in by_run] for fold in shared}
