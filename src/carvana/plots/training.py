"""What one watches: a fold's curves and edges while it trains, and where a prediction without known masks hesitates.

Training is drawn from the files in the fold's folder, so it is the same after a kill and for processes of their own.
"""

import contextlib
import io
import sys
import time

import cv2
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from carvana.data.competition import Archive, full_picture
from carvana.plots.explore import DATA, MARK, PREDICTED, TEXT, TRUE, charts, inside, label, panels
from carvana.plots.overlays import densest, framed, outlined
from carvana.training import trainer as training
from carvana.training.state import LOGIT_STEPS, Fold

COLUMNS = 5  # epochs in the strip, from the first to the last
CLOSE = 0.125  # of height and width that a place of a large picture shows
SHARE = 0.2  # of height and width that a crop of the strip shows
REST = 50  # drawing takes at most a fiftieth of the time
UNSURE = 0.27, 0.73  # probabilities between which a network hesitates, logits of -1 to 1 as in inference.unsure


def train(fold: Fold, max_hours: float = 0, workers: int = -1) -> pd.DataFrame:
    """`training.train`, shown in the notebook by one line of progress and two figures that are renewed in place."""
    if get_ipython() is None:  # a script has no outputs to renew
        return training.train(fold, max_hours, workers)
    shown = _Display(fold)
    with contextlib.redirect_stderr(shown):
        history = training.train(fold, max_hours, workers, shown.draw)
    if not epochs_kept(fold):  # it was trained before there was anything to look at
        fold.look()
    shown.rest_until = 0
    shown.draw()
    return history


class _Display(io.TextIOBase):
    """Where progress bars and figures go: each has one output, which ends in the notebook as it was last."""

    def __init__(self, fold: Fold):
        self.fold, self.stderr = fold, sys.stderr
        self.outputs, self.rest_until = {}, 0.0

    def write(self, text: str) -> int:
        """Take what is meant for stderr; only lines that are no progress bar go there."""
        line = text.replace("\x1b[A", "").strip()
        if "%|" in line:
            self._show("progress", {"text/plain": line}, raw=True)
        elif line:
            self.stderr.write(text)
        return len(text)

    def draw(self) -> None:
        """Renew the figures, unless that was done a moment ago."""
        began = time.monotonic()
        started = epochs_kept(self.fold) and (self.fold.folder / "history.csv").exists()
        if began < self.rest_until or not started:
            return
        self._show("curves", curves(self.fold))
        self._show("strip", strip(self.fold))
        self.rest_until = time.monotonic() + REST * (time.monotonic() - began)

    def _show(self, name: str, shown, **options) -> None:
        if name in self.outputs:
            self.outputs[name].update(shown, **options)
        else:
            self.outputs[name] = display(shown, display_id=True, **options)


def epochs_kept(fold: Fold) -> list[int]:
    """Epochs after which `Fold.look` has kept something to look at; 0 is the untrained network."""
    return sorted(int(path.stem) for path in (fold.folder / "watch").glob("*.npz"))


def _kept(fold: Fold, epoch: int, *names: str) -> list[np.ndarray]:
    with np.load(fold.folder / "watch" / f"{epoch:04d}.npz") as found:
        return [found[name] for name in names]


def curves(fold: Fold) -> Figure:
    """Loss of every step, Dice of every validation, learning rate and speed of every epoch of a fold."""
    history, kept = pd.read_csv(fold.folder / "history.csv"), epochs_kept(fold)
    losses, lr, speed = zip(*(_kept(fold, epoch, "losses", "lr", "speed") for epoch in kept), strict=True)
    figure, (top, dice, rate, pace) = charts(2, 2, 5.6)
    _losses(top, kept, losses)
    _dices(dice, history)
    rate.plot(kept, lr, "o-", color=DATA, markersize=4)
    label(rate, f"Learning rate after epoch {kept[-1]}: {lr[-1]:.2g}", "epoch", "learning rate")
    pace.plot(kept, speed, "o-", color=DATA, markersize=4)
    pace.set_ylim(0, 1.15 * max(1e-9, np.nanmax([0, *speed])))
    middle = np.nanmedian([0, *speed]) if len(speed) < 2 else np.nanmedian(speed[1:])
    label(pace, f"Learns from {middle:.3g} pictures/s", "epoch", "pictures/s of training")
    for ax in (top, dice, rate, pace):
        ax.set_xlim(-0.03 * max(1, kept[-1]), 1.03 * max(1, kept[-1]))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _losses(ax: Axes, epochs: list[int], losses: list[np.ndarray]) -> None:
    """Steps in the background, each epoch's mean on them."""
    known = [(epoch, of_steps) for epoch, of_steps in zip(epochs, losses, strict=True) if len(of_steps)]
    for epoch, of_steps in known:
        at = np.linspace(epoch - 1, epoch, len(of_steps) + 1)[1:]
        ax.plot(at, of_steps, color=DATA, alpha=0.3, linewidth=1)
    means = [of_steps.mean() for _, of_steps in known]
    ax.plot([epoch - 0.5 for epoch, _ in known], means, "o-", color=DATA, markersize=4)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    fell = f"Mean loss falls from {means[0]:.4f} to {means[-1]:.4f}" if known else "No loss yet"
    label(ax, fell, "epoch", "training loss (log scale)")


def _dices(ax: Axes, history: pd.DataFrame) -> None:
    best, values = history.loc[history["dice"].idxmax()], inside(history["dice"])
    ax.plot(history["epoch"], values, "o-", color=PREDICTED, markersize=4)
    ax.plot(history["epoch"][:1], values[:1], "o", color="white", markeredgecolor=PREDICTED, label="untrained")
    ax.axvline(best["epoch"], color=MARK, linewidth=2, zorder=0, label=f"best, epoch {best['epoch']:g}")
    ax.legend(fontsize=TEXT - 1.5, loc="lower right")
    title = f"Best Dice {best['dice']:.6f}, untrained {history['dice'].iloc[0]:.6f}"
    label(ax, title, "epoch", "mean Dice (logit scale)", scores={"y": values})


def strip(fold: Fold) -> Figure:
    """The same crops of the same validation pictures after several epochs: probability of car, and the true edge."""
    kept = epochs_kept(fold)
    epochs = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, COLUMNS).astype(int))]
    logits = {epoch: _kept(fold, epoch, "logits")[0] / LOGIT_STEPS for epoch in epochs}
    size = next(iter(logits.values())).shape[1:]
    figure, axes = panels(len(fold.watched) * (len(epochs) + 1), len(epochs) + 1, size[0] / size[1], " ", foot=0.6)
    grid, wrong = np.reshape(axes, (len(fold.watched), -1)), {epoch: [] for epoch in epochs}
    for i, (row, line) in enumerate(zip(fold.watched, grid, strict=True)):
        image, target = fold.source[row]
        window = densest(outline(target > 127), SHARE)
        soft, name = target[window] / 255, fold.pictures["img"].iloc[row].partition(".")[0]
        outlined(line[0], image[window], soft, TRUE, name)
        for ax, epoch in zip(line[1:], epochs, strict=True):
            probability = 1 / (1 + np.exp(-logits[epoch][i][window]))
            wrong[epoch].append(np.mean((probability > 0.5) != (soft > 0.5)))
            outlined(ax, probability, soft, TRUE, f"epoch {epoch}" if epoch else "untrained")
    first, last = (np.mean(wrong[epoch]) for epoch in (epochs[0], epochs[-1]))
    text = f"Around hard edges {first:.1%} of pixels are wrong at epoch {epochs[0]}, {last:.1%} at epoch {epochs[-1]}"
    figure._suptitle.set_text(text)
    colours, layout = ScalarMappable(cmap="cividis"), {"orientation": "horizontal", "aspect": 60, "shrink": 0.6}
    bar = figure.colorbar(colours, ax=axes, format=PercentFormatter(1), **layout)
    bar.set_label("probability of car; line: true edge", fontsize=TEXT)
    return figure


def hesitations(photos: Archive, names: list[str], probabilities: list[np.ndarray], titles: list[str]) -> Figure:
    """Photographs with the predicted outline, each beside the place that holds most pixels of which it is unsure.

    probabilities: (H, W) in [0, 1] for each of `names`.
    """
    height, width = probabilities[0].shape
    figure, axes = panels(2 * len(names), 4, height / width, " ", line=0.4)
    shares = []
    for left, right, name, probability, title in zip(axes[::2], axes[1::2], names, probabilities, titles, strict=False):
        image, unsure = full_picture(photos, name), _hesitates(probability)
        window = densest(unsure, CLOSE)
        shares.append(unsure[window].sum() / max(1, unsure.sum()))
        outlined(left, image, probability, PREDICTED, title)
        framed(left, window)
        image[unsure] = 0.4 * image[unsure] + 0.6 * 255 * np.array(to_rgb(MARK))
        outlined(right, image[window], probability[window], PREDICTED, "in orange: unsure")
    text = f"The frames hold {CLOSE**2:.1%} of the picture and {np.mean(shares):.0%} of the pixels that are unsure"
    figure._suptitle.set_text(text)
    return figure


def _hesitates(probability: np.ndarray) -> np.ndarray:
    return (probability > UNSURE[0]) & (probability < UNSURE[1])


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask (H, W) bool beside its edge; where they are dense, the edge is hard."""
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
