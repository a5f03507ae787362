"""Starts the training of a fold: here, or in several processes that share it.

`python -m carvana.training.launch` is one of these processes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from carvana.data.competition import Competition
from carvana.device import connected, process_count
from carvana.errors import UserError
from carvana.parallel import Processes, exit_code, launch
from carvana.run import Run
from carvana.training.recipe import Recipe
from carvana.training.trainer import Trainer


def train(
    trainer: Trainer, max_hours: float = 0, workers: int = -1, on_epoch: Callable[[], None] = lambda: None
) -> pd.DataFrame:  # fmt: skip
    """Train a fold to its end, or until `max_hours` are over; returns the history, a row per validation.

    workers: processes that prepare images; -1 takes what suits the device. on_epoch: called whenever the fold's folder
    may hold more to look at; what it takes, the training waits.
    """
    run, state = trainer.run, trainer.state
    if not state.step and not trainer.rank:
        numbers = trainer.folds["fold"]
        split = {"n_folds": int(numbers.max()) + 1, "holdout_cars": int((numbers < 0).sum())}
        run.write_start(vars(trainer.recipe) | trainer.competition.parameters | split, trainer.source.key)
    try:
        if trainer.processes.count > 1 and not connected():
            values = json.dumps(vars(trainer.recipe) | trainer.competition.parameters)
            arguments = [run.folder, trainer.fold, values, max_hours, workers]
            launch("carvana.training.launch", arguments, trainer.processes, on_epoch)
            state.resume()
        else:
            trainer.fit(max_hours, workers, on_epoch)
    except torch.OutOfMemoryError as error:
        advice = "Halve batch_size and double accumulate, or lower height and width."
        raise UserError(f"The device is out of memory. {advice}") from error
    return trainer.history


def main(folder: str, fold: str, values: str, max_hours: str, workers: str) -> None:
    """Train a fold of the run in `folder`, which has begun, as one of the processes that share it.

    values: the recipe and `Competition.parameters`, as JSON.
    """
    run, parameters = Run(Path(folder).parent, Path(folder).name), json.loads(values)
    recipe = Recipe.from_parameters(parameters)
    competition = Competition(parameters["data_dir"], parameters["hq"], parameters["exclude"])
    trainer = Trainer(run, competition, recipe, int(fold), Processes(process_count()))
    train(trainer, float(max_hours), int(workers))
    trainer.state.accelerator.end_training()  # a connection that is still open at the end may abort the process


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(*sys.argv[1:])))
