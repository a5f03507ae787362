"""Figures of scores: how good, where on the car, and what would change it."""

import re

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from carvana.metrics import error_shares, score_over_cars
from carvana.plots import style


def dice_distribution(scores: pd.DataFrame) -> Figure:
    """Dice of all images."""
    (ax,) = style.charts(3.2)
    dices, middle, tail = style.inside(scores["dice"]), scores["dice"].median(), scores["dice"].quantile(0.05)
    logits = np.log(dices / (1 - dices))
    edges = np.linspace(logits.min() - 0.05, logits.max() + 0.05, min(41, 6 + len(dices) // 8))
    ax.hist(dices, bins=(1 / (1 + np.exp(-edges))).tolist(), color=style.PREDICTED_COLOUR, edgecolor="white")
    ax.axvline(style.inside([middle])[0], color=style.HIGHLIGHT_COLOUR, linewidth=2)
    title = f"Half of the images reach {middle:.6f}, one in twenty stays below {tail:.6f}"
    style.scale(ax, "x", "logit")
    return style.label(ax, title, "Dice of an image (logit scale)", "images", count="y")


def dice_by_view(scores: pd.DataFrame) -> Figure:
    """Mean Dice of every view with its 95 % interval over cars."""
    (ax,) = style.charts(3.4)
    views = scores.groupby("view")
    intervals = pd.DataFrame(
        [score_over_cars(rows["dice"], rows["car"]) for _, rows in views], index=list(views.groups)
    )
    means = intervals["mean"]
    ax.errorbar(range(len(means)), means, _reach(intervals, "mean"), **style.DOTS)
    ax.set_xticks(range(len(means)), list(means.index))
    (worst, least), (best, most) = style.ends(means)
    title = f"Hardest is view {worst} with {least:.6f}, easiest view {best} with {most:.6f}"
    return style.label(ax, title, "view", "mean Dice, 95 % interval over cars")


def dice_by_car(scores: pd.DataFrame) -> Figure:
    """Mean Dice of every car, sorted, the worst (at most a third of all) by name."""
    (ax,) = style.charts(3.8)
    cars = scores.groupby("car")["dice"].mean().sort_values()
    worst = cars.head(max(1, min(style.NAMED, len(cars) // 3)))
    dices, at = style.inside(cars), np.arange(1, len(cars) + 1)
    ax.plot(at, dices, "o", color=style.PREDICTED_COLOUR, markersize=5)
    ax.plot(at[: len(worst)], dices[: len(worst)], "o", color=style.HIGHLIGHT_COLOUR, markersize=7)
    style.note(ax, [f"{car}  {dice:.6f}" for car, dice in worst.items()], 0.98, 0.06)
    share = (1 - worst).sum() / max((1 - cars).sum(), 1e-12)
    title = f"{share:.0%} of all lost Dice is lost on the worst {len(worst)} of {len(cars)} cars"
    style.scale(ax, "y", "logit")
    return style.label(ax, title, "cars, worst first", "mean Dice of a car (logit scale)", count="x")


def error_parts(scores: pd.DataFrame) -> Figure:
    """What the wrong pixels are made of, by distance from the true edge."""
    (ax,) = style.charts(3)
    parts = error_shares(scores).join(style.PARTS)
    bars = ax.barh(parts["text"], parts["share"], color=parts["colour"])
    texts = [f"{part.share:.1%}, {part.pixels:,.0f} pixels an image" for part in parts.itertuples()]
    ax.bar_label(bars, texts, fontsize=style.FONT_SIZE - 1, padding=3)
    ax.set_xlim(0, max(parts["share"].max(), 0.01) * 1.6)
    ax.invert_yaxis()
    near = parts.loc[["edge_1", "edge_3"], "share"].sum()
    title = f"{near:.0%} of the wrong pixels lie within 3 pixels of the true edge"
    return style.label(ax, title, "share of the wrong pixels", percent="x")


def gains(table: pd.DataFrame) -> Figure:
    """What the ensemble gains over each simpler variant, with paired 95 % intervals; table of evaluation.gains."""
    (ax,) = style.charts(1.4 + 0.4 * max(1, len(table)))
    table = table.sort_values("gain", ignore_index=True)
    ax.errorbar(table["gain"], table.index, xerr=_reach(table), **style.DOTS)
    ax.set_yticks(table.index, table["variant"].map(variant_text))
    ax.set_ylim(-0.5, max(1, len(table)) - 0.5)
    ax.axvline(0, color="black", linewidth=1)
    title = f"The ensemble is surely better than {(table['low'] > 0).sum()} of {len(table)} simpler variants"
    text = "mean Dice that the ensemble has more than each variant, 95 % interval over cars"
    return style.label(ax, title if len(table) else "Nothing to compare", text)


def variant_text(variant: str) -> str:
    """What a variant of evaluation.gains lacks: a version of the image, or all folds or runs but one."""
    texts = {"without none": "without the unflipped image", "without hflip": "without the mirrored image"}
    texts |= {"equal": "all runs as equals, cut at 0.5"}
    if scale := re.fullmatch(r"without scale(.+)", variant):
        return f"without the image {scale[1]} times as large"
    subject = variant if re.fullmatch(r"fold [0-9]+", variant) else f"run {variant}"
    return texts.get(variant, f"{subject} alone")


def _reach(table: pd.DataFrame, middle: str = "gain") -> list[pd.Series]:
    """Lengths of the error bars to both sides of the column `middle`."""
    reach = table[middle] - table["low"], table["high"] - table[middle]
    return [side.clip(lower=0) for side in reach]  # rounding may lead to the other side


def error_maps(maps: dict[int, np.ndarray], scores: pd.DataFrame, aspect: float) -> Figure:
    """Where on the car the errors of each view sit, with the outline of the mean mask.

    maps: of evaluation.Evaluation; aspect: height / width of the images.
    """
    counts = scores["view"].value_counts()
    means = {view: sums / counts[view] for view, sums in sorted(maps.items())}
    wrong = {view: mean[:2].sum(0) for view, mean in means.items()}
    every = np.stack(list(wrong.values()))
    (_, height, width), top = every.shape, max(0.01, np.quantile(every, 0.998))
    _, (view, most) = style.ends(pd.Series(every.mean((1, 2)), list(wrong)))
    text = f"View {view} has most wrong pixels, {most:.2%} of the image"
    figure, axes = style.panels(len(means), 4, aspect, foot=0.3)
    for ax, (view, mean) in zip(axes, means.items(), strict=False):
        ax.imshow(_inked(mean[:2] / top), aspect=aspect * width / height)
        if mean[2].min() < 0.5 < mean[2].max():
            ax.contour(mean[2], [0.5], colors=[style.TRUE_COLOUR], linewidths=1)
        ax.set_title(f"view {view}: {wrong[view].mean():.2%} wrong", fontsize=style.FONT_SIZE - 1.5)
    title = f"full colour: wrong in {top:.0%} of the images or more"
    style.colour_legend(figure, style.ERROR_TEXTS | {style.TRUE_COLOUR: "mean outline"}, title)
    return style.set_title(figure, text)


def _inked(shares: np.ndarray) -> np.ndarray:
    """White where nothing is wrong: shares (2, h, w) of false negatives and positives -> colours (h, w, 3) up to 1."""
    strength = np.clip(shares, 0, 1)[..., None]
    colours = np.array([to_rgb(colour) for colour in style.ERROR_TEXTS])
    return np.clip(1 - (strength * (1 - colours[:, None, None])).sum(0), 0, 1)


def dice_by_threshold(table: pd.DataFrame) -> Figure:
    """What other thresholds gain over 0.5, with paired 95 % intervals; table of evaluation.by_threshold."""
    (ax,) = style.charts(3.4)
    ax.errorbar(table["threshold"], table["gain"], _reach(table), **style.DOTS)
    best = table.nlargest(1, "gain").iloc[0]
    ax.plot(best["threshold"], best["gain"], "o", color=style.HIGHLIGHT_COLOUR, markersize=9)
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xticks(table["threshold"])
    more = f", {best['gain']:.6f} above 0.5" if best["gain"] > 0 else ""
    title = f"Threshold {best['threshold']:g} is best with {best['dice']:.6f}{more}"
    return style.label(ax, title, "threshold (probability)", "gain in mean Dice over 0.5,\n95 % interval over cars")
