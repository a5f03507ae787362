"""Seeded cars of about 1200 runs, as masks and as logits at a network's size: blurred ellipses with a noisy edge."""

import cv2
import numpy as np

from carvana import rle
from carvana.grid import Grid


def logits(n: int, height: int, width: int) -> list[np.ndarray]:
    """`n` maps (height, width) float32 of the size that a network gives for an image of 1280x1918."""
    return [_car(seed, height, width) for seed in range(n)]


def masks(n: int) -> list[np.ndarray]:
    """`n` masks (1280, 1918) bool."""
    return [Grid(1280, 1918, 640, 960).enlarge(car) > 0 for car in logits(n, 640, 960)]


def runs(mask: np.ndarray) -> int:
    return rle.encode(mask).count(" ") // 2 + 1


def _car(seed: int, height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:640, :960] / np.array([640, 960]).reshape(2, 1, 1)
    body = 1 - ((x - 0.5) / random.uniform(0.25, 0.38)) ** 2 - ((y - 0.55) / random.uniform(0.2, 0.3)) ** 2
    edge = cv2.GaussianBlur(random.normal(size=(640, 960)), (0, 0), 2.5)
    car = cv2.GaussianBlur((20 * body + 6 * edge).astype(np.float32), (0, 0), 1.0)
    return cv2.resize(car, (width, height), interpolation=cv2.INTER_AREA)
