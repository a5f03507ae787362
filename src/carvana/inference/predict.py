"""Run lengths of all images, in whole shards that processes and machines share and that a kill cannot spoil."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic's demand on Python 3.11

from carvana import rle
from carvana.data.competition import TestSet
from carvana.data.images import Archive, Size
from carvana.device import use_gpu
from carvana.errors import UserError
from carvana.files import fingerprint, read_json, sha256, write_json, write_text
from carvana.inference.ensemble import Ensemble, EnsembleSpec
from carvana.inference.loader import UNDECODED, InferenceDataset, in_batches, predict_batches
from carvana.inference.logits import BlendedLogits, blend
from carvana.parallel import overlapped, progress, sharing

SHARD_SIZE = 512  # images a shard: some seconds on a GPU, a minute on a CPU


class PredictedMask(NamedTuple):
    """Run lengths, area (share of the image) and boundary uncertainty; None for both where nothing could be decoded."""

    rle: str
    area: float | None
    unsure: float | None


class ShardNote(TypedDict):
    """What the json of a shard holds: a value an image of names, areas and boundary uncertainties."""

    key: str
    sha256: str
    names: list[str]
    areas: list[float | None]
    unsure: list[float | None]


@dataclass(frozen=True)
class Shard:
    """A slice of the images, and the files that hold it: a csv of img,rle_mask and a json that vouches for it."""

    path: Path
    rows: range

    def finished(self, key: str) -> bool:
        """Whether the shard is whole and was made with the same checkpoints, tta, threshold and images."""
        try:
            note = read_json(self.path.with_suffix(".json"), ShardNote)
            lengths = {len(note[name]) for name in ("names", "areas", "unsure")}
            return note["key"] == key and lengths == {len(self.rows)} and note["sha256"] == sha256(self.path)
        except (OSError, UserError):  # missing or damaged: it is made anew
            return False

    def write(self, key: str, names: list[str], masks: list[PredictedMask]) -> None:
        """The csv first, then the json that makes it count."""
        texts, areas, unsure = zip(*masks, strict=True)
        write_text(self.path, pd.DataFrame({"img": names, "rle_mask": texts}).to_csv(index=False))
        note = {"key": key, "sha256": sha256(self.path), "names": names, "areas": areas, "unsure": unsure}
        write_json(self.path.with_suffix(".json"), note)

    def table(self) -> pd.DataFrame:
        """Its images: img, area (share of the image), unsure (boundary uncertainty), part (path of the shard)."""
        note = read_json(self.path.with_suffix(".json"))
        facts = {"area": note["areas"], "unsure": note["unsure"]}
        return pd.DataFrame({"img": note["names"], **facts, "part": str(self.path)}).astype(dict.fromkeys(facts, float))


@dataclass(frozen=True)
class Options:
    """How images are predicted; none of it changes a mask.

    workers: processes that decode, -1 for what suits the device. max_hours: stop after the first shard that ends
    later, 0 for no limit. processes: that share the work, each with a device of its own. skip_broken: an image that
    cannot be decoded gets empty run lengths and the area NaN; else it ends the work.
    """

    batch_size: int = 8
    workers: int = -1
    max_hours: float = 0.0
    processes: int = 1
    skip_broken: bool = False
    shard_size: int = SHARD_SIZE


@dataclass(frozen=True)
class Prediction:
    """Everything that decides the run lengths of a test set, and the folder of its shards."""

    spec: EnsembleSpec
    test: TestSet
    folder: Path
    options: Options

    @cached_property
    def key(self) -> str:
        """Changes with what the masks depend on."""
        spec, images = self.spec, self.test.images
        hashes = [sha256(path) for path in spec.checkpoints]
        settings = list(spec.weights), list(spec.tta), spec.threshold
        return fingerprint(hashes, *settings, images.stamp(), self.test.names)

    @cached_property
    def shards(self) -> list[Shard]:
        """Consecutive slices of the images."""
        n, size = len(self.test.names), self.options.shard_size
        rows = [range(first, min(first + size, n)) for first in range(0, n, size)]
        return [Shard(self.folder / f"part-{i:05d}.csv", of_shard) for i, of_shard in enumerate(rows)]


def predict_run_lengths(
    ensemble: Ensemble, test: TestSet, folder: Path, options: Options | None = None
) -> pd.DataFrame:  # fmt: skip
    """Write run lengths of all images to shards in `folder`; computes only those that are missing.

    Shards are shared with every other process that predicts the same into the same folder. Returns a table of the
    finished shards' images, as `Shard.table`; shorter than the test set where max_hours ended before the last shard.
    """
    options = options or Options()
    prediction = Prediction(ensemble.spec, test, folder, options)
    deadline = time.time() + options.max_hours * 3600 if options.max_hours else float("inf")
    folder.mkdir(parents=True, exist_ok=True)
    with _helpers(prediction, deadline):
        _work(prediction, ensemble, deadline)
    tables = [shard.table() for shard in prediction.shards if shard.finished(prediction.key)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["img", "area", "unsure", "part"])


def predict_probabilities(
    ensemble: Ensemble, images: Archive, names: Sequence[str], batch_size: int = 4
) -> Iterator[np.ndarray]:  # fmt: skip
    """Probabilities of car at full size, (H, W) float32 in [0, 1], of a few images to look at."""
    dataset = InferenceDataset(images, list(names), ensemble.sizes)
    for batch in predict_batches(ensemble, dataset, in_batches(len(names), batch_size), workers=0):
        for blended, size in zip(blend(batch.logits, ensemble.spec.weights), batch.full_sizes, strict=True):
            yield blended.probabilities(size)


def _work(prediction: Prediction, ensemble: Ensemble, deadline: float, show: bool = True) -> None:
    """Take shards that nobody works on until none is missing, or the deadline has passed; at least one is done."""
    missing, n = prediction.shards, len(prediction.test.names)
    with progress(None, "predicting", total=n, disable=not show) as bar:
        while True:
            missing = [shard for shard in missing if not shard.finished(prediction.key)]
            bar.update(n - sum(len(shard.rows) for shard in missing) - bar.n)
            claims = Claims(prediction, missing, deadline)
            batches = iter(claims)
            if first := next(batches, None):
                _finish(claims, ensemble, chain([first], batches), bar)
            if time.time() > deadline or claims.count == len(missing):
                return
            time.sleep(0 if claims.count else 1)  # the others are being done elsewhere, unless that process dies


class Claims:
    """Batches of rows of shards that no other process works on; iterating claims shard after shard.

    A claim is a locked file beside the shard, and the lock ends with its process, however that ends.
    """

    def __init__(self, prediction: Prediction, missing: list[Shard], deadline: float):
        self.prediction, self.missing, self.deadline = prediction, missing, deadline
        self.count, self.locks = 0, dict[Shard, FileLock]()  # of this process

    def __iter__(self) -> Iterator[list[int]]:
        """A batch never holds rows of two shards."""
        size = self.prediction.options.batch_size
        for shard in self.missing:
            if self.count and time.time() > self.deadline:
                return
            if self._claim(shard):
                self.count += 1
                yield from (list(shard.rows[first : first + size]) for first in range(0, len(shard.rows), size))

    def _claim(self, shard: Shard) -> bool:
        self.locks[shard] = FileLock(shard.path.with_suffix(".lock"), blocking=False)
        try:
            self.locks[shard].acquire()
        except Timeout:
            return False
        if not shard.finished(self.prediction.key):
            return True
        self.release(shard)  # another process has written it in between
        return False

    def release(self, shard: Shard) -> None:
        """Let go of a shard that is written."""
        self.locks.pop(shard).release()


def _finish(claims: Claims, ensemble: Ensemble, row_batches: Iterable[list[int]], bar: tqdm) -> None:
    """Predict all rows of the batches and write each shard when its last row is encoded."""
    prediction, masks = claims.prediction, []
    for row, mask in overlapped(_encode, _blended(prediction, ensemble, row_batches, bar)):
        masks.append(mask)
        bar.update()
        shard = prediction.shards[row // prediction.options.shard_size]
        if row == shard.rows[-1]:
            shard.write(prediction.key, [prediction.test.names[i] for i in shard.rows], masks)
            claims.release(shard)
            masks = []


def _blended(
    prediction: Prediction, ensemble: Ensemble, row_batches: Iterable[list[int]], bar: tqdm
) -> Iterator[tuple[int, BlendedLogits, Size, float]]:  # fmt: skip
    """What `_encode` takes for each image; the network works on while threads encode what it gave before."""
    options, test, spent, began = prediction.options, prediction.test, Counter[str](), time.monotonic()
    dataset = InferenceDataset(test.images, test.names, ensemble.sizes, options.skip_broken)
    for batch in predict_batches(ensemble, dataset, row_batches, options.workers):
        blended = blend(batch.logits, ensemble.spec.weights)
        for row, logits, size in zip(batch.rows, blended, batch.full_sizes, strict=True):
            yield row, logits, size, ensemble.spec.logit_threshold
        spent.update({"decode": batch.decode_seconds, "network": batch.network_seconds})
        bar.set_postfix_str(_shares(spent, time.monotonic() - began), refresh=False)


def _shares(spent: Counter[str], seconds: float) -> str:
    """Where the time goes; what is neither decoding nor network is waiting for the encoder and the disk."""
    shares = {name: spent[name] / seconds for name in ("decode", "network")}
    return ", ".join(f"{name} {share:.0%}" for name, share in {**shares, "encode": 1 - sum(shares.values())}.items())


def _encode(row: int, logits: BlendedLogits, size: Size, logit_threshold: float) -> tuple[int, PredictedMask]:
    if size == UNDECODED:
        return row, PredictedMask("", None, None)
    edges = logits.edges(size, logit_threshold)
    area = round(int((edges[1::2] - edges[::2]).sum()) / (size[0] * size[1]), 6)
    return row, PredictedMask(rle.from_edges(edges), area, logits.boundary_uncertainty(logit_threshold))


@contextmanager
def _helpers(prediction: Prediction, deadline: float) -> Iterator[None]:
    """Further processes that take shards, each on a GPU of its own where there are several; ended with the work."""
    threads, processes = torch.get_num_threads(), prediction.options.processes
    each = max(1, threads // processes)
    torch.set_num_threads(each)
    spawn = multiprocessing.get_context("spawn").Process
    started = [spawn(target=_help, args=(prediction, number, each, deadline)) for number in range(1, processes)]
    try:
        with sharing(processes):
            for process in started:
                process.start()
            yield
    finally:
        for process in started:
            process.terminate()
            process.join()
        torch.set_num_threads(threads)


def _help(prediction: Prediction, number: int, threads: int, deadline: float) -> None:
    torch.set_num_threads(threads)
    use_gpu(number)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        _work(prediction, Ensemble(prediction.spec), deadline, show=False)
    except UserError:  # the first process meets it as well, and says it
        return
