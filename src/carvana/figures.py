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
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from carvana import metrics, rle
from carvana.files import atomic
from carvana.folds import HOLDOUT
from carvana.grid import Grid, resize
from carvana.photos import Archive, full_picture, picture

TRUE, PREDICTED = "#009E73", "#CC79A7"  # the mask of the competition and ours
MISSED, EXTRA = "#D55E00", "#0072B2"  # car taken for wall, wall taken for car
EDGES = ("#C9CED6", "#97A0AE", "#5F6A7B")  # wrong pixels within 1, 3 and 10 pixels of the true edge
DATA, MARK = "#4A5568", "#E69F00"  # a plain series, and what the title speaks of
FOLDS = ("#332288", "#88CCEE", "#999933", "#882255", "#DDCC77", "#AA4499", "#6699CC", "#661100")  # from fold 0 on
HELD_OUT = "#A3A3A3"  # cars that no fold sees
WIDTH, DPI = 9.5, 110  # inches, and dots an inch: 1045 pixels, the width of a notebook's page
TEXT = 10.5  # points
PARTS = {"edge_1": "within 1 pixel of the edge", "edge_3": "2 to 3 pixels off", "edge_10": "4 to 10 pixels off"}
PARTS |= {"missed": "farther, car missed", "extra": "farther, wall taken for car"}


class Page(Figure):
    """A figure that a notebook shows where it is the last line of a cell, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def fold_colour(fold: int) -> str:
    """The colour of a fold, grey for the held-out cars."""
    return HELD_OUT if fold == HOLDOUT else FOLDS[fold % len(FOLDS)]


def _charts(rows: int, columns: int, height: float) -> tuple[Page, list[Axes]]:
    figure = Page(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=TEXT - 1)
        ax.grid(alpha=0.25, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _label(ax: Axes, title: str, x: str, y: str = "") -> None:
    ax.set_title(title, loc="left", fontsize=TEXT + 1, fontweight="semibold")
    ax.set_xlabel(x, fontsize=TEXT)
    ax.set_ylabel(y, fontsize=TEXT)


def _percent(axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=None))


def _score_axis(ax: Axes, axis: str, values: np.ndarray) -> None:
    """Logit scale, which leaves room for 0.99 and for 0.999, labelled with plain scores."""
    low, high = np.nanmin(values), np.nanmax(values)
    getattr(ax, f"set_{axis}scale")("logit")
    ticks = [0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < 2:
        inside = [low, high]
    axis = getattr(ax, f"{axis}axis")
    axis.set_major_locator(FixedLocator(inside[:: -(-len(inside) // 7)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _inside(values: Iterable[float]) -> np.ndarray:
    """Scores as a logit scale can show them: strictly between 0 and 1."""
    return np.clip(np.asarray(values, dtype=float), 1e-3, 1 - 1e-5)


def _grid(count: int, columns: int, aspect: float, line: float = 0.25) -> tuple[Page, list[Axes]]:
    """Panels for pictures of height / width = `aspect`, with `line` inches for each title."""
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    width = min(WIDTH, 3.2 * columns)
    figure = Page(figsize=(width, rows * (width / columns * aspect + line) + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def _outlined(ax: Axes, image: np.ndarray, soft: np.ndarray, colour: str, title: str) -> None:
    """A picture (H, W, 3) and the line where `soft`, (H, W) in [0, 1], passes 0.5."""
    ax.imshow(image)
    ax.set_title(title, fontsize=TEXT - 1.5)
    if soft.min() < 0.5 < soft.max():
        line = ax.contour(soft, [0.5], colors=[colour], linewidths=1.3)
        line.set_path_effects([withStroke(linewidth=2.4, foreground="white", alpha=0.8)])


def _reduced(photos: Archive, row, width: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Photograph and soft mask of a row of the index, `width` pixels wide, on one grid."""
    grid = Grid(row.height, row.width, max(1, round(width * row.height / row.width)), width)
    image = picture(photos, row.img, grid.height, grid.width)[0]
    return image, grid.soft_target(rle.decode(row.rle, row.height, row.width)) / 255


def turntable(photos: Archive, pictures: pd.DataFrame, car: str) -> Figure:
    """Every view of a car with the outline of its mask."""
    views = pictures[pictures["car"] == car].sort_values("view")
    figure, axes = _grid(len(views), 4, views["height"].iloc[0] / views["width"].iloc[0])
    for ax, row in zip(axes, views.itertuples(), strict=False):
        _outlined(ax, *_reduced(photos, row), TRUE, f"view {row.view}: {row.area:.1%} car")
    low, high = views.loc[views["area"].idxmin()], views.loc[views["area"].idxmax()]
    span = f"{low['area']:.1%} of the picture (view {low['view']}) to {high['area']:.1%} (view {high['view']})"
    figure.suptitle(f"Car {car} covers {span}", fontsize=TEXT + 2)
    return figure


def areas(pictures: pd.DataFrame) -> Figure:
    """Share of the picture that is car: a box for every view, and the distribution over cars."""
    figure, (left, right) = _charts(1, 2, 3.8)
    views = pictures.groupby("view")["area"]
    middle = views.median()
    boxes = left.boxplot([area for _, area in views], widths=0.6, patch_artist=True, flierprops={"markersize": 3})
    left.set_xticks(range(1, len(middle) + 1), middle.index)
    for box, line in zip(boxes["boxes"], boxes["medians"], strict=True):
        box.set(facecolor=TRUE, alpha=0.45)
        line.set(color="black")
    least, most = middle.idxmin(), middle.idxmax()
    title = f"View {most} shows most car ({middle[most]:.1%}), view {least} least ({middle[least]:.1%})"
    _label(left, title, "view", "area of the mask (share of the picture)")
    cars = pictures.groupby("car")["area"].mean()
    right.hist(cars, bins=min(30, max(5, len(cars) // 4)), color=TRUE, edgecolor="white")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    _label(right, f"Cars: {cars.min():.1%} to {cars.max():.1%}", "mean area over a car's views", "cars")
    for axis in (left.yaxis, right.xaxis):
        _percent(axis)
    figure.get_layout_engine().set(w_pad=0.15)
    left.get_gridspec().set_width_ratios([2, 1])
    return figure


def mean_mask(pictures: pd.DataFrame) -> Figure:
    """For every view, in how many pictures each place is car."""
    height, width = (max(1, round(pictures[side].median() / 8)) for side in ("height", "width"))
    means = {view: _mean_of(rows, height, width) for view, rows in pictures.groupby("view")}
    figure, axes = _grid(len(means), 8, height / width)
    for ax, (view, mean) in zip(axes, means.items(), strict=False):
        shown = ax.imshow(mean, cmap="cividis", vmin=0, vmax=1)
        ax.set_title(f"view {view}", fontsize=TEXT - 1)
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", aspect=50, shrink=0.6, format=PercentFormatter(1))
    bar.set_label("cars that cover the place", fontsize=TEXT)
    stack = np.stack(list(means.values()))
    never, always = (stack.max(0) == 0).mean(), (stack.min(0) == 1).mean()
    figure.suptitle(f"{never:.0%} of the picture is never car, {always:.1%} always is", fontsize=TEXT + 2)
    return figure


def _mean_of(pictures: pd.DataFrame, height: int, width: int) -> np.ndarray:
    total = np.zeros((height, width))
    for row in pictures.itertuples():
        mask = rle.decode(row.rle, row.height, row.width).astype(np.uint8)
        total += resize(mask * np.uint8(255), height, width)
    return total / 255 / len(pictures)


def oddities(pictures: pd.DataFrame) -> pd.DataFrame:
    """What may be wrong with a mask: img, ratio, fragment, fragment_at, hole, hole_at; a row per picture.

    ratio: area over what the view's middle and the car's other views let expect. fragment, hole: the largest patch apart
    from the car and the largest gap in it, as a share of the mask; ..._at: (x, y) of its middle in pixels.
    """
    ratio = pictures["area"] / pictures.groupby("view")["area"].transform("median")
    ratio /= ratio.groupby(pictures["car"]).transform("median")
    with ThreadPoolExecutor() as pool:
        found = pd.DataFrame(list(pool.map(_patches, pictures.itertuples())), index=pictures.index)
    return pd.concat([pictures["img"], ratio.rename("ratio"), found], axis=1)


def _patches(row) -> dict:
    mask = rle.decode(row.rle, row.height, row.width).astype(np.uint8)
    wall = np.pad(1 - mask, 1, constant_values=1)  # the frame joins all wall that touches the picture's border
    found = {}
    for name, image, shift in (("fragment", mask, 0), ("hole", wall, 1)):
        _, _, stats, centres = cv2.connectedComponentsWithStats(image, connectivity=4 if shift else 8)
        sizes = stats[1:, cv2.CC_STAT_AREA]
        second = sizes.argsort()[-2] if sizes.size > 1 else None
        found[name] = sizes[second] / mask.sum() if second is not None else 0.0
        found[f"{name}_at"] = tuple(centres[1 + second] - shift) if second is not None else None
    return found


def odd_pictures(photos: Archive, pictures: pd.DataFrame, odd: pd.DataFrame, columns: int = 4) -> Figure:
    """The oddest masks of `oddities`: by area, by fragment, by hole, `columns` of each."""
    order = {"ratio": np.log(odd["ratio"].clip(lower=1e-6)).abs(), "fragment": odd["fragment"], "hole": odd["hole"]}
    texts = {"ratio": "{:.2f} x the expected area", "fragment": "patch of {:.2%} of the mask", "hole": "gap of {:.2%}"}
    figure, axes = _grid(3 * columns, columns, pictures["height"].iloc[0] / pictures["width"].iloc[0], 0.4)
    for line, (name, values) in enumerate(order.items()):
        for ax, at in zip(axes[line * columns :], values[values > 0].nlargest(columns).index, strict=False):
            row = pictures.loc[at]
            image, soft = _reduced(photos, row)
            _outlined(ax, image, soft, TRUE, f"{row.img}\n{texts[name].format(odd.loc[at, name])}")
            if name != "ratio":
                x, y = np.array(odd.loc[at, f"{name}_at"]) * image.shape[1] / row.width
                ax.plot(x, y, "o", markersize=16, markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=2)
    off, fragment, hole = np.expm1(order["ratio"].max()), odd["fragment"].max(), odd["hole"].max()
    found = f"areas off by {off:.0%}, patches of {fragment:.2%}, gaps of {hole:.2%} of the mask"
    figure.suptitle(f"The oddest of {len(odd)} masks: up to {found}", fontsize=TEXT + 2)
    return figure
