"""Figures made of photographs with their masks drawn on, in the colours of `figures`."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import simplejpeg
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from carvana import rle
from carvana.data.competition import Archive, full_picture, picture
from carvana.files import atomic
from carvana.grid import Grid, resize
from carvana.plots.explore import EXTRA, MARK, MISSED, PREDICTED, TEXT, TRUE, charts, label, panels

Window = tuple[slice, slice]  # rows and columns


def turntable(photos: Archive, pictures: pd.DataFrame, car: str) -> Figure:
    """Every view of a car with the outline of its mask."""
    views = pictures[pictures["car"] == car].sort_values("view")
    low, high = views.loc[views["area"].idxmin()], views.loc[views["area"].idxmax()]
    span = f"{low['area']:.1%} of the picture (view {low['view']}) to {high['area']:.1%} (view {high['view']})"
    figure, axes = panels(len(views), 4, low["height"] / low["width"], f"Car {car} covers {span}")
    for ax, row in zip(axes, views.itertuples(), strict=False):
        outlined(ax, *_reduced(photos, row), TRUE, f"view {row.view}: {row.area:.1%} car")
    return figure


def wall_contrast(photos: Archive, pictures: pd.DataFrame) -> pd.DataFrame:
    """How far each car's colour is from the wall's: a row per car (index), nearest first.

    Columns: contrast, the distance in CIELAB (1 is just visible, 100 black to white) between the median colours inside
    and outside the mask, in the middle over its views; red, green, blue of the car and wall_red, ... (0 to 1).
    """
    with ThreadPoolExecutor() as pool:
        rows = pool.map(lambda row: _colours(*_reduced(photos, row, 160)), pictures.itertuples())
        colours = pd.DataFrame(list(rows), index=pictures.index)
    parts = [colours.iloc[:, i : i + 3].to_numpy(np.float32)[None] for i in (0, 3)]
    inside, outside = (cv2.cvtColor(part, cv2.COLOR_RGB2LAB)[0] for part in parts)
    contrast = pd.Series(np.linalg.norm(inside - outside, axis=1), pictures.index, name="contrast")
    return pd.concat([contrast, colours], axis=1).groupby(pictures["car"]).median().sort_values("contrast")


def _colours(image: np.ndarray, soft: np.ndarray) -> dict[str, float]:
    """Median colours where a picture is surely car and surely wall, 0 to 1."""
    found = {}
    for prefix, place in (("", soft > 0.99), ("wall_", soft < 0.01)):
        pixels = image[place] if place.any() else image.reshape(-1, 3)
        middle = np.median(pixels, axis=0) / 255
        found |= {f"{prefix}{name}": value for name, value in zip(("red", "green", "blue"), middle, strict=True)}
    return found


def contrasts(cars: pd.DataFrame, near: float = 15, named: int = 5) -> Figure:
    """Each car of `wall_contrast` as a dot of its own colour on the wall's, nearest to the wall first."""
    figure, (ax,) = charts(1, 1, 3.8)
    at, close = np.arange(1, len(cars) + 1), cars["contrast"] < near
    ax.set_facecolor(tuple(cars[["wall_red", "wall_green", "wall_blue"]].median()))
    ax.scatter(
        at, cars["contrast"], s=60, c=cars[["red", "green", "blue"]].to_numpy(), edgecolors="black", linewidths=0.4
    )
    ax.axhline(near, color=MARK, linewidth=2)
    ax.set_ylim(0, 1.08 * cars["contrast"].max())
    listed = "nearest\n" + "\n".join(f"{car}  {value:.1f}" for car, value in cars["contrast"].head(named).items())
    ax.text(0.02, 0.94, listed, transform=ax.transAxes, va="top", fontsize=TEXT - 1, family="monospace")
    title = f"{close.sum()} of {len(cars)} cars have a colour within {near:g} of the wall's"
    label(ax, title, "cars, nearest to the wall's colour first", "distance from the wall's colour (CIELAB)")
    return figure


def odd_pictures(photos: Archive, pictures: pd.DataFrame, odd: pd.DataFrame, columns: int = 4) -> Figure:
    """The oddest masks of `oddities`: by area, by fragment, by hole, `columns` of each."""
    order = {"ratio": np.log(odd["ratio"].clip(lower=1e-6)).abs(), "fragment": odd["fragment"], "hole": odd["hole"]}
    texts = {"ratio": "{:.2f} x the expected area", "fragment": "patch of {} pixels", "hole": "gap of {} pixels"}
    worst = np.expm1(order["ratio"].max()), odd["fragment"].max(), odd["hole"].max()
    text = "The oddest of {} masks: area off by {:.0%}, patch of {}, gap of {} pixels"
    aspect = pictures["height"].iloc[0] / pictures["width"].iloc[0]
    figure, axes = panels(3 * columns, columns, aspect, text.format(len(odd), *worst), line=0.4)
    for line, (name, values) in enumerate(order.items()):
        for ax, at in zip(axes[line * columns :], values[values > 0].nlargest(columns).index, strict=False):
            row = pictures.loc[at]
            image, soft = _reduced(photos, row)
            outlined(ax, image, soft, TRUE, f"{row.img}\n{texts[name].format(odd.loc[at, name])}")
            if name != "ratio":
                x, y = np.array(odd.loc[at, f"{name}_at"]) * image.shape[1] / row.width
                ax.plot(x, y, "o", markersize=16, markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=2)
    return figure


def errors(photos: Archive, names, probabilities, masks=None, titles=None, threshold: float = 0.5) -> Figure:
    """Photographs with what is wrong painted on them, or, where `masks` is None, with the predicted outline alone.

    probabilities: (H, W) in [0, 1] for each of `names`; masks: (H, W) bool for each. With masks a second panel beside
    each photograph shows where most pixels are wrong.
    """
    known, shares, wrong = masks is not None, [], np.zeros(2)
    aspect = np.divide(*full_picture(photos, names[0]).shape[:2])
    figure, axes = panels(len(names) * (1 + known), 4 if known else 3, aspect, " ", line=0.35, foot=0.3 * known)
    rows = zip(names, probabilities, masks if known else names, titles or names, strict=True)
    for i, (name, probability, true, title) in enumerate(rows):
        image, predicted = full_picture(photos, name), probability > threshold
        shares.append(predicted.mean())
        if not known:
            _cropped(axes[i], image, predicted, PREDICTED, _around(predicted), title)
            continue
        wrong += (true & ~predicted).sum(), (predicted & ~true).sum()
        image, spot = _painted(image, predicted, true), densest(true != predicted)
        shown = true | predicted
        shown[spot] = True  # the frame must not leave the panel
        _cropped(axes[2 * i], image, true, TRUE, _around(shown), title, spot)
        _cropped(axes[2 * i + 1], image, true, TRUE, spot, "where most is wrong", halo=0)
    text = f"Predicted cars cover {min(shares):.1%} to {max(shares):.1%} of the picture"
    if known:
        colours = {MISSED: "car missed", EXTRA: "wall taken for car", TRUE: "true edge"}
        handles = [Patch(color=colour, label=text) for colour, text in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=TEXT, frameon=False)
        text = f"Of the wrong pixels {wrong[0] / max(1, wrong.sum()):.0%} are car missed, the others wall taken for car"
    figure._suptitle.set_text(text)
    return figure


def save_errors(photos: Archive, names, predicted, masks, folder: Path, width: int = 400) -> None:
    """Fill `folder`: NAME.jpg, a full-size photograph with its errors and the true edge, NAME_zoom.jpg its worst spot.

    predicted, masks: (H, W) bool for each of `names`; width: of a zoom, in pixels. Older pictures there are removed.
    """
    for old in folder.glob("*.jpg"):
        old.unlink()
    for name, own, true in zip(names, predicted, masks, strict=True):
        image = _painted(full_picture(photos, name), own, true)
        spot = densest(own != true, 0.25)
        zoom = np.ascontiguousarray(image[spot])
        edge = resize(true[spot].astype(np.float32), *(size := _fitted(zoom, width)))
        _write_jpeg(folder / f"{Path(name).stem}_zoom.jpg", _edged(resize(zoom, *size), edge > 0.5, 2))
        _write_jpeg(folder / f"{Path(name).stem}.jpg", _edged(image, true, 1))


def _fitted(image: np.ndarray, width: int) -> tuple[int, int]:
    return max(1, round(image.shape[0] * width / image.shape[1])), width


def _painted(image: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """A photograph (H, W, 3) uint8 with its missed and extra pixels in their colours."""
    image = image.copy()
    for mask, colour in ((true & ~predicted, MISSED), (predicted & ~true, EXTRA)):
        image[mask] = 0.25 * image[mask] + 0.75 * 255 * np.array(to_rgb(colour))
    return image


def _edged(image: np.ndarray, true: np.ndarray, thickness: int) -> np.ndarray:
    """A photograph with the outer `thickness` pixels of a mask in the colour of the true edge."""
    mask, size = true.astype(np.uint8), 2 * thickness + 1
    edge = mask > cv2.erode(mask, np.ones((size, size), np.uint8))  # not where the picture cuts the car off
    return np.where(edge[..., None], np.uint8(np.multiply(to_rgb(TRUE), 255).round()), image)


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    with atomic(path) as file:
        file.write(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=80))


def _reduced(photos: Archive, row, width: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Photograph and soft mask of a row of the index, `width` pixels wide, on one grid."""
    grid = Grid(row.height, row.width, max(1, round(width * row.height / row.width)), width)
    image = picture(photos, row.img, grid.height, grid.width)[0]
    return image, grid.soft_target(rle.decode(row.rle, row.height, row.width)) / 255


def outlined(ax: Axes, image: np.ndarray, soft: np.ndarray, colour: str, title: str, halo: float = 2.4) -> None:
    """A photograph (H, W, 3) or probabilities (H, W), and the line where `soft`, (H, W) in [0, 1], passes 0.5."""
    ax.imshow(image, cmap="cividis", vmin=0, vmax=1)
    ax.set_title(title, fontsize=TEXT - 1.5)
    if soft.min() < 0.5 < soft.max():
        line = ax.contour(soft, [0.5], colors=[colour], linewidths=1.3)
        line.set_path_effects([withStroke(linewidth=halo, foreground="white", alpha=0.8)])


def _cropped(ax: Axes, image, mask, colour: str, window, title: str, marked=None, halo: float = 2.4) -> None:
    """One panel: a window of a picture with an outline, and a frame around the window `marked`."""
    crop, soft = np.ascontiguousarray(image[window]), mask[window].astype(np.float32)
    scale = min(1, 480 / crop.shape[1])
    size = [max(1, round(side * scale)) for side in soft.shape]
    outlined(ax, resize(crop, *size), resize(soft, *size), colour, title, halo)
    if marked:
        framed(ax, marked, window[0].start, window[1].start, scale)


def framed(ax: Axes, window: Window, top: int = 0, left: int = 0, scale: float = 1) -> None:
    """A frame around a window of a picture of which the panel shows what is below `top` and right of `left`."""
    rows, columns = window
    corner = (columns.start - left) * scale, (rows.start - top) * scale
    sides = (columns.stop - columns.start) * scale, (rows.stop - rows.start) * scale
    ax.add_patch(Rectangle(corner, *sides, fill=False, color=MARK, linewidth=2))


def _around(mask: np.ndarray) -> Window:
    """A window of the picture's shape around a mask; all of it for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return _window(mask.shape, 0, 0, 1)
    share = 1.08 * max((np.ptp(rows) + 1) / mask.shape[0], (np.ptp(columns) + 1) / mask.shape[1])
    return _window(mask.shape, (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2, share)


def densest(marked: np.ndarray, share: float = 0.125) -> Window:
    """The window, `share` of the sides of `marked` (H, W) bool, around most marked pixels."""
    size = [max(1, round(side * share / 2)) for side in marked.shape]
    density = marked.astype(np.float32)
    for _ in range(2):  # twice: what is in the middle of the window counts most
        density = cv2.boxFilter(density, -1, size[::-1], borderType=cv2.BORDER_CONSTANT)
    return _window(marked.shape, *np.unravel_index(density.argmax(), density.shape), share)


def _window(shape: tuple[int, int], y: float, x: float, share: float) -> Window:
    """`share` of a picture's sides around a place, within the picture."""
    sizes = [max(2, round(side * min(1, share))) for side in shape]
    firsts = [
        min(max(0, round(at - size / 2)), side - size) for at, size, side in zip((y, x), sizes, shape, strict=True)
    ]
    return tuple(slice(first, first + size) for first, size in zip(firsts, sizes, strict=True))
