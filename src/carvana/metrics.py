"""Scores of masks, and how certain they are."""

from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd

ERROR_PARTS = ("edge_1", "edge_3", "edge_10", "missed", "extra")  # columns of scores.csv, in pixels


class PixelCounts(NamedTuple):
    """Pixels in both masks, in the predicted and in the true one; whole numbers, or arrays of one number an image."""

    both: int | np.ndarray
    predicted: int | np.ndarray
    true: int | np.ndarray


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

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


def mean_over_cars(values: np.ndarray, cars: np.ndarray, draws: int = 2000) -> Interval:
    """Mean of a value per image and its 95 % interval.

    Bootstrapped over cars, not images: the 16 views of a car fail together, so images are not independent.
    """
    _, car_of = np.unique(np.asarray(cars), return_inverse=True)
    sums, sizes = np.bincount(car_of, weights=values), np.bincount(car_of)
    drawn = np.random.default_rng(0).integers(0, sums.size, (draws, sums.size))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high))


def boundary_distance(mask: np.ndarray) -> np.ndarray:
    """Distance in pixels to the other side of the nearest edge, 1 beside it: (H, W) bool -> (H, W) float32."""
    inside, outside = (cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, 3) for side in (mask, ~mask))
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
