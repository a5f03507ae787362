"""Scores of masks, and how certain they are."""

import math
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
import pandas as pd
from scipy.special import expit, logit, stdtrit

Values: TypeAlias = np.ndarray | pd.Series  # one an image

ERROR_PARTS = ("edge_1", "edge_3", "edge_10", "missed", "extra")  # columns of scores.csv, in pixels


class PixelCounts(NamedTuple):
    """Pixels in both masks, in the predicted and in the true one; whole numbers, or arrays of one number an image."""

    both: int | np.ndarray
    predicted: int | np.ndarray
    true: int | np.ndarray


class Interval(NamedTuple):
    """A mean and the ends of its interval, 95 % where nothing else is said."""

    mean: float
    low: float
    high: float


def dice(counts: PixelCounts) -> np.ndarray:
    """2 |A and B| / (|A| + |B|), elementwise; two empty masks count 1 (the rule of the competition)."""
    total = np.asarray(counts.predicted + counts.true, dtype=float)
    return np.where(total > 0, 2 * counts.both / np.maximum(total, 1), 1.0)


def iou(counts: PixelCounts) -> np.ndarray:
    """|A and B| / |A or B|, elementwise; two empty masks count 1."""
    union = np.asarray(counts.predicted + counts.true - counts.both, dtype=float)
    return np.where(union > 0, counts.both / np.maximum(union, 1), 1.0)


def pixel_counts(predicted: np.ndarray, true: np.ndarray) -> PixelCounts:
    """Counts of two masks (H, W) bool."""
    return PixelCounts(*(int(np.count_nonzero(mask)) for mask in (predicted & true, predicted, true)))


def mean_over_cars(values: Values, cars: Values, level: float = 0.95) -> Interval:
    """Mean of a value per image, and its interval from what the means of cars differ by.

    Cars, not images, are what is drawn by chance: the 16 views of a car fail together. Student's t of the weighted
    means of cars covers the truth in 93 to 96 % of trials with 6 to 100 cars (90 % where a few cars hold most of the
    error; percentiles of a bootstrap cover 84 to 89 % with 6 to 12). A single car has no interval: NaN.
    """
    mean, error, n_cars = _mean_and_error(values, cars)
    reach = error * stdtrit(n_cars - 1, (1 + level) / 2)
    return Interval(mean, mean - reach, mean + reach)


def score_over_cars(values: Values, cars: Values) -> Interval:
    """`mean_over_cars` of a score in [0, 1], such as Dice: computed on the logit scale, so that it stays inside."""
    mean, error, n_cars = _mean_and_error(values, cars)
    slope = max(mean * (1 - mean), 1e-12)
    reach = stdtrit(n_cars - 1, 0.975) * error / slope
    low, high = expit(logit(mean) + np.array([-reach, reach])) if 0 < mean < 1 else (mean, mean)
    return Interval(mean, float(low), float(high))


def _mean_and_error(values: Values, cars: Values) -> tuple[float, float, int]:
    """Mean over images, its standard error where cars are independent, and the number of cars."""
    values = np.asarray(values, dtype=float)
    _, car_of = np.unique(np.asarray(cars), return_inverse=True)
    sums, sizes = np.bincount(car_of, weights=values), np.bincount(car_of)
    mean, n = values.mean(), len(sums)
    spread = ((sums - mean * sizes) ** 2).sum()
    return float(mean), float(math.sqrt(spread * n / max(n - 1, 1)) / sizes.sum()) if n > 1 else math.nan, n


def boundary_distance(mask: np.ndarray) -> np.ndarray:
    """Exact distance in pixels to the nearest pixel of the other class: (H, W) bool -> (H, W) float32."""
    sides = (side.astype(np.uint8) for side in (mask, ~mask))
    inside, outside = (cv2.distanceTransform(side, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for side in sides)
    return np.where(mask, inside, outside)


def error_anatomy(predicted: np.ndarray, true: np.ndarray) -> dict[str, int]:
    """What the wrong pixels of a mask are made of, by ERROR_PARTS, which sum to all wrong pixels.

    edge_1, edge_3, edge_10: within 1, 3 and 10 pixels of the true edge (each counts only what the one before does not
    hold). Beyond that `missed` (car taken for background) and `extra` (background taken for car). predicted, true:
    (H, W) bool.
    """
    wrong, distance = predicted != true, boundary_distance(true)
    band = np.digitize(distance[wrong], [1.5, 3.5, 10.5])
    edge_1, edge_3, edge_10, far = np.bincount(band, minlength=4).tolist()
    missed = int(np.count_nonzero(wrong & true & (distance >= 10.5)))
    return dict(zip(ERROR_PARTS, (edge_1, edge_3, edge_10, missed, far - missed), strict=True))


def error_shares(scores: pd.DataFrame) -> pd.DataFrame:
    """Of a table with the columns ERROR_PARTS: their mean pixels an image, and their share of all wrong pixels."""
    pixels = scores[list(ERROR_PARTS)].mean()
    return pd.DataFrame({"pixels": pixels, "share": pixels / max(pixels.sum(), 1e-12)})
