"""Images at every size that an ensemble needs, decoded in batches, and the loop that gives their logits."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from carvana.data.images import Archive, Size, read_image
from carvana.device import worker_count
from carvana.errors import UserError
from carvana.inference.ensemble import Ensemble, Item, collate

UNDECODED: Size = (0, 0)  # the full size of an image that cannot be decoded


class InferenceDataset(Dataset[Item]):
    """Images at every network size; item i is (size -> (h, w, 3) uint8, full size, i).

    One that cannot be decoded is a UserError with its name, or with `skip_broken` black and UNDECODED in size.
    """

    def __init__(self, images: Archive, names: list[str], sizes: list[Size], skip_broken: bool = False):
        self.images, self.names, self.sizes, self.skip_broken = images, names, sizes, skip_broken

    def __getitem__(self, i: int) -> Item:
        by_size = {}
        try:
            for size in self.sizes:
                by_size[size], full = read_image(self.images, self.names[i], *size)
        except UserError:
            if not self.skip_broken:
                raise
            return {size: np.zeros((*size, 3), np.uint8) for size in self.sizes}, UNDECODED, i
        return by_size, full, i


@dataclass(frozen=True)
class Batch:
    """Logits of a few images: (tta, B, h, w) float32 for each checkpoint, their full sizes, their rows in the dataset.

    decode_seconds, network_seconds: what was waited for either.
    """

    logits: list[torch.Tensor]
    full_sizes: list[Size]
    rows: list[int]
    decode_seconds: float
    network_seconds: float


def predict_batches(
    ensemble: Ensemble, dataset: InferenceDataset, row_batches: Iterable[list[int]], workers: int = -1
) -> Iterator[Batch]:
    """Logits of all checkpoints, for one batch of the dataset's rows after the other.

    workers: processes that decode; -1 for what suits the device. UserError with the names of a batch whose logits are
    not finite, and where the device's memory is full.
    """
    on_gpu = ensemble.device.type == "cuda"
    if not (first := next(rest := iter(row_batches), None)):
        return
    batch_bytes = 3 * len(first) * sum(height * width for height, width in ensemble.sizes)
    workers = worker_count(workers, 16, 1, batch_bytes)  # decoding takes a tenth of a small network's time
    rows_left = chain([first], rest)
    loader = DataLoader(dataset, batch_sampler=rows_left, num_workers=workers, collate_fn=collate, pin_memory=on_gpu)
    began = time.monotonic()
    for images, full_sizes, rows in loader:
        decoded = time.monotonic()
        logits = ensemble.predict_logits(images, [dataset.names[row] for row in rows])
        yield Batch(logits, full_sizes, rows, decoded - began, time.monotonic() - decoded)
        began = time.monotonic()


def in_batches(n: int, batch_size: int) -> list[list[int]]:
    """Rows 0 to n - 1, `batch_size` at a time."""
    return [list(range(first, min(first + batch_size, n))) for first in range(0, n, batch_size)]
