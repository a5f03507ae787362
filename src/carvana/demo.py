"""The built-in competition: a photo studio with invented cars, in the layout of the real one, for runs without an account.

Lengths are metres in the car's frame: x forward, y to its left, z up, the origin on the floor under its middle.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from carvana import rle
from carvana.files import UserError, atomic, need_space, progress, read_json, write_json

VERSION, VIEWS, HEIGHT, WIDTH = 1, 16, 1280, 1918
FINE = 2  # the car is drawn this much finer than the picture, which gives its edges their partial cover
ROUND = 6  # exponent of the cross-sections: 2 would be an ellipse, many a box
DARK, RUBBER, CHROME, LAMP, RED, PLATE = (20,) * 3, (34,) * 3, (120, 122, 126), (214, 216, 218), (150, 14, 22), (238,) * 3
# What a surface mirrors by the height of the mirrored ray: floor, foot of the wall, wall, ceiling between its lamps.
STUDIO = (-1, -0.7, -0.3, -0.1, 0, 0.1, 0.45, 0.6, 0.75, 1), (0.2, 0.3, 0.62, 0.55, 0.35, 0.95, 1.0, 0.65, 1.25, 0.9)
PAINTS = {  # red, green, blue; how much of the studio the paint mirrors
    "white": (0.93, 0.93, 0.92, 0.05), "black": (0.03, 0.03, 0.035, 0.12), "silver": (0.62, 0.63, 0.65, 0.20),
    "red": (0.45, 0.03, 0.07, 0.12), "grey": (0.27, 0.27, 0.29, 0.16), "blue": (0.07, 0.14, 0.32, 0.13),
}  # fmt: skip
FITTINGS = [  # axis and side they are seen from; left and right, low and high as shares of half the size; colour
    (0, 1, -0.44, 0.44, 0.66, 0.84, DARK), (0, 1, -0.66, 0.66, 0.34, 0.52, DARK), (0, 1, -0.17, 0.17, 0.5, 0.64, PLATE),
    (0, 1, 0.52, 0.92, 0.72, 0.91, CHROME), (0, 1, 0.57, 0.84, 0.75, 0.88, LAMP),
    (0, -1, -0.8, 0.8, 0.3, 0.44, DARK), (0, -1, -0.17, 0.17, 0.76, 0.92, PLATE), (1, 1, -0.40, 0.38, 0.28, 0.36, DARK),
]  # fmt: skip
MAKES = ["Brenta", "Calder", "Ostrava", "Marrow", "Tindale", "Veyl", ""]


@dataclass(frozen=True)
class Body:
    """A car's closed surface: cross-sections of rounded boxes along its length; shares are of length or height."""

    size: tuple  # length, width, height
    clearance: float
    wheel: float  # radius
    belt: float  # share of the height where the windows begin
    tumble: float  # how much narrower the roof is
    tail: tuple  # lamps: inner and outer share of half the width, low and high share of the height
    rear: float  # share of the height where the rear window begins
    glass: tuple  # ends of the side windows and the pillars between, shares from the nose
    top: tuple  # top line: shares from the nose, shares of the height

    def section(self, x):
        """Half width, bottom, belt and top of the cross-sections at x, each of x's shape."""
        length, width, height = self.size
        end, share, middle = np.minimum(np.abs(2 * x / length), 1), 0.5 - x / length, 0.32 * height
        top = height * np.mean([np.interp(share + shift, *self.top) for shift in np.linspace(-0.025, 0.025, 7)], axis=0)
        top = middle + (top - middle) * (1 - end**9) ** (1 / 9)
        bottom = middle - (middle - self.clearance) * (1 - end**14) ** (1 / 14)
        return width / 2 * (1 - end**6) ** (1 / 6), bottom, np.minimum(self.belt * height, 0.14 * bottom + 0.86 * top), top

    def taper(self, z):
        """Share of the width that is left at height z."""
        share = z / self.size[2] - self.belt
        return 1 - self.tumble * np.maximum(share, 0) / (1 - self.belt) - 0.3 * np.minimum(share + 0.15, 0) ** 2

    def mesh(self):
        """Points of the surface, (stations, ring, 3)."""
        x = self.size[0] / 2 * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 141))[:, None]
        ring = _oval(-1, 1, -1, 1, 2 / ROUND, 72)
        across, up = np.vstack([ring, ring[:1]]).T
        half, bottom, belt, top = self.section(x)
        z = belt + up * np.where(up > 0, top - belt, belt - bottom)
        return np.stack(np.broadcast_arrays(x, half * across * self.taper(z), z), axis=2)

    def lift(self, outline, axis, sign):
        """Points (n, 3) where an outline (n, 2), seen along an axis from its positive or negative side, lies on the body."""
        inner, outer = (np.insert(np.asarray(outline, float), axis, start, axis=1) for start in (0, sign * self.size[axis]))
        for _ in range(14):
            middle = (inner + outer) / 2
            x, y, z = middle.T
            half, bottom, belt, top = self.section(x)
            reach = np.where(z > belt, top - belt, belt - bottom) + 1e-9
            inside = (y / (half * self.taper(z) + 1e-9)) ** ROUND + ((z - belt) / reach) ** ROUND < 1
            inner, outer = np.where(inside[:, None], middle, inner), np.where(inside[:, None], outer, middle)
        return inner


SHAPES = {
    "saloon": Body((4.75, 1.84, 1.45), 0.19, 0.33, 0.63, 0.25, (0.58, 0.94, 0.52, 0.62), 0.77, (0.31, 0.5, 0.68, 0.79), (
        (0, 0.03, 0.26, 0.42, 0.52, 0.64, 0.83, 0.97, 1), (0.5, 0.54, 0.68, 0.95, 1, 0.98, 0.75, 0.73, 0.68))),
    "suv": Body((4.65, 1.9, 1.72), 0.25, 0.37, 0.61, 0.17, (0.7, 0.94, 0.5, 0.64), 0.67, (0.29, 0.46, 0.67, 0.86), (
        (0, 0.03, 0.24, 0.37, 0.48, 0.86, 0.97, 1), (0.52, 0.57, 0.66, 0.95, 1, 0.97, 0.64, 0.6))),
    "hatchback": Body((4.2, 1.76, 1.5), 0.19, 0.32, 0.62, 0.22, (0.66, 0.94, 0.5, 0.63), 0.69, (0.3, 0.51, 0.71, 0.83), (
        (0, 0.03, 0.25, 0.41, 0.52, 0.8, 0.96, 1), (0.48, 0.53, 0.67, 0.95, 1, 0.93, 0.65, 0.6))),
    "van": Body((5.05, 1.96, 1.82), 0.2, 0.35, 0.56, 0.15, (0.74, 0.94, 0.47, 0.58), 0.62, (0.23, 0.41, 0.62, 0.91), (
        (0, 0.03, 0.18, 0.34, 0.46, 0.91, 0.985, 1), (0.44, 0.48, 0.59, 0.94, 1, 0.97, 0.6, 0.56))),
}  # fmt: skip


class Car:
    """What the 16 views of a car share, drawn from its own random generator; number: neighbours look different."""

    def __init__(self, rng, number):
        """Choose shape, paint, wheels and where the camera stands."""
        self.id, self.shape = f"{rng.integers(16**12):012x}", list(SHAPES)[number % len(SHAPES)]
        self.paint = list(PAINTS)[(number + number // len(PAINTS) // 2) % len(PAINTS)]
        self.body = replace(SHAPES[self.shape], size=tuple(SHAPES[self.shape].size * rng.uniform(0.97, 1.03, 3)))
        self.axles = self.body.size[0] * np.array([0.31, -0.285]) + rng.normal(0, 0.02)
        self.spokes, self.rim, self.turn = int(rng.choice([5, 6, 7, 10])), rng.uniform(120, 215), rng.normal(0, 0.02)
        self.distance, self.height, self.focal = 8 + rng.normal(0, 0.15), 1.65 + rng.normal(0, 0.05), 2380 + rng.normal(0, 30)
        self.centre = WIDTH / 2 + rng.normal(0, 25), 350 + rng.normal(0, 12)
        self.mesh, self.studio = self.body.mesh(), _studio(rng, self)

    def eye(self, azimuth):
        """Where the camera stands for an azimuth, radians, 0 before the nose: (3,)."""
        return np.array([self.distance * np.cos(azimuth), self.distance * np.sin(azimuth), self.height])

    def project(self, points, azimuth):
        """Positions in the picture (..., 2) and depths (...) of points (..., 3); the camera is level."""
        x, y, z = np.moveaxis(np.asarray(points) - self.eye(azimuth), -1, 0)
        depth = -x * np.cos(azimuth) - y * np.sin(azimuth)
        right = y * np.cos(azimuth) - x * np.sin(azimuth)
        return np.stack([right, -z], axis=-1) * (self.focal / depth)[..., None] + self.centre, depth

    def floor(self, outline, azimuth):
        """Positions (n, 2) of an outline (n, 2) on the floor."""
        return self.project(np.insert(outline, 2, 0, axis=1), azimuth)[0]


def _oval(left, right, low, high, power=1.0, points=48):
    """Outline (points, 2) that fills a rectangle: an ellipse, squarer for a smaller power."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (np.sign(circle) * np.abs(circle) ** power * (right - left, high - low) + (left + right, low + high)) / 2


def _pixels(points):
    return np.rint(np.asarray(points) * 16).astype(np.int32)  # OpenCV's fixed point with shift=4


def _fill(image, points, colour):
    cv2.fillPoly(image, [_pixels(points)], colour, shift=4)


def _area(points):
    """Twice the signed area of outlines (..., n, 2)."""
    x, y = points[..., 0], points[..., 1]
    return (x * np.roll(y, -1, axis=-1) - y * np.roll(x, -1, axis=-1)).sum(axis=-1)


def _studio(rng, car):
    """The empty studio, (HEIGHT, WIDTH, 3) uint8: wall with letters, floor with turntable."""
    rows, columns = np.arange(HEIGHT)[:, None, None] / HEIGHT, np.linspace(-1, 1, WIDTH)[None, :, None]
    wall, edge = np.full((HEIGHT, WIDTH, 3), 248, np.uint8), car.centre[1] / HEIGHT + 0.095 + rng.normal(0, 0.008)
    strip = wall[int((edge - 0.19) * HEIGHT) :]
    for text, left, bold in (("MI", 30, 22), ("NAVI", 480, 56)):
        cv2.putText(strip, text, (left + rng.integers(-20, 60), 262), cv2.FONT_HERSHEY_SIMPLEX, 11.5, (98, 94, 96), bold, cv2.LINE_AA)
    dirt = cv2.resize(rng.normal(0, 1, (16, 10)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)[..., None]
    table = cv2.GaussianBlur(_table(car), (0, 0), 4)[..., None] / 255
    floor = 182 + 34 * rows - 6 * columns**2 + dirt * (1.5, 2, 3.5) + table * (3, 0, -9)
    weight = np.clip((rows - edge - 0.03 * columns**2) * 250 + 0.5, 0, 1)
    image = wall * (1 - 0.05 * columns**2 - 0.05 * rows) * (1 - weight) + floor * weight
    return np.clip(image * (rng.uniform(0.96, 1.02) + rng.normal(0, 0.006, 3)), 0, 255).astype(np.uint8)


def _table(car):
    table = np.zeros((HEIGHT, WIDTH), np.uint8)
    _fill(table, car.floor(_oval(-3.2, 3.2, -3.2, 3.2, points=200), 0), 255)
    return table
