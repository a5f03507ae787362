"""Look at any training picture in Jupyter: photograph, mask, probability and difference of any run, worst first."""

from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pandas as pd
import simplejpeg
from ipywidgets import HTML, Dropdown, HBox, Image, IntSlider, ToggleButton, VBox
from matplotlib.colors import to_rgb

from carvana import metrics, rle
from carvana.data.competition import Archive, full_picture, index, photographs
from carvana.data.folds import HOLDOUT, read_folds
from carvana.evaluation.evaluate import finished_folds
from carvana.files import UserError, nearest, read_json, resolve
from carvana.grid import resize
from carvana.inference.ensemble import Ensemble, masks
from carvana.plots.explore import EXTRA, MISSED, TRUE
from carvana.plots.overlays import densest
from carvana.plots.training import CLOSE, outline

LARGEST = 640, 960  # height and width of what is shown, in screen pixels
KEPT = 8  # probabilities in memory, 10 MB each at 1918x1280
ORDERS = {"worst first": (["dice", "img"], True), "best first": (["dice", "img"], False), "by name": (["img"], True)}
LAYERS = {"photograph": True, "mask": True, "probability": False, "difference": True}


def browse(runs_dir: str | Path, data_dir: str | Path, run_name: str = "", hq: bool = False) -> "Browser":
    """A widget that shows every training picture that a run has networks for; the last line of a cell.

    run_name: the run that is shown first, by default the first of `runs_dir` that is trained. UserError where there is
    none.
    """
    folder, data = resolve(runs_dir), resolve(data_dir)
    runs = sorted({path.parent.parent.name for path in folder.glob("*/fold*/best.safetensors")})
    if not runs:
        raise UserError(f"runs_dir {folder} holds no trained run. Train with 03_train first.")
    if run_name and run_name not in runs:
        raise UserError(f"run_name {run_name} has no trained fold in {folder}{nearest(run_name, runs)}")
    return Browser(folder, runs, photographs(data, "train", hq), index(data, hq), run_name or runs[0])


class Browser(VBox):
    """The widget of `browse`. `rank` is the picture's place in the order; car and view follow it and lead to it.

    While several controls are set together, it is not `settled`, and none of them leads anywhere.
    """

    def __init__(self, folder: Path, runs: list[str], photos: Archive, pictures: pd.DataFrame, run_name: str):
        self.folder, self.photos, self.pictures = folder, photos, pictures
        self.photograph = lru_cache(KEPT)(lambda name: full_picture(photos, name))
        self.probability = lru_cache(KEPT)(self._probability)
        self.ensemble = lru_cache(2)(self._ensemble)
        self.run = Dropdown(options=runs, value=run_name, description="run")
        self.order = Dropdown(options=list(ORDERS), description="order")
        self.car, self.view = Dropdown(description="car"), Dropdown(description="view")
        self.view.options = sorted(pictures["view"].unique().tolist())
        self.rank = IntSlider(1, 1, len(pictures), description="picture", continuous_update=False)
        self.layers = {name: ToggleButton(on, description=name) for name, on in LAYERS.items()}
        self.zoom = ToggleButton(False, description="where most is wrong")
        self.image, self.caption = Image(format="jpeg"), HTML()
        chosen = HBox([self.run, self.order]), HBox([self.car, self.view]), self.rank
        super().__init__([*chosen, HBox([*self.layers.values(), self.zoom]), self.caption, self.image])
        self._sort()
        for widget, react in ((self.run, self._sort), (self.order, self._sort), (self.rank, self._show),
                              (self.car, self._find), (self.view, self._find), (self.zoom, self._show)):  # fmt: skip
            widget.observe(react, "value")
        for layer in self.layers.values():
            layer.observe(self._show, "value")

    @property
    def picture(self) -> pd.Series:
        """The row of the picture that is shown, with its fold and its Dice of scores.csv."""
        return self.table.iloc[self.rank.value - 1]

    def _sort(self, _change=None) -> None:
        """Take the pictures that the run has networks for, in the order that is chosen, and show the first."""
        run_dir = self.folder / self.run.value
        fold_of, trained = read_folds(run_dir).set_index("car")["fold"], [HOLDOUT, *finished_folds(run_dir)]
        table, scores = self.pictures.assign(fold=self.pictures["car"].map(fold_of)), run_dir / "scores.csv"
        known = pd.read_csv(scores, index_col="img")["dice"] if scores.exists() else pd.Series(dtype=float)
        columns, ascending = ORDERS[self.order.value]
        table = table[table["fold"].isin(trained)].assign(dice=table["img"].map(known))
        self.table = table.sort_values(columns, ascending=ascending, ignore_index=True)
        self.settled = False
        self.car.options = self.table["car"].unique().tolist()
        self.rank.value, self.rank.max = 1, len(self.table)
        self.settled = True
        self._show()

    def _find(self, _change) -> None:
        """Go to the car and view that are chosen; another car is shown by the first of its views in the order."""
        own = self.table[self.table["car"] == self.car.value]
        if self.picture["car"] == self.car.value:
            own = own[own["view"] == self.view.value]
        if self.settled and len(own):
            self.rank.value = int(own.index[0]) + 1

    def _show(self, _change=None) -> None:
        if not self.settled:
            return
        picture, layers = self.picture, {name for name, layer in self.layers.items() if layer.value}
        self.settled = False
        self.car.value, self.view.value = picture["car"], picture["view"]
        self.settled = True
        true = rle.decode(picture["rle"], picture["height"], picture["width"])
        needed = layers & {"probability", "difference"} or self.zoom.value
        probability = self.probability(self.run.value, picture["img"], picture["fold"]) if needed else None
        shown = self.photograph(picture["img"]), true, probability
        if self.zoom.value:
            window = densest(true != (probability > 0.5), CLOSE)
            shown = [None if image is None else image[window] for image in shown]
        self.image.value = simplejpeg.encode_jpeg(painted(*shown, layers), quality=92)
        self.caption.value = self._told(picture, true, probability)

    def _told(self, picture: pd.Series, true: np.ndarray, probability: np.ndarray | None) -> str:
        network = "all folds, as it is held out" if picture["fold"] == HOLDOUT else f"fold {picture['fold']}"
        parts = [f"<b>{picture['img']}</b>, by the network of {network}, which has not seen this car"]
        if not np.isnan(picture["dice"]):
            parts.append(f"Dice {picture['dice']:.6f} in scores.csv")
        if probability is not None:
            parts.append(f"as shown {float(metrics.dice(*metrics.counts(probability > 0.5, true))):.6f}")
        colours = {TRUE: "true edge", MISSED: "car missed", EXTRA: "wall taken for car"}
        legend = " ".join(f'<span style="color:{colour}">&#9632;</span> {text}' for colour, text in colours.items())
        return f"{'; '.join(parts)}.<br>{legend}"

    def _probability(self, run: str, name: str, fold: int) -> np.ndarray:
        return next(masks(self.ensemble(run, fold), self.photos, [name]))

    def _ensemble(self, run: str, fold: int) -> Ensemble:
        """The networks of a run that have not seen the cars of `fold`, with the views that it predicts with."""
        run_dir, found = self.folder / run, finished_folds(self.folder / run)
        members = list(found.values()) if fold == HOLDOUT else [found[fold]]
        ensemble = run_dir / "ensemble.json"
        views = read_json(ensemble)["views"] if ensemble.exists() else ["none"]
        return Ensemble(members, [1 / len(members)] * len(members), views)


def painted(image: np.ndarray, true: np.ndarray, probability: np.ndarray | None, layers: set[str]) -> np.ndarray:
    """The chosen `layers` of a picture as large as the screen allows, (h, w, 3) uint8.

    image: (H, W, 3) uint8; true: (H, W) bool; probability: (H, W) in [0, 1], needed for "probability" and "difference".
    """
    scale = min(LARGEST[0] / true.shape[0], LARGEST[1] / true.shape[1])
    size = [round(side * scale) for side in true.shape]
    shown = resize(image, *size).copy() if "photograph" in layers else np.full((*size, 3), 255, np.uint8)
    if "probability" in layers:
        share = 0.65 if "photograph" in layers else 1.0
        shown = cv2.addWeighted(shown, 1 - share, _coloured(resize(np.ascontiguousarray(probability), *size)), share, 0)
    if "difference" in layers:
        predicted, least = probability > 0.5, 0 if scale < 1 else 0.5  # a single wrong pixel is to be seen
        for wrong, colour in ((true & ~predicted, MISSED), (predicted & ~true, EXTRA)):
            place = resize(wrong.astype(np.float32), *size) > least
            shown[place] = 0.25 * shown[place] + 0.75 * _rgb(colour)
    if "mask" in layers:
        shown[outline(resize(true.astype(np.float32), *size) > 0.5)] = _rgb(TRUE)
    return shown


def _coloured(probability: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] -> (h, w, 3) uint8 in the colours of the other figures."""
    table = (matplotlib.colormaps["cividis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table[(probability * 255).round().astype(np.uint8)]


def _rgb(colour: str) -> np.ndarray:
    return 255 * np.array(to_rgb(colour))
