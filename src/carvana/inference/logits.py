"""Blended logits of an image: their weighted mean, its full-size form, its edges, and how certain those are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from scipy.special import expit
from torch.nn.functional import interpolate

from carvana import rle
from carvana.data.images import Size
from carvana.grid import Grid


@dataclass(frozen=True)
class BlendedLogits:
    """One image's blended logits, (h, w) float32 for each distinct network size; the sum of all, enlarged, counts."""

    by_size: Sequence[np.ndarray]

    def enlarge(self, full: Size) -> np.ndarray:
        """Full-size logits (H, W) float32: the logits of each size are enlarged on a grid of their own."""
        return reduce(np.add, (Grid(*full, *logits.shape).enlarge(logits) for logits in self.by_size))

    def probabilities(self, full: Size) -> np.ndarray:
        """Full-size probabilities of car (H, W) float32."""
        return expit(self.enlarge(full))

    def soft_mask(self, full: Size) -> np.ndarray:
        """Probabilities of car at the network size, the largest of several: (h, w) uint8, 255 = 1."""
        grid, small = Grid(*full, *max(logits.shape for logits in self.by_size)), expit(self.by_size[0])
        small = small if len(self.by_size) == 1 else grid.reduce(self.probabilities(full))
        return np.rint(255 * small).astype(np.uint8)

    def mask(self, full: Size, logit_threshold: float) -> np.ndarray:
        """Full-size mask (H, W) bool, from its edges: equal to its run lengths to the pixel."""
        return rle.decode(rle.from_edges(self.edges(full, logit_threshold)), *full)

    def edges(self, full: Size, logit_threshold: float) -> np.ndarray:
        """`rle.edges` of the full-size mask, which is not computed where that is possible."""
        if len(self.by_size) == 1:
            return Grid(*full, *self.by_size[0].shape).edges(self.by_size[0], logit_threshold)
        return rle.edges(self.enlarge(full) > logit_threshold)

    def boundary_uncertainty(self, logit_threshold: float) -> float:
        """Width of the band along the outline with logits within 1 of `logit_threshold`, in network pixels.

        0.36 for the middle image of a trained ensemble at 512x512, 0.74 for one whose lower edge is lost in its shadow.
        Without any outline it is the number of such pixels.
        """
        logits = self.by_size[0]
        for other in self.by_size[1:]:
            resized = interpolate(torch.from_numpy(other)[None, None], logits.shape, mode="bilinear")
            logits = logits + resized[0, 0].numpy()
        car, near = logits > logit_threshold, (logits > logit_threshold - 1) & (logits < logit_threshold + 1)
        outline = np.count_nonzero(car[1:] != car[:-1]) + np.count_nonzero(car[:, 1:] != car[:, :-1])
        return round(np.count_nonzero(near) / max(1, int(outline)), 3)


def blend(logits: Sequence[torch.Tensor], weights: Sequence[float]) -> list[BlendedLogits]:
    """Weighted mean over checkpoints and tta for each image of a batch.

    logits: (tta, B, h, w) on any device for each checkpoint. They leave the device blended, once for each size.
    """
    sums: dict[torch.Size, torch.Tensor] = {}
    for weight, of_checkpoint in zip(weights, logits, strict=True):
        weighted = weight * of_checkpoint.mean(0)
        size = weighted.shape[1:]
        sums[size] = sums[size] + weighted if size in sums else weighted
    batches = [batch.cpu().numpy() for batch in sums.values()]
    return [BlendedLogits(by_size) for by_size in zip(*batches, strict=True)]
