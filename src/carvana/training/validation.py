"""Scores of a network in training, at full size: logits are enlarged as a submission's are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from carvana.data.dataset import Item
from carvana.data.images import mask_of
from carvana.grid import Grid
from carvana.metrics import PixelCounts, dice, iou, pixel_counts
from carvana.parallel import overlapped, progress


class Scores(NamedTuple):
    """Means over images."""

    dice: float
    iou: float


@dataclass(frozen=True)
class Validator:
    """Scores networks on rows of `samples`, whose images and targets are the items of `source`, row for row."""

    samples: pd.DataFrame
    source: Dataset[Item]
    batch_size: int
    accelerator: Accelerator

    def predict(self, network: torch.nn.Module, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Row and logits (height, width) float32 of each of `rows`."""
        network.eval()
        for first in range(0, len(rows), self.batch_size):
            batch_rows = rows[first : first + self.batch_size]
            images = torch.from_numpy(np.stack([self.source[row][0] for row in batch_rows]))
            with torch.inference_mode(), self.accelerator.autocast():
                logits = network(images.to(self.accelerator.device)).float().cpu().numpy()
            yield from zip(batch_rows, logits, strict=True)

    def pixel_counts(self, network: torch.nn.Module, rows: np.ndarray) -> PixelCounts:
        """Counts at full size, an array (len(rows),) each."""
        hidden = not self.accelerator.is_main_process
        predicted = progress(self.predict(network, rows), "validating", total=len(rows), disable=hidden)
        return PixelCounts(*np.array(list(overlapped(self._count, predicted))).reshape(-1, 3).T)

    def scores(self, network: torch.nn.Module, rows: np.ndarray) -> Scores:
        """Mean Dice and IoU of `rows`, shared among the processes that train together."""
        accelerator = self.accelerator
        counts = self.pixel_counts(network, rows[accelerator.process_index :: accelerator.num_processes])
        sums = torch.tensor([dice(counts).sum(), iou(counts).sum(), np.size(counts.true)])
        if accelerator.num_processes > 1:  # Apple's GPUs, which know no float64, work alone
            sums = accelerator.reduce(sums.to(accelerator.device))
        dice_sum, iou_sum, n = sums.tolist()
        return Scores(dice_sum / n, iou_sum / n)

    def _count(self, row: int, logits: np.ndarray) -> PixelCounts:
        sample = self.samples.iloc[row]
        grid = Grid(sample["height"], sample["width"], *logits.shape)
        return pixel_counts(grid.enlarge(logits) > 0, mask_of(sample))
