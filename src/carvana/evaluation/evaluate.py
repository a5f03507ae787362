"""Out-of-fold scores at full size, what each tta, fold and run adds, and the ensemble that follows."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from carvana import metrics
from carvana.data.competition import Competition
from carvana.data.folds import HOLDOUT
from carvana.errors import UserError
from carvana.evaluation.label_issues import label_issues
from carvana.evaluation.scoring import Evaluation, FoldScorer
from carvana.files import write_text
from carvana.inference.ensemble import Ensemble, EnsembleSpec
from carvana.inference.predict import predict_probabilities
from carvana.members import shared_checkpoints, shared_folds
from carvana.run import Run
from carvana.tracking import Point, Tracking


def evaluate(runs: list[Run], competition: Competition, tta: list[str], batch_size: int = 8) -> Evaluation:
    """Score every image by networks that have not seen its car.

    Columns of the scores: img, car, view, fold, dice, iou (of the blend of all runs and tta), area, predicted_area, the
    parts of the error in pixels (see metrics.error_anatomy), disputed and sure (see `label_issue_pixels`),
    `dice:VARIANT` for every simpler variant (without a tta, a single run, a single fold for held-out cars), and
    `try:WEIGHTS@THRESHOLD` for other weights of the runs and thresholds, for `choose_settings`. Each fold is kept in
    the first run's folder: a kill costs one.

    Cars of fold -1 are scored by all folds together. UserError where runs have other folds, or where every mask is
    empty.
    """
    samples, evaluations = competition.samples, []
    fold_of, checkpoints = _fold_of(runs, samples["car"]), shared_checkpoints(runs)
    for run in runs:
        _say_unfinished(run)
    folds = list(checkpoints)
    present = [fold for fold in [*folds, HOLDOUT] if (fold_of == fold).any()]
    if not present:
        cars = f"no image of the cars that {runs[0].folder} has networks for"
        raise UserError(f"{competition.folder} has {cars}. Give the data_dir that it was trained on.")
    for fold in present:
        scorer = FoldScorer(runs, folds, fold, unseen_by(checkpoints, fold), tta)
        evaluations.append(scorer.score(competition, samples[fold_of == fold], batch_size))
    scores = pd.concat([evaluation.scores for evaluation in evaluations], ignore_index=True)
    if not scores["predicted_area"].any():
        raise UserError(
            f"Every predicted mask of {runs[0].folder} is empty. Look at history.csv: a loss that stands still asks "
            "for a lower lr or another loss, a Dice of 0 from the start for masks that fit their images (02_explore)."
        )
    error_maps: dict[int, np.ndarray] = {}
    for evaluation in evaluations:
        for view, sums in evaluation.error_maps.items():
            error_maps[view] = error_maps.get(view, 0) + sums
    return Evaluation(scores.sort_values("img", ignore_index=True), error_maps)


def predict_out_of_fold(
    runs: list[Run], competition: Competition, names: Iterable[str], tta: list[str], batch_size: int = 8
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and probability of car, (H, W) float32, of a few training images, by networks that have not seen their cars.

    They come fold by fold, not in the order of `names`.
    """
    samples = competition.samples[competition.samples["img"].isin(set(names))]
    for fold, of_fold in samples.groupby(_fold_of(runs, samples["car"])):
        ensemble = unseeing_ensemble(runs, fold, tta)
        of_names = of_fold["img"].tolist()
        probabilities = predict_probabilities(ensemble, competition.train_images, of_names, batch_size)
        yield from zip(of_names, probabilities, strict=True)


def unseeing_ensemble(runs: list[Run], fold: int, tta: list[str]) -> Ensemble:
    """The networks of all runs that have not seen the cars of `fold`, as equals."""
    return Ensemble(EnsembleSpec.equal(unseen_by(shared_checkpoints(runs), fold), tta))


def _say_unfinished(run: Run) -> None:
    epochs = run.note("run").get("parameters", {}).get("epochs", 0)
    for fold, epoch in run.epochs_done().items():
        if epoch < epochs:
            print(f"{run.fold_dir(fold)} has trained {epoch} of {epochs} epochs: 03_train goes on with it.")


def _fold_of(runs: list[Run], cars: pd.Series) -> pd.Series:
    return cars.map(shared_folds(runs).set_index("car")["fold"])


def unseen_by(checkpoints: dict[int, list[Path]], fold: int) -> list[Path]:
    """The checkpoints that have not seen the cars of `fold`, fold by fold: for held-out cars all."""
    return [path for number, paths in checkpoints.items() if fold in (number, HOLDOUT) for path in paths]


def gains(scores: pd.DataFrame) -> pd.DataFrame:
    """What the whole ensemble gains over each simpler variant: mean Dice of both, gain, its paired 95 % interval.

    Both have equal weights and 0.5, but for the variant "equal": what other weights or another threshold gain.
    """
    rows = []
    for column in scores.columns[scores.columns.str.startswith("dice:")]:
        scored = scores[scores[column].notna()]
        whole = scored["dice" if column == "dice:equal" else _dice_of_equals(scores)]
        gain = metrics.mean_over_cars(whole - scored[column], scored["car"])
        variant = column.removeprefix("dice:")
        rows.append((variant, scored[column].mean(), whole.mean(), *gain, len(scored)))
    return pd.DataFrame(rows, columns=["variant", "dice", "ensemble", "gain", "low", "high", "images"])


def _dice_of_equals(scores: pd.DataFrame) -> str:
    """The column of Dice with equal weights at 0.5."""
    return "dice:equal" if "dice:equal" in scores else "dice"


def by_threshold(scores: pd.DataFrame) -> pd.DataFrame:
    """All runs as equals, cut at each threshold: threshold, mean Dice, gain over 0.5 and its paired 95 % interval."""
    columns = {float(name.partition("@")[2]): name for name in scores.columns if name.startswith("try:")}
    rows = []
    half = _dice_of_equals(scores)
    for threshold, column in sorted((columns | {0.5: half}).items()):
        gain = metrics.mean_over_cars(scores[column] - scores[half], scores["car"])
        rows.append((threshold, scores[column].mean(), *gain))
    return pd.DataFrame(rows, columns=["threshold", "dice", "gain", "low", "high"])


@dataclass(frozen=True)
class Settings:
    """Weights of runs and the threshold that an ensemble is used with, and what choosing them gains on unseen cars."""

    weights: list[float]
    threshold: float
    gain: metrics.Interval = metrics.Interval(0.0, 0.0, 0.0)


def choose_settings(scores: pd.DataFrame, n_runs: int) -> tuple[Settings, pd.DataFrame]:
    """The weights and threshold with the best out-of-fold Dice, where the choice surely gains; and scores with them.

    The gain is honest: what is used on a fold was chosen on the other folds. It is sure where its paired 99 % interval
    lies above 0: one candidate of many is chosen in each fold, so 95 % would be wrong for 5 to 9 % of useless choices
    (99 %: 0.5 to 1.5 %, and up to 4 % where few cars decide). In the scores, `dice` and `iou` are then those of the
    chosen settings, honest in the same way, and `dice:equal` those of equal weights at 0.5.
    """
    equal = Settings([1 / n_runs] * n_runs, 0.5)
    scored = scores[scores["fold"] != HOLDOUT]
    columns = ["dice", *scored.columns[scored.columns.str.startswith("try:")]]
    if scored["fold"].nunique() < 2:
        return equal, scores
    best = str(scored[columns].mean().idxmax())
    honest = scores[best].copy()  # for cars that no fold has seen
    for fold, of_fold in scored.groupby("fold"):
        honest[of_fold.index] = of_fold[scored.loc[scored["fold"] != fold, columns].mean().idxmax()]
    gain = metrics.mean_over_cars((honest - scores["dice"])[scored.index], scored["car"], level=0.99)
    if not gain.low > 0 or best == "dice":
        return replace(equal, gain=gain), scores
    texts, threshold = best.removeprefix("try:").split("@")
    weights = [float(text) for text in texts.split(",")]
    chosen = Settings([weight / sum(weights) for weight in weights], float(threshold), gain)
    return chosen, scores.assign(**{"dice": honest, "iou": honest / (2 - honest), "dice:equal": scores["dice"]})


def write_results(run: Run, scores: pd.DataFrame, runs: list[Run], tta: list[str], settings: Settings) -> None:
    """Write scores.csv, quality.csv (see `label_issues`) and ensemble.json of `run`.

    The ensemble is every shared fold of every one of `runs`, with `settings`.
    """
    write_text(run.scores_path, scores.to_csv(index=False))
    write_text(run.quality_path, label_issues(scores, run.quality()).to_csv(index=False))
    by_fold = shared_checkpoints(runs)
    checkpoints = [by_fold[fold][i] for i in range(len(runs)) for fold in by_fold]
    weights = [weight / len(by_fold) for weight in settings.weights for _ in by_fold]
    EnsembleSpec(checkpoints, weights, tta, settings.threshold).write(run.ensemble_path)


def log_scores(tracker: str, run: Run, scores: pd.DataFrame, settings: Settings) -> None:
    """Log mean Dice and IoU with their intervals, and the threshold; tracker: where, see `tracking`.

    A run's evaluations are numbered, from 0.
    """
    values, unseen = {"threshold": settings.threshold}, scores["fold"] == HOLDOUT
    for label, rows in {"out_of_fold": scores[~unseen], "unseen": scores[unseen]}.items():
        for name in ("dice", "iou") if len(rows) else ():
            interval = metrics.score_over_cars(rows[name], rows["car"])
            values |= {f"{label}/{name}_{end}": value for end, value in interval._asdict().items()}
    with closing(Tracking(tracker, run, run.evaluation_dir)) as tracking:
        number = max(tracking.note["logged"].values(), default=0)
        tracking.log(number, [Point(number, values)])
