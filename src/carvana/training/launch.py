"""Starts the training of a fold: here, or in several processes that share it.

`python -m carvana.training.launch` is one of these processes.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from carvana.data.competition import Competition
from carvana.device import connected, process_count
from carvana.errors import UserError
from carvana.parallel import launch
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
        if trainer.processes > 1 and not connected():
            options = ["--max-hours", max_hours, "--workers", workers]
            arguments = [run.runs_dir, run.name, trainer.fold, *options]
            launch("carvana.training.launch", arguments, trainer.processes, on_epoch)
            state.resume()
        else:
            trainer.fit(max_hours, workers, on_epoch)
    except torch.OutOfMemoryError as error:
        advice = "Lower batch_size and raise accumulate by as much, or lower height and width."
        raise UserError(f"The device is out of memory. {advice}") from error
    return trainer.history


def main(arguments: list[str] | None = None) -> int:
    """Train a fold of a run that has begun, as one of the processes that share it; 0 when done."""
    parser = argparse.ArgumentParser("carvana.training.launch", description=main.__doc__)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("run_name")
    parser.add_argument("fold", type=int)
    parser.add_argument("--max-hours", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=-1)
    options = parser.parse_args(arguments)
    run = Run(options.runs_dir, options.run_name)
    try:
        parameters = run.parameters()
        competition = Competition(*(parameters[name] for name in ("data_dir", "hq", "exclude")))
        recipe = Recipe.from_parameters(parameters)
        train(Trainer(run, competition, recipe, options.fold, process_count()), options.max_hours, options.workers)
    except UserError as error:
        print(f"carvana: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
