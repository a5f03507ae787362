"""The submission file: put together from shards, checked as the competition would, scored where the truth is known.

Everything streams: a full submission is a gigabyte of text, and no function here holds more than a few rows of it.
"""

import gzip
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd

from carvana import metrics, rle
from carvana.errors import UserError, printable
from carvana.files import UNREADABLE, atomic

HEADER = [b"img", b"rle_mask"]
QUOTED = re.compile(rb'(?<![^,])"([^",]*)"(?![^,])')  # a whole field; any other quote belongs to the text
LONGEST = 1 << 26  # bytes of a line: full-size masks of single pixels take 12 MB
LEVEL = 4  # gzip, 100064 masks of 12 KB: 28 s and 494 MB; level 1 takes 15 s and 524 MB, level 6 117 s and 473 MB
EXAMPLES = 3  # offending rows that a problem names
SMALL, LARGE = 0.01, 0.80  # shares of the image outside which a mask deserves a look

MEANING = rle.FAULTS | {
    "unreadable": "the file cannot be read to its end",
    "header": "the first line must be img,rle_mask",
    "columns": "a row must have two columns, name and run lengths",
    "missing": "names of the sample are missing",
    "extra": "names are not in the sample",
    "duplicate": "names stand there more than once",
    "small": f"less than {SMALL:.0%} of the image is masked",
    "large": f"more than {LARGE:.0%} of the image is masked",
}
WARNINGS = ("small", "large")  # the kinds that do not make a file invalid


@dataclass(frozen=True)
class Expected:
    """What a submission must contain: the names of a csv in its form, or of a list, and masks of height x width.

    size_of: height and width of an image by its name, where they differ; (0, 0) where there is none to decode, so that
    its row must be empty.
    """

    sample: str | Path | list[str]
    height: int = 1280
    width: int = 1918
    size_of: Callable[[str], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no image has."""
        for name in ("height", "width"):
            if not 1 <= getattr(self, name) <= 65535:
                raise UserError(f"{name} is {str(getattr(self, name))[:30]}, but must be 1 to 65535 pixels.")

    def pixels(self, name: str) -> int:
        """Of an image."""
        height, width = self.size_of(name) if self.size_of else (self.height, self.width)
        return height * width


@dataclass
class Problem:
    """One kind of fault: a key of `MEANING`, how often it occurs, and the first places as text."""

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for people."""
        return f"{MEANING[self.kind]}: {self.count} x, first at {'; '.join(self.examples)}"


@dataclass
class Validation:
    """What `validate` says of a file. mean_area: share of the image, 0..1, over the rows without a fault."""

    path: str
    rows: int
    problems: list[Problem]
    warnings: list[Problem]
    mean_area: float

    @property
    def ok(self) -> bool:
        """Whether the competition would take the file; warnings do not count."""
        return not self.problems

    def lines(self) -> list[str]:
        """The lines that the command line prints; the last one is the verdict."""
        verdict = "valid" if self.ok else f"not valid, {len(self.problems)} kind(s) of problems"
        return [
            f"{self.path}: {self.rows} rows, {self.mean_area:.2%} of the image masked on average",
            *(f"problem: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            f"{self.path}: {verdict}",
        ]


def assemble(shards: list[Path], names: list[str], path: Path) -> None:
    """Write `shards`, CSV files that are consecutive slices of `names`, as one .csv.gz; equal rows, equal bytes."""
    with atomic(path) as file, gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as out:  # without a file's name or time
        out.write(b",".join(HEADER) + b"\n")
        out.writelines(b"%s,%s\n" % (record.name.encode(), record.runs) for record in _in_order(shards, names))


class _Record(NamedTuple):
    line: int  # from 1
    name: str
    runs: bytes


def _in_order(shards: Iterable[Path], names: Iterable[str]) -> Iterator[_Record]:
    expected = iter(names)
    for shard in shards:
        for record in _records(shard):
            wanted = next(expected, "nothing")
            if record.name != wanted:
                place = f"{shard}, line {record.line}"
                raise UserError(f"{place}: expected {wanted}, found {record.name}. Delete the shard and predict again.")
            yield record
    if left := next(expected, None):
        raise UserError(f"{left} and {sum(1 for _ in expected)} more images are in no shard. Predict them first.")


def validate(path: str | Path, expected: Expected) -> Validation:
    """Check a submission (plain, .gz or .zip) against what it must contain.

    All faults are collected in one pass. UserError only where the sample cannot be used.
    """
    sample = expected.sample
    names = sample if isinstance(sample, list) else (record.name for record in _records(sample))
    seen, problems, rows = dict.fromkeys(names, False), _Problems(), 0
    shares: list[float] = []
    if not seen:
        raise UserError(f"sample {sample or ''} names no image. Give the competition's sample_submission.csv.")
    try:
        for rows, (number, fields) in enumerate(_body(path, seen, problems), 1):  # noqa: B007 (its last value is used)
            name = _text(fields[0])
            place = f"line {number} ({name})"
            if seen.get(name, True):
                problems.add("duplicate" if name in seen else "extra", place)
            seen[name] = True
            size = expected.pixels(name)
            if (area := _check_row(fields, place, size, problems)) is not None:
                shares.append(area / max(1, size))
                if not SMALL <= shares[-1] <= LARGE:
                    problems.add("small" if shares[-1] < SMALL else "large", f"{place}: {shares[-1]:.2%}")
        for name in (name for name, done in seen.items() if not done):
            problems.add("missing", name)
    except UserError as error:  # the names after the break cannot be judged
        problems.add("unreadable", str(error))
    warnings = [problems.pop(kind) for kind in WARNINGS if kind in problems]
    return Validation(str(path), rows, [*problems.values()], warnings, sum(shares) / max(1, len(shares)))


class _Problems(dict[str, Problem]):
    """Kind -> Problem, in the order of discovery."""

    def add(self, kind: str, place: str) -> None:
        problem = self.setdefault(kind, Problem(kind))
        problem.count += 1
        if len(problem.examples) < EXAMPLES:
            problem.examples.append(printable(place))


def _body(path: str | Path, names: dict[str, bool], problems: _Problems) -> Iterator[tuple[int, list[bytes]]]:
    """Rows under the header; where the header was forgotten, the first row too."""
    table = _table(path)
    number, fields = next(table, (1, [b""]))
    if fields != HEADER:
        problems.add("header", f"line {number}: {_text(b','.join(fields))[:60]!r}")
        if _text(fields[0]) in names:
            yield number, fields
    yield from table


def _check_row(fields: list[bytes], place: str, size: int, problems: _Problems) -> int | None:
    """Masked pixels of a row; None where something is wrong with it, which goes to `problems`."""
    if len(fields) != 2:
        problems.add("columns", f"{place}: {len(fields)} columns")
        return None
    numbers, faults = np.empty(0, np.int64), []
    try:
        numbers = rle.parse(fields[1])
        faults = list(rle.faults(numbers, size))
    except ValueError as error:
        if (count := len(fields[1].split())) % 2:
            faults = [rle.Fault("odd", f"{count} values")]
        faults.append(rle.Fault("integer", str(error)))
    for fault in faults:
        problems.add(fault.kind, f"{place}: {fault.detail}")
    return None if faults else int(numbers[1::2].sum())


def score(path: str | Path, truth: str | Path) -> pd.DataFrame:
    """Dice and IoU of every row, in the order of the file: columns img, dice, iou (0..1; two empty masks count 1).

    Works on run lengths alone. UserError where names differ from the truth's or a row is broken.
    """
    names, counts = [], []
    for record, true in _matched(path, truth):
        try:
            counts.append(rle.overlap(_text(record.runs), _text(true)))
        except ValueError as error:
            place = f"{path}, line {record.line} ({record.name})"
            raise UserError(f"{place}: {error}. `carvana validate` shows all such rows.") from error
        names.append(record.name)
    if not names:
        raise UserError(f"{path} has no rows, so there is nothing to score. Write or download it again.")
    pixels = metrics.PixelCounts(*np.array(counts, np.int64).reshape(-1, 3).T)
    return pd.DataFrame({"img": names, "dice": metrics.dice(pixels), "iou": metrics.iou(pixels)})


def _matched(path: str | Path, truth: str | Path) -> Iterator[tuple[_Record, bytes]]:
    """Rows with the true run lengths; where both files have the same order, no more than one of the truth is held."""
    ahead: dict[str, bytes] = {}
    true, extra = _records(truth), []
    for record in _records(path):
        while record.name not in ahead and (other := next(true, None)):
            ahead[other.name] = other.runs
        if record.name in ahead:
            yield record, ahead.pop(record.name)
        else:
            extra.append(record.name)
    missing = [*ahead, *(record.name for record in true)]
    for what, names in (("missing", missing), ("not in the truth, or twice", extra)):
        if names:
            first = ", ".join(names[:EXAMPLES])
            raise UserError(f"{path}: {len(names)} names of {truth} are {what}: {first}. Score the same images.")


def _records(path: str | Path) -> Iterator[_Record]:
    """Each row; UserError unless every one has the two columns of the header."""
    for number, fields in _table(path):
        if len(fields) != 2 or (number == 1 and fields != HEADER):
            raise UserError(f"{path}, line {number}: two columns, img,rle_mask, are expected. Write the file again.")
        if number > 1:
            yield _Record(number, _text(fields[0]), fields[1])


def _table(path: str | Path) -> Iterator[tuple[int, list[bytes]]]:
    """Line number, from 1, and fields of every line that is not blank."""
    try:
        with _open(Path(path)) as file:
            if file.peek(2)[:2] in (b"\x1f\x8b", b"PK"):
                raise OSError("it is compressed in a way that its name, .gz or .zip, does not say")
            for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
                if len(line) == LONGEST:
                    raise OSError(f"line {number} is longer than {LONGEST >> 20} MB")
                if line := line.removesuffix(b"\n").removesuffix(b"\r"):
                    yield number, QUOTED.sub(rb"\1", line).split(b",") if b'"' in line else line.split(b",")
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}. Write or download it again.") from error


def _open(path: Path) -> io.BufferedReader:
    if path.exists() and not path.is_file():
        raise OSError("it is a folder or a device, not a file")
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path), 1 << 20)
    return io.BufferedReader(_member(path) if path.suffix.lower() == ".zip" else path.open("rb", 0), 1 << 20)


def _member(path: Path) -> zipfile.ZipExtFile:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX") and not name.endswith("/")]
    if len(names) != 1:
        raise zipfile.BadZipFile(f"one CSV is expected inside, found {len(names)} files")
    return cast(zipfile.ZipExtFile, archive.open(names[0]))


def _text(text: bytes) -> str:
    return text.decode("utf-8", "replace")
