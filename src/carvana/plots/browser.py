"""Look at any training image in Jupyter: image, mask, probability and difference of any run, worst first."""

from contextlib import suppress
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
import simplejpeg
from ipywidgets import HTML, Dropdown, HBox, Image, IntSlider, ToggleButton, VBox

from carvana.data.competition import Competition
from carvana.data.folds import HOLDOUT
from carvana.data.images import mask_of, read_full_image
from carvana.errors import UserError, did_you_mean
from carvana.evaluation.evaluate import unseeing_ensemble
from carvana.files import resolve
from carvana.grid import resize
from carvana.inference import Ensemble, predict_probabilities
from carvana.metrics import dice, pixel_counts
from carvana.plots import style
from carvana.plots.overlays import densest, with_edge, with_errors
from carvana.run import Run

LARGEST = 640, 960  # height and width of what is shown, in screen pixels
KEPT = 8  # images and probabilities in memory, up to 10 MB each at 1918x1280
ORDERS = {"worst first": (["dice", "img"], True), "best first": (["dice", "img"], False), "by name": (["img"], True)}
LAYERS = {"image": True, "mask": True, "probability": False, "difference": True}


def browse(competition: Competition, runs_dir: str | Path, run_name: str = "") -> "Browser":
    """A widget that shows every training image that a run has networks for; the last line of a cell.

    run_name: the run that is shown first, by default the first of `runs_dir` that is trained on cars of `competition`.
    UserError where there is none.
    """
    folder, cars = resolve(runs_dir), set(competition.samples["car"])
    names = [name for name in Run.trained(folder) if _shows(Run(folder, name), cars)]
    if not names:
        raise UserError(f"runs_dir {folder} holds no trained run of these cars. Train with 03_train first.")
    if run_name and run_name not in names:
        raise UserError(f"run_name {run_name} has no trained fold of these cars{did_you_mean(run_name, names)}")
    return Browser(competition, [Run(folder, name) for name in names], run_name or names[0])


def _shows(run: Run, cars: set[str]) -> bool:
    with suppress(UserError):  # what is wrong with another run is no affair of the one that is shown
        folds = run.folds()
        return bool(cars & set(folds.loc[folds["fold"].isin([HOLDOUT, *run.checkpoints()]), "car"]))
    return False


class Browser(VBox):  # type: ignore[misc]  # ipywidgets has no types
    """The widget of `browse`. `rank` is the image's place in the order; car and view follow it and lead to it.

    While several controls are set together, it is not `settled`, and none of them leads anywhere.
    """

    def __init__(self, competition: Competition, runs: list[Run], run_name: str):
        self.competition, self.runs = competition, {run.name: run for run in runs}
        self.full_image = lru_cache(KEPT)(lambda name: read_full_image(competition.train_images, name))
        self.probability = lru_cache(KEPT)(self._probability)
        self.ensemble = lru_cache(2)(self._ensemble)
        self.run = Dropdown(options=list(self.runs), value=run_name, description="run")
        self.order = Dropdown(options=list(ORDERS), description="order")
        self.car, self.view = Dropdown(description="car"), Dropdown(description="view")
        self.view.options = sorted(competition.samples["view"].unique().tolist())
        self.rank = IntSlider(1, 1, len(competition.samples), description="image", continuous_update=False)
        self.layers = {name: ToggleButton(on, description=name) for name, on in LAYERS.items()}
        self.zoom = ToggleButton(False, description="where most is wrong")
        self.screen, self.caption = Image(format="jpeg"), HTML()
        controls = HBox([self.run, self.order]), HBox([self.car, self.view]), self.rank
        super().__init__([*controls, HBox([*self.layers.values(), self.zoom]), self.caption, self.screen])
        self._sort()
        reactions = dict.fromkeys((self.rank, self.zoom, *self.layers.values()), self._show)
        reactions |= {self.run: self._sort, self.order: self._sort, self.car: self._find, self.view: self._find}
        for widget, react in reactions.items():
            widget.observe(react, "value")

    @property
    def sample(self) -> pd.Series:
        """The row of the image that is shown, with its fold and its Dice of scores.csv."""
        return self.table.iloc[self.rank.value - 1]

    def _sort(self, _change: Any = None) -> None:
        """Take the images that the run has networks for, in the order that is asked for, and show the first."""
        run, samples = self.runs[self.run.value], self.competition.samples
        fold_of, scored_folds = run.folds().set_index("car")["fold"], [HOLDOUT, *run.checkpoints()]
        dices = run.scores().set_index("img")["dice"] if run.scores_path.exists() else pd.Series(dtype=float)
        table = samples.assign(fold=samples["car"].map(fold_of), dice=samples["img"].map(dices))
        columns, ascending = ORDERS[self.order.value]
        table = table[table["fold"].isin(scored_folds)]
        self.table = table.sort_values(columns, ascending=ascending, ignore_index=True)
        self.settled = False
        self.car.options = self.table["car"].unique().tolist()
        self.rank.value, self.rank.max = 1, len(self.table)
        self.settled = True
        self._show()

    def _find(self, _change: Any) -> None:
        """Go to the car and view that are set; another car is shown by the first of its views in the order."""
        views = self.table[self.table["car"] == self.car.value]
        if self.sample["car"] == self.car.value:
            views = views[views["view"] == self.view.value]
        if self.settled and len(views):
            self.rank.value = int(views.index[0]) + 1

    def _show(self, _change: Any = None) -> None:
        if not self.settled:
            return
        sample, layers = self.sample, {name for name, layer in self.layers.items() if layer.value}
        self.settled = False
        self.car.value, self.view.value = sample["car"], sample["view"]
        self.settled = True
        image, true, probability = self.full_image(sample["img"]), mask_of(sample), None
        if self.zoom.value or layers & {"probability", "difference"}:
            probability = self.probability(self.run.value, sample["img"], sample["fold"])
        self.caption.value = caption(sample, true, probability)
        if self.zoom.value and probability is not None:
            window = densest(true != (probability > 0.5))
            image, true, probability = (np.ascontiguousarray(array[window]) for array in (image, true, probability))
        self.screen.value = simplejpeg.encode_jpeg(painted(image, true, probability, layers), quality=92)

    def _probability(self, run_name: str, name: str, fold: int) -> np.ndarray:
        """Of car at full size, by the networks that have not seen it."""
        return next(predict_probabilities(self.ensemble(run_name, fold), self.competition.train_images, [name]))

    def _ensemble(self, run_name: str, fold: int) -> Ensemble:
        """The networks of a run for the cars of a fold, with the tta that the run predicts with."""
        run = self.runs[run_name]
        return unseeing_ensemble([run], fold, run.note("ensemble").get("views", ["none"]))


def caption(sample: pd.Series, true: np.ndarray, probability: np.ndarray | None) -> str:
    """HTML about the image that is shown: whose network, how good, what colours mean."""
    network = "all folds, as it is held out" if sample["fold"] == HOLDOUT else f"fold {sample['fold']:g}"
    name = f"<b><code>{escape(sample['img'])}</code></b>"  # nobody looks for formulas in code
    parts = [f"{name}, by the network of {network}, which has not seen this car"]
    if not np.isnan(sample["dice"]):
        parts.append(f"Dice {sample['dice']:.6f} in scores.csv")
    if probability is not None:
        parts.append(f"as shown {float(dice(pixel_counts(probability > 0.5, true))):.6f}")
    colours = style.ERROR_LEGEND.items()
    legend = " ".join(f'<span style="color:{colour}">&#9632;</span> {text}' for colour, text in colours)
    return f"{'; '.join(parts)}.<br>{legend}"


def painted(image: np.ndarray, true: np.ndarray, probability: np.ndarray | None, layers: set[str]) -> np.ndarray:
    """The `layers` of an image that are asked for, as large as the screen allows, (h, w, 3) uint8.

    image: (H, W, 3) uint8; true: (H, W) bool; probability: (H, W) in [0, 1], needed for "probability" and "difference".
    """
    scale = min(LARGEST[0] / true.shape[0], LARGEST[1] / true.shape[1])
    size = [round(side * scale) for side in true.shape]
    shown = resize(image, *size) if "image" in layers else np.full((*size, 3), 255, np.uint8)
    if probability is not None and "probability" in layers:
        share = 0.65 if "image" in layers else 1.0
        coloured = matplotlib.colormaps["cividis"](resize(probability, *size), bytes=True)[..., :3]
        shown = cv2.addWeighted(shown, 1 - share, np.ascontiguousarray(coloured), share, 0)
    if probability is not None and "difference" in layers:
        predicted, least = probability > 0.5, 0 if scale < 1 else 0.5  # a single wrong pixel is to be seen
        errors = (resize(mask.astype(np.float32), *size) > least for mask in (true & ~predicted, predicted & ~true))
        shown = with_errors(shown, *errors)
    return with_edge(shown, resize(true.astype(np.float32), *size) > 0.5, 2) if "mask" in layers else shown
