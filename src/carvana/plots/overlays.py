"""Images with masks, errors or doubts drawn on them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from scipy.special import expit, logit

from carvana.data.competition import Competition
from carvana.data.images import Archive, image_size, mask_of, read_full_image
from carvana.files import atomic
from carvana.grid import resize
from carvana.plots import style

Masks = Mapping[str, np.ndarray]  # (H, W) bool by image
Window = tuple[slice, slice]  # rows and columns
WHOLE: Window = slice(None), slice(None)
CLOSE_UP = 0.125  # of height and width that a place of a large image shows
PANEL_WIDTH, ZOOM_WIDTH = 480, 400  # pixels of an image in a panel at most, and of a saved zoom
UNSURE = 0.23  # a network hesitates from 27 to 73 %, logits of -1 to 1, as in boundary_uncertainty


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
        top, left = (side.start or 0 for side in window)
        height, width = soft.shape
        extent = left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5  # the axes count the image's pixels
        size = [max(1, round(side * min(1, PANEL_WIDTH / width))) for side in soft.shape]
        image, soft = resize(image, *size), resize(soft, *size)
        ax.imshow(image, cmap="cividis", vmin=0, vmax=1, extent=extent)
        ax.set_title(title, fontsize=style.FONT_SIZE - 1.5)
        if soft.min() < 0.5 < soft.max():
            line = ax.contour(soft, [0.5], colors=[self.colour], linewidths=1.3, extent=extent, origin="upper")
            line.set_path_effects([withStroke(linewidth=self.halo, foreground="white", alpha=0.8)])
        if frame:
            rows, columns = frame
            corner, size = (columns.start, rows.start), [side.stop - side.start for side in (columns, rows)]
            ax.add_patch(Rectangle(corner, *size, fill=False, color=style.HIGHLIGHT_COLOUR, linewidth=2))


def tinted(image: np.ndarray, place: np.ndarray, colour: str, share: float = 0.75) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 that has `share` of a colour where `place`, (H, W) bool, is set."""
    image = image.copy()
    image[place] = np.round((1 - share) * image[place] + share * 255 * np.array(to_rgb(colour)))
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
    return tinted(image, edge_pixels(true, thickness), style.TRUE_COLOUR, 1)


def error_overlays(competition: Competition, predicted: Masks, titles: Mapping[str, str]) -> Figure:
    """Training images with what is wrong painted on them, each beside the place where most pixels are wrong.

    titles: by image, of those that are shown, in order.
    """
    counts = np.zeros(2)  # of false negatives and false positives
    aspect = competition.samples["height"].iloc[0] / competition.samples["width"].iloc[0]
    figure, axes = style.panels(2 * len(titles), 4, aspect, line=0.4, foot=0.3)
    painted = _painted(competition, predicted, titles)
    for whole, close, (name, image, true, wrong) in zip(axes[::2], axes[1::2], painted, strict=False):
        counts += np.count_nonzero(wrong & true), np.count_nonzero(wrong & ~true)
        place = densest(wrong)
        Outlined(image, true).draw(whole, titles[name], frame=place)
        Outlined(image, true, halo=0).draw(close, "where most is wrong", place)
    style.colour_legend(figure, style.ERROR_LEGEND)
    share, (missed, taken) = counts[0] / max(1, counts.sum()), style.ERROR_TEXTS.values()
    return style.set_title(figure, f"Of the wrong pixels {share:.0%} are {missed}, the others {taken}")


def save_errors(competition: Competition, predicted: Masks, names: Iterable[str], folder: Path) -> None:
    """Fill `folder`: NAME.jpg, a full-size image with its errors and the true edge, NAME_zoom.jpg its worst place.

    names: those to be saved. Older images there are removed.
    """
    for old in folder.glob("*.jpg"):
        old.unlink()
    for name, image, true, wrong in _painted(competition, predicted, names):
        place = densest(wrong, 2 * CLOSE_UP)
        zoom, edge = np.ascontiguousarray(image[place]), true[place].astype(np.float32)
        size = max(1, round(ZOOM_WIDTH * edge.shape[0] / edge.shape[1])), ZOOM_WIDTH
        zoom = with_edge(resize(zoom, *size), resize(edge, *size) > 0.5, 2)
        stem = Path(name).stem
        for part, shown in (("_zoom", zoom), ("", with_edge(image, true, 1))):
            with atomic(folder / f"{stem}{part}.jpg") as file:
                file.write(simplejpeg.encode_jpeg(shown, quality=80))


def _painted(
    competition: Competition, predicted: Masks, names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Each name, its full-size image with errors painted on it, its true mask, and where the prediction is wrong."""
    for sample in competition.samples.set_index("img").loc[list(names)].itertuples():
        name, true = str(sample.Index), mask_of(sample)
        wrong = true != predicted[name]
        image = read_full_image(competition.train_images, name)
        yield name, with_errors(image, wrong & true, wrong & ~true), true, wrong


def predicted_outlines(
    images: Archive, names: Iterable[str], probabilities: Iterable[np.ndarray], threshold: float = 0.5
) -> Figure:
    """Images with the outline of their predicted masks; probabilities: (H, W) in [0, 1] for each of `names`."""
    names, shares = list(names), []
    height, width = image_size(images, names[0])
    figure, axes = style.panels(len(names), 3, height / width, line=0.35)
    for ax, name, probability in zip(axes, names, probabilities, strict=False):
        mask = probability > threshold
        shares.append(mask.mean())
        Outlined(read_full_image(images, name), mask, style.PREDICTED_COLOUR).draw(ax, name)
    return style.set_title(figure, f"Predicted cars cover {min(shares):.1%} to {max(shares):.1%} of the image")


def hesitations(
    images: Archive, titles: Mapping[str, str], probabilities: Iterable[np.ndarray], threshold: float = 0.5
) -> Figure:
    """Images with the predicted outline, each beside the place that holds most pixels of which it is unsure.

    titles: by image, in the order of `probabilities`, (H, W) in [0, 1] each. threshold: from which it is car.
    """
    height, width = image_size(images, next(iter(titles)))
    figure, axes = style.panels(2 * len(titles), 4, height / width, line=0.4)
    shares = []
    for whole, close, name, probability in zip(axes[::2], axes[1::2], titles, probabilities, strict=False):
        probability = expit(logit(probability) - logit(threshold))  # the outline is at 0.5 of these
        image, unsure = read_full_image(images, name), np.abs(probability - 0.5) < UNSURE
        place = densest(unsure)
        shares.append(unsure[place].sum() / max(1, unsure.sum()))
        Outlined(image, probability, style.PREDICTED_COLOUR).draw(whole, titles[name], frame=place)
        image = tinted(image, unsure, style.HIGHLIGHT_COLOUR, 0.6)
        Outlined(image, probability, style.PREDICTED_COLOUR).draw(close, "in orange: unsure", place)
    text = f"The frames hold {CLOSE_UP**2:.1%} of the image and {np.mean(shares):.0%} of the pixels that are unsure"
    return style.set_title(figure, text)


def densest(marked: np.ndarray, share: float = CLOSE_UP) -> Window:
    """The window, `share` of the sides of `marked` (H, W) bool, around most marked pixels."""
    height, width = (max(1, round(side * share / 2)) for side in marked.shape)
    density = marked.astype(np.float32)
    for _ in range(2):  # twice: what is in the middle of the window counts most
        density = cv2.boxFilter(density, -1, (width, height), borderType=cv2.BORDER_CONSTANT).astype(np.float32)
    middles = divmod(int(density.argmax()), marked.shape[1])
    rows, columns = (_span(side, middle, share) for side, middle in zip(marked.shape, middles, strict=True))
    return rows, columns


def _span(side: int, middle: int, share: float) -> slice:
    """`share` of a side around a place, within the image."""
    size = max(2, round(side * share))
    first = min(max(0, round(middle - size / 2)), side - size)
    return slice(first, first + size)
