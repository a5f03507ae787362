"""What the networks of a fold say of each of its pictures: scores, where errors are, where all contradict the mask."""

import math
from collections.abc import Iterator
from itertools import product

import cv2
import numpy as np
import pandas as pd
import torch

from carvana import metrics, rle
from carvana.data.folds import HOLDOUT
from carvana.files import atomic, fingerprint, progress, sha256, write_text
from carvana.grid import resize
from carvana.inference.ensemble import Ensemble, Photographs, batched, blend, enlarged, in_batches

THRESHOLDS = 0.35, 0.4, 0.45, 0.55, 0.6, 0.65  # that are tried beside 0.5
MAP = 128, 192  # rows and columns of error maps, whatever the size of the pictures
SURE = 0.9  # probability from which a network contradicts a mask
PATCH = 5  # pixels a contradicted patch is wide and high at least: edges are soft, labels are not wrong for that


def score_fold(
    run_dir, members, names, pictures, photos, views, batch_size, fold
) -> tuple[pd.DataFrame, dict[int, np.ndarray]]:
    """Scores of a fold's pictures and their errors summed by view, as `evaluation.evaluate` returns them for all folds.

    Kept in `run_dir` and read again there, for the same members, views, masks and photographs. members: checkpoints,
    fold by fold and within it run by run; names: the runs' names and the folds, for the names of variants.
    """
    truth, settings = pictures[["img", "rle"]].to_numpy().tolist(), (THRESHOLDS, MAP, SURE, PATCH)
    key = fingerprint([sha256(member) for member in members], names, views, truth, photos.stamp(), settings)
    folder = run_dir / (f"fold{fold}" if fold != HOLDOUT else "holdout")
    path, errors = folder / f"scores-{key}.csv", folder / f"errors-{key}.npz"
    if path.exists() and errors.exists():
        with np.load(errors) as kept:
            return pd.read_csv(path, dtype={"car": str}), {int(view): kept[view] for view in kept}
    ensemble = Ensemble(members, [1 / len(members)] * len(members), views)
    rows, sums = [], {}
    with progress(None, f"scoring {folder.name}", total=len(pictures)) as bar:
        photographs = Photographs(photos, pictures["img"].tolist(), ensemble.sizes)
        for each, full, batch in batched(ensemble, photographs, in_batches(len(pictures), batch_size)):
            for row, errors_of_it in _score_batch(each, full, pictures.iloc[batch], views, names, fold):
                rows.append(row)
                sums[row["view"]] = sums.get(row["view"], 0) + errors_of_it
            bar.update(len(batch))
    table = pd.DataFrame(rows)
    table.insert(3, "fold", fold)
    with atomic(errors) as file:
        np.savez_compressed(file, **{str(view): own for view, own in sums.items()})
    write_text(path, table.to_csv(index=False))
    return table, sums


def _score_batch(each, full, pictures, views, names, fold) -> Iterator[tuple[dict, np.ndarray]]:
    """A row of the table and an error map for each picture of a batch."""
    variants, agreed = _variants(each, views, *names, fold), _agreed(each)
    for i, picture in enumerate(pictures.itertuples()):
        true = rle.decode(picture.rle, *full[i])
        own = {name: [logits[i] for logits in blended] for name, blended in variants.items()}
        scored, predicted = _score(own, true, len(names[0]))
        least, most = ([logits[i] for logits in of_size] for of_size in agreed)
        row = {"img": picture.img, "car": picture.car, "view": picture.view}
        yield row | scored | disputed(least, most, true), error_map(predicted, true)


def error_map(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Shares of what is missed, extra and truly car at each place: (H, W) bool twice -> (3, *MAP) float32."""
    parts = true & ~predicted, predicted & ~true, true
    return np.stack([resize(part.astype(np.float32), *MAP) for part in parts])


def _agreed(each: list[torch.Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The least and the most logits (B, h, w) of all members and views, for each size."""
    sizes = sorted({logits.shape[2:] for logits in each})
    of_size = [torch.cat([logits for logits in each if logits.shape[2:] == size]) for size in sizes]
    return [part.amin(0).cpu().numpy() for part in of_size], [part.amax(0).cpu().numpy() for part in of_size]


def disputed(least: list[np.ndarray], most: list[np.ndarray], true: np.ndarray) -> dict[str, float]:
    """Where every network in every view contradicts the mask, so that the mask may be wrong.

    disputed: pixels at which each gives the other class SURE or more, in patches at least PATCH pixels wide and high;
    sure: mean probability there of the network that is least sure (0 where nothing is disputed).

    least, most: logits over all networks and views, (h, w) for each size; true: (H, W) bool.
    """
    against = [
        np.where(true, -enlarged([high], true.shape), enlarged([low], true.shape))
        for low, high in zip(least, most, strict=True)
    ]
    against = np.minimum.reduce(against)
    firm = (against >= math.log(SURE / (1 - SURE))).astype(np.uint8)
    patches = cv2.morphologyEx(firm, cv2.MORPH_OPEN, np.ones((PATCH, PATCH), np.uint8)) > 0
    sure = float(1 / (1 + np.exp(-against[patches])).mean()) if patches.any() else 0.0
    return {"disputed": int(np.count_nonzero(patches)), "sure": sure}


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


def _score(variants: dict[str, list[np.ndarray]], true: np.ndarray, n_runs: int) -> tuple[dict, np.ndarray]:
    """Scores of a picture's blended logits, and the mask (H, W) bool of the whole ensemble."""
    row = {}
    for name, blended in variants.items():
        logits = enlarged(blended, true.shape)
        predicted = logits > 0
        counts = metrics.counts(predicted, true)
        row[name] = float(metrics.dice(*counts))
        if name == "dice":
            chosen = predicted
            row |= {"iou": float(metrics.iou(*counts))}
            row |= {"area": counts[2] / true.size, "predicted_area": counts[1] / true.size}
            row |= metrics.error_anatomy(predicted, true)
            for threshold in THRESHOLDS:
                cut = math.log(threshold / (1 - threshold))
                column = _column((1 / n_runs,) * n_runs, threshold)
                row[column] = float(metrics.dice(*metrics.counts(logits > cut, true)))
    return row, chosen
