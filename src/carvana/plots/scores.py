"""Figures of scores: how good, where on the car, and what would change it; in the look of `figures`."""

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from carvana import metrics
from carvana.plots.explore import (
    DOTS,
    EDGES,
    EXTRA,
    MARK,
    MISSED,
    PARTS,
    PREDICTED,
    TEXT,
    TRUE,
    charts,
    inside,
    label,
    panels,
)


def dice_distribution(scores: pd.DataFrame) -> Figure:
    """Dice of all pictures."""
    figure, (ax,) = charts(1, 1, 3.2)
    values, middle, tail = inside(scores["dice"]), scores["dice"].median(), scores["dice"].quantile(0.05)
    logits = np.log(values / (1 - values))
    edges = np.linspace(logits.min() - 0.05, logits.max() + 0.05, min(41, 6 + len(values) // 8))
    ax.hist(values, bins=1 / (1 + np.exp(-edges)), color=PREDICTED, edgecolor="white")
    ax.axvline(inside([middle])[0], color=MARK, linewidth=2)
    title = f"Half of the pictures reach {middle:.6f}, one in twenty stays below {tail:.6f}"
    label(ax, title, "Dice of a picture (logit scale)", "pictures", scores={"x": values})
    return figure


def dice_by_view(scores: pd.DataFrame) -> Figure:
    """Mean Dice of every view with its 95 % interval over cars."""
    figure, (ax,) = charts(1, 1, 3.4)
    views = scores.groupby("view")
    means, lows, highs = np.array([metrics.mean_over_cars(rows["dice"], rows["car"]) for _, rows in views]).T
    ax.errorbar(range(len(views)), means, [means - lows, highs - means], **DOTS)
    ax.set_xticks(range(len(views)), list(views.groups))
    worst, best = list(views.groups)[means.argmin()], list(views.groups)[means.argmax()]
    title = f"Hardest is view {worst} with {means.min():.6f}, easiest view {best} with {means.max():.6f}"
    label(ax, title, "view", "mean Dice, 95 % interval over cars")
    return figure


def dice_by_car(scores: pd.DataFrame, named: int = 5) -> Figure:
    """Mean Dice of every car, sorted, the worst `named` (at most a third of all) by name."""
    figure, (ax,) = charts(1, 1, 3.8)
    cars = scores.groupby("car")["dice"].mean().sort_values()
    worst = cars.head(max(1, min(named, len(cars) // 3)))
    values, at = inside(cars), np.arange(1, len(cars) + 1)
    ax.plot(at, values, "o", color=PREDICTED, markersize=5)
    ax.plot(at[: len(worst)], values[: len(worst)], "o", color=MARK, markersize=7)
    listed = "\n".join(f"{car}  {dice:.6f}" for car, dice in worst.items())
    ax.text(0.98, 0.06, listed, transform=ax.transAxes, ha="right", fontsize=TEXT - 1, family="monospace")
    share = (1 - worst).sum() / max((1 - cars).sum(), 1e-12)
    title = f"{share:.0%} of all lost Dice is lost on the worst {len(worst)} of {len(cars)} cars"
    label(ax, title, "cars, worst first", "mean Dice of a car (logit scale)", scores={"y": values})
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def error_parts(scores: pd.DataFrame) -> Figure:
    """What the wrong pixels are made of, by distance from the true edge."""
    figure, (ax,) = charts(1, 1, 3)
    pixels = scores[list(PARTS)].mean()
    shares = pixels / max(pixels.sum(), 1e-12)
    bars = ax.barh(list(PARTS.values()), shares, color=[*EDGES, MISSED, EXTRA])
    texts = [f"{share:.1%}, {count:,.0f} pixels a picture" for share, count in zip(shares, pixels, strict=True)]
    ax.bar_label(bars, texts, fontsize=TEXT - 1, padding=3)
    ax.set_xlim(0, max(shares.max(), 0.01) * 1.45)
    ax.invert_yaxis()
    title = f"{shares[['edge_1', 'edge_3']].sum():.0%} of the wrong pixels lie within 3 pixels of the true edge"
    label(ax, title, "share of the wrong pixels", percent="x")
    return figure


def gains(table: pd.DataFrame) -> Figure:
    """What the ensemble gains over each simpler variant, with paired 95 % intervals; table of evaluation.gains."""
    figure, (ax,) = charts(1, 1, 1.4 + 0.4 * max(1, len(table)))
    table = table.sort_values("gain", ignore_index=True)
    reach = [table["gain"] - table["low"], table["high"] - table["gain"]]
    ax.errorbar(table["gain"], table.index, xerr=reach, **DOTS)
    ax.set_yticks(table.index, "over " + table["variant"])
    ax.set_ylim(-0.5, max(1, len(table)) - 0.5)
    ax.axvline(0, color="black", linewidth=1)
    title = f"The ensemble is surely better than {(table['low'] > 0).sum()} of {len(table)} simpler variants"
    label(ax, title if len(table) else "Nothing to compare", "gain in mean Dice, 95 % interval over cars")
    return figure


def error_maps(maps: dict[int, np.ndarray], scores: pd.DataFrame, aspect: float) -> Figure:
    """Where on the car the errors of each view sit, with the outline of the mean mask.

    maps: as evaluation.evaluate fills them; aspect: height / width of the pictures.
    """
    counts = scores["view"].value_counts()
    means = {view: sums / counts[view] for view, sums in sorted(maps.items())}
    wrong = {view: mean[:2].sum(0) for view, mean in means.items()}
    most = max(wrong, key=lambda view: wrong[view].mean())
    top = max(0.01, np.quantile(np.stack(list(wrong.values())), 0.998))
    text = f"View {most} has most wrong pixels, {wrong[most].mean():.2%} of the picture"
    figure, axes = panels(len(means), 4, aspect, text, foot=0.3)
    height, width = next(iter(wrong.values())).shape
    for ax, (view, (missed, extra, true)) in zip(axes, means.items(), strict=False):
        ink = [np.clip(share / top, 0, 1)[..., None] * (1 - np.array(to_rgb(colour)))
               for share, colour in ((missed, MISSED), (extra, EXTRA))]  # fmt: skip
        ax.imshow(np.clip(1 - sum(ink), 0, 1), aspect=aspect * width / height)
        if true.min() < 0.5 < true.max():
            ax.contour(true, [0.5], colors=[TRUE], linewidths=1)
        ax.set_title(f"view {view}: {wrong[view].mean():.2%} wrong", fontsize=TEXT - 1.5)
    colours = {MISSED: "car missed", EXTRA: "wall taken for car", TRUE: "mean outline"}
    handles = [Patch(color=colour, label=name) for colour, name in colours.items()]
    title = f"full colour: wrong in {top:.0%} of the pictures or more"
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        title=title,
        fontsize=TEXT,
        title_fontsize=TEXT,
        frameon=False,
    )
    return figure


def dice_by_threshold(table: pd.DataFrame) -> Figure:
    """What other thresholds gain over 0.5, with paired 95 % intervals; table of evaluation.by_threshold."""
    figure, (ax,) = charts(1, 1, 3.4)
    reach = [table["gain"] - table["low"], table["high"] - table["gain"]]
    ax.errorbar(table["threshold"], table["gain"], reach, **DOTS)
    best = table.loc[table["gain"].idxmax()]
    ax.plot(best["threshold"], best["gain"], "o", color=MARK, markersize=9)
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xticks(table["threshold"])
    more = f", {best['gain']:.6f} above 0.5" if best["gain"] > 0 else ""
    title = f"Threshold {best['threshold']:g} is best with {best['dice']:.6f}{more}"
    label(ax, title, "threshold (probability)", "gain in mean Dice over 0.5,\n95 % interval over cars")
    return figure
