"""Run lengths of all photographs, in whole parts that processes and machines share and that a kill cannot spoil."""

import fcntl
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import pandas as pd
import torch
from tqdm import tqdm

from carvana import rle
from carvana.data.competition import Archive
from carvana.files import UserError, fingerprint, overlapped, progress, read_json, sha256, write_json, write_text
from carvana.inference.ensemble import BROKEN, Ensemble, Photographs, Size, batched, blend, edges, unsure

PART_SIZE = 512  # pictures a part: some seconds on a GPU, a minute on a CPU


@dataclass
class Part:
    """A slice of the rows, and the files that hold it: a csv of img,rle_mask and a json that vouches for it."""

    path: Path
    rows: range

    def finished(self, key: str) -> bool:
        """Whether the part is whole and was made with the same members, views, threshold and photographs."""
        note = self.path.with_suffix(".json")
        if not (self.path.exists() and note.exists()):
            return False
        found = read_json(note)
        return found["key"] == key and found["sha256"] == sha256(self.path)

    def write(self, key: str, names: list[str], masks: list[tuple[str, float | None, float | None]]) -> None:
        """The csv first, then the json that makes it count.

        masks: run lengths, area and `inference.unsure`; None for both where the photograph could not be decoded.
        """
        texts, areas, unsure = zip(*masks, strict=True)
        write_text(self.path, pd.DataFrame({"img": names, "rle_mask": texts}).to_csv(index=False))
        note = {"key": key, "sha256": sha256(self.path), "names": names, "areas": areas, "unsure": unsure}
        write_json(self.path.with_suffix(".json"), note)

    def table(self) -> pd.DataFrame:
        """Its pictures: img, area (share of the picture), unsure (see inference.unsure), part (path)."""
        note = read_json(self.path.with_suffix(".json"))
        unknown = [None] * len(note["names"])  # a part from before `unsure` was measured stays valid
        facts = {"area": note["areas"], "unsure": note.get("unsure", unknown)}
        return pd.DataFrame({"img": note["names"], **facts, "part": str(self.path)}).astype(dict.fromkeys(facts, float))


@dataclass
class Prediction:
    """Everything that decides the run lengths of `names`, and where their parts are."""

    ensemble: Ensemble
    photos: Archive
    names: list[str]
    folder: Path
    batch_size: int
    skip_broken: bool = False
    part_size: int = PART_SIZE

    def __post_init__(self):
        """Slice the rows into parts, and name what they depend on."""
        chosen = self.ensemble
        members = [sha256(path) for path in chosen.paths], chosen.weights, chosen.views, chosen.threshold
        self.key = fingerprint(*members, self.photos.stamp(), self.names)
        starts = range(0, len(self.names), self.part_size)
        rows = [range(first, min(first + self.part_size, len(self.names))) for first in starts]
        self.parts = [Part(self.folder / f"part-{i:05d}.csv", of_part) for i, of_part in enumerate(rows)]


def predict(
    ensemble: Ensemble, photos: Archive, names: list[str], folder: Path, batch_size: int = 8, workers: int = -1,
    max_hours: float = 0, processes: int = 1, skip_broken: bool = False, part_size: int = PART_SIZE,
) -> pd.DataFrame:  # fmt: skip
    """Write run lengths of all photographs to parts in `folder`; computes only those that are missing.

    Parts are shared with every other process that predicts the same into the same folder, `processes` of which are
    started here. A photograph that cannot be decoded ends the work; with `skip_broken` its run lengths are empty and
    its area is NaN. Returns a table of the finished parts' pictures: img, area (share of the picture), unsure (see
    inference.unsure), part (path); shorter than `names` where `max_hours` ended before the last part.
    """
    prediction = Prediction(ensemble, photos, names, folder, batch_size, skip_broken, part_size)
    deadline = time.time() + max_hours * 3600 if max_hours else float("inf")
    folder.mkdir(parents=True, exist_ok=True)
    with _helpers(prediction, workers, deadline, processes - 1):
        _work(prediction, workers, deadline)
    tables = [part.table() for part in prediction.parts if part.finished(prediction.key)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["img", "area", "unsure", "part"])


def _work(prediction: Prediction, workers: int, deadline: float, show: bool = True) -> None:
    """Take parts that nobody works on until none is missing, or the deadline has passed; at least one part is done."""
    missing = list(enumerate(prediction.parts))
    with (
        (prediction.folder / "claims.lock").open("a") as lock,
        progress(None, "predicting", total=len(prediction.names), disable=not show) as bar,
    ):
        while True:
            missing = [(number, part) for number, part in missing if not part.finished(prediction.key)]
            bar.update(len(prediction.names) - sum(len(part.rows) for _, part in missing) - bar.n)
            claims = _Claims(prediction, missing, lock, deadline)
            batches = iter(claims)
            if first := next(batches, None):
                _finish(prediction, claims, chain([first], batches), workers, bar)
            if time.time() > deadline or len(claims.taken) == len(missing):
                return
            time.sleep(0 if claims.taken else 1)  # the rest is being done elsewhere, unless that process dies


class _Claims:
    """Batches of rows of parts that no other process works on; iterating claims part after part.

    A claim is a lock on one byte of a file, so it ends with the process, however that ends.
    """

    def __init__(self, prediction: Prediction, missing: list[tuple[int, Part]], lock: IO, deadline: float):
        self.prediction, self.missing, self.lock, self.deadline = prediction, missing, lock, deadline
        self.taken: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        """A batch never holds rows of two parts."""
        size = self.prediction.batch_size
        for number, part in self.missing:
            if self.taken and time.time() > self.deadline:
                return
            if self._claim(number, part):
                self.taken.append(number)
                yield from (list(part.rows[first : first + size]) for first in range(0, len(part.rows), size))

    def _claim(self, number: int, part: Part) -> bool:
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        if not part.finished(self.prediction.key):
            return True
        self.release(number)  # another process has written it in between
        return False

    def release(self, number: int) -> None:
        """Let go of a part that is written."""
        fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, number)


def _finish(prediction: Prediction, claims: _Claims, batches: Iterable[list[int]], workers: int, bar: tqdm) -> None:
    """Predict all rows of `batches` and write each part when its last row is encoded."""
    masks, spent, began = [], Counter(), time.monotonic()
    for row, *mask in overlapped(_encode, _blended(prediction, batches, workers, spent)):
        masks.append(mask)
        bar.set_postfix_str(_waits(spent, time.monotonic() - began), refresh=False)
        bar.update()
        number = row // prediction.part_size
        part = prediction.parts[number]
        if row == part.rows[-1]:
            part.write(prediction.key, [prediction.names[i] for i in part.rows], masks)
            claims.release(number)
            masks = []


def _waits(spent: Counter, seconds: float) -> str:
    """Where the time goes; what is neither decoding nor network is waiting for the encoder and the disk."""
    shares = {name: spent[name] / seconds for name in ("decode", "network")}
    return ", ".join(f"{name} {share:.0%}" for name, share in {**shares, "encode": 1 - sum(shares.values())}.items())


def _blended(prediction: Prediction, batches: Iterable[list[int]], workers: int, spent: Counter) -> Iterator[tuple]:
    """What `_encode` takes for each photograph; the network works on while threads encode what it gave before."""
    chosen = prediction.ensemble
    photographs = Photographs(prediction.photos, prediction.names, chosen.sizes, prediction.skip_broken)
    for each, full, rows in batched(chosen, photographs, batches, workers, spent):
        blended = blend(each, chosen.weights)
        for i, row in enumerate(rows):
            yield row, [logits[i] for logits in blended], full[i], chosen.cut


def _encode(
    row: int, blended: list[torch.Tensor], full: Size, cut: float
) -> tuple[int, str, float | None, float | None]:
    if full == BROKEN:
        return row, "", None, None
    found = edges(blended, full, cut)
    area = round(int((found[1::2] - found[::2]).sum()) / (full[0] * full[1]), 6)
    return row, rle.from_edges(found), area, unsure(blended, cut)


@contextmanager
def _helpers(prediction: Prediction, workers: int, deadline: float, n: int) -> Iterator[None]:
    """`n` further processes that take parts, each on a GPU of its own where there are several; ended with the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // (n + 1)))
    context, chosen = multiprocessing.get_context("spawn"), prediction.ensemble
    facts = chosen.paths, chosen.weights, chosen.views, chosen.threshold
    rest = prediction.photos, prediction.names, prediction.folder, prediction.batch_size
    rest = *rest, prediction.skip_broken, prediction.part_size
    started = [
        context.Process(
            target=_help, args=(i + 1, torch.get_num_threads(), facts, rest, workers, deadline), daemon=False
        )
        for i in range(n)
    ]
    try:
        for process in started:
            process.start()
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()
        torch.set_num_threads(threads)


def _help(number: int, threads: int, facts: tuple, rest: tuple, workers: int, deadline: float) -> None:
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    os.environ["TQDM_DISABLE"] = "1"
    try:
        _work(Prediction(Ensemble(*facts), *rest), workers, deadline, show=False)
    except UserError:  # the first process meets it as well, and says it
        return
