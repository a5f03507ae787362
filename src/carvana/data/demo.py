"""The built-in competition: a photo studio with invented cars, in the real one's layout, for runs without an account.

Lengths are metres in the car's frame: x forward, y to its left, z up, the origin on the floor under its middle.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from carvana import rle
from carvana.errors import UserError
from carvana.files import atomic, need_space, read_json, write_json, write_text
from carvana.parallel import progress

VERSION, VIEWS, HEIGHT, WIDTH = 3, 16, 1280, 1918
MAKES = ["Brenta", "Calder", "Ostrava", "Marrow", "Tindale", "Veyl", ""]
PAINTS = {  # red, green, blue; how much of the studio the paint mirrors
    "white": (0.93, 0.93, 0.92, 0.05), "black": (0.03, 0.03, 0.035, 0.20), "silver": (0.62, 0.63, 0.65, 0.20),
    "red": (0.45, 0.03, 0.07, 0.12), "blue": (0.07, 0.14, 0.32, 0.13), "grey": (0.27, 0.27, 0.29, 0.16),
}  # fmt: skip
# What a surface mirrors by the height of the mirrored ray: floor, foot of the wall, wall, ceiling between its lamps.
STUDIO = (-1, -0.7, -0.3, -0.1, 0, 0.1, 0.45, 0.6, 0.75, 1), (0.2, 0.3, 0.62, 0.55, 0.35, 0.95, 1.0, 0.65, 1.25, 0.9)
BELT = 0.61  # share of a car's height where the windows begin
SHAPES = {  # size; wheel's radius; by shares of the length from the nose: ends of windows and pillars, line of the roof
    "saloon": ((4.75, 1.84, 1.45), 0.33, (0.31, 0.5, 0.68, 0.79), (
        (0, 0.03, 0.26, 0.42, 0.52, 0.64, 0.83, 0.97, 1), (0.5, 0.54, 0.68, 0.95, 1, 0.98, 0.7, 0.69, 0.66))),
    "suv": ((4.65, 1.9, 1.72), 0.37, (0.29, 0.46, 0.67, 0.86), (
        (0, 0.03, 0.24, 0.37, 0.48, 0.88, 0.975, 1), (0.52, 0.57, 0.66, 0.95, 1, 0.97, 0.64, 0.6))),
    "hatchback": ((4.2, 1.76, 1.5), 0.32, (0.3, 0.51, 0.71, 0.83), (
        (0, 0.03, 0.25, 0.41, 0.52, 0.8, 0.96, 1), (0.48, 0.53, 0.67, 0.95, 1, 0.93, 0.65, 0.6))),
}  # fmt: skip
FLANK, NOSE, TAIL = range(3)
PAINT, DARK, LAMP, PLATE, RED, GLASS, OPEN = range(7)  # what covers a place of the body
TONES = np.uint8([(0, 0, 0), (20, 20, 20), (205, 205, 205), (238, 238, 238), (150, 14, 22), (0, 0, 0), (0, 0, 0)])
FITTINGS = [  # where; left and right as shares of the length or of half the width, low and high of the height; what
    (NOSE, -0.44, 0.44, 0.36, 0.46, DARK), (NOSE, -0.66, 0.66, 0.19, 0.29, DARK), (NOSE, 0.55, 0.9, 0.4, 0.5, LAMP),
    (NOSE, -0.17, 0.17, 0.27, 0.35, PLATE), (TAIL, -0.17, 0.17, 0.42, 0.51, PLATE), (FLANK, 0.3, 0.7, 0.15, 0.2, DARK),
    (TAIL, 0.66, 0.94, 0.5, 0.61, RED), (TAIL, -0.82, 0.82, 0.72, 0.95, GLASS), (NOSE, -0.82, 0.82, 0.72, 0.95, GLASS),
]  # fmt: skip
SKIN, CIRCLE = (2048, 512), np.linspace(0, 2 * np.pi, 145)  # columns and rows of what covers the body; angles


class Car:
    """What 16 views share, by a generator of its own; an even number and the next look alike, one for each fold."""

    def __init__(self, rng, number):
        """Choose shape, paint, wheels and where the camera stands."""
        pair, self.id = number // 2, f"{rng.integers(16**12):012x}"
        self.shape, self.paint = list(SHAPES)[pair % len(SHAPES)], list(PAINTS.values())[pair % len(PAINTS)]
        size, self.wheel, self.glass, self.top = SHAPES[self.shape]
        self.size = size * rng.uniform(0.995, 1.005, 3) * (0.97 + 0.06 * (pair // len(SHAPES) % 2))
        self.axles = self.size[0] * np.array([0.31, -0.285]) + rng.normal(0, 0.02)
        self.spokes, self.rim, self.turn = int(rng.choice([5, 6, 7, 10])), rng.uniform(120, 215), rng.normal(0, 0.02)
        self.distance, self.height, self.focal = rng.normal((8, 1.65, 2380), (0.03, 0.05, 10))
        self.centre = WIDTH / 2 + rng.normal(0, 25), 350 + rng.normal(0, 12)
        self.row = {"id": self.id, "year": rng.integers(2008, 2017), "make": MAKES[number % len(MAKES)]}
        self.row |= {"model": self.shape.title(), "trim1": "Base", "trim2": ""}
        self.mesh, self.skin, self.studio = _mesh(self), _skin(self), _studio(rng, self)


def _oval(left, right, low, high, power=1.0):
    """Closed outline (n, 2) that fills a rectangle: an ellipse, squarer for a smaller power."""
    circle = np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], axis=1)
    return (np.sign(circle) * np.abs(circle) ** power * (right - left, high - low) + (left + right, low + high)) / 2


def _pixels(points):
    return np.rint(points * 16).astype(np.int32)  # OpenCV's fixed point with shift=4


def _fill(image, points, colour):
    cv2.fillPoly(image, [_pixels(points)], colour, shift=4)


def _mesh(car):
    """Points of the closed body, (stations, ring, 3): rounded boxes along its length, narrower to the roof."""
    (length, width, height), end = car.size, np.sin(np.linspace(-np.pi / 2, np.pi / 2, 241))[:, None]
    rounded, middle, shifts = (1 - np.abs(end) ** 9) ** (1 / 9), 0.32 * height, np.linspace(-0.025, 0.025, 7)
    top = height * np.mean([np.interp((1 - end) / 2 + shift, *car.top) for shift in shifts], axis=0)
    bottom, top = (middle + (z - middle) * rounded for z in (0.58 * car.wheel, top))
    belt = np.minimum(BELT * height, 0.14 * bottom + 0.86 * top)
    across, up = _oval(-1, 1, -1, 1, 1 / 3).T
    z = belt + up * np.where(up > 0, top - belt, belt - bottom)
    y = width / 2 * (1 - end**6) ** (1 / 6) * across * (1 - 0.5 * (z / height - BELT).clip(0))
    return np.stack(np.broadcast_arrays(end * length / 2, y, z), axis=2)


def _skin(car):
    """What covers flank, nose and tail, (3, rows, columns): by shares of the height, the length or half the width."""
    skin, (length, _, height), radius = np.zeros((3, *SKIN[::-1]), np.uint8), car.size, 1.13 * car.wheel
    fittings = FITTINGS + [(FLANK, x - 0.001, x + 0.001, 0.2, 0.6, DARK) for x in car.glass[1:-1]]
    outlines = [(where, _oval(*rectangle, 0.2), what) for where, *rectangle, what in fittings]
    for left, right in zip(car.glass[:-1], car.glass[1:], strict=True):
        x = np.linspace(left + 0.008, right - 0.008, 16)
        upper = (np.interp(x, *car.top) - 0.07).clip(BELT + 0.05, 0.93)
        outlines.append((FLANK, [(x[-1], BELT + 0.03), (x[0], BELT + 0.03), *zip(x, upper, strict=True)], GLASS))
    for x in 0.5 - car.axles / length:
        arch = _oval(x - radius / length, x + radius / length, car.wheel - radius, car.wheel + radius)
        outlines.append((FLANK, arch / (1, height), OPEN))
    for where, outline, what in outlines:
        _fill(skin[where], np.array(outline) * SKIN, what)
        cv2.polylines(skin[where], [_pixels(np.array(outline) * SKIN)], True, DARK, 5, shift=4)
    return skin


def _studio(rng, car):
    """The empty studio, (HEIGHT, WIDTH, 3) uint8: wall with letters, floor with turntable."""
    rows, columns = np.float32(np.linspace(0, 1, HEIGHT)[:, None, None]), np.float32(np.linspace(-1, 1, WIDTH)[:, None])
    wall, edge = np.full((HEIGHT, WIDTH, 3), 253, np.uint8), car.centre[1] / HEIGHT + 0.095 + rng.normal(0, 0.008)
    shift, line = rng.integers(0, 150), int((edge - 0.19) * HEIGHT) + 262
    cv2.putText(wall, "MIN AVIMA", (20 + shift, line), cv2.FONT_HERSHEY_SIMPLEX, 11.5, (98, 94, 96), 54, cv2.LINE_AA)
    floor = np.float32((182, 181, 178)) + 34 * rows - 6 * columns**2
    image = np.where(rows > edge + 0.03 * columns**2, floor, wall * (1 - 0.04 * columns**2 - 0.03 * rows))
    image = np.clip(image * np.float32(rng.uniform(0.96, 1.02) + rng.normal(0, 0.006, 3)), 0, 255).astype(np.uint8)
    table = Scene(car, 0).at(_oval(-3.2, 3.2, -3.2, 3.2))
    return cv2.polylines(image, [_pixels(table)], True, (150, 152, 150), 2, cv2.LINE_AA, shift=4)


class Scene:
    """A car before a level camera, on a canvas; azimuth: radians, 0 before the nose."""

    def __init__(self, car, azimuth):
        right, away = (-np.sin(azimuth), np.cos(azimuth), 0), (-np.cos(azimuth), -np.sin(azimuth), 0)
        self.car, self.axes = car, np.array([right, (0, 0, -1), away])
        self.eye = np.array([0, -car.height, -car.distance]) @ self.axes
        self.canvas = np.zeros((HEIGHT, WIDTH, 4), np.uint8)  # red, green, blue, cover: 0 or 255

    def at(self, points):
        """Positions in the image (..., 2) of points (..., 3), or (..., 2) on the floor."""
        seen = points @ self.axes[:, : points.shape[-1]].T + (0, self.car.height, self.car.distance)
        return np.float32(seen[..., :2] * self.car.focal / seen[..., 2:] + self.car.centre)

    def _solid(self, points, colour):
        _fill(self.canvas, cv2.convexHull(self.at(points)), (*np.float64(colour), 255))

    def shade(self):
        """Share of the light that the car leaves on the floor, (HEIGHT, WIDTH) uint8."""
        (length, width, _), dark = self.car.size / 2, np.zeros((HEIGHT // 8, WIDTH // 8 + 1), np.float32)
        _fill(dark, self.at(_oval(-length, length, -width, width, 0.4)) / 8, 0.62)
        for x, y in product(self.car.axles, (-0.8 * width, 0.8 * width)):
            _fill(dark, self.at(_oval(x - 0.3, x + 0.3, y - 0.16, y + 0.16)) / 8, 1)
        dark = 0.55 * cv2.GaussianBlur(dark, (0, 0), 7) + 0.45 * cv2.GaussianBlur(dark, (0, 0), 2)
        return cv2.resize(np.uint8(255 - 255 * dark), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)

    def on_wheel(self, x, side, share=1.0, deep=0.0, angle=CIRCLE):
        """Positions (n, 2) of points on a wheel: shares of its radius, metres inwards, angles."""
        radius, y = self.car.wheel, side * (0.48 * self.car.size[1] - np.asarray(deep))
        across, up = x + radius * share * np.cos(angle), radius + radius * share * np.sin(angle)
        return self.at(np.stack(np.broadcast_arrays(across, y, up), axis=-1)).reshape(-1, 2)

    def wheel(self, x, side):
        """Draw a wheel, open between its spokes where its face is seen."""
        layer, place = np.zeros_like(self.canvas), partial(self.on_wheel, x, side)
        _fill(layer, cv2.convexHull(place(deep=[[0], [0.24]])), (28, 28, 28, 255))
        if self.eye[1] * side > self.car.size[1] / 2:
            _fill(layer, place(0.7), (*[self.car.rim] * 3, 255))
            share, spread = np.array([(0.24, -0.6), (0.63, -1), (0.63, 0), (0.63, 1), (0.24, 0.6)]).T
            for turn in 40 * self.car.turn + np.linspace(0, 2 * np.pi, self.car.spokes, endpoint=False):
                gap = place(share, 0, turn + 2.3 / self.car.spokes * spread)
                _fill(layer, gap, (45, 45, 45, 255))
                through = cv2.intersectConvexConvex(gap, place(0.62, 0.2))[1]
                if through is not None:
                    _fill(layer, through, (0, 0, 0, 0))
        cv2.copyTo(layer, layer[..., 3], self.canvas)

    def faces(self):
        """Index of the body's face in each pixel, -1 for none, the faces' corners and normals."""
        mesh, at, index = self.car.mesh, self.at(self.car.mesh), np.full((HEIGHT, WIDTH), -1, np.int32)
        corners = mesh[:-1, :-1].reshape(-1, 3)
        normals = np.cross(mesh[:-1, 1:] - mesh[1:, :-1], mesh[1:, 1:] - mesh[:-1, :-1]).reshape(-1, 3)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
        outlines = _pixels(np.stack([at[:-1, :-1], at[1:, :-1], at[1:, 1:], at[:-1, 1:]], axis=2).reshape(-1, 4, 2))
        facing = ((self.eye - corners) * normals).sum(axis=1) > 0
        far_first = np.argsort(-corners @ self.axes[2], kind="stable")
        for face in far_first[facing[far_first]].tolist():
            cv2.fillConvexPoly(index, outlines[face], face, shift=4)
        return index, corners, normals

    def cover(self, rows, columns, corners, normals):
        """What covers the body in pixels (n,) whose rays meet planes through corners with normals, (n, 3) each."""
        rays = (np.stack([columns, rows, 0 * rows], axis=1) - (*self.car.centre, -self.car.focal)) @ self.axes
        reach = ((corners - self.eye) * normals).sum(axis=1) / (rays * normals).sum(axis=1)
        x, y, z = ((self.eye + rays * reach[:, None]) / self.car.size).T
        ends = (np.abs(x) > 0.45) | (z > 0.25) & (np.abs(y) < 0.44 - 0.22 * (z - BELT).clip(0))
        across, where = np.where(ends, 2 * np.abs(y), 0.5 - x), np.where(ends, np.where(x > 0, NOSE, TAIL), FLANK)
        column, row = (np.stack([across, z], axis=1) * SKIN).clip(0, np.array(SKIN) - 1).astype(int).T
        return self.car.skin[where, row, column]

    def shades(self, normals):
        """Red, green, blue of the paint and what it mirrors by normals (n, 3): (n, 4) uint8."""
        to_eye = self.eye / np.linalg.norm(self.eye)
        facing, up = np.clip(normals @ to_eye, 0, 1), normals[:, 2]
        mirrored = np.interp(2 * facing * up - to_eye[2], *STUDIO)
        *albedo, gloss = self.car.paint
        light = np.outer(0.84 + 0.17 * up + 0.08 * facing, albedo) * (1 - gloss)
        shine = mirrored * (gloss + 0.5 * (1 - facing) ** 4)
        return (np.column_stack([light + shine[:, None], mirrored]) * 255).clip(0, 255).astype(np.uint8)

    def body(self):
        """Draw the body but for its wheel arches."""
        index, corners, normals = self.faces()
        rows, columns = np.nonzero(index >= 0)
        face = index[rows, columns]
        shades, what = self.shades(normals)[face], self.cover(rows, columns, corners[face], normals[face])
        colours = np.where((what == PAINT)[:, None], shades[:, :3], TONES[what])
        colours[what == GLASS] = shades[what == GLASS, 3:] // 4 + np.uint8((40, 44, 42))
        shown = what != OPEN
        self.canvas[rows[shown], columns[shown]] = np.insert(colours[shown], 3, 255, axis=1)

    def mirrors(self, behind):
        """Draw the mirrors behind the middle of the car, or the others."""
        box = np.array([*product((-0.09, -0.05, 0.05), (-0.12, 0.12), (-0.08, 0.08))])
        for side in (-1, 1):
            foot = self.car.size * (0.47 - self.car.glass[0], 0.53 * side, BELT + 0.055)
            if (foot @ self.axes[2] > 0) == behind:
                self._solid(box + foot, np.array(self.car.paint[:3]) * 210 + 8)

    def draw(self):
        """Draw the car, what lies behind first."""
        self.mirrors(behind=True)
        self._solid(np.array([*product((-0.44, 0.43), (-0.44, 0.44), (0.2, 0.5))]) * self.car.size, (13, 13, 13))
        for side, x in product(sorted((-1, 1), key=lambda side: side * self.eye[1]), self.car.axles):
            self.wheel(x, side)
        aerial = np.array([(0.02, 0.007, 0), (0, -0.007, 0), (-0.16, 0.006, 0.36), (-0.16, -0.006, 0.36)])
        self._solid(aerial + self.car.size * (-0.12, 0, 0.93), TONES[DARK])
        self.body()
        self.mirrors(behind=False)


def render(car, view, rng):
    """An image, (HEIGHT, WIDTH, 3) uint8, and its mask, (HEIGHT, WIDTH) bool; view: 1..16."""
    scene = Scene(car, (view - 1) * 2 * np.pi / VIEWS + car.turn)
    scene.draw()
    image = cv2.multiply(car.studio, cv2.merge([scene.shade()] * 3), scale=1 / 255)
    cv2.copyTo(cv2.cvtColor(scene.canvas, cv2.COLOR_RGBA2RGB), scene.canvas[..., 3], image)
    noise = np.frombuffer(rng.bytes(image.size), np.int8).reshape(image.shape) >> 7
    return cv2.add(cv2.GaussianBlur(image, (5, 5), 0.8), noise, dtype=cv2.CV_8U), scene.canvas[..., 3] > 0


def _write_view(folder, split, car, view, rng):
    """Write an image, in train with its mask, unless they are there; returns its name and the mask's run lengths."""
    image_file = folder / split / f"{car.id}_{view:02d}.jpg"
    mask_file = folder / "train_masks" / f"{image_file.stem}_mask.gif"
    if image_file.exists() and mask_file.exists():
        return image_file.name, rle.encode(np.array(Image.open(mask_file)))
    image, mask = render(car, view, rng)
    with atomic(image_file) as file:
        Image.fromarray(image).save(file, "JPEG", quality=90)
    if split == "train":
        paletted = Image.fromarray(mask.view(np.uint8))
        paletted.putpalette([0, 0, 0, 255, 255, 255])
        with atomic(mask_file) as file:
            paletted.save(file, "GIF")
    return image_file.name, rle.encode(mask)


def _write_car(folder, key):
    """Write the views of a car; key: seed, 0 for train or 1 for test, number; returns its rows of the tables."""
    number = 2 * key[2] + 6 if key[1] else key[2]  # each test car has another paint, the first two a colour
    car, split = Car(np.random.default_rng(key), number), ("train", "test")[key[1]]
    views = [_write_view(folder, split, car, view, np.random.default_rng((*key, view))) for view in range(1, VIEWS + 1)]
    return car.row, pd.DataFrame(views, columns=["img", "rle_mask"])


def _complete(folder, wanted):
    """Whether `folder` holds this demo; UserError where it holds something else."""
    note = read_json(folder / "demo.json", dict) if (folder / "demo.json").exists() else {}
    if {name: note.get(name) for name in wanted} != wanted and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files, or another demo: {note}. Give an empty folder.")
    files = sum(len(list(folder.glob(names))) for names in ("t*/*.jpg", "train_masks/*.gif", "*.csv"))
    return note.get("complete") and files >= (2 * wanted["cars"] + wanted["test_cars"]) * VIEWS + 4


def write_competition(folder: str | Path, cars: int = 12, test_cars: int = 4, seed: int = 1) -> None:
    """Write the demo in the competition's layout, 16 images a car; returns at once where it is all there.

    folder: new, empty, or this demo begun before, which is finished; `truth.csv` there is of the test images.
    """
    folder, wanted = Path(folder), {"version": VERSION, "cars": cars, "test_cars": test_cars, "seed": seed}
    if min(cars, test_cars) < 1 or seed < 0:
        raise UserError(f"cars is {cars}, test_cars {test_cars}, seed {seed}: give 1 or more, 1 or more, 0 or more.")
    if _complete(folder, wanted):
        return
    need_space(folder, (cars + test_cars) * VIEWS * 150_000)
    write_json(folder / "demo.json", wanted | {"complete": False})
    keys = [(seed, 0, number) for number in range(cars)] + [(seed, 1, number) for number in range(test_cars)]
    with ThreadPoolExecutor(2) as pool:
        done = list(progress(pool.map(partial(_write_car, folder), keys), "demo cars", "cars", total=len(keys)))
    train, test = (pd.concat([views for _, views in part]).sort_values("img") for part in (done[:cars], done[cars:]))
    tables = {"train_masks": train, "truth": test, "sample_submission": test.assign(rle_mask="1 1")}
    tables["metadata"] = pd.DataFrame([row for row, _ in done]).sort_values("id")
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    write_json(folder / "demo.json", wanted | {"complete": True})
