"""What every measurement needs: the machine in words, a tame allocator, a recipe, a training, and a result file."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from carvana import parallel
from carvana.data.competition import Competition
from carvana.files import write_json
from carvana.profiles import load_profile, with_defaults
from carvana.run import Run
from carvana.training.recipe import Recipe
from carvana.training.state import TrainState
from carvana.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"


def tame_allocator() -> None:
    """Start this program again with the allocator settings that `carvana run` gives to its notebooks."""
    if "MALLOC_TOP_PAD_" not in os.environ:
        parallel.tame_allocator()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def machine() -> str:
    """Processor or GPU, cores and torch, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = dict(line.replace("\t", "").split(": ", 1) for line in reversed(lines) if ": " in line)
    has = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    name = facts.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} cores, {' '.join(has) or 'no bf16'}, torch {torch.__version__}"


def recipe_of(profile: str = "", **changes: Any) -> Recipe:
    """The recipe of a profile, by default of the notebooks' defaults, with `changes`."""
    return Recipe.from_parameters(with_defaults(load_profile(profile) if profile else {}) | changes)


def trainer_in(
    run: Run, competition: Competition, recipe: Recipe, fold: int = 0, n_folds: int = 2, holdout_cars: int = 0
) -> Trainer:
    """Training of a fold of `run`, whose cars are split by seed 1."""
    run.split(competition.samples, n_folds, holdout_cars, 1)
    return Trainer(run, competition, recipe, fold)


def state_for_steps(recipe: Recipe) -> TrainState:
    """The state of a training that is never saved, to measure single steps of it."""
    return TrainState(recipe, fold=0, total_steps=1000, data="none", path=RESULTS / "never_saved.pt")


def write(name: str, results: dict[str, Any]) -> None:
    """Write bench/results/NAME.json, with the machine and the command, of folders elsewhere the names alone."""
    command = " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)])
    write_json(RESULTS / f"{name}.json", {"machine": machine(), "command": command} | results)
