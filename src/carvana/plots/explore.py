"""Figures of the competition's images and masks, and of how cars fall into folds."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from carvana.data.folds import HOLDOUT
from carvana.data.images import Archive, mask_of
from carvana.data.statistics import BACKGROUND_RGB, CAR_RGB, thumbnail
from carvana.grid import resize
from carvana.plots import style
from carvana.plots.overlays import Outlined

NEAR = 15  # CIELAB distance below which a car's colour is near the background's
ODD_TEXTS = {"ratio": "{:.2f} x the expected area", "fragment": "patch of {} pixels", "hole": "gap of {} pixels"}


def turntable(images: Archive, samples: pd.DataFrame, car: str) -> Figure:
    """Every view of a car with the outline of its mask."""
    views = samples[samples["car"] == car].sort_values("view")
    low, high = views.loc[views["area"].idxmin()], views.loc[views["area"].idxmax()]
    span = f"{low['area']:.1%} of the image (view {low['view']}) to {high['area']:.1%} (view {high['view']})"
    figure, axes = style.panels(len(views), 4, low["height"] / low["width"], f"Car {car} covers {span}")
    for ax, view in zip(axes, views.itertuples(), strict=False):
        Outlined(*thumbnail(images, view)).draw(ax, f"view {view.view}: {view.area:.1%} car")
    return figure


def areas(samples: pd.DataFrame) -> Figure:
    """Share of the image that is car: a box for every view, and the distribution over cars."""
    figure, (left, right) = style.charts(1, 2, 3.8, width_ratios=[2, 1])
    views, cars = samples.groupby("view")["area"], samples.groupby("car")["area"].mean()
    look = {"boxprops": {"facecolor": style.TRUE_COLOUR, "alpha": 0.5}, "medianprops": {"color": "black"}}
    left.boxplot([area for _, area in views], widths=0.6, patch_artist=True, flierprops={"markersize": 3}, **look)
    left.set_xticks(range(1, len(views) + 1), list(views.groups))
    middle = views.median()
    least, most = middle.idxmin(), middle.idxmax()
    title = f"View {most} shows most car ({middle[most]:.1%}), view {least} least ({middle[least]:.1%})"
    style.label(left, title, "view", "area of the mask (share of the image)", percent="y")
    right.hist(cars, bins=min(30, max(5, len(cars) // 4)), color=style.TRUE_COLOUR, edgecolor="white")
    title = f"Cars: {cars.min():.1%} to {cars.max():.1%}"
    style.label(right, title, "mean area over a car's views", "cars", percent="x")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def areas_by_make(samples: pd.DataFrame, makes: pd.Series, count: int = 14) -> Figure:
    """A car's mean area, a dot each, by make; the `count` commonest, then all others together.

    makes: make by car; cars that are not in it or have an empty one are drawn as unknown.
    """
    cars = samples.groupby("car")["area"].mean()
    make = makes.reindex(cars.index).fillna("").replace("", "unknown")
    common = make[make != "unknown"].value_counts().index[:count]
    make = make.where(make.isin([*common, "unknown"]), "other makes")
    order = sorted(common, key=lambda name: cars[make == name].median())
    order += [name for name in ("other makes", "unknown") if (make == name).any()]
    figure, (ax,) = style.charts(1, 1, 1.3 + 0.26 * len(order))
    for at, name in enumerate(order):
        _dots(ax, at, cars[make == name], style.TRUE_COLOUR if name in common else style.SERIES_COLOUR)
    ax.set_yticks(range(len(order)), [f"{name} ({(make == name).sum()})" for name in order])
    title = f"{make.ne('unknown').sum()} of {len(cars)} cars have a known make"
    if common.size:
        least, most = (f"{name} ({cars[make == name].median():.1%})" for name in (order[0], order[common.size - 1]))
        title = f"Makes go from {least} to {most}, cars from {cars.min():.1%} to {cars.max():.1%}"
    style.label(ax, title, "a car's mean area (share of the image); line: middle of the make", percent="x")
    return figure


def _dots(ax: Axes, height: int, areas_of_make: pd.Series, colour: str) -> None:
    ax.plot(areas_of_make, np.full(len(areas_of_make), height), "o", markersize=5, alpha=0.6, color=colour)
    ax.vlines(areas_of_make.median(), height - 0.35, height + 0.35, color="black", linewidth=1.5)


def mean_mask(samples: pd.DataFrame) -> Figure:
    """For every view the share of cars that cover each place, and below it their spread (one sigma)."""
    height, width = (max(1, round(samples[side].median() / 8)) for side in ("height", "width"))
    views = {view: np.stack(list(_masks(rows, height, width))) for view, rows in samples.groupby("view")}
    means, spreads = ({view: moment(masks, 0) for view, masks in views.items()} for moment in (np.mean, np.std))
    every = np.stack(list(means.values()))
    never, always = (every.max(0) == 0).mean(), (every.min(0) > 0.999).mean()
    most = max(spreads, key=lambda view: spreads[view].mean())
    text = f"{never:.0%} of the image is never car, {always:.1%} always is; cars differ most in view {most}"
    columns = min(8, len(views))
    half = -(-len(views) // columns) * columns  # panels of the means; the spreads start a row of their own
    figure, axes = style.panels(2 * half, columns, height / width, text, line=0.35, foot=0.7)
    kinds = ("mean", means, "cividis", 1), ("spread", spreads, "magma", 0.5)
    for i, (kind, maps, colours, top) in enumerate(kinds):
        for ax, (view, shares) in zip(axes[i * half :], maps.items(), strict=False):
            shown = ax.imshow(shares, cmap=colours, vmin=0, vmax=top)
            ax.set_title(f"view {view}: {kind}", fontsize=style.FONT_SIZE - 1.5)
        side = [ax for at, ax in enumerate(axes) if (at % columns >= columns // 2) == i] or axes
        bar = figure.colorbar(shown, ax=side, orientation="horizontal", aspect=30, format=PercentFormatter(1))
        text = "spread among cars (sigma)" if i else "cars that cover the place"
        bar.set_label(text, fontsize=style.FONT_SIZE - 1)
    return figure


def _masks(samples: pd.DataFrame, height: int, width: int) -> Iterator[np.ndarray]:
    for sample in samples.itertuples():
        yield resize(mask_of(sample).astype(np.float32), height, width)


def contrasts(cars: pd.DataFrame, named: int = 5) -> Figure:
    """Each car of `statistics.background_contrast` as a dot of its own colour on the background's, nearest first."""
    figure, (ax,) = style.charts(1, 1, 3.8)
    at, near = np.arange(1, len(cars) + 1), cars["contrast"] < NEAR
    ax.set_facecolor(tuple(cars[BACKGROUND_RGB].median()))
    ax.scatter(at, cars["contrast"], s=60, c=cars[CAR_RGB].to_numpy(), edgecolors="black", linewidths=0.4)
    ax.axhline(NEAR, color=style.HIGHLIGHT_COLOUR, linewidth=2)
    ax.set_ylim(0, 1.08 * cars["contrast"].max())
    nearest = [f"{car}  {contrast:.1f}" for car, contrast in cars["contrast"].head(named).items()]
    look = {"transform": ax.transAxes, "va": "top", "fontsize": style.FONT_SIZE - 1, "family": "monospace"}
    ax.text(0.02, 0.94, "\n".join(["nearest", *nearest]), **look)
    title = f"{near.sum()} of {len(cars)} cars have a colour within {NEAR} of the background's"
    style.label(ax, title, "cars, nearest to the background's colour first", "distance from its colour (CIELAB)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def odd_masks(images: Archive, samples: pd.DataFrame, odd: pd.DataFrame, columns: int = 4) -> Figure:
    """The oddest masks of `statistics.mask_oddities`: by area, by fragment, by hole, `columns` of each."""
    order = {"ratio": np.log(odd["ratio"].clip(lower=1e-6)).abs(), "fragment": odd["fragment"], "hole": odd["hole"]}
    worst = np.expm1(order["ratio"].max()), odd["fragment"].max(), odd["hole"].max()
    text = "The oddest of {} masks: area off by {:.0%}, patch of {}, gap of {} pixels"
    aspect = samples["height"].iloc[0] / samples["width"].iloc[0]
    figure, axes = style.panels(3 * columns, columns, aspect, text.format(len(odd), *worst), line=0.4)
    for line, (kind, oddness) in enumerate(order.items()):
        for ax, at in zip(axes[line * columns :], oddness[oddness > 0].nlargest(columns).index, strict=False):
            sample = samples.loc[at]
            image, soft = thumbnail(images, sample)
            Outlined(image, soft).draw(ax, f"{sample.img}\n{ODD_TEXTS[kind].format(odd.loc[at, kind])}")
            if kind != "ratio":
                _circle(ax, np.array(odd.loc[at, f"{kind}_at"]) * image.shape[1] / sample.width)
    return figure


def _circle(ax: Axes, place: np.ndarray) -> None:
    look = {"markerfacecolor": "none", "markeredgecolor": style.HIGHLIGHT_COLOUR, "markeredgewidth": 2}
    ax.plot(*place, "o", markersize=16, **look)


def fold_balance(samples: pd.DataFrame, folds: pd.DataFrame) -> Figure:
    """Images and areas of every fold, held-out cars included; folds: table car, fold."""
    fold_of = samples["car"].map(folds.set_index("car")["fold"])
    sizes, means = fold_of.value_counts().sort_index(), samples.groupby(fold_of)["area"].mean()
    names = ["held out" if fold == HOLDOUT else str(fold) for fold in sizes.index]
    figure, (left, right) = style.charts(1, 2, 3.6)
    bars = left.bar(names, sizes, color=[style.fold_colour(fold) for fold in sizes.index])
    left.bar_label(bars, fontsize=style.FONT_SIZE - 1)
    left.margins(y=0.12)
    in_folds = sizes[sizes.index != HOLDOUT]
    style.label(left, f"Folds hold {in_folds.min()} to {in_folds.max()} images", "fold", "images")
    for at, (fold, rows) in enumerate(samples.groupby(fold_of)):
        cars = rows.groupby("car")["area"].mean().sort_values()
        right.plot(at + np.linspace(-0.25, 0.25, len(cars)), cars, "o", markersize=3.5, color=style.fold_colour(fold))
        right.hlines(means[fold], at - 0.35, at + 0.35, color="black", linewidth=1.5)
    right.set_xticks(range(len(names)), names)
    title = f"Mean areas lie between {means.min():.1%} and {means.max():.1%}"
    style.label(right, title, "fold", "a car's area (share of the image)", percent="y")
    return figure


def test_areas(test: pd.DataFrame, train: pd.DataFrame) -> Figure:
    """Predicted areas of test images against areas of training masks; `area` of both tables is a share."""
    figure, (ax,) = style.charts(1, 1, 3.2)
    bins = np.linspace(0, max(test["area"].max(), train["area"].max(), 0.01), 41)
    named = {"training masks": (train, style.TRUE_COLOUR), "predicted test masks": (test, style.PREDICTED_COLOUR)}
    for text, (table, colour) in named.items():
        shares = np.full(len(table), 1 / len(table))
        ax.hist(table["area"], bins, weights=shares, color=colour, alpha=0.55, label=f"{len(table)} {text}")
        ax.axvline(table["area"].median(), color=colour, linewidth=2)
    ax.legend(fontsize=style.FONT_SIZE - 1)
    beyond = (~test["area"].between(train["area"].min(), train["area"].max())).sum()
    middles = f"{test['area'].median():.1%} against {train['area'].median():.1%}"
    title = f"Middle area {middles} in training; {beyond} of {len(test)} outside the training range"
    style.label(ax, title, "area of the mask (share of the image)", "share of the images", percent="xy")
    return figure
