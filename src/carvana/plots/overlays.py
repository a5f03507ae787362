"""Images with masks, errors or doubts drawn on them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from carvana.data.competition import Competition
from carvana.data.images import Archive, image_size, mask_of, read_full_image
from carvana.files import atomic
from carvana.grid import resize
from carvana.plots import style

Window = tuple[slice, slice]  # rows and columns
WHOLE: Window = slice(None), slice(None)
CLOSE_UP = 0.125  # of height and width that a place of a large image shows
PANEL_WIDTH, ZOOM_WIDTH = 480, 400  # pixels of an image in a panel at most, and of a saved zoom
UNSURE = 0.27, 0.73  # probabilities between which a network hesitates: logits of -1 to 1, as in boundary_uncertainty


@dataclass(frozen=True)
class Outlined:
    """An image (H, W, 3) uint8 or probabilities (H, W), and a line where `soft`, (H, W) in [0, 1], passes 0.5."""

    image: np.ndarray
    soft: np.ndarray
    colour: str = style.TRUE_COLOUR
    halo: float = 2.4  # points, of the white on both sides of the line

    def draw(self, ax: Axes, title: str, window: Window = WHOLE, frame: Window | None = None) -> None:
        """Fill a panel with a `window` of the image, and draw a frame around another one."""
        image, soft = np.ascontiguousarray(self.image[window]), self.soft[window].astype(np.float32)
        scale = min(1, PANEL_WIDTH / soft.shape[1])
        size = [max(1, round(side * scale)) for side in soft.shape]
        image, soft = resize(image, *size), resize(soft, *size)
        ax.imshow(image, cmap="cividis", vmin=0, vmax=1)
        ax.set_title(title, fontsize=style.FONT_SIZE - 1.5)
        if soft.min() < 0.5 < soft.max():
            line = ax.contour(soft, [0.5], colors=[self.colour], linewidths=1.3)
            line.set_path_effects([withStroke(linewidth=self.halo, foreground="white", alpha=0.8)])
        if frame:
            ax.add_patch(_rectangle(frame, window, scale))


def _rectangle(frame: Window, window: Window, scale: float) -> Rectangle:
    top, left = (side.start or 0 for side in window)
    rows, columns = frame
    corner = (columns.start - left) * scale, (rows.start - top) * scale
    width, height = ((side.stop - side.start) * scale for side in (columns, rows))
    return Rectangle(corner, width, height, fill=False, color=style.HIGHLIGHT_COLOUR, linewidth=2)


def tinted(image: np.ndarray, place: np.ndarray, colour: str, share: float = 0.75) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 that has `share` of a colour where `place`, (H, W) bool, is set."""
    image = image.copy()
    image[place] = (1 - share) * image[place] + share * style.rgb(colour)
    return image


def with_errors(image: np.ndarray, false_negative: np.ndarray, false_positive: np.ndarray) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 with its wrong pixels, (H, W) bool each, in their colours."""
    for place, colour in zip((false_negative, false_positive), style.ERROR_TEXTS, strict=True):
        image = tinted(image, place, colour)
    return image


def edge_pixels(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """The outer `thickness` pixels of a mask (H, W) bool, but not where the image cuts the car off."""
    car, size = mask.astype(np.uint8), 2 * thickness + 1
    return car > cv2.erode(car, np.ones((size, size), np.uint8))


def with_edge(image: np.ndarray, true: np.ndarray, thickness: int) -> np.ndarray:
    """An image (H, W, 3) uint8 with the edge of a mask (H, W) bool in the colour of the truth."""
    colour = style.rgb(style.TRUE_COLOUR).round().astype(np.uint8)
    return np.where(edge_pixels(true, thickness)[..., None], colour, image)


def error_overlays(competition: Competition, predicted: Mapping[str, np.ndarray], titles: Mapping[str, str]) -> Figure:
    """Training images with what is wrong painted on them, each beside the place where most pixels are wrong.

    predicted: masks (H, W) bool by image. titles: by image, of those that are shown, in order.
    """
    samples, counts = list(_samples(competition, titles)), np.zeros(2)
    figure, axes = style.panels(2 * len(samples), 4, samples[0].height / samples[0].width, "", line=0.35, foot=0.3)
    for whole, close, sample in zip(axes[::2], axes[1::2], samples, strict=False):
        true, mask = mask_of(sample), predicted[sample.Index]
        errors, place = (true & ~mask, mask & ~true), densest(true != mask)
        counts += [np.count_nonzero(places) for places in errors]
        image = with_errors(read_full_image(competition.train_images, sample.Index), *errors)
        shown = true | mask
        shown[place] = True  # the frame must not leave the panel
        Outlined(image, true).draw(whole, titles[sample.Index], _around(shown), place)
        Outlined(image, true, halo=0).draw(close, "where most is wrong", place)
    style.colour_legend(figure, style.ERROR_LEGEND)
    share, (missed, taken) = counts[0] / max(1, counts.sum()), style.ERROR_TEXTS.values()
    style.set_title(figure, f"Of the wrong pixels {share:.0%} are {missed}, the others {taken}")
    return figure


def save_errors(
    competition: Competition, predicted: Mapping[str, np.ndarray], names: Iterable[str], folder: Path
) -> None:
    """Fill `folder`: NAME.jpg, a full-size image with its errors and the true edge, NAME_zoom.jpg its worst place.

    predicted: masks (H, W) bool by image. names: those to be saved. Older images there are removed.
    """
    for old in folder.glob("*.jpg"):
        old.unlink()
    for sample in _samples(competition, names):
        true, mask = mask_of(sample), predicted[sample.Index]
        image = with_errors(read_full_image(competition.train_images, sample.Index), true & ~mask, mask & ~true)
        place = densest(true != mask, 2 * CLOSE_UP)
        zoom, edge = np.ascontiguousarray(image[place]), true[place].astype(np.float32)
        size = max(1, round(ZOOM_WIDTH * zoom.shape[0] / zoom.shape[1])), ZOOM_WIDTH
        zoom = with_edge(resize(zoom, *size), resize(edge, *size) > 0.5, 2)
        stem = Path(sample.Index).stem
        _write_jpeg(folder / f"{stem}_zoom.jpg", zoom)
        _write_jpeg(folder / f"{stem}.jpg", with_edge(image, true, 1))


def _samples(competition: Competition, names: Iterable[str]) -> Iterator[Any]:
    """Rows of the competition's samples, with the image's name as Index."""
    return competition.samples.set_index("img").loc[list(names)].itertuples()


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    with atomic(path) as file:
        file.write(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=80))


def predicted_outlines(
    images: Archive, names: Iterable[str], probabilities: Iterable[np.ndarray], threshold: float = 0.5
) -> Figure:
    """Images with the outline of their predicted masks; probabilities: (H, W) in [0, 1] for each of `names`."""
    names, shares = list(names), []
    height, width = image_size(images, names[0])
    figure, axes = style.panels(len(names), 3, height / width, "", line=0.35)
    for ax, name, probability in zip(axes, names, probabilities, strict=False):
        mask = probability > threshold
        shares.append(mask.mean())
        Outlined(read_full_image(images, name), mask, style.PREDICTED_COLOUR).draw(ax, name, _around(mask))
    style.set_title(figure, f"Predicted cars cover {min(shares):.1%} to {max(shares):.1%} of the image")
    return figure


def hesitations(images: Archive, titles: Mapping[str, str], probabilities: Iterable[np.ndarray]) -> Figure:
    """Images with the predicted outline, each beside the place that holds most pixels of which it is unsure.

    titles: by image, in the order of `probabilities`, (H, W) in [0, 1] each.
    """
    height, width = image_size(images, next(iter(titles)))
    figure, axes = style.panels(2 * len(titles), 4, height / width, "", line=0.4)
    shares = []
    for whole, close, name, probability in zip(axes[::2], axes[1::2], titles, probabilities, strict=False):
        image, unsure = read_full_image(images, name), (probability > UNSURE[0]) & (probability < UNSURE[1])
        place = densest(unsure)
        shares.append(unsure[place].sum() / max(1, unsure.sum()))
        Outlined(image, probability, style.PREDICTED_COLOUR).draw(whole, titles[name], frame=place)
        image = tinted(image, unsure, style.HIGHLIGHT_COLOUR, 0.6)
        Outlined(image, probability, style.PREDICTED_COLOUR).draw(close, "in orange: unsure", place)
    text = f"The frames hold {CLOSE_UP**2:.1%} of the image and {np.mean(shares):.0%} of the pixels that are unsure"
    style.set_title(figure, text)
    return figure


def _around(mask: np.ndarray) -> Window:
    """A window of the image's shape around a mask; all of it for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return _window(mask.shape, (0, 0), 1)
    share = 1.08 * max((np.ptp(rows) + 1) / mask.shape[0], (np.ptp(columns) + 1) / mask.shape[1])
    return _window(mask.shape, ((rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2), share)


def densest(marked: np.ndarray, share: float = CLOSE_UP) -> Window:
    """The window, `share` of the sides of `marked` (H, W) bool, around most marked pixels."""
    size = [max(1, round(side * share / 2)) for side in marked.shape]
    density = marked.astype(np.float32)
    for _ in range(2):  # twice: what is in the middle of the window counts most
        density = cv2.boxFilter(density, -1, size[::-1], borderType=cv2.BORDER_CONSTANT)
    return _window(marked.shape, np.unravel_index(density.argmax(), density.shape), share)


def _window(shape: Iterable[int], centre: Iterable[float], share: float) -> Window:
    """`share` of an image's sides around a place, within the image."""
    rows, columns = (_span(*side, share) for side in zip(shape, centre, strict=True))
    return rows, columns


def _span(side: int, middle: float, share: float) -> slice:
    size = max(2, round(side * min(1, share)))
    first = min(max(0, round(middle - size / 2)), side - size)
    return slice(first, first + size)
