"""The built-in competition: a photo studio with invented cars, in the real one's layout, for runs without an account.

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
DARK, RUBBER, CHROME, LAMP, PLATE, RED = (20,) * 3, (34,) * 3, (122,) * 3, (216,) * 3, (238,) * 3, (150, 14, 22)
# What a surface mirrors by the height of the mirrored ray: floor, foot of the wall, wall, ceiling between its lamps.
STUDIO = (-1, -0.7, -0.3, -0.1, 0, 0.1, 0.45, 0.6, 0.75, 1), (0.2, 0.3, 0.62, 0.55, 0.35, 0.95, 1.0, 0.65, 1.25, 0.9)
PAINTS = {  # red, green, blue; how much of the studio the paint mirrors
    "white": (0.93, 0.93, 0.92, 0.05), "black": (0.03, 0.03, 0.035, 0.20), "silver": (0.62, 0.63, 0.65, 0.20),
    "red": (0.45, 0.03, 0.07, 0.12), "grey": (0.27, 0.27, 0.29, 0.16), "blue": (0.07, 0.14, 0.32, 0.13),
}  # fmt: skip
FITTINGS = [  # axis and side they are seen from; left and right, low and high as shares of half the size; colour
    (0, 1, -0.44, 0.44, 0.66, 0.84, DARK), (0, 1, -0.66, 0.66, 0.34, 0.52, DARK),
    (0, 1, -0.17, 0.17, 0.5, 0.64, PLATE), (0, 1, 0.52, 0.92, 0.72, 0.91, CHROME), (0, 1, 0.57, 0.84, 0.75, 0.88, LAMP),
    (0, -1, -0.66, 0.66, 0.37, 0.47, DARK), (0, -1, -0.17, 0.17, 0.76, 0.92, PLATE),
    (1, 1, -0.40, 0.38, 0.28, 0.36, DARK),
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
        belt = np.minimum(self.belt * height, 0.14 * bottom + 0.86 * top)
        return width / 2 * (1 - end**6) ** (1 / 6), bottom, belt, top

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
        """Points (n, 3) on the body under an outline (n, 2), seen along an axis from its positive or negative side."""
        inner, outer = (np.insert(outline, axis, start, axis=1) for start in (0.0, sign * self.size[axis]))
        for _ in range(14):
            middle = (inner + outer) / 2
            x, y, z = middle.T
            half, bottom, belt, top = self.section(x)
            reach = np.where(z > belt, top - belt, belt - bottom) + 1e-9
            inside = (y / (half * self.taper(z) + 1e-9)) ** ROUND + ((z - belt) / reach) ** ROUND < 1
            inner, outer = np.where(inside[:, None], middle, inner), np.where(inside[:, None], outer, middle)
        return inner


SHAPES = {
    "saloon": Body(
        (4.75, 1.84, 1.45), 0.19, 0.33, 0.63, 0.25, (0.58, 0.94, 0.52, 0.62), 0.77, (0.31, 0.5, 0.68, 0.79), (
        (0, 0.03, 0.26, 0.42, 0.52, 0.64, 0.83, 0.97, 1), (0.5, 0.54, 0.68, 0.95, 1, 0.98, 0.75, 0.73, 0.68))),
    "suv": Body((4.65, 1.9, 1.72), 0.25, 0.37, 0.61, 0.17, (0.7, 0.94, 0.5, 0.64), 0.67, (0.29, 0.46, 0.67, 0.86), (
        (0, 0.03, 0.24, 0.37, 0.48, 0.88, 0.975, 1), (0.52, 0.57, 0.66, 0.95, 1, 0.97, 0.64, 0.6))),
    "hatchback": Body(
        (4.2, 1.76, 1.5), 0.19, 0.32, 0.62, 0.22, (0.66, 0.94, 0.5, 0.63), 0.69, (0.3, 0.51, 0.71, 0.83), (
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
        self.distance, self.height, self.focal = rng.normal((8, 1.65, 2380), (0.15, 0.05, 30))
        self.centre = WIDTH / 2 + rng.normal(0, 25), 350 + rng.normal(0, 12)
        make, model = MAKES[number % len(MAKES)], f"{self.shape.title()} {number % 9 + 1}"
        self.row = self.id, rng.integers(2008, 2017), make, model, model, "Base"
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
    rows, columns = np.ogrid[0 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    rows, columns = rows[..., None].astype(np.float32), columns[..., None].astype(np.float32)
    wall, edge = np.full((HEIGHT, WIDTH, 3), 253, np.uint8), car.centre[1] / HEIGHT + 0.095 + rng.normal(0, 0.008)
    strip, shift = wall[int((edge - 0.19) * HEIGHT) :], rng.integers(0, 150)
    for text, left, bold in (("MIN", 20, 20), ("AVIMA", 680, 54)):
        cv2.putText(strip, text, (left + shift, 262), cv2.FONT_HERSHEY_SIMPLEX, 11.5, (98, 94, 96), bold, cv2.LINE_AA)
    stains = rng.normal(0, 1, (16, 10)).astype(np.float32)
    dirt = cv2.resize(stains, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)[..., None]
    ring, table = car.floor(_oval(-3.2, 3.2, -3.2, 3.2, points=200), 0), np.zeros((HEIGHT, WIDTH), np.uint8)
    _fill(table, ring, 255)
    table = cv2.GaussianBlur(table, (0, 0), 4)[..., None] / np.float32(255)
    floor = 182 + 34 * rows - 6 * columns**2
    floor = floor + dirt * np.float32((1.5, 2, 3.5)) + table * np.float32((3, 0, -9))
    weight = np.clip((rows - edge - 0.03 * columns**2) * 250 + 0.5, 0, 1)
    image = wall * (1 - 0.04 * columns**2 - 0.03 * rows) * (1 - weight) + floor * weight
    image = np.clip(image * np.float32(rng.uniform(0.96, 1.02) + rng.normal(0, 0.006, 3)), 0, 255).astype(np.uint8)
    return cv2.polylines(image, [_pixels(ring)], True, (150, 152, 150), 2, cv2.LINE_AA, shift=4)


class _Scene:
    """A car on its part of a picture: colour and cover, `FINE` times as fine as the picture."""

    def __init__(self, car, azimuth):
        self.car, self.azimuth, self.eye = car, azimuth, car.eye(azimuth)
        points = car.project([car.mesh, car.mesh * (1, 1, 0)], azimuth)[0].reshape(-1, 2)
        low, high = np.maximum(points.min(axis=0) - 80, 0), np.minimum(points.max(axis=0) + 40, (WIDTH, HEIGHT))
        self.corner = low.astype(int) // 4 * 4
        self.size = -((self.corner - high.astype(int)) // 4) * 4
        self.colour = np.zeros((*self.size[::-1] * FINE, 3), np.uint8)
        self.cover = np.zeros(self.colour.shape[:2], np.uint8)

    def at(self, points):
        return (self.car.project(points, self.azimuth)[0] - self.corner) * FINE

    def solid(self, points, colour):
        hull = cv2.convexHull(_pixels(self.at(points)))
        for image, value in ((self.colour, colour), (self.cover, 255)):
            cv2.fillConvexPoly(image, hull, value, shift=4)

    def trace(self, outline, axis, sign):
        """An outline laid on the body: its positions on the canvas and whether it faces the camera."""
        points = self.at(self.car.body.lift(outline, axis, sign))
        return points, _area(points) * _area(outline) * sign * (1 if axis == 1 else -1) > 0

    def faces(self):
        """Cover of the body on the canvas and its smoothed normals at half the picture's size."""
        mesh, at = self.car.mesh, self.at(self.car.mesh)
        faces = np.stack([at[:-1, :-1], at[1:, :-1], at[1:, 1:], at[:-1, 1:]], axis=2).reshape(-1, 4, 2)
        directions = np.cross(mesh[:-1, 1:] - mesh[1:, :-1], mesh[1:, 1:] - mesh[:-1, :-1]).reshape(-1, 3)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True) + 1e-9
        order = np.argsort(-self.car.project(mesh[:-1, :-1], self.azimuth)[1].ravel(), kind="stable")
        order = order[_area(faces[order]) > 0]
        cover, normals = np.zeros_like(self.cover), np.zeros((*self.size[::-1] // 2, 3), np.float32)
        fine, coarse = _pixels(faces[order]), _pixels(faces[order] / FINE / 2)
        for face, small, direction in zip(fine, coarse, directions[order].tolist(), strict=True):
            cv2.fillConvexPoly(cover, face, 255, shift=4)
            cv2.fillConvexPoly(normals, small, direction, shift=4)
        normals = cv2.blur(normals, (5, 5))
        return cover, normals / (np.linalg.norm(normals, axis=2, keepdims=True) + 1e-6)

    def paint(self, normals, cover):
        """Paint the body; returns what it mirrors, on the canvas."""
        to_eye = self.eye / np.linalg.norm(self.eye)
        facing, up = np.clip(normals @ to_eye, 0, 1), normals[..., 2]
        mirrored = np.interp(2 * facing * up - to_eye[2], *STUDIO)
        *albedo, gloss = PAINTS[self.car.paint]
        light = (0.84 + 0.17 * up + 0.08 * facing)[..., None] * np.array(albedo) * (1 - gloss)
        shine = light + (mirrored * (gloss + 0.5 * (1 - facing) ** 4))[..., None]
        levels = [np.clip(values * 255, 0, 255).astype(np.uint8) for values in (shine, mirrored)]
        shine, mirrored = (cv2.resize(values, self.cover.shape[::-1]) for values in levels)
        cv2.copyTo(shine, cover, self.colour)
        cv2.max(self.cover, cover, self.cover)
        return mirrored

    def ring(self, x, radius, y):
        circle = _oval(-radius, radius, -radius, radius) + (x, self.car.body.wheel)
        return self.at(np.insert(circle, 1, y, axis=1)).astype(np.float32)

    def wheel(self, x, side, near, clip):
        """Draw a wheel where clip allows; a near one is open between its spokes."""
        radius, outer = self.car.body.wheel, side * self.car.body.size[1] * 0.48
        tyre = np.vstack([self.ring(x, radius, outer), self.ring(x, radius, outer - side * 0.24)])
        left, top, width, height = cv2.boundingRect(tyre)
        window = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
        colour, cover = np.zeros_like(self.colour[window]), np.zeros_like(self.cover[window])
        parts = [(cv2.convexHull(tyre)[:, 0], DARK, 255)] + (self.rim(x, outer, side) if near else [])
        for points, tone, opaque in parts:
            _fill(colour, points - (max(left, 0), max(top, 0)), tone)
            _fill(cover, points - (max(left, 0), max(top, 0)), opaque)
        cover &= clip[window]
        cv2.copyTo(colour, cover, self.colour[window])
        cv2.max(self.cover[window], cover, self.cover[window])

    def rim(self, x, outer, side):
        """Outlines, tones and covers of a near wheel: tyre, rim, opening, what shows through it, brake, spokes, hub."""
        body, shine = self.car.body, self.car.rim
        rings = [self.ring(x, share * body.wheel, outer - side * deep) for share, deep in ((0.66, 0), (0.62, 0.2))]
        through = cv2.intersectConvexConvex(*rings)[1]
        parts = [(self.ring(x, body.wheel * 0.98, outer), RUBBER, 255)]
        parts += [(self.ring(x, body.wheel * 0.7, outer), (shine * 0.8,) * 3, 255)]
        parts += [(rings[0], (45,) * 3, 255)] + ([] if through is None else [(through[:, 0], 0, 0)])
        parts += [(self.ring(x, body.wheel * 0.46, outer - side * 0.08), (72,) * 3, 255)]
        for turn in np.linspace(0, 2 * np.pi, self.car.spokes, endpoint=False) + self.car.turn * 40:
            angle = turn + 1.35 / self.car.spokes * np.array([-1.0, 1.0, 0.75, -0.75])
            spoke = np.stack([np.cos(angle), 0 * angle, np.sin(angle)], axis=1) * [[0.12], [0.12], [0.68], [0.68]]
            spoke = self.at(spoke * body.wheel + (x, outer - side * 0.02, body.wheel))
            parts.append((spoke, (shine * (0.85 + 0.15 * np.sin(turn)),) * 3, 255))
        return parts + [(self.ring(x, body.wheel * 0.15, outer), (shine * 0.7,) * 3, 255)]

    def arch(self, x, side, cover):
        """Cut a wheel's arch into the near flank and draw the wheel in it and below the body."""
        body, clip = self.car.body, np.zeros_like(self.cover)
        radius, floor = body.wheel * 1.13, body.clearance + 0.05
        outline = _oval(x - radius, x + radius, body.wheel - radius, body.wheel + radius)
        points = body.lift(np.maximum(outline, (-9, floor)), 1, side)
        points[:, 2] = outline[:, 1]
        _fill(clip, self.at(points), 255)
        cv2.copyTo(np.full_like(self.colour, 13), clip & cover, self.colour)
        self.wheel(x, side, True, clip | ~cover)

    def panes(self):
        """Windows as (outline, axis, sign): flanks, windscreen, rear window."""
        body, height = self.car.body, self.car.body.size[2]
        for start, end in zip(body.glass[:-1], body.glass[1:], strict=True):
            x = body.size[0] * (0.5 - np.linspace(start + 0.008, end - 0.008, 16))
            _, _, belt, top = body.section(x)
            upper = np.maximum(np.minimum(top - 0.10, height * 0.93), belt + 0.05)
            pane = np.vstack([np.stack([x, belt + 0.04], axis=1), np.stack([x, upper], axis=1)[::-1]])
            yield from ((pane, 1, 1), (pane, 1, -1))
        cowl = body.section(body.size[0] * (0.535 - body.glass[0]))[3] + 0.03
        for low, sign in ((cowl, 1), (body.rear * height, -1)):
            z = np.linspace(low, height * 0.955, 12)
            y = 0.42 * body.size[1] * body.taper(z)
            yield np.vstack([np.stack([y, z], axis=1), np.stack([-y, z], axis=1)[::-1]]), 0, sign

    def glaze(self, mirrored):
        """Fill the panes: dark inside, light where another pane lies behind, and what the glass mirrors."""
        near, far = np.zeros((2, *self.cover.shape), np.uint8)
        for points, facing in (self.trace(*pane) for pane in self.panes()):
            _fill(near if facing else far, points, 255)
            if facing:
                cv2.polylines(self.colour, [_pixels(points)], True, DARK, 9, shift=4)
        glass = cv2.addWeighted(mirrored, 0.25, cv2.blur(far, (9, 9)), 0.24, 28)
        cv2.copyTo(cv2.merge([glass, cv2.add(glass, 6), cv2.add(glass, 3)]), near, self.colour)

    def fittings(self):
        """Paint lamps, grille, plates, sills, joints and handles onto the body."""
        body, (length, width, height) = self.car.body, self.car.body.size
        nose = body.section(length * 0.46)[3]
        inner, outer, low, high = body.tail
        rows = [*FITTINGS, (0, -1, inner, outer, low * height / nose, high * height / nose, RED)]
        tone, belt = tuple(150 * value for value in PAINTS[self.car.paint][:3]), body.belt * height / nose
        for x in (1 - 2 * share for share in body.glass[1:-1]):
            rows += [(1, 1, x - 0.002, x + 0.002, 0.36, belt, tone)]
            rows += [(1, 1, x + 0.025, x + 0.1, belt - 0.12, belt - 0.08, tone)]
        for axis, sign, left, right, low, high, colour in rows:
            half = (width, length)[axis] / 2
            outline = _oval(left * half, right * half, low * nose, high * nose, 0.4)
            twin = (outline, axis, -sign) if axis else (outline * (-1, 1), axis, sign)
            for points, facing in (self.trace(outline, axis, sign), self.trace(*twin)):
                if facing:
                    _fill(self.colour, points, colour)

    def mirror(self, side):
        body = self.car.body
        x, z = body.size[0] * (0.5 - body.glass[0] - 0.03), body.belt * body.size[2] + 0.09
        ball = np.stack(np.meshgrid(*[(-1, -0.6, 0.6, 1)] * 3), axis=-1).reshape(-1, 3)
        ball = ball[np.abs(ball).sum(axis=1) < 2.3] * (0.09, 0.12, 0.085) + (x, side * (body.size[1] / 2 + 0.06), z)
        paint = np.array(PAINTS[self.car.paint][:3]) * 215 + 10
        self.solid(ball * (1, 1, 0.4) + (0, -side * 0.1, 0.6 * z - 0.06), DARK)
        self.solid(ball, tuple(paint * 0.75))
        self.solid(ball[ball[:, 2] > z - 0.06] + (0, 0, 0.004), tuple(paint))

    def aerial(self):
        body = self.car.body
        x = body.size[0] * (0.63 - body.glass[-1])
        foot = np.array([x, 0, body.section(x)[3] - 0.02])
        self.solid(foot + [(0.02, 0.007, 0), (0, -0.007, 0), (-0.16, 0.006, 0.3), (-0.16, -0.006, 0.3)], DARK)

    def draw(self):
        """Draw the car, what lies behind first."""
        near = [side for side in (1, -1) if self.eye[1] * side > self.car.body.size[1] / 2]
        everywhere = np.full_like(self.cover, 255)
        for side in {1, -1} - set(near):
            for x in sorted(self.car.axles, key=lambda x: x * np.cos(self.azimuth)):
                self.wheel(x, side, False, everywhere)
            self.mirror(side)
        self.aerial()
        cover, normals = self.faces()
        mirrored = self.paint(normals, cover)
        self.fittings()
        for side in near:
            for x in self.car.axles:
                self.arch(x, side, cover)
        self.glaze(mirrored)
        for side in near:
            self.mirror(side)


def _shade(car, azimuth):
    """Share of the light that the car leaves on the floor, (HEIGHT, WIDTH) uint8."""
    length, width, _ = car.body.size
    soft, close = np.zeros((2, HEIGHT // 8, WIDTH // 8 + 1), np.float32)
    _fill(soft, car.floor(_oval(-length / 2, length / 2, -width / 2, width / 2, 0.4), azimuth) / 8, 1)
    for x in car.axles:
        for y in (-0.4 * width, 0.4 * width):
            _fill(close, car.floor(_oval(x - 0.3, x + 0.3, y - 0.16, y + 0.16), azimuth) / 8, 1)
    dark = 0.34 * cv2.GaussianBlur(soft, (0, 0), 7) + 0.28 * cv2.GaussianBlur(soft, (0, 0), 2.5)
    shade = (1 - dark - 0.45 * cv2.GaussianBlur(close, (0, 0), 1.5)).clip(0, 1) * 255
    return cv2.resize(shade.astype(np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def render(car, view, rng):
    """A photograph, (HEIGHT, WIDTH, 3) uint8, and its mask, (HEIGHT, WIDTH) bool; view: 1..16."""
    azimuth = (view - 1) * 2 * np.pi / VIEWS + car.turn
    scene = _Scene(car, azimuth)
    scene.draw()
    picture = cv2.multiply(car.studio, cv2.merge([_shade(car, azimuth)] * 3), scale=1 / 255)
    mask, (left, top), (right, bottom) = np.zeros((HEIGHT, WIDTH), bool), scene.corner, scene.corner + scene.size
    behind = picture[top:bottom, left:right]
    shrink = partial(cv2.resize, dsize=scene.size.tolist(), interpolation=cv2.INTER_AREA)
    colour, cover = (shrink(layer)[: len(behind), : behind.shape[1]] for layer in (scene.colour, scene.cover))
    behind[:] = cv2.add(cv2.multiply(behind, cv2.merge([255 - cover] * 3), scale=1 / 255), colour)
    mask[top:bottom, left:right] = cover > 127
    noise = np.frombuffer(rng.bytes(picture.size), np.int8).reshape(picture.shape) >> 6
    return cv2.add(cv2.GaussianBlur(picture, (3, 3), 0.6), noise, dtype=cv2.CV_8U), mask


def _write_view(folder, car, view, rng, part):
    """Write a picture, in train with its mask, unless they are there; returns its name and the mask's run lengths."""
    picture = folder / part / f"{car.id}_{view:02d}.jpg"
    mask_file = folder / "train_masks" / f"{picture.stem}_mask.gif"
    if part == "train" and picture.exists() and mask_file.exists():
        return picture.name, rle.encode(np.array(Image.open(mask_file)))
    image, mask = render(car, view, rng)
    with atomic(picture) as file:
        Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=0)
    if part == "train":
        with atomic(mask_file) as file:
            paletted = Image.fromarray(mask.view(np.uint8))
            paletted.putpalette([0, 0, 0, 255, 255, 255])
            paletted.save(file, "GIF")
    return picture.name, rle.encode(mask)


def _write_car(folder, seed, job):
    """Write the views of a car; its random generators depend on nothing but seed, part and number."""
    part, number = job
    key = (seed, ("train", "test").index(part), number)
    car = Car(np.random.default_rng(key), number)
    views = [_write_view(folder, car, view, np.random.default_rng((*key, view)), part) for view in range(1, VIEWS + 1)]
    return part, car.row, views


def _complete(folder, wanted):
    """Whether `folder` holds this demo; UserError where it holds something else."""
    marker = folder / "demo.json"
    if not marker.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds files that are not a demo. Use another folder or delete it.")
        return False
    found = read_json(marker)
    if {name: found.get(name) for name in wanted} != wanted:
        raise UserError(f"{folder} holds another demo: {found}. Use another folder or delete it.")
    return found["complete"]


def write_competition(folder, cars=12, test_cars=4, seed=1):
    """Write the demo in the competition's layout, 16 pictures a car; returns at once where it is all there.

    folder: new, empty, or this demo begun before, which is finished. cars, test_cars: 1 or more. A larger demo of the
    same seed holds the cars of a smaller one. `truth.csv` holds the run lengths of the test pictures.
    """
    folder, wanted = Path(folder), {"version": VERSION, "cars": cars, "test_cars": test_cars, "seed": seed}
    if min(cars, test_cars) < 1 or seed < 0:
        raise UserError(f"cars={cars} and test_cars={test_cars} must be 1 or more and seed={seed} not negative.")
    if _complete(folder, wanted):
        return
    need_space(folder, (cars + test_cars) * VIEWS * 400_000)
    write_json(folder / "demo.json", wanted | {"complete": False})
    jobs = [("train", number) for number in range(cars)] + [("test", number) for number in range(test_cars)]
    with ThreadPoolExecutor(2) as pool:
        done = list(progress(pool.map(partial(_write_car, folder, seed), jobs), "demo cars", "cars", total=len(jobs)))
    train, test = (sorted(row for part, _, rows in done if part == one for row in rows) for one in ("train", "test"))
    tables = {"train_masks": train, "truth": test, "sample_submission": [(name, "1 1") for name, _ in test]}
    for name, rows in tables.items():
        _write_table(folder / f"{name}.csv", rows, ["img", "rle_mask"])
    cars_table = sorted(row for _, row, _ in done)
    _write_table(folder / "metadata.csv", cars_table, ["id", "year", "make", "model", "trim1", "trim2"])
    write_json(folder / "demo.json", wanted | {"complete": True})


def _write_table(path, rows, columns):
    with atomic(path) as file:
        pd.DataFrame(rows, columns=columns).to_csv(file, index=False)
