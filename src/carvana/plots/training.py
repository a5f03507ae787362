"""Training that one watches: a fold's curves and edges, renewed in place while it trains.

They are drawn from the files in the fold's folder, so they are the same after a kill and for processes of their own.
"""

import contextlib
import io
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from carvana.plots import style
from carvana.plots.overlays import Outlined, densest, edge_pixels, with_errors
from carvana.tracking import Point, Tracking
from carvana.training.launch import train
from carvana.training.state import Snapshot, read_snapshot, snapshot_epochs
from carvana.training.trainer import READ_EVERY, Trainer

COLUMNS = 5  # epochs in the strip, from the first to the last
STRIP_SHARE = 0.2  # of height and width that a crop of the strip shows
PAUSE = 50  # drawing takes at most a fiftieth of the time


def train_live(trainer: Trainer, max_hours: float = 0, workers: int = -1, tracker: str = "") -> pd.DataFrame:
    """`training.train`, shown in the notebook by one line of progress and two figures that are renewed in place.

    tracker: where else it is shown, see `tracking`.
    """
    with contextlib.closing(Tracking(tracker, trainer.run, trainer.folder)) as tracking:
        shown = LiveDisplay(trainer, tracking)
        # a script has no outputs to renew
        with contextlib.nullcontext() if get_ipython() is None else contextlib.redirect_stderr(shown):
            history = train(trainer, max_hours, workers, shown.renew)
            shown.pause_until = 0
            shown.renew()
    return history


class LiveDisplay(io.TextIOBase):
    """Where progress bars and figures go: each has one output, which ends in the notebook as it was last."""

    def __init__(self, trainer: Trainer, tracking: Tracking):
        self.trainer, self.tracking, self.stderr = trainer, tracking, sys.stderr
        self.outputs: dict[str, DisplayHandle] = {}
        self.pause_until = 0.0

    def write(self, text: str) -> int:
        """Take what is meant for stderr; only lines that are no progress bar go there."""
        line = text.replace("\x1b[A", "").strip()
        if "%|" in line:
            self._show("progress", {"text/plain": line}, raw=True)
        elif line:
            self.stderr.write(text)
        return len(text)

    def renew(self) -> None:
        """Show what is new, in the trackers and, unless that was done a moment ago, in the figures."""
        log_epochs(self.trainer, self.tracking)
        began, fold = time.monotonic(), str(self.trainer.fold)
        if get_ipython() is None or began < self.pause_until or fold not in self.trainer.run.histories():
            return
        self._show("curves", training_curves(self.trainer))
        self._show("strip", edge_strip(self.trainer))
        self.pause_until = time.monotonic() + PAUSE * (time.monotonic() - began)

    def _show(self, name: str, output: Any, **options: Any) -> None:
        if name in self.outputs:
            self.outputs[name].update(output, **options)  # type: ignore[no-untyped-call]
        else:
            self.outputs[name] = display(output, display_id=True, **options)  # type: ignore[no-untyped-call]


def log_epochs(trainer: Trainer, tracking: Tracking) -> None:
    """Log every epoch that the fold's folder holds and a tracker lacks, also those of before the last kill."""
    recipe = trainer.recipe
    for epoch in filter(tracking.lacking, snapshot_epochs(trainer.folder)):
        rows = trainer.run.histories().get(str(trainer.fold), pd.DataFrame({"epoch": []}))
        rows = rows[rows["epoch"] == epoch]
        if rows.empty and (epoch % recipe.validate_every == 0 or epoch == recipe.epochs):
            return  # it is being validated
        tracking.log(epoch, _points(trainer, epoch, rows))


def _points(trainer: Trainer, epoch: int, rows: pd.DataFrame) -> list[Point]:
    """What an epoch's snapshot and its row of the history, if it was validated, have to show."""
    snapshot, last = read_snapshot(trainer.folder, epoch), epoch * trainer.steps_per_epoch
    first = last - len(snapshot.losses)
    points = []
    for start in range(0, len(snapshot.losses), READ_EVERY):
        losses = snapshot.losses[start : start + READ_EVERY]
        points.append(Point(first + start + len(losses), {"train/loss": float(losses.mean())}))
    values = {"train/lr": snapshot.lr, "train/speed": snapshot.speed}
    for row in rows.to_dict("records"):
        values |= {"valid/dice": row["dice"], "valid/iou": row["iou"]}
    return [*points, Point(last, values, _watched(trainer, snapshot) if len(rows) else None)]


def _watched(trainer: Trainer, snapshot: Snapshot) -> np.ndarray:
    """The watched images with their errors painted on them, (n, height, width, 3) uint8."""
    shown = []
    for row, logits in zip(trainer.preview_rows, snapshot.logits, strict=True):
        image, target = trainer.source[row]
        true, predicted = target > 127, logits > 0
        shown.append(with_errors(image, true & ~predicted, predicted & ~true))
    return np.stack(shown)


def training_curves(trainer: Trainer) -> Figure:
    """Loss of every step, Dice of every validation, learning rate and speed of every epoch of a fold."""
    history, epochs = trainer.run.histories()[str(trainer.fold)], snapshot_epochs(trainer.folder)
    snapshots = [read_snapshot(trainer.folder, epoch, with_logits=False) for epoch in epochs]
    loss, dice, rate, pace = style.charts(5.6, 2, 2)
    _draw_losses(loss, {epoch: snapshot.losses for epoch, snapshot in zip(epochs, snapshots, strict=True)})
    _draw_dice(dice, history)
    rate.plot(epochs, [snapshot.lr for snapshot in snapshots], "o-", color=style.SERIES_COLOUR, markersize=4)
    title = f"Learning rate after epoch {epochs[-1]}: {snapshots[-1].lr:.2g}"
    style.label(rate, title, "epoch", "learning rate", count="x")
    speeds = [snapshot.speed for snapshot in snapshots]  # images/s, NaN where nothing was trained, as before epoch 1
    pace.plot(epochs, speeds, "o-", color=style.SERIES_COLOUR, markersize=4)
    pace.set_ylim(0, 1.15 * np.nanmax([1e-9, *speeds]))
    middle = np.nan_to_num(pd.Series(speeds).median())
    figure = style.label(pace, f"Learns from {middle:.3g} images/s", "epoch", "images/s of training", count="x")
    for ax in (loss, dice, rate, pace):
        ax.set_xlim(-0.03 * max(1, epochs[-1]), 1.03 * max(1, epochs[-1]))
    return figure


def _draw_losses(ax: Axes, losses: dict[int, np.ndarray]) -> None:
    """Steps in the background, each epoch's mean on them; losses: of each epoch's steps."""
    losses = {epoch: steps for epoch, steps in losses.items() if len(steps)}
    for epoch, steps in losses.items():
        at = np.linspace(epoch - 1, epoch, len(steps) + 1)[1:]
        ax.plot(at, steps, color=style.SERIES_COLOUR, alpha=0.3, linewidth=1)
    means = [steps.mean() for steps in losses.values()]
    ax.plot([epoch - 0.5 for epoch in losses], means, "o-", color=style.SERIES_COLOUR, markersize=4)
    title = "No loss yet"
    if losses:
        style.scale(ax, "y", "log")
        title = f"Mean loss goes from {means[0]:.4f} to {means[-1]:.4f}"
    style.label(ax, title, "epoch", "training loss (log scale)", count="x")


def _draw_dice(ax: Axes, history: pd.DataFrame) -> None:
    best = history.nlargest(1, "dice").iloc[0]
    dices, colour = style.inside(history["dice"]), style.PREDICTED_COLOUR
    ax.plot(history["epoch"], dices, "o-", color=colour, markersize=4)
    ax.plot(history["epoch"][:1], dices[:1], "o", color="white", markeredgecolor=colour, label="before training")
    text = f"best, epoch {best['epoch']:g}"
    ax.axvline(best["epoch"], color=style.HIGHLIGHT_COLOUR, linewidth=2, zorder=0, label=text)
    ax.legend(fontsize=style.FONT_SIZE - 1.5)
    title = f"Best Dice {best['dice']:.6f}, at first {history['dice'].iloc[0]:.6f}"
    style.label(ax, title, "epoch", "mean Dice (logit scale)", count="x")
    style.scale(ax, "y", "logit")


def edge_strip(trainer: Trainer) -> Figure:
    """The same crops of the same validation images after several epochs: probability of car, and the true edge."""
    rows, epochs = trainer.preview_rows, snapshot_epochs(trainer.folder)
    epochs = [epochs[i] for i in np.unique(np.linspace(0, len(epochs) - 1, COLUMNS).astype(int))]
    logits = {epoch: read_snapshot(trainer.folder, epoch).logits for epoch in epochs}
    height, width = logits[epochs[0]].shape[1:]
    figure, axes = style.panels(len(rows) * (len(epochs) + 1), len(epochs) + 1, height / width, foot=0.6)
    wrong = []  # shares of pixels: a row an image, a column an epoch
    for i, row in enumerate(rows):
        line = axes[i * (len(epochs) + 1) :]
        image, target = trainer.source[row]
        window = densest(edge_pixels(target > 127), STRIP_SHARE)
        soft = target[window] / 255
        Outlined(image[window], soft).draw(line[0], trainer.samples["img"].iloc[row].partition(".")[0])
        probabilities = [1 / (1 + np.exp(-logits[epoch][i][window])) for epoch in epochs]
        wrong.append([np.mean((probability > 0.5) != (soft > 0.5)) for probability in probabilities])
        for ax, epoch, probability in zip(line[1:], epochs, probabilities, strict=False):
            Outlined(probability, soft).draw(ax, f"epoch {epoch}" if epoch else "before training")
    first, last = np.mean(wrong, axis=0)[[0, -1]]
    text = f"Around hard edges {first:.1%} of pixels are wrong at epoch {epochs[0]}, {last:.1%} at epoch {epochs[-1]}"
    bar = figure.colorbar(ScalarMappable(cmap="cividis"), ax=axes, location="bottom", aspect=60, shrink=0.6)
    bar.set_label("probability of car; line: true edge", fontsize=style.FONT_SIZE)
    return style.set_title(figure, text)
