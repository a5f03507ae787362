"""Figures of the competition's images and masks, and of how cars fall into folds."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from carvana.data.folds import HOLDOUT
from carvana.data.images import Archive, mask_of
from carvana.data.statistics import BACKGROUND_RGB, CAR_RGB, thumbnail
from carvana.grid import resize
from carvana.plots import style
from carvana.plots.overlays import Outlined

NEAR = 15  # CIELAB distance below which a car's colour is near the background's
ODD_TEXTS = {"ratio": "{:.2f} x the expected area", "fragment": "patch of {} pixels", "hole": "gap of {} pixels"}
ODD_SHOWN = 4  # of each kind


def turntable(images: Archive, samples: pd.DataFrame, car: str) -> Figure:
    """Every view of a car with the outline of its mask."""
    views = samples[samples["car"] == car].sort_values("view")
    (low, least), (high, most) = style.ends(views.set_index("view")["area"])
    text = f"Car {car} covers {least:.1%} of the image (view {low}) to {most:.1%} (view {high})"
    figure, axes = style.panels(len(views), 4, views["height"].iloc[0] / views["width"].iloc[0])
    for ax, view in zip(axes, views.itertuples(), strict=False):
        Outlined(*thumbnail(images, view)).draw(ax, f"view {view.view}: {view.area:.1%} car")
    return style.set_title(figure, text)


def areas(samples: pd.DataFrame) -> Figure:
    """Share of the image that is car: a box for every view."""
    (ax,) = style.charts(3.8)
    views = samples.groupby("view")["area"]
    look: dict[str, Any] = {"boxprops": {"facecolor": style.TRUE_COLOUR, "alpha": 0.5}, "flierprops": {"markersize": 3}}
    ax.boxplot([area for _, area in views], widths=0.6, patch_artist=True, medianprops={"color": "black"}, **look)
    ax.set_xticks(range(1, len(views) + 1), list(map(str, views.groups)))
    (low, least), (high, most) = style.ends(views.median())
    title = f"View {high} shows most car ({most:.1%}), view {low} least ({least:.1%})"
    return style.label(ax, title, "view", "area of the mask (share of the image)", percent="y")


def areas_by_make(samples: pd.DataFrame, makes: pd.Series, count: int = 14) -> Figure:
    """A car's mean area, a dot each, by make; the `count` commonest, then all others together.

    makes: make by car; cars that are not in it or have an empty one are drawn as unknown.
    """
    cars = samples.groupby("car")["area"].mean()
    make = makes.reindex(cars.index).fillna("").replace("", "unknown")
    common = make[make != "unknown"].value_counts().index[:count]
    make = make.where(make.isin([*common, "unknown"]), "other makes")
    means = cars.groupby(make).mean().sort_values()
    colours = dict.fromkeys(means.index[means.index.isin(common)], style.TRUE_COLOUR)
    colours |= dict.fromkeys(means.index.difference(common), style.SERIES_COLOUR)
    title = f"cars from {cars.min():.1%} to {cars.max():.1%}"
    if len(common):
        (low, least), (high, most) = style.ends(means[common])
        title = f"makes from {low} ({least:.1%}) to {high} ({most:.1%}), {title}"
    return _strips(cars, make, colours, f"Areas: {title}")


def _strips(cars: pd.Series, groups: pd.Series, colours: dict[str, str], title: str) -> Figure:
    """Mean areas by car, a dot each, in a strip a group; colours: by group, from below."""
    (ax,) = style.charts(1.3 + 0.26 * len(colours))
    for at, (name, colour) in enumerate(colours.items()):
        areas = cars[groups == name].sort_values()
        ax.plot(areas, at + np.linspace(-0.3, 0.3, len(areas) + 2)[1:-1], "o", markersize=4, alpha=0.6, color=colour)
        ax.vlines(areas.mean(), at - 0.35, at + 0.35, color="black", linewidth=1.5)
    ax.set_yticks(range(len(colours)), [f"{name} ({(groups == name).sum()})" for name in colours])
    return style.label(ax, title, "a car's mean area (share of the image); line: their mean", percent="x")


def mean_mask(samples: pd.DataFrame) -> Figure:
    """For every view the share of cars that cover each place, and below it their standard deviation."""
    height, width = (max(1, round(samples[side].median() / 8)) for side in ("height", "width"))
    views = {str(view): _moments(rows, height, width) for view, rows in samples.groupby("view")}
    means, spreads = map(np.stack, zip(*views.values(), strict=True))
    never, always = (means.max(0) == 0).mean(), (means.min(0) > 0.999).mean()
    _, (most, _) = style.ends(pd.Series(spreads.mean((1, 2)), list(views)))
    text = f"{never:.0%} of the image is never car, {always:.1%} always is; cars differ most in view {most}"
    columns = min(8, len(views))
    half = -(-len(views) // columns) * columns  # panels of the means; the spreads start a row of their own
    figure, axes = style.panels(2 * half, columns, height / width, line=0.3)
    kinds = ("cars that cover it", means, "cividis", 1), ("standard deviation", spreads, "magma", 0.5)
    for part, (kind, maps, colours, top) in zip((axes[:half], axes[half:]), kinds, strict=True):
        for ax, view, shares in zip(part, views, maps, strict=False):
            shown = ax.imshow(shares, cmap=colours, vmin=0, vmax=top)
            ax.set_title(f"view {view}", fontsize=style.FONT_SIZE - 1.5)
        bar = figure.colorbar(shown, ax=part, format=PercentFormatter(1))
        bar.set_label(kind, fontsize=style.FONT_SIZE - 1)
    return style.set_title(figure, text)


def _moments(samples: pd.DataFrame, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of masks, brought to (height, width)."""
    masks = np.stack([resize(mask_of(row).astype(np.float32), height, width) for row in samples.itertuples()])
    return masks.mean(0), masks.std(0)


def contrasts(cars: pd.DataFrame) -> Figure:
    """Each car of `statistics.background_contrast` as a dot of its own colour on the background's, nearest first."""
    (ax,) = style.charts(3.8)
    at, near = np.arange(1, len(cars) + 1), cars["contrast"] < NEAR
    ax.set_facecolor(tuple(cars[BACKGROUND_RGB].median()))
    ax.scatter(at, cars["contrast"], s=60, c=cars[CAR_RGB].to_numpy(), edgecolors="black", linewidths=0.4)
    ax.axhline(NEAR, color=style.HIGHLIGHT_COLOUR, linewidth=2)
    ax.set_ylim(0, 1.08 * cars["contrast"].max())
    nearest = [f"{car}  {contrast:.1f}" for car, contrast in cars["contrast"].head(style.NAMED).items()]
    style.note(ax, ["nearest", *nearest], 0.02, 0.94)
    title = f"{near.sum()} of {len(cars)} cars have a colour within {NEAR} of the background's"
    x, y = "cars, nearest to the background's colour first", "distance from its colour (CIELAB)"
    return style.label(ax, title, x, y, count="x")


def odd_masks(images: Archive, samples: pd.DataFrame, odd: pd.DataFrame) -> Figure:
    """The oddest masks of `statistics.mask_oddities`: a row by area, by fragment, by hole."""
    order = {"ratio": np.log(odd["ratio"].clip(lower=1e-6)).abs(), "fragment": odd["fragment"], "hole": odd["hole"]}
    worst = (odd["ratio"] - 1).abs().max(), odd["fragment"].max(), odd["hole"].max()
    text = "The oddest of {} masks: area off by {:.0%}, patch of {}, gap of {} pixels"
    aspect = samples["height"].iloc[0] / samples["width"].iloc[0]
    figure, axes = style.panels(3 * ODD_SHOWN, ODD_SHOWN, aspect, line=0.4)
    look: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": style.HIGHLIGHT_COLOUR, "markeredgewidth": 2}
    for line, (kind, oddness) in enumerate(order.items()):
        for ax, at in zip(axes[line * ODD_SHOWN :], oddness[oddness > 0].nlargest(ODD_SHOWN).index, strict=False):
            sample = samples.loc[at]
            image, soft = thumbnail(images, sample)
            Outlined(image, soft).draw(ax, f"{sample.img}\n{ODD_TEXTS[kind].format(odd.loc[at, kind])}")
            if kind != "ratio":
                place = np.array(odd.loc[at, f"{kind}_at"]) * image.shape[1] / sample.width
                ax.plot(*place, "o", markersize=16, **look)
    return style.set_title(figure, text.format(len(odd), *worst))


def fold_balance(samples: pd.DataFrame, folds: pd.DataFrame) -> Figure:
    """Areas of the cars of every fold, held-out cars included; folds: table car, fold."""
    fold_of, cars = folds.set_index("car")["fold"], samples.groupby("car")["area"].mean()
    names = {fold: "held out" if fold == HOLDOUT else f"fold {fold}" for fold in sorted(fold_of.unique())}
    groups = cars.index.to_series().map(fold_of).map(names)
    sizes = samples["car"].map(fold_of).value_counts().drop(HOLDOUT, errors="ignore")
    means = cars.groupby(groups).mean().drop("held out", errors="ignore")
    held = " to ".join(map(str, sorted({sizes.min(), sizes.max()})))
    text = f"Folds hold {held} images; mean areas are {means.min():.1%} to {means.max():.1%}"
    return _strips(cars, groups, {name: style.fold_colour(fold) for fold, name in names.items()}, text)


def test_areas(test: pd.DataFrame, train: pd.DataFrame) -> Figure:
    """Predicted areas of test images against areas of training masks; `area` of both tables is a share."""
    (ax,) = style.charts(3.2)
    bins = np.linspace(0, max(test["area"].max(), train["area"].max(), 0.01), 41).tolist()
    named = {"training masks": (train, style.TRUE_COLOUR), "predicted test masks": (test, style.PREDICTED_COLOUR)}
    for text, (table, colour) in named.items():
        shares = np.full(len(table), 1 / len(table))
        ax.hist(table["area"], bins, weights=shares, color=colour, alpha=0.55, label=f"{len(table)} {text}")
        ax.axvline(table["area"].median(), color=colour, linewidth=2)
    ax.legend(fontsize=style.FONT_SIZE - 1)
    beyond = (~test["area"].between(train["area"].min(), train["area"].max())).sum()
    medians = f"{test['area'].median():.1%} against {train['area'].median():.1%}"
    title = f"Median area {medians} in training; {beyond} of {len(test)} outside the training range"
    return style.label(ax, title, "area of the mask (share of the image)", "share of the images", percent="xy")
