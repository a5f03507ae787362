"""Every figure of the suite, in one look: functions take arrays and tables and return a matplotlib Figure.

A colour means the same thing everywhere and is safe for colour-blind eyes (after Okabe and Ito, folds after Tol).
"""

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from carvana import rle
from carvana.data.folds import HOLDOUT
from carvana.files import atomic
from carvana.grid import resize

TRUE, PREDICTED = "#009E73", "#CC79A7"  # the mask of the competition and ours
MISSED, EXTRA = "#D55E00", "#0072B2"  # car taken for wall, wall taken for car
EDGES = ("#C9CED6", "#97A0AE", "#5F6A7B")  # wrong pixels within 1, 3 and 10 pixels of the true edge
DATA, MARK = "#4A5568", "#E69F00"  # a plain series, and what the title speaks of
FOLDS = ("#332288", "#88CCEE", "#999933", "#882255", "#DDCC77", "#AA4499", "#6699CC", "#661100")  # from fold 0 on
HELD_OUT = "#A3A3A3"  # cars that no fold sees
WIDTH, DPI = 9.5, 110  # inches, and dots an inch: 1045 pixels, the width of a notebook's page
TEXT = 10.5  # points
PARTS = {"edge_1": "1 pixel from the true edge", "edge_3": "2 to 3 pixels from it", "edge_10": "4 to 10 pixels from it"}
PARTS |= {"missed": "farther: car missed", "extra": "farther: wall taken for car"}


class Page(Figure):
    """A figure that a notebook shows where it is the last line of a cell, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG whole or not at all; returns the figure, so that a notebook's last line shows it."""
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return figure


def fold_colour(fold: int) -> str:
    """The colour of a fold, grey for the held-out cars."""
    return HELD_OUT if fold == HOLDOUT else FOLDS[fold % len(FOLDS)]


def areas(pictures: pd.DataFrame) -> Figure:
    """Share of the picture that is car: a box for every view, and the distribution over cars."""
    figure, (left, right) = charts(1, 2, 3.8, width_ratios=[2, 1])
    views, cars = pictures.groupby("view")["area"], pictures.groupby("car")["area"].mean()
    look = {"boxprops": {"facecolor": TRUE, "alpha": 0.5}, "medianprops": {"color": "black"}}
    left.boxplot([area for _, area in views], widths=0.6, patch_artist=True, flierprops={"markersize": 3}, **look)
    left.set_xticks(range(1, len(views) + 1), list(views.groups))
    middle = views.median()
    least, most = middle.idxmin(), middle.idxmax()
    title = f"View {most} shows most car ({middle[most]:.1%}), view {least} least ({middle[least]:.1%})"
    label(left, title, "view", "area of the mask (share of the picture)", percent="y")
    right.hist(cars, bins=min(30, max(5, len(cars) // 4)), color=TRUE, edgecolor="white")
    label(right, f"Cars: {cars.min():.1%} to {cars.max():.1%}", "mean area over a car's views", "cars", percent="x")
    return figure


def areas_by_make(pictures: pd.DataFrame, makes: pd.Series, shown: int = 14) -> Figure:
    """A car's mean area, a dot each, by make; the `shown` commonest, then all others together.

    makes: make by car; cars that are not in it or have an empty one are drawn as unknown.
    """
    cars = pictures.groupby("car")["area"].mean()
    make = makes.reindex(cars.index).fillna("").replace("", "unknown")
    common = make[make != "unknown"].value_counts().index[:shown]
    make = make.where(make.isin([*common, "unknown"]), "other makes")
    order = sorted(common, key=lambda name: cars[make == name].median())
    order += [name for name in ("other makes", "unknown") if (make == name).any()]
    figure, (ax,) = charts(1, 1, 1.3 + 0.26 * len(order))
    for at, name in enumerate(order):
        own = cars[make == name]
        ax.plot(own, np.full(len(own), at), "o", markersize=5, alpha=0.6, color=TRUE if name in common else DATA)
        ax.vlines(own.median(), at - 0.35, at + 0.35, color="black", linewidth=1.5)
    ax.set_yticks(range(len(order)), [f"{name} ({(make == name).sum()})" for name in order])
    title = f"{make.ne('unknown').sum()} of {len(cars)} cars have a known make"
    if common.size:
        least, most = (f"{name} ({cars[make == name].median():.1%})" for name in (order[0], order[common.size - 1]))
        title = f"Makes go from {least} to {most}, cars from {cars.min():.1%} to {cars.max():.1%}"
    label(ax, title, "a car's mean area (share of the picture); line: middle of the make", percent="x")
    return figure


def mean_mask(pictures: pd.DataFrame) -> Figure:
    """For every view the share of cars that cover each place, and below it their spread (one sigma)."""
    height, width = (max(1, round(pictures[side].median() / 8)) for side in ("height", "width"))
    views = {view: _mean_and_spread(rows, height, width) for view, rows in pictures.groupby("view")}
    every = np.stack([mean for mean, _ in views.values()])
    never, always = (every.max(0) == 0).mean(), (every.min(0) > 0.999).mean()
    most = max(views, key=lambda view: views[view][1].mean())
    text = f"{never:.0%} of the picture is never car, {always:.1%} always is; cars differ most in view {most}"
    columns = min(8, len(views))
    half = -(-len(views) // columns) * columns  # panels of the means; the spreads start a row of their own
    figure, axes = panels(2 * half, columns, height / width, text, line=0.35, foot=0.7)
    looks = ("mean", "cividis", 1, "cars that cover the place"), ("spread", "magma", 0.5, "spread among cars (sigma)")
    for i, (name, colours, top, words) in enumerate(looks):
        for ax, (view, maps) in zip(axes[i * half :], views.items(), strict=False):
            shown = ax.imshow(maps[i], cmap=colours, vmin=0, vmax=top)
            ax.set_title(f"view {view}: {name}", fontsize=TEXT - 1.5)
        side = [ax for at, ax in enumerate(axes) if (at % columns >= columns // 2) == i] or axes
        bar = figure.colorbar(shown, ax=side, orientation="horizontal", aspect=30, format=PercentFormatter(1))
        bar.set_label(words, fontsize=TEXT - 1)
    return figure


def _mean_and_spread(rows: pd.DataFrame, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    masks = (rle.decode(row.rle, row.height, row.width).astype(np.float32) for row in rows.itertuples())
    stack = np.stack([resize(mask, height, width) for mask in masks])
    return stack.mean(0), stack.std(0)


def oddities(pictures: pd.DataFrame) -> pd.DataFrame:
    """What may be wrong with a mask: img, ratio, fragment, fragment_at, hole, hole_at; a row per picture.

    ratio: area over what the view's middle and the car's other views let expect. fragment, hole: the largest patch
    apart from the car and the largest gap in it, in pixels; ..._at: (x, y) of its middle.
    """
    ratio = pictures["area"] / pictures.groupby("view")["area"].transform("median")
    ratio /= ratio.groupby(pictures["car"]).transform("median")
    with ThreadPoolExecutor() as pool:
        found = pd.DataFrame(list(pool.map(_patches, pictures.itertuples())), index=pictures.index)
    return pd.concat([pictures["img"], ratio.rename("ratio"), found], axis=1)


def _patches(row) -> dict:
    mask = rle.decode(row.rle, row.height, row.width).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(mask) if mask.any() else (0, 0, row.width, row.height)
    mask = mask[top : top + height, left : left + width]
    wall = np.pad(1 - mask, 1, constant_values=1)  # the frame joins all wall that reaches it
    found = {}
    for name, image, shift in (("fragment", mask, 0), ("hole", wall, 1)):
        _, _, stats, centres = cv2.connectedComponentsWithStats(image, connectivity=4 if shift else 8)
        second = stats[1:, cv2.CC_STAT_AREA].argsort()[-2:-1] + 1  # the largest is the car, or the wall around it
        found[name] = int(stats[second, cv2.CC_STAT_AREA].sum())
        found[f"{name}_at"] = tuple(centres[second].sum(0) - shift + (left, top))
    return found


def fold_balance(pictures: pd.DataFrame, folds: pd.DataFrame) -> Figure:
    """Pictures and areas of every fold, held-out cars included; folds: table car, fold."""
    fold_of = pictures["car"].map(folds.set_index("car")["fold"])
    sizes, means = fold_of.value_counts().sort_index(), pictures.groupby(fold_of)["area"].mean()
    names = ["held out" if fold == HOLDOUT else str(fold) for fold in sizes.index]
    figure, (left, right) = charts(1, 2, 3.6)
    left.bar_label(left.bar(names, sizes, color=[fold_colour(fold) for fold in sizes.index]), fontsize=TEXT - 1)
    left.margins(y=0.12)
    kept = sizes[sizes.index != HOLDOUT]
    label(left, f"Folds hold {kept.min()} to {kept.max()} pictures", "fold", "pictures")
    for at, (fold, rows) in enumerate(pictures.groupby(fold_of)):
        cars = rows.groupby("car")["area"].mean().sort_values()
        right.plot(at + np.linspace(-0.25, 0.25, len(cars)), cars, "o", markersize=3.5, color=fold_colour(fold))
        right.hlines(means[fold], at - 0.35, at + 0.35, color="black", linewidth=1.5)
    right.set_xticks(range(len(names)), names)
    title = f"Mean areas lie between {means.min():.1%} and {means.max():.1%}"
    label(right, title, "fold", "a car's area (share of the picture)", percent="y")
    return figure


def test_areas(test: pd.DataFrame, train: pd.DataFrame) -> Figure:
    """Predicted areas of test pictures against areas of training masks; `area` of both tables is a share."""
    figure, (ax,) = charts(1, 1, 3.2)
    bins = np.linspace(0, max(test["area"].max(), train["area"].max(), 0.01), 41)
    for table, colour, text in ((train, TRUE, "training masks"), (test, PREDICTED, "predicted test masks")):
        shares = np.full(len(table), 1 / len(table))
        ax.hist(table["area"], bins, weights=shares, color=colour, alpha=0.55, label=f"{len(table)} {text}")
        ax.axvline(table["area"].median(), color=colour, linewidth=2)
    ax.legend(fontsize=TEXT - 1)
    beyond = (~test["area"].between(train["area"].min(), train["area"].max())).sum()
    middles = f"{test['area'].median():.1%} against {train['area'].median():.1%}"
    title = f"Middle area {middles} in training; {beyond} of {len(test)} outside the training range"
    label(ax, title, "area of the mask (share of the picture)", "share of the pictures", percent="xy")
    return figure


DOTS = {"fmt": "o", "color": PREDICTED, "ecolor": DATA, "capsize": 3, "markersize": 6}


def panels(count, columns, aspect, text: str, line: float = 0.25, foot: float = 0) -> tuple[Page, list[Axes]]:
    """Panels for pictures of height / width = `aspect`, with `line` inches for each title and `foot` below all."""
    columns = max(1, min(columns, count))
    rows, width = -(-count // columns), min(WIDTH, max(5, 3.2 * columns))
    figure = Page(figsize=(width, rows * (width / columns * aspect + line) + 0.35 + foot), layout="constrained")
    figure.suptitle(text, x=0.01, ha="left", fontsize=TEXT + 1, fontweight="bold")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def charts(rows: int, columns: int, height: float, **layout) -> tuple[Page, list[Axes]]:
    """Axes of the suite's look in a page of `height` inches; layout: of matplotlib's subplots."""
    figure = Page(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **layout).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=TEXT - 1)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return figure, axes


def label(ax: Axes, title: str, x: str, y: str = "", percent: str = "", scores: dict | None = None) -> None:
    """Title and axes; percent: axes that show shares; scores: axes on a logit scale, with the values on them.

    The logit scale leaves room for 0.99 and for 0.999; it is labelled with plain scores.
    """
    ax.set_title(title, loc="left", fontsize=TEXT + 1, fontweight="bold")
    ax.set_xlabel(x, fontsize=TEXT)
    ax.set_ylabel(y, fontsize=TEXT)
    for name in percent:
        getattr(ax, f"{name}axis").set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    for name, values in (scores or {}).items():
        low, high = values.min(), values.max()
        round_ones = [0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995]
        ticks = [tick for tick in round_ones if low <= tick <= high]
        if len(ticks) < 4:
            ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if 0 < tick < 1]
        ax.set(**{f"{name}scale": "logit"})
        axis = getattr(ax, f"{name}axis")
        axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.set_minor_locator(NullLocator())


def inside(values: Iterable[float]) -> np.ndarray:
    """Scores as a logit scale can show them: strictly between 0 and 1."""
    return np.clip(np.asarray(values, dtype=float), 1e-3, 1 - 1e-5)
