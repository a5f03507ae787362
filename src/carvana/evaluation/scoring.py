"""What the networks of a fold say of each of its images: scores, where errors are, where all contradict the mask."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from carvana import metrics
from carvana.data.competition import Competition
from carvana.data.folds import HOLDOUT
from carvana.data.images import mask_of
from carvana.errors import UserError
from carvana.evaluation.label_issues import CONFIDENCE, PATCH, label_issue_pixels
from carvana.files import UNREADABLE, atomic, fingerprint, sha256, write_text
from carvana.grid import resize
from carvana.inference.ensemble import Ensemble, EnsembleSpec
from carvana.inference.loader import Batch, InferenceDataset, in_batches, predict_batches
from carvana.inference.logits import BlendedLogits, blend
from carvana.parallel import overlapped, progress
from carvana.run import Run, read_csv

THRESHOLDS = 0.35, 0.4, 0.45, 0.55, 0.6, 0.65  # that are tried beside 0.5
MAP = 128, 192  # rows and columns of error maps, whatever the size of the images


class Evaluation(NamedTuple):
    """A row of scores for every image, and for every view where its errors are, summed over its images.

    error_maps: (3, *MAP) float32, false negatives, false positives and true car at each place.
    """

    scores: pd.DataFrame
    error_maps: dict[int, np.ndarray]


@dataclass(frozen=True)
class FoldScorer:
    """The networks that score the images of a fold: of all `runs` those of the fold, or for held-out cars of `folds`.

    checkpoints: fold by fold and within it run by run.
    """

    runs: list[Run]
    folds: list[int]
    fold: int
    checkpoints: list[Path]
    tta: list[str]

    def score(self, competition: Competition, samples: pd.DataFrame, batch_size: int) -> Evaluation:
        """Scores of the fold's `samples`, as `evaluate` returns them for all folds.

        Kept in the first run's folder and read again there, for the same checkpoints, tta, masks and images.
        """
        names = [run.name for run in self.runs], self.folds if self.fold == HOLDOUT else []
        truth, settings = samples[["img", "rle"]].to_numpy().tolist(), (THRESHOLDS, MAP, CONFIDENCE, PATCH)
        hashes = [sha256(path) for path in self.checkpoints]
        images = competition.train_images.stamp(samples["img"])
        key = fingerprint(hashes, names, self.tta, truth, images, settings)
        folder = self.runs[0].fold_dir(self.fold)
        path, errors = folder / f"scores-{key}.csv", folder / f"errors-{key}.npz"
        if kept := _read_kept(path, errors):
            return kept
        evaluation = self._score_all(competition, samples, batch_size)
        write_text(path, evaluation.scores.to_csv(index=False))
        with atomic(errors) as file:
            views, sums = zip(*evaluation.error_maps.items(), strict=True)
            np.savez_compressed(file, views=views, sums=np.array(sums), sha256=sha256(path))
        return evaluation

    def _score_all(self, competition: Competition, samples: pd.DataFrame, batch_size: int) -> Evaluation:
        """Scored on all cores while the networks go on with the next batch."""
        ensemble = Ensemble(EnsembleSpec.equal(self.checkpoints, self.tta))
        rows: list[dict[str, Any]] = []
        error_maps: dict[int, np.ndarray] = {}
        dataset = InferenceDataset(competition.train_images, samples["img"].tolist(), ensemble.sizes)
        batches = predict_batches(ensemble, dataset, in_batches(len(samples), batch_size))
        images = (image for batch in batches for image in self._images(batch, samples.iloc[batch.rows]))
        what = f"scoring {self.runs[0].fold_dir(self.fold).name}"
        for row, errors in progress(overlapped(self._score, images), what, total=len(samples)):
            rows.append(row)
            error_maps[row["view"]] = error_maps.get(row["view"], 0) + errors
        scores = pd.DataFrame(rows)
        scores.insert(3, "fold", self.fold)
        return Evaluation(scores, error_maps)

    def _images(self, batch: Batch, samples: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
        """What `_score` needs of each image of a batch."""
        variants, (least, most) = self._variants(batch.logits), extremes(batch.logits)
        for i, sample in enumerate(samples.itertuples()):
            yield sample, {name: blended[i] for name, blended in variants.items()}, least[i], most[i]

    def _score(
        self, sample: Any, variants: dict[str, BlendedLogits], least: BlendedLogits, most: BlendedLogits
    ) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
        """A row of the table and the error map of an image."""
        true = mask_of(sample)
        logits = variants["dice"].enlarge(true.shape)
        predicted, equal = logits > 0, (1 / len(self.runs),) * len(self.runs)
        counts = metrics.pixel_counts(predicted, true)
        row = {"img": sample.img, "car": sample.car, "view": sample.view}
        row |= {"dice": float(metrics.dice(counts)), "iou": float(metrics.iou(counts))}
        row |= {"area": counts.true / true.size, "predicted_area": counts.predicted / true.size}
        row |= metrics.error_anatomy(predicted, true)
        for threshold in THRESHOLDS:
            row[column(equal, threshold)] = _dice(logits > math.log(threshold / (1 - threshold)), true)
        simpler = {name: blended for name, blended in variants.items() if name != "dice"}
        row |= {name: _dice(blended.enlarge(true.shape) > 0, true) for name, blended in simpler.items()}
        return row | label_issue_pixels(least, most, true), error_map(predicted, true)

    def _variants(self, logits: list[torch.Tensor]) -> dict[str, list[BlendedLogits]]:
        """A batch's blended logits by column: the ensemble, every simpler variant, every other weighting."""
        n, size = len(logits), len(self.runs)
        equal = [1 / n] * n
        variants = {"dice": blend(logits, equal)}
        for i, name in enumerate(self.tta if len(self.tta) > 1 else ()):
            others = [j for j in range(len(self.tta)) if j != i]
            variants[f"dice:without {name}"] = blend([of_network[others] for of_network in logits], equal)
        for i, run in enumerate(self.runs if size > 1 else ()):
            variants[f"dice:{run.name}"] = blend(logits[i::size], [size / n] * (n // size))
        for i, fold in enumerate(self.folds if self.fold == HOLDOUT and len(self.folds) > 1 else ()):
            variants[f"dice:fold {fold}"] = blend(logits[i * size :][:size], [1 / size] * size)
        for weights in weightings(size):
            of_checkpoints = [weights[i % size] * size / n for i in range(n)]
            variants[column(weights, 0.5)] = blend(logits, of_checkpoints)
        return variants


def _read_kept(path: Path, errors: Path) -> Evaluation | None:
    """Scores and error maps of an earlier call; None where they are missing, damaged or not as they were written."""
    with suppress(*UNREADABLE, UserError, KeyError, ValueError), np.load(errors) as kept:
        if str(kept["sha256"]) == sha256(path):
            error_maps = dict(zip(kept["views"].tolist(), kept["sums"], strict=True))
            return Evaluation(read_csv(path, "img", "car", "view", "fold", "dice"), error_maps)
    return None


def _dice(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(metrics.dice(metrics.pixel_counts(predicted, true)))


def error_map(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Shares of false negatives, false positives and true car at each place: (H, W) bool twice -> (3, *MAP) float32."""
    parts = true & ~predicted, predicted & ~true, true
    return np.stack([resize(part.astype(np.float32), *MAP) for part in parts])


def extremes(logits: Sequence[torch.Tensor]) -> tuple[list[BlendedLogits], list[BlendedLogits]]:
    """The lowest and the highest logits of all networks and tta, for each image of a batch.

    logits: (tta, B, h, w) for each network.
    """
    sizes = sorted({of_network.shape[2:] for of_network in logits})
    by_size = [torch.cat([of_network for of_network in logits if of_network.shape[2:] == size]) for size in sizes]
    lowest, highest = ([reduce(part, 0).cpu().numpy() for part in by_size] for reduce in (torch.amin, torch.amax))
    least, most = ([BlendedLogits(of_image) for of_image in zip(*maps, strict=True)] for maps in (lowest, highest))
    return least, most


def weightings(n_runs: int) -> list[tuple[float, ...]]:
    """Weights of two or three runs in quarters, each run taking part; more runs are blended as equals."""
    if n_runs not in (2, 3):
        return []
    return [tuple(q / 4 for q in quarters) for quarters in product((1, 2, 3), repeat=n_runs) if sum(quarters) == 4]


def column(weights: Sequence[float], threshold: float) -> str:
    """Name of the column of scores that holds the Dice with these weights of the runs and this threshold."""
    return f"try:{','.join(f'{weight:g}' for weight in weights)}@{threshold:g}"
