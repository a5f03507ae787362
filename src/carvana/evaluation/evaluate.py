"""Out-of-fold scores at full size, what each view, fold and run adds, and the ensemble that follows."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from carvana import metrics
from carvana.data.competition import Archive
from carvana.data.folds import HOLDOUT, read_folds
from carvana.evaluation.scoring import score_fold
from carvana.files import UserError, write_text
from carvana.inference.ensemble import write_ensemble


def finished_folds(run_dir: Path) -> dict[int, Path]:
    """Best checkpoint of every fold of a run that has one; UserError where the run has none."""
    found = {int(p.parent.name.removeprefix("fold")): p for p in sorted(run_dir.glob("fold*/best.safetensors"))}
    if not found:
        raise UserError(f"{run_dir} has no trained fold. Train with 03_train first, or correct run_name or members.")
    return found


def evaluate(
    run_dirs: list[Path],
    pictures: pd.DataFrame,
    photos: Archive,
    views: list[str],
    batch_size: int = 8,
    maps: dict[int, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Score every picture by models that have not seen its car; returns a table, a row per picture.

    Columns: img, car, view, fold, dice, iou (of the blend of all runs and views), area, predicted_area, the parts of
    the error in pixels (see metrics.error_anatomy), disputed and sure (see `disputed`), `dice:VARIANT` for every
    simpler variant (without a view, a single run, a single fold for held-out cars), and `try:WEIGHTS@THRESHOLD` for
    other weights of the runs and thresholds, for `best_settings`. Each fold is kept in the first run's folder: a kill
    costs one.

    pictures: table of photos.index. Cars of fold -1 are scored by all folds together. maps: receives for every view
    (3, *MAP) float32, sums over its pictures of what is missed, extra and truly car at each place. UserError where runs
    have other folds, or where every mask is empty.
    """
    folds = _same_folds(run_dirs)
    fold_of = pictures["car"].map(folds.set_index("car")["fold"])
    found, shared = checkpoints(run_dirs)
    tables = []
    for fold in [*shared, HOLDOUT] if (fold_of == HOLDOUT).any() else shared:
        members = [of_run[f] for f in ([fold] if fold != HOLDOUT else shared) for of_run in found]
        names = [run_dir.name for run_dir in run_dirs], shared
        table, sums = score_fold(
            run_dirs[0], members, names, pictures[fold_of == fold], photos, views, batch_size, fold
        )
        tables.append(table)
        for view, own in sums.items() if maps is not None else ():
            maps[view] = maps.get(view, 0) + own
    scores = pd.concat(tables, ignore_index=True)
    if not scores["predicted_area"].any():
        raise UserError(
            f"Every predicted mask of {run_dirs[0]} is empty. Look at history.csv: a loss that stands still asks for a "
            "lower lr or another loss, a Dice of 0 from the start for masks that fit their pictures (02_explore)."
        )
    return scores.sort_values("img", ignore_index=True)


def checkpoints(run_dirs: list[Path]) -> tuple[list[dict[int, Path]], list[int]]:
    """Every run's best checkpoints by fold, and the folds that all runs have finished."""
    found = [finished_folds(run_dir) for run_dir in run_dirs]
    return found, sorted(set.intersection(*(set(of_run) for of_run in found)))


def _same_folds(run_dirs: list[Path]) -> pd.DataFrame:
    folds = read_folds(run_dirs[0])
    for other in run_dirs[1:]:
        if not read_folds(other).equals(folds):
            raise UserError(
                f"members: {other} has other folds than {run_dirs[0]}, so a blend would score cars that it has seen. "
                "Train them with the same n_folds, holdout_cars and seed."
            )
    return folds


def gains(scores: pd.DataFrame) -> pd.DataFrame:
    """What the whole ensemble gains over each simpler variant: mean Dice of both, gain, its paired 95 % interval."""
    rows = []
    for column in scores.columns[scores.columns.str.startswith("dice:")]:
        known = scores[scores[column].notna()]
        gain, low, high = metrics.mean_over_cars(known["dice"] - known[column], known["car"])
        variant = column.removeprefix("dice:")
        rows.append((variant, known[column].mean(), known["dice"].mean(), gain, low, high, len(known)))
    return pd.DataFrame(rows, columns=["variant", "dice", "ensemble", "gain", "low", "high", "pictures"])


def by_threshold(scores: pd.DataFrame) -> pd.DataFrame:
    """The whole ensemble cut at each threshold: threshold, mean Dice, gain over 0.5 and its paired 95 % interval."""
    columns = {float(name.partition("@")[2]): name for name in scores.columns if name.startswith("try:")}
    rows = []
    for threshold, column in sorted((columns | {0.5: "dice"}).items()):
        gain = metrics.mean_over_cars(scores[column] - scores["dice"], scores["car"])
        rows.append((threshold, scores[column].mean(), *gain))
    return pd.DataFrame(rows, columns=["threshold", "dice", "gain", "low", "high"])


def audit(scores: pd.DataFrame, earlier: pd.DataFrame | None = None) -> pd.DataFrame:
    """Pictures whose mask every network contradicts (`scoring.disputed`), most disputed first, for a person to judge.

    Columns: img, car, view, fold, dice, disputed, sure, and exclude, empty: a mark in it leaves the picture out where
    the table is given as `exclude`. Marks of an `earlier` table stay, also those of pictures that were left out.
    """
    columns = ["img", "car", "view", "fold", "dice", "disputed", "sure"]
    found = scores.loc[scores["disputed"] > 0, columns].assign(exclude="")
    if earlier is not None:
        marked = earlier[earlier["exclude"] != ""]
        marks = dict(zip(marked["img"], marked["exclude"], strict=True))
        found["exclude"] = [marks.get(name, "") for name in found["img"]]
        found = pd.concat([found, marked[~marked["img"].isin(found["img"])]])
    return found.sort_values("disputed", ascending=False, ignore_index=True)


def compare(run_dirs: list[Path]) -> pd.DataFrame:
    """Runs side by side on the pictures that all of them have scored, best first.

    Columns: run, dice with its 95 % interval (low, high), what the best run has more (behind) with the paired interval
    (least, most), pictures, and the minutes that its own folds were trained. UserError for a run without scores.csv.
    """
    tables = {run_dir: _scored(run_dir) for run_dir in run_dirs}
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    if not common:
        raise UserError(f"{' and '.join(str(run_dir) for run_dir in run_dirs)} have scored no picture in common.")
    tables = {run_dir: table.loc[common] for run_dir, table in tables.items()}
    best = max(tables.values(), key=lambda table: table["dice"].mean())
    rows = []
    for run_dir, table in tables.items():
        mean, low, high = metrics.mean_over_cars(table["dice"], table["car"])
        behind, least, most = metrics.mean_over_cars(best["dice"] - table["dice"], table["car"])
        minutes = sum(pd.read_csv(path)["seconds"].max() for path in run_dir.glob("fold*/history.csv")) / 60
        rows.append((run_dir.name, mean, low, high, behind, least, most, len(common), minutes))
    columns = ["run", "dice", "low", "high", "behind", "least", "most", "pictures", "minutes"]
    return pd.DataFrame(rows, columns=columns).sort_values("behind", ignore_index=True)


def _scored(run_dir: Path) -> pd.DataFrame:
    path = run_dir / "scores.csv"
    if not path.exists():
        raise UserError(f"{path} does not exist. Score the run with 04_evaluate first.")
    return pd.read_csv(path, usecols=["img", "car", "dice"], dtype={"car": str}).set_index("img")


@dataclass(frozen=True)
class Settings:
    """Weights of runs and the threshold that an ensemble is used with, and what they gain over equal ones at 0.5."""

    weights: list[float]
    threshold: float
    gain: float = 0.0
    low: float = 0.0
    high: float = 0.0


def best_settings(scores: pd.DataFrame, n_runs: int) -> Settings:
    """The weights and threshold with the best out-of-fold Dice, where the search itself surely gains; else equal ones.

    The gain is honest: what is used on a fold was chosen on the other folds. Its 95 % interval is paired, over cars.
    """
    equal = Settings([1 / n_runs] * n_runs, 0.5)
    scored = scores[scores["fold"] != HOLDOUT]
    columns = ["dice", *scored.columns[scored.columns.str.startswith("try:")]]
    if scored["fold"].nunique() < 2:
        return equal
    honest = scored["dice"].copy()
    for fold, own in scored.groupby("fold"):
        best = scored.loc[scored["fold"] != fold, columns].mean().idxmax()
        honest[own.index] = own[best]
    gain, low, high = metrics.mean_over_cars(honest - scored["dice"], scored["car"])
    best = scored[columns].mean().idxmax()
    if low <= 0 or best == "dice":
        return replace(equal, gain=gain, low=low, high=high)
    texts, threshold = best.removeprefix("try:").split("@")
    weights = [float(text) for text in texts.split(",")]
    return Settings([weight / sum(weights) for weight in weights], float(threshold), gain, low, high)


def write_results(
    run_dir: Path, scores: pd.DataFrame, run_dirs: list[Path], views: list[str], settings: Settings
) -> None:
    """Write scores.csv, quality.csv (see `audit`) and ensemble.json into `run_dir`.

    The ensemble is every shared fold of every run, with `settings`.
    """
    write_text(run_dir / "scores.csv", scores.to_csv(index=False))
    quality = run_dir / "quality.csv"
    kinds = {"car": str, "exclude": str}
    earlier = pd.read_csv(quality, dtype=kinds).fillna({"exclude": ""}) if quality.exists() else None
    write_text(quality, audit(scores, earlier).to_csv(index=False))
    found, shared = checkpoints(run_dirs)
    weighted = zip(found, settings.weights, strict=True)
    members = [(of_run[fold], weight / len(shared)) for of_run, weight in weighted for fold in shared]
    write_ensemble(run_dir / "ensemble.json", members, views, settings.threshold)
