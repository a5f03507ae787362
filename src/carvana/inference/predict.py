"""Run lengths of all images, in whole shards that are dealt to processes and that a kill cannot spoil.

`python -m carvana.inference.predict` is one of several processes.
"""

import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from accelerate import PartialState
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic's demand on Python 3.11

from carvana import device, rle
from carvana.data.competition import TestSet
from carvana.data.images import Archive, Size
from carvana.errors import UserError
from carvana.files import atomic, fingerprint, locked, read_json, sha256, write_json, write_text
from carvana.inference.ensemble import Ensemble, EnsembleSpec
from carvana.inference.loader import UNDECODED, InferenceDataset, in_batches, predict_batches
from carvana.inference.logits import BlendedLogits, blend
from carvana.parallel import ALONE, Processes, exit_code, launch, overlapped, progress
from carvana.run import ENSEMBLE, read_csv

SHARD_SIZE = 512  # images a shard: half a minute on a GPU, minutes on a CPU


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

    def finished(self, key: str, skip_broken: bool) -> bool:
        """Whether the shard is whole and was made with the same checkpoints, tta, threshold and images.

        One with images that could not be decoded counts where these may be skipped.
        """
        try:
            note = read_json(self.path.with_suffix(".json"), ShardNote)
            lengths = {len(note[name]) for name in ("names", "areas", "unsure")}
            whole = lengths == {len(self.rows)} and (skip_broken or None not in note["areas"])
            return whole and note["key"] == key and note["sha256"] == sha256(self.path)
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
    """How images are predicted; none of it changes the mask of an image that can be decoded.

    workers: processes that decode, -1 for what suits the device. max_hours: stop after the first shard that ends
    later, 0 for no limit. processes: that share the work, each with a device of its own. skip_broken: an image that
    cannot be decoded gets empty run lengths and the area NaN; else it ends the work.
    """

    batch_size: int = 8
    workers: int = -1
    max_hours: float = 0.0
    processes: Processes = ALONE
    skip_broken: bool = False
    shard_size: int = SHARD_SIZE


@dataclass(frozen=True)
class Prediction:
    """Everything that decides the run lengths of a test set, and the folder of its shards.

    key: changes with what the masks depend on.
    """

    spec: EnsembleSpec
    test: TestSet
    folder: Path
    options: Options
    key: str

    @classmethod
    def of(cls, spec: EnsembleSpec, test: TestSet, folder: Path, options: Options) -> "Prediction":
        """With its key, for which checkpoints and images are read."""
        hashes = [sha256(path) for path in spec.checkpoints]
        settings = list(spec.weights), list(spec.tta), spec.threshold
        return cls(spec, test, folder, options, fingerprint(hashes, *settings, test.images.stamp(test.names)))

    def write_plan(self) -> None:
        """Write what `read_plan` reads in another process."""
        facts = {"options": asdict(self.options), "key": self.key, "names": self.test.names}
        self.spec.write(self.folder / "ensemble.json")
        write_json(self.folder / "plan.json", facts | {"images": str(self.test.images.path.absolute())})

    @classmethod
    def read_plan(cls, folder: Path) -> "Prediction":
        """The prediction into `folder` that another process has planned."""
        plan: dict[str, Any] = read_json(folder / "plan.json", dict[str, Any])
        spec, images = EnsembleSpec.read(folder / "ensemble.json"), Archive(plan["images"], ".jpg")
        options = Options(**plan["options"] | {"processes": Processes(**plan["options"]["processes"])})
        return cls(spec, TestSet(images, plan["names"]), folder, options, plan["key"])

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

    Returns a table of the finished shards' images, as `Shard.table`; shorter than the test set where max_hours ended
    before the last shard. Another process that predicts into the same folder is waited for, unless both are machines
    of one accelerate_config.
    """
    options = options or Options()
    prediction = Prediction.of(ensemble.spec, test, folder, options)
    with nullcontext() if options.processes.config else locked(folder / "prediction.lock", "the prediction"):
        if options.processes.count > 1:
            prediction.write_plan()
            launch("carvana.inference.predict", [folder], options.processes)
        else:
            _work(prediction, ensemble)
    finished = [shard for shard in prediction.shards if shard.finished(prediction.key, options.skip_broken)]
    tables = [shard.table() for shard in finished]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["img", "area", "unsure", "part"])


def predict_probabilities(
    ensemble: Ensemble, images: Archive, names: Sequence[str], batch_size: int = 4
) -> Iterator[np.ndarray]:  # fmt: skip
    """Probabilities of car at full size, (H, W) float32 in [0, 1], of a few images to look at."""
    dataset = InferenceDataset(images, list(names), ensemble.sizes)
    for batch in predict_batches(ensemble, dataset, in_batches(len(names), batch_size), workers=0):
        for blended, size in zip(blend(batch.logits, ensemble.spec.weights), batch.full_sizes, strict=True):
            yield blended.probabilities(size)


def surest(predicted: pd.DataFrame, share: float) -> pd.DataFrame:
    """Columns img and unsure of `share` of all images, one at least: those with the surest edges, if they have any."""
    edged = predicted[predicted["area"].between(0, 1, inclusive="neither")]
    return edged.nsmallest(max(1, round(share * len(predicted))), "unsure")[["img", "unsure"]]


def keep_soft_masks(ensemble: Ensemble, images: Archive, labels: pd.DataFrame, index: Path, options: Options) -> None:
    """Write a PNG for each image of `labels` (img, unsure, test_dir), then the csv `index`, which vouches for them.

    `data.dataset.PseudoSamples` reads them. Nothing is predicted where they are there; else by this process alone.
    """
    test, n, crcs = TestSet(images, labels["img"].tolist()), len(labels), []
    prediction = Prediction.of(ensemble.spec, test, index.parent, options)
    labels = labels.assign(key=fingerprint(prediction.key, labels["test_dir"].tolist()))
    with locked(index.parent.with_suffix(".lock"), "the soft masks"):
        with suppress(UserError):  # not there, or damaged
            if read_csv(index, "key")["key"].tolist() == labels["key"].tolist():
                return
        shutil.rmtree(index.parent, ignore_errors=True)
        with progress(None, "keeping", total=n) as bar:
            for row, logits, size, _ in _blended(prediction, ensemble, in_batches(n, options.batch_size), bar):
                png = cv2.imencode(".png", logits.soft_mask(size))[1].tobytes()
                with atomic(index.parent / f"{test.names[row]}.png") as file:
                    file.write(png)
                crcs.append(zlib.crc32(png, zlib.crc32(images.read(test.names[row])) ^ n))
                bar.update()
        ensemble.spec.write(index.with_name(ENSEMBLE))  # whose cars must not be held out by who learns from them
        write_text(index, labels.assign(crc32=crcs).to_csv(index=False))


def _work(prediction: Prediction, ensemble: Ensemble) -> None:
    """Write the missing ones of this process's shards until max_hours are over; at least one is done."""
    options, rank = prediction.options, device.rank()
    dealt = prediction.shards[rank :: options.processes.count]
    missing = [shard for shard in dealt if not shard.finished(prediction.key, options.skip_broken)]
    ends = time.monotonic() + options.max_hours * 3600 if options.max_hours else float("inf")
    n, left = (sum(len(shard.rows) for shard in shards) for shards in (dealt, missing))
    with progress(None, "predicting", total=n, initial=n - left, disable=rank > 0) as bar:
        _finish(prediction, ensemble, _in_time(missing, options.batch_size, ends), bar)


def _in_time(shards: list[Shard], batch_size: int, ends: float) -> Iterator[list[int]]:
    """Batches of the rows of one shard after the other, none of two shards, until a shard would begin too late."""
    for shard in shards:
        if shard is not shards[0] and time.monotonic() > ends:
            return
        yield from (list(shard.rows[first : first + batch_size]) for first in range(0, len(shard.rows), batch_size))


def _finish(prediction: Prediction, ensemble: Ensemble, row_batches: Iterable[list[int]], bar: tqdm) -> None:
    """Predict all rows of the batches and write each shard when its last row is encoded."""
    masks = []
    for row, mask in overlapped(_encode, _blended(prediction, ensemble, row_batches, bar)):
        masks.append(mask)
        bar.update()
        shard = prediction.shards[row // prediction.options.shard_size]
        if row == shard.rows[-1]:
            shard.write(prediction.key, [prediction.test.names[i] for i in shard.rows], masks)
            masks = []


def _blended(
    prediction: Prediction, ensemble: Ensemble, row_batches: Iterable[list[int]], bar: tqdm
) -> Iterator[tuple[int, BlendedLogits, Size, float]]:  # fmt: skip
    """What `_encode` takes for each image; the network works on while threads encode what it gave before."""
    options, test, spent, began = prediction.options, prediction.test, np.zeros(2), time.monotonic()
    dataset = InferenceDataset(test.images, test.names, ensemble.sizes, options.skip_broken)
    for batch in predict_batches(ensemble, dataset, row_batches, options.workers):
        blended = blend(batch.logits, ensemble.spec.weights)
        for row, logits, size in zip(batch.rows, blended, batch.full_sizes, strict=True):
            yield row, logits, size, ensemble.spec.logit_threshold
        spent += batch.decode_seconds, batch.network_seconds
        decode, network = spent / (time.monotonic() - began)
        encode = 1 - (decode + network)  # waiting for the encoder and the disk
        bar.set_postfix_str(f"decode {decode:.0%}, network {network:.0%}, encode {encode:.0%}", refresh=False)


def _encode(row: int, logits: BlendedLogits, size: Size, logit_threshold: float) -> tuple[int, PredictedMask]:
    if size == UNDECODED:
        return row, PredictedMask("", None, None)
    edges = logits.edges(size, logit_threshold)
    area = round(int((edges[1::2] - edges[::2]).sum()) / (size[0] * size[1]), 6)
    return row, PredictedMask(rle.from_edges(edges), area, logits.boundary_uncertainty(logit_threshold))


def main(folder: str) -> None:
    """Predict the shards of a planned prediction that fall to this one of its processes, then wait for the others."""
    group = PartialState(cpu=True, timeout=timedelta(days=30))  # no device is needed to wait
    device.use_gpu(group.local_process_index)
    prediction = Prediction.read_plan(Path(folder))
    _work(prediction, Ensemble(prediction.spec))
    group.wait_for_everyone()
    group.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1])))
