"""The one grid between full size and network size.

Image, target and enlarged logits must lie on the same grid: mixing the grids of 1918 and 1920 columns costs 0.001 to
0.0014 Dice. Where the network size is 1, 1/2, 1/4 or 1/8 of the full size (rounded up to what a network can divide by),
the image is padded at its right and lower edge by repeating the last column and row, and every network pixel covers
k x k full-size pixels. Any other network size covers the image itself, through one resize.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from carvana import rle

STRIDE = 32  # segmentation networks halve the size five times, so height and width are multiples of 2**5


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a network, `height` x `width`, lie in an image of `full_height` x `full_width`."""

    full_height: int
    full_width: int
    height: int
    width: int

    @property
    def factor(self) -> int:
        """Full-size pixels that a network pixel covers along each side: 1, 2, 4 or 8 for a natural size, else 0."""
        for k in (1, 2, 4, 8):
            spare_height, spare_width = self.height * k - self.full_height, self.width * k - self.full_width
            if 0 <= spare_height < STRIDE * k and 0 <= spare_width < STRIDE * k:
                return k
        return 0

    @property
    def padded(self) -> tuple[int, int]:
        """Full-size height and width that the network sees, padding included."""
        if not self.factor:
            return self.full_height, self.full_width
        return self.height * self.factor, self.width * self.factor

    def reduce(self, image: np.ndarray) -> np.ndarray:
        """Area average of a full-size image or mask on this grid.

        image: (full_height, full_width[, 3]) uint8. Returns (height, width[, 3]) uint8.
        """
        return resize(pad(image, *self.padded), self.height, self.width)

    def soft_target(self, mask: np.ndarray) -> np.ndarray:
        """Share of each network pixel that is car: (full_height, full_width) bool -> (height, width) uint8, 255 = 1."""
        return self.reduce(mask.astype(np.uint8) * np.uint8(255))

    def enlarge(self, logits: np.ndarray) -> np.ndarray:
        """Bilinear, half-pixel centres: (height, width) float32 -> (full_height, full_width) float32.

        Equals torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False) on the padded size, cropped.
        Logits are enlarged, not probabilities: the sigmoid bends straight edges (173 to 611 pixels an image).
        """
        enlarged = cv2.resize(logits, self.padded[::-1], interpolation=cv2.INTER_LINEAR)
        return enlarged[: self.full_height, : self.full_width]

    def edges(self, logits: np.ndarray, logit_threshold: float = 0.0) -> np.ndarray:
        """`rle.edges(self.enlarge(logits) > logit_threshold)`, 3 times as fast for a whole factor.

        Along a full-size row the logits are straight lines between the centres of network pixels, so a run starts or
        ends once between two neighbours of opposite sign, and nowhere else.
        """
        k, (height, width) = self.factor, logits.shape
        if k < 2:
            return rle.edges(self.enlarge(logits) > logit_threshold)
        values, t = logits - np.float32(logit_threshold), (np.arange(k, dtype=np.float32) + np.float32(0.5)) / k
        signs = _row_signs(values, t)[: self.full_height].reshape(-1)
        change = np.flatnonzero(signs[1:] != signs[:-1])
        y, x = np.divmod(change, width)
        above, step = np.divmod(y - k // 2, k)  # the network row above a full-size row, and how far below it is
        upper, lower = np.maximum(above, 0) * width, np.minimum(above + 1, height - 1) * width
        flat, down = values.reshape(-1), t[step]
        left, right = (
            (1 - down) * flat[upper + column] + down * flat[lower + column]
            for column in (x, np.minimum(x + 1, width - 1))
        )
        between = left[:, None] * (1 - t) + right[:, None] * t > 0
        same = (between == (left > 0)[:, None]).sum(1)
        column = np.minimum(x * k + k // 2 + same, self.full_width)
        positions = np.where(x == width - 1, y + 1, y) * self.full_width + np.where(x == width - 1, 0, column)
        ends = [np.zeros(int(signs[0]), int), positions, np.full(int(signs[-1]), self.full_height * self.full_width)]
        unique, times = np.unique(np.concatenate(ends), return_counts=True)
        return unique[times % 2 == 1]  # a run of no pixel starts and ends at once


def _row_signs(values: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Whether values (h, w) are above 0 on every full-size row, (h * k, w) bool; computed where neighbours differ."""
    height, width = values.shape
    k, signs = len(t), values > 0
    rows, flat = np.repeat(signs, k, axis=0).reshape(-1), values.reshape(-1)
    differ = np.flatnonzero(signs[1:] != signs[:-1])
    y, x = np.divmod(differ, width)
    first = (y * k + k // 2) * width + x
    upper, lower = flat[differ, None], flat[differ + width, None]
    rows[first[:, None] + np.arange(k) * width] = upper * (1 - t) + lower * t > 0
    return rows.reshape(height * k, width)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """One resize of (H, W[, 3]): area average where it shrinks, bilinear where it grows."""
    grows = height > image.shape[0] or width > image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR if grows else cv2.INTER_AREA)


def pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the last row and column of (H, W[, 3]) until it is height x width."""
    below, right = height - image.shape[0], width - image.shape[1]
    if not below and not right:
        return image
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
