"""Out-of-fold scores at full size, what each view, fold and run adds, and the ensemble that follows."""

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from carvana import metrics, rle
from carvana.files import UserError, fingerprint, progress, sha256, write_text
from carvana.folds import HOLDOUT, read_folds
from carvana.inference import Ensemble, Photographs, batched, blend, enlarged, in_batches, write_ensemble
from carvana.photos import Archive

THRESHOLDS = 0.35, 0.4, 0.45, 0.55, 0.6, 0.65  # that are tried beside 0.5


def finished_folds(run_dir: Path) -> dict[int, Path]:
    """Best checkpoint of every fold of a run that has one; UserError where the run has none."""
    found = {int(p.parent.name.removeprefix("fold")): p for p in sorted(run_dir.glob("fold*/best.safetensors"))}
    if not found:
        raise UserError(f"{run_dir} has no trained fold. Train with 03_train first, or correct run_name or members.")
    return found


def evaluate(run_dirs: list[Path], pictures: pd.DataFrame, photos: Archive, views: list[str], batch_size: int = 8):
    """Score every picture by models that have not seen its car; returns a table, a row per picture.

    Columns: img, car, view, fold, dice, iou (of the blend of all runs and views), area, predicted_area, the parts of
    the error in pixels (see metrics.error_anatomy), `dice:VARIANT` for every simpler variant (without a view, a single
    run, a single fold for held-out cars), and `try:WEIGHTS@THRESHOLD` for other weights of the runs and thresholds, for
    `best_settings`. Each fold is kept in the first run's folder: a kill costs one.

    pictures: table of photos.index. Cars of fold -1 are scored by all folds together. UserError where runs have other
    folds, or where every mask is empty.
    """
    folds = _same_folds(run_dirs)
    fold_of = pictures["car"].map(folds.set_index("car")["fold"])
    found, shared = checkpoints(run_dirs)
    tables = []
    for fold in [*shared, HOLDOUT] if (fold_of == HOLDOUT).any() else shared:
        members = [of_run[f] for f in ([fold] if fold != HOLDOUT else shared) for of_run in found]
        names = [run_dir.name for run_dir in run_dirs], shared
        table = _score_fold(run_dirs[0], members, names, pictures[fold_of == fold], photos, views, batch_size, fold)
        tables.append(table)
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


def _score_fold(run_dir, members, names, pictures, photos, views, batch_size, fold) -> pd.DataFrame:
    truth = pictures[["img", "rle"]].to_numpy().tolist()
    key = fingerprint([sha256(member) for member in members], names, views, truth, photos.stamp(), THRESHOLDS)
    path = run_dir / (f"fold{fold}" if fold != HOLDOUT else "holdout") / f"scores-{key}.csv"
    if path.exists():
        return pd.read_csv(path, dtype={"car": str})
    ensemble = Ensemble(members, [1 / len(members)] * len(members), views)
    rows = []
    with progress(None, f"scoring {path.parent.name}", total=len(pictures)) as bar:
        photographs = Photographs(photos, pictures["img"].tolist(), ensemble.sizes)
        for each, full, batch in batched(ensemble, photographs, in_batches(len(pictures), batch_size)):
            variants = _variants(each, views, *names, fold)
            for i, row in enumerate(batch):
                own = {name: [logits[i] for logits in blended] for name, blended in variants.items()}
                rows.append(_score(pictures.iloc[row], own, full[i], len(names[0])))
            bar.update(len(batch))
    table = pd.DataFrame(rows)
    table.insert(3, "fold", fold)
    write_text(path, table.to_csv(index=False))
    return table


def _variants(
    each: list[torch.Tensor], views: list[str], runs: list[str], folds: list[int], fold: int
) -> dict[str, list[np.ndarray]]:
    """Blended logits (B, h, w) of each size by column: the ensemble, every simpler variant, every other weighting."""
    n, equal = len(each), [1 / len(each)] * len(each)
    chosen = {"dice": (each, equal)}
    if len(views) > 1:
        rest = {view: [i for i, other in enumerate(views) if other != view] for view in views}
        chosen |= {f"dice:without {v}": ([logits[kept] for logits in each], equal) for v, kept in rest.items()}
    if len(runs) > 1:
        chosen |= {
            f"dice:{run}": (each[i :: len(runs)], [len(runs) / n] * (n // len(runs))) for i, run in enumerate(runs)
        }
    if fold == HOLDOUT:
        size = len(runs)
        chosen |= {f"dice:fold {f}": (each[i * size :][:size], [1 / size] * size) for i, f in enumerate(folds)}
    for weights in _weightings(len(runs)):
        of_members = [weights[i % len(runs)] * len(runs) / n for i in range(n)]
        chosen[_column(weights, 0.5)] = each, of_members
    return {
        name: [logits.cpu().numpy() for logits in blend(members, weights)]
        for name, (members, weights) in chosen.items()
    }


def _weightings(n_runs: int) -> list[tuple[float, ...]]:
    """Weights of two or three runs in quarters, each run taking part; more runs are blended as equals."""
    if n_runs not in (2, 3):
        return []
    return [tuple(q / 4 for q in quarters) for quarters in product((1, 2, 3), repeat=n_runs) if sum(quarters) == 4]


def _column(weights: tuple[float, ...], threshold: float) -> str:
    return f"try:{','.join(f'{weight:g}' for weight in weights)}@{threshold:g}"


def _score(picture: pd.Series, variants: dict[str, list[np.ndarray]], full: tuple[int, int], n_runs: int) -> dict:
    true = rle.decode(picture["rle"], *full)
    row = {"img": picture["img"], "car": picture["car"], "view": picture["view"]}
    for name, blended in variants.items():
        logits = enlarged(blended, full)
        predicted = logits > 0
        counts = metrics.counts(predicted, true)
        row[name] = float(metrics.dice(*counts))
        if name == "dice":
            row |= {"iou": float(metrics.iou(*counts))}
            row |= {"area": counts[2] / true.size, "predicted_area": counts[1] / true.size}
            row |= metrics.error_anatomy(predicted, true)
            for threshold in THRESHOLDS:
                cut = math.log(threshold / (1 - threshold))
                column = _column((1 / n_runs,) * n_runs, threshold)
                row[column] = float(metrics.dice(*metrics.counts(logits > cut, true)))
    return row


def gains(scores: pd.DataFrame) -> pd.DataFrame:
    """What the whole ensemble gains over each simpler variant: mean Dice of both, gain, its paired 95 % interval."""
    rows = []
    for column in scores.columns[scores.columns.str.startswith("dice:")]:
        known = scores[scores[column].notna()]
        gain, low, high = metrics.mean_over_cars(known["dice"] - known[column], known["car"])
        variant = column.removeprefix("dice:")
        rows.append((variant, known[column].mean(), known["dice"].mean(), gain, low, high, len(known)))
    return pd.DataFrame(rows, columns=["variant", "dice", "ensemble", "gain", "low", "high", "pictures"])


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
    """Write scores.csv and ensemble.json (every shared fold of every run, with `settings`) into `run_dir`."""
    write_text(run_dir / "scores.csv", scores.to_csv(index=False))
    found, shared = checkpoints(run_dirs)
    weighted = zip(found, settings.weights, strict=True)
    members = [(of_run[fold], weight / len(shared)) for of_run, weight in weighted for fold in shared]
    write_ensemble(run_dir / "ensemble.json", members, views, settings.threshold)
