"""A run's folder: the only place that knows the names of its files, and reads and writes its tables and notes."""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pandas as pd
from pydantic import Field
from typing_extensions import TypedDict  # pydantic's demand on Python 3.11

from carvana.data.folds import HOLDOUT, make_folds
from carvana.errors import UserError
from carvana.files import project_root, read_json, resolve, write_json, write_text
from carvana.metrics import ERROR_PARTS, mean_over_cars, score_over_cars
from carvana.parallel import cores
from carvana.profiles import NAME, TTA, check

PACKAGES = ("torch", "segmentation-models-pytorch", "timm", "accelerate", "albumentations", "numpy", "simplejpeg")
FOLDS, ENSEMBLE = "folds.csv", "ensemble.json"
TYPES = {  # of columns of a run's tables; what is not named here may hold anything
    **dict.fromkeys(("img", "car", "exclude", "test_dir", "key"), str),
    **dict.fromkeys(("fold", "view", "epoch", *ERROR_PARTS, "disputed", "crc32"), int),
    **dict.fromkeys(("dice", "iou", "area", "predicted_area", "seconds"), float),
}


class Member(TypedDict):
    """A checkpoint of an ensemble, its path relative to ensemble.json."""

    path: str
    weight: Annotated[float, Field(ge=0, le=1)]


class EnsembleNote(TypedDict):
    """What ensemble.json holds, which people may edit; more may stand there."""

    members: Annotated[list[Member], Field(min_length=1)]
    views: Annotated[list[Annotated[str, Field(pattern=f"^({TTA})$")]], Field(min_length=1)]
    threshold: Annotated[float, Field(gt=0, lt=1)]


class StepNote(TypedDict):
    """What steps.json holds of a step."""

    key: NotRequired[str]
    seconds: float


class Facts(TypedDict, total=False):
    """What run.json (parameters) and submission.json hold; more may stand there."""

    parameters: dict[str, Any]
    versions: dict[str, str]
    path: str
    rows: int
    true_dice: float


NOTES: dict[str, Any] = {"steps": dict[str, StepNote], "submission": Facts, "run": Facts}


class Run:
    """The folder `runs_dir`/`run_name`. Making one reads and writes nothing."""

    def __init__(self, runs_dir: str | Path, run_name: str):
        check({"run_name": run_name})
        self.runs_dir, self.name = resolve(runs_dir), run_name
        self.folder = self.runs_dir / run_name
        self.cache_dir = self.runs_dir / "cache"  # of training samples, for all runs
        self.shards_dir = self.folder / "parts"
        self.pseudo_path = self.folder / "pseudo" / "labels.csv"  # of the PNGs beside it
        self.evaluation_dir = self.folder / "evaluation"  # of its trackers
        self.worst_dir = self.folder / "figures" / "worst"
        self.folds_path = self.folder / FOLDS
        self.scores_path = self.folder / "scores.csv"
        self.quality_path = self.folder / "quality.csv"
        self.ensemble_path = self.folder / ENSEMBLE
        self.submission_path = self.folder / "submission.json"
        self.report_path = self.folder / "report.html"

    @staticmethod
    def trained(runs_dir: str | Path) -> list[str]:
        """Names of the runs in `runs_dir` that have a trained fold."""
        names = {path.parent.parent.name for path in resolve(runs_dir).glob("*/fold*/best.safetensors")}
        return sorted(name for name in names if re.fullmatch(NAME[0], name))

    def fold_dir(self, fold: int) -> Path:
        """Where a fold's files are; those of the cars that no fold sees have a folder of their own."""
        return self.folder / (f"fold{fold}" if fold != HOLDOUT else "holdout")

    def checkpoint(self, fold: int, kind: str = "best") -> Path:
        """The weights of a fold; kind: "best" or "last"."""
        return self.fold_dir(fold) / f"{kind}.safetensors"

    def checkpoints(self) -> dict[int, Path]:
        """Best checkpoint of every fold that has one; UserError where none has, or one is of an untrained network."""
        paths = {fold: self.checkpoint(fold) for fold in self._fold_dirs() if self.checkpoint(fold).exists()}
        if not paths:
            raise UserError(f"{self.folder} has no trained fold. Train with 03_train, or name another run.")
        if untrained := [fold for fold, epoch in self.epochs_done().items() if fold in paths and not epoch]:
            raise UserError(f"{self.fold_dir(untrained[0])} has not ended an epoch. Train or delete it.")
        return paths

    def epochs_done(self) -> dict[int, int]:
        """The last epoch in the history of every fold that has one."""
        return {int(fold): int(history["epoch"].max()) for fold, history in self.histories().items() if fold.isdigit()}

    def _fold_dirs(self) -> dict[int, Path]:
        """Folders of the run's own folds by number; a copy of a fold under another name is a person's own affair.

        UserError for one that folds.csv does not know: its network may have seen every car.
        """
        named = {path: re.fullmatch(r"fold(0|[1-9]\d{0,8})", path.name) for path in self.folder.glob("fold*/")}
        folders = {int(match[1]): path for path, match in named.items() if match}
        if self.folds_path.exists() and (strays := folders.keys() - set(self.folds()["fold"])):
            raise UserError(f"{folders[min(strays)]} is no fold of folds.csv. Rename or delete it.")
        return dict(sorted(folders.items()))

    def figure(self, name: str) -> Path:
        """Where the figure `name` is saved."""
        return self.folder / "figures" / f"{name}.png"

    def notebook(self, title: str) -> Path:
        """Where the executed notebook `title` is saved."""
        return self.folder / "notebooks" / f"{title}.ipynb"

    def split(self, samples: pd.DataFrame, n_folds: int, holdout_cars: int, seed: int) -> pd.DataFrame:
        """The run's folds.csv, written by whoever comes first: a table car, fold.

        UserError where it belongs to other cars or parameters.
        """
        path, folds = self.folds_path, make_folds(samples, n_folds, holdout_cars, seed)
        if not path.exists():
            write_text(path, folds.to_csv(index=False))
        if not self.folds().equals(folds):
            raise UserError(
                f"{path} was made with other cars, masks, exclude, n_folds, holdout_cars or seed. "
                "Choose another run_name, or delete the run to start it again."
            )
        return folds

    def folds(self) -> pd.DataFrame:
        """Table car, fold; UserError where the run has none."""
        path = self.folds_path
        if not path.exists():
            raise UserError(f"{path} does not exist. Train with 03_train first, or correct run_name or runs_dir.")
        return read_csv(path, "car", "fold")

    def histories(self) -> dict[str, pd.DataFrame]:
        """Histories by "0", "1", ...; where the run only blends others, those of its members, by "RUN/0", ..."""
        folders = list(self._fold_dirs().values())
        if not folders and self.ensemble_path.exists():
            folders = [path.parent for path in member_paths(self.ensemble_path)]
        histories = {}
        for path in (folder / "history.csv" for folder in folders):
            if path.exists():
                history = read_csv(path, "epoch", "dice", "seconds")
                prefix = "" if path.parent.parent == self.folder else f"{path.parent.parent.name}/"
                histories[prefix + path.parent.name.removeprefix("fold")] = history
        return dict(sorted(histories.items(), key=lambda item: (len(item[0]), item[0])))

    def cars_behind_soft_masks(self) -> set[str]:
        """Cars that the networks which made the run's soft masks have learnt from, as far as their runs are there."""
        note = self.pseudo_path.with_name(ENSEMBLE)
        folders = {path.parents[1] for path in member_paths(note)} if note.exists() else set()
        runs = [Run(folder.parent, folder.name) for folder in folders if (folder / FOLDS).exists()]
        runs = runs or [self] * self.folds_path.exists()
        return {car for run in runs for car in run.folds().query("fold >= 0")["car"]}

    def training_minutes(self) -> float:
        """Minutes that the run's own folds were trained, all together."""
        return sum(history["seconds"].max() for fold, history in self.histories().items() if fold.isdigit()) / 60

    def scores(self) -> pd.DataFrame:
        """A row a scored image, as `evaluation.evaluate` returns it; UserError where the run has none."""
        if not self.scores_path.exists():
            raise UserError(f"{self.scores_path} does not exist. Score the run with 04_evaluate first.")
        scores = read_csv(self.scores_path, "img", "car", "fold", "dice")
        if scores["img"].duplicated().any() or not scores["dice"].between(0, 1).all():
            raise UserError(f"{self.scores_path} names an image twice, or has a Dice outside 0 to 1. Run 04_evaluate.")
        return scores

    def out_of_fold_dice(self) -> float | None:
        """Mean Dice of the images that a fold has scored; None where the run has no scores."""
        if not self.scores_path.exists():
            return None
        scores = self.scores()
        return float(scores.loc[scores["fold"] >= 0, "dice"].mean())

    def quality(self) -> pd.DataFrame | None:
        """quality.csv with a person's marks in the column exclude; None where the run has none."""
        return read_csv(self.quality_path, "img", "exclude") if self.quality_path.exists() else None

    def write_start(self, parameters: dict[str, Any], data: str) -> None:
        """Write run.json: what the run starts with; data: fingerprint of its samples."""
        machine = {"system": platform.platform(), "processor": platform.processor(), "cores": cores()}
        versions = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
        facts = {"parameters": parameters, "data": data, "versions": versions, "commit": _commit(), "machine": machine}
        self.write_note("run", facts)

    def parameters(self) -> dict[str, Any]:
        """The parameters of training in run.json."""
        return self.note("run", "parameters")["parameters"]

    def note(self, name: str, *needed: str) -> dict[str, Any]:
        """What NAME.json of the run says, {} where it is not there; name: run, ensemble, submission or steps.

        UserError where it is damaged or lacks the keys `needed`; damaged steps are {}, for they are found anew.
        """
        path = self.folder / f"{name}.json"
        try:
            note = read_json(path, NOTES.get(name, dict[str, Any]))
        except UserError:
            if path.exists() and name != "steps":
                raise
            note = {}
        if lacking := [key for key in needed if key not in note]:
            raise UserError(f"{path} is not there or lacks {lacking[0]}. Delete it, then run its step again.")
        return note

    def write_note(self, name: str, facts: dict[str, Any]) -> None:
        """Write NAME.json."""
        write_json(self.folder / f"{name}.json", facts)

    def result_lines(self) -> Iterator[str]:
        """Where the submission, the notebooks and the scores are; last the true Dice where it is known."""
        submission = self.note("submission", "path", "rows")
        yield f"submission  {submission['path']} ({submission['rows']} images, valid)"
        yield f"notebooks   {self.folder / 'notebooks'}"
        yield f"scores      {self.scores_path}, report {self.report_path}"
        if "true_dice" in submission:
            yield f"true Dice {submission['true_dice']:.6f}"


def member_paths(ensemble: Path) -> list[Path]:
    """The checkpoints of an ensemble.json, there or not; UserError where it is missing or damaged."""
    members = read_json(ensemble, EnsembleNote)["members"]
    return [(ensemble.parent / member["path"]).resolve() for member in members]


def read_csv(path: Path, *needed: str) -> pd.DataFrame:
    """A table with the columns `needed`; UserError where it is missing or damaged, or cells are not of their TYPES."""
    ours = "exclude" not in needed  # to the other one people may add rows
    try:
        types = {name: kind for name, kind in TYPES.items() if ours or kind is str}
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
        table = table.fillna({"exclude": "", "test_dir": ""})  # may be empty; a car may be called NA
        typed = [name for name in (TYPES if ours else needed) if name in table]
        if lacking := [name for name in needed if name not in table]:
            raise ValueError(f"it has no column {lacking[0]}")
        if table[typed].isna().any(axis=None) or not isinstance(table.index, pd.RangeIndex):
            raise ValueError("it has cells that are empty or beyond the header")
        if ours and table.empty:
            raise ValueError("it has no rows")
        return table
    except (OSError, ValueError) as error:
        reason = f"{path} is not a table of {', '.join(needed)}: {' '.join(str(error).split())}"
        raise UserError(f"{reason}. Fix it, or delete it and run the step that writes it again.") from error


def _commit() -> str | None:
    if not shutil.which("git"):
        return None
    git = ["git", "-C", str(project_root()), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None


def compare(runs: list[Run]) -> pd.DataFrame:
    """Runs side by side on the images that all have scored out of fold, or all as held out, best first.

    Columns: run, dice with its 95 % interval (low, high), what the best run has more (behind) with the paired interval
    (least, most), images, and the minutes that its own folds were trained. UserError for a run without scores.csv.
    """
    tables = {run: run.scores().assign(held=lambda t: t["fold"] < 0).set_index(["img", "held"]) for run in runs}
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    if not common:
        raise UserError(f"{' and '.join(str(run.folder) for run in runs)} have scored no image in common.")
    tables = {run: table.loc[common] for run, table in tables.items()}
    best = max(tables.values(), key=lambda table: table["dice"].mean())
    rows = []
    for run, table in tables.items():
        dice = score_over_cars(table["dice"], table["car"])
        behind = mean_over_cars(best["dice"] - table["dice"], table["car"])
        rows.append((run.name, *dice, *behind, len(common), run.training_minutes()))
    columns = ["run", "dice", "low", "high", "behind", "least", "most", "images", "minutes"]
    return pd.DataFrame(rows, columns=columns).sort_values("behind", ignore_index=True)
