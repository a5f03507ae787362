"""The look of every figure: colours, pages, axes, legends.

A colour means the same thing everywhere and is safe for colour-blind eyes (after Okabe and Ito, folds after Tol).
"""

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from carvana.data.folds import HOLDOUT
from carvana.files import atomic
from carvana.metrics import ERROR_PARTS

TRUE_COLOUR, PREDICTED_COLOUR = "#009E73", "#CC79A7"  # the mask of the competition and ours
EDGE_COLOURS = "#C9CED6", "#97A0AE", "#5F6A7B"  # wrong pixels within 1, 3 and 10 pixels of the true edge
SERIES_COLOUR, HIGHLIGHT_COLOUR = "#4A5568", "#E69F00"  # a plain series, and what the title speaks of
FOLD_COLOURS = "#332288", "#88CCEE", "#999933", "#882255", "#DDCC77", "#AA4499", "#6699CC", "#661100"
HOLDOUT_COLOUR = "#A3A3A3"  # cars that no fold sees
PAGE_WIDTH, DPI = 9.5, 110  # inches, and dots an inch: 1045 pixels, the width of a notebook's page
FONT_SIZE = 10.5  # points
NAMED = 5  # cars that a list names

ERROR_TEXTS = {"#D55E00": "car missed", "#0072B2": "background taken for car"}  # false negatives, then false positives
EDGE_TEXTS = "1 pixel from the true edge", "2 to 3 pixels from it", "4 to 10 pixels from it"
PART_TEXTS = [*EDGE_TEXTS, *(f"farther: {text}" for text in ERROR_TEXTS.values())]
PARTS = pd.DataFrame({"text": PART_TEXTS, "colour": [*EDGE_COLOURS, *ERROR_TEXTS]}, index=list(ERROR_PARTS))
ERROR_LEGEND = ERROR_TEXTS | {TRUE_COLOUR: "true edge"}

DOTS: dict[str, Any] = {  # of matplotlib's errorbar
    "fmt": "o", "color": PREDICTED_COLOUR, "ecolor": SERIES_COLOUR, "capsize": 3, "markersize": 6,
}  # fmt: skip
LIMITS = {"logit": (1e-3, 1 - 1e-5), "log": (1e-9, None)}  # of the numbers that a scale can show
ROUND = {  # numbers to label an axis with, by its scale
    "logit": [0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995],
    "log": [digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)],
}


class Page(Figure):
    """A figure that a notebook shows where it is the last line of a cell, without pyplot's global state."""

    def draw(self, renderer: RendererBase) -> None:
        """Draw every text as it is written: `$x$` in a car's name is no formula."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)

    @cached_property
    def png(self) -> bytes:
        """The finished page, drawn once for the file and for the notebook: that takes a second."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png


def save(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG whole or not at all; returns the figure, so that a notebook's last line shows it."""
    with atomic(path) as file:
        file.write(cast(Page, figure).png)
    return figure


def fold_colour(fold: int) -> str:
    """The colour of a fold, grey for the held-out cars."""
    return HOLDOUT_COLOUR if fold == HOLDOUT else FOLD_COLOURS[fold % len(FOLD_COLOURS)]


def panels(count: int, columns: int, aspect: float, line: float = 0.25, foot: float = 0) -> tuple[Page, list[Axes]]:
    """Panels for images of height / width = `aspect`; line, foot: inches for the title of each, and below all."""
    columns = max(1, min(columns, count))
    rows, width = -(-count // columns), min(PAGE_WIDTH / columns, 3.2)
    height = rows * (width * aspect + line) + 0.35 + foot
    figure = Page(figsize=(PAGE_WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def set_title(figure: Page, title: str) -> Page:
    """Write above all panels what the figure says, and hand it back."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=FONT_SIZE + 1, fontweight="bold")
    return figure


def charts(height: float, rows: int = 1, columns: int = 1) -> list[Axes]:
    """Axes of the suite's look in a page of `height` inches."""
    axes = list(Page(figsize=(PAGE_WIDTH, height), layout="constrained").subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=FONT_SIZE - 1)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return axes


def label(ax: Axes, title: str, x: str, y: str = "", **letters: str) -> Figure:
    """Write title and names of the axes, and hand back their figure.

    letters: percent, of the axes that show shares, and count, of those that show whole numbers, such as "xy".
    """
    ax.set_title(title, loc="left", fontsize=FONT_SIZE + 1, fontweight="bold")
    ax.set_xlabel(x, fontsize=FONT_SIZE)
    ax.set_ylabel(y, fontsize=FONT_SIZE)
    for letter in letters.get("count", ""):
        getattr(ax, f"{letter}axis").set_major_locator(MaxNLocator(integer=True))
    for letter in letters.get("percent", ""):
        getattr(ax, f"{letter}axis").set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    return cast(Figure, ax.figure)


def note(ax: Axes, lines: Iterable[str], x: float, y: float) -> None:
    """Lines of figures in a corner; x, y: shares of the axes' width and height, from the lower left."""
    look: dict[str, Any] = {"ha": "left" if x < 0.5 else "right", "va": "bottom" if y < 0.5 else "top"}
    ax.text(x, y, "\n".join(lines), transform=ax.transAxes, fontsize=FONT_SIZE - 1, family="monospace", **look)


def scale(ax: Axes, letter: str, kind: str) -> None:
    """Scale the axis "x" or "y", on which all is drawn that will be, and label it with plain numbers.

    kind: "log", or "logit", which leaves room for 0.99 and for 0.999.
    """
    low, high = getattr(ax.dataLim, f"interval{letter}")
    ticks = [tick for tick in ROUND[kind] if low <= tick <= high]
    if len(ticks) < 4:
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if tick > 0 and (tick < 1 or kind == "log")]
    ax.set(**{f"{letter}scale": kind})
    axis = getattr(ax, f"{letter}axis")
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.4g}"))
    axis.set_minor_locator(NullLocator())


def ends(numbers: pd.Series) -> tuple[tuple[Any, float], tuple[Any, float]]:
    """Label and value of the smallest and of the largest number."""
    return (numbers.idxmin(), numbers.min()), (numbers.idxmax(), numbers.max())


def inside(numbers: Iterable[float], kind: str = "logit") -> np.ndarray:
    """Numbers as a scale can show them."""
    return np.clip(np.array([*numbers], dtype=float), *LIMITS[kind])


def colour_legend(figure: Figure, texts: dict[str, str], title: str = "") -> None:
    """What colours mean, below all panels; texts: by colour."""
    look: dict[str, Any] = {"fontsize": FONT_SIZE, "title_fontsize": FONT_SIZE, "frameon": False}
    handles = [Patch(color=colour, label=text) for colour, text in texts.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), title=title or None, **look)
