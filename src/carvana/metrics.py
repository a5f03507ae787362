"""Scores of masks, and how sure they are."""

import cv2
import numpy as np


def dice(intersection: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """2 |A and B| / (|A| + |B|) of pixel counts, elementwise; two empty masks count 1 (the rule of the competition)."""
    total = np.asarray(predicted + true, dtype=float)
    return np.where(total > 0, 2 * intersection / np.maximum(total, 1), 1.0)


def iou(intersection: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """|A and B| / |A or B| of pixel counts, elementwise; two empty masks count 1."""
    union = np.asarray(predicted + true - intersection, dtype=float)
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def counts(predicted: np.ndarray, true: np.ndarray) -> tuple[int, int, int]:
    """Pixels in both, in the predicted and in the true mask; (H, W) bool each."""
    return int(np.count_nonzero(predicted & true)), int(np.count_nonzero(predicted)), int(np.count_nonzero(true))


def mean_over_cars(values: np.ndarray, cars: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of a value per picture and its 95 % interval, (mean, low, high).

    Bootstrapped over cars, not pictures: the 16 views of a car fail together, so pictures are not independent.
    """
    _, car_of = np.unique(np.asarray(cars), return_inverse=True)
    sums, sizes = np.bincount(car_of, weights=values), np.bincount(car_of)
    drawn = np.random.default_rng(0).integers(0, sums.size, (draws, sums.size))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def boundary_distance(mask: np.ndarray) -> np.ndarray:
    """Distance in pixels to the other side of the nearest edge, 1 beside it: (H, W) bool -> (H, W) float32."""
    car, wall = mask.astype(np.uint8), (~mask).astype(np.uint8)
    return np.where(mask, cv2.distanceTransform(car, cv2.DIST_L2, 3), cv2.distanceTransform(wall, cv2.DIST_L2, 3))


def error_anatomy(predicted: np.ndarray, true: np.ndarray) -> dict[str, int]:
    """What the wrong pixels of a mask are made of; the parts sum to all wrong pixels.

    Within 1, 3 and 10 pixels of the true edge (each counts only what the one before does not hold), beyond that
    `missed` (car taken for wall) and `extra` (wall taken for car). predicted, true: (H, W) bool.
    """
    wrong, distance = predicted != true, boundary_distance(true)
    band = np.digitize(distance[wrong], [1.5, 3.5, 10.5])
    edge_1, edge_3, edge_10, far = np.bincount(band, minlength=4)
    missed = int(np.count_nonzero(wrong & true & (distance >= 10.5)))
    bands = {"edge_1": int(edge_1), "edge_3": int(edge_3), "edge_10": int(edge_10)}
    return bands | {"missed": missed, "extra": int(far) - missed}
