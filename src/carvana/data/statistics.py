"""What the training samples say before anything is trained: areas, colours, odd masks, what a smaller size costs."""

from typing import Any

import cv2
import numpy as np
import pandas as pd

from carvana.data.images import Archive, mask_of, read_image
from carvana.grid import STRIDE, Grid
from carvana.metrics import dice, pixel_counts
from carvana.parallel import overlapped

CAR_RGB = ["red", "green", "blue"]
BACKGROUND_RGB = [f"background_{name}" for name in CAR_RGB]


def thumbnail(images: Archive, sample: Any, width: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Image (h, width, 3) uint8 and soft mask (h, width) in [0, 1] of a row of `Competition.samples`, on one grid."""
    grid = Grid(sample.height, sample.width, max(1, round(width * sample.height / sample.width)), width)
    image = read_image(images, sample.img, grid.height, grid.width)[0]
    return image, grid.soft_target(mask_of(sample)) / 255


def background_contrast(images: Archive, samples: pd.DataFrame) -> pd.DataFrame:
    """How far each car's colour is from the background's: a row per car (index), nearest first.

    Columns: contrast, the distance in CIELAB (1 is just visible, 100 black to white) between the median colours inside
    and outside the mask, in the middle over its views; CAR_RGB and BACKGROUND_RGB, from 0 to 1.
    """
    colours = overlapped(_median_colours, ((images, sample) for sample in samples.itertuples()))
    table = pd.DataFrame(list(colours), samples.index, [*CAR_RGB, *BACKGROUND_RGB])
    car, background = (
        cv2.cvtColor(table[names].to_numpy(np.float32)[None], cv2.COLOR_RGB2LAB)[0]
        for names in (CAR_RGB, BACKGROUND_RGB)
    )
    table.insert(0, "contrast", np.linalg.norm(car - background, axis=1))
    return table.groupby(samples["car"]).median().sort_values("contrast")


def _median_colours(images: Archive, sample: Any) -> np.ndarray:
    """Red, green, blue where an image is surely car, then where it is surely background: (6,) from 0 to 1."""
    image, soft = thumbnail(images, sample, 160)
    pixels = (image[place] if place.any() else image.reshape(-1, 3) for place in (soft > 0.99, soft < 0.01))
    return np.concatenate([np.median(colours, axis=0) / 255 for colours in pixels])


def mask_oddities(samples: pd.DataFrame) -> pd.DataFrame:
    """What may be wrong with a mask: img, ratio, fragment, fragment_at, hole, hole_at; a row per sample.

    ratio: area over what the view's middle and the car's other views let expect. fragment, hole: the largest patch
    apart from the car and the largest gap in it, in pixels; ..._at: (x, y) of its middle.
    """
    ratio = samples["area"] / samples.groupby("view")["area"].transform("median")
    ratio /= ratio.groupby(samples["car"]).transform("median")
    patches = overlapped(_patches, ((sample,) for sample in samples.itertuples()))
    return pd.concat([samples["img"], ratio.rename("ratio"), pd.DataFrame(list(patches), samples.index)], axis=1)


def _patches(sample: Any) -> dict[str, Any]:
    mask = mask_of(sample).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(mask) if mask.any() else (0, 0, sample.width, sample.height)
    mask = mask[top : top + height, left : left + width]
    background = np.pad(1 - mask, 1, constant_values=1)  # the frame joins all background that reaches it
    patches: dict[str, Any] = {}
    for name, area, border in (("fragment", mask, 0), ("hole", background, 1)):
        _, _, stats, centres = cv2.connectedComponentsWithStats(area, connectivity=4 if border else 8)
        second = stats[1:, cv2.CC_STAT_AREA].argsort()[-2:-1] + 1  # the largest is the car, or what is around it
        patches[name] = int(stats[second, cv2.CC_STAT_AREA].sum())
        patches[f"{name}_at"] = tuple(centres[second].sum(0) - border + (left, top))
    return patches


def touching_sides(samples: pd.DataFrame) -> int:
    """Images in which the car touches the left or the right border."""
    return sum(bool(mask_of(sample)[:, [0, -1]].any()) for sample in samples.itertuples())


def share_explained(sizes: pd.Series, groups: pd.Series) -> float:
    """Share of the variance of `sizes` that lies between the groups; both by the same index."""
    return float(sizes.groupby(groups).transform("mean").var(ddof=0) / max(sizes.var(ddof=0), 1e-12))


def downscaling_ceilings(samples: pd.DataFrame, seed: int, count: int = 48) -> pd.DataFrame:
    """The Dice of a network at 1/2, 1/4 or 1/8 of the full size that has learnt to give its targets exactly.

    Masks of `count` samples, drawn by `seed`, are reduced as training targets are and enlarged as predictions are.
    Columns: fraction ("1/2", ...), height and width at the network (of the last sample), mean dice.
    """
    drawn = samples.sample(min(len(samples), count), random_state=seed)
    rows = []
    for factor in (2, 4, 8):
        dices = []
        for mask in map(mask_of, drawn.itertuples()):
            grid = Grid(*mask.shape, *(-(-side // (STRIDE * factor)) * STRIDE for side in mask.shape))
            back = grid.enlarge(grid.soft_target(mask).astype(np.float32)) > 127.5
            dices.append(dice(pixel_counts(back, mask)))
        rows.append((f"1/{factor}", grid.height, grid.width, np.mean(dices)))
    return pd.DataFrame(rows, columns=["fraction", "height", "width", "dice"])
