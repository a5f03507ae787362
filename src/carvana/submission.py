"""The submission file: put together from parts, checked as the competition would, scored where the truth is known.

Everything streams: a full submission is a gigabyte of text, and no function here holds more than a few rows of it.
"""

import contextlib
import gzip
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from carvana import metrics
from carvana.files import BROKEN, UserError, atomic

HEADER = [b"img", b"rle_mask"]
QUOTED = re.compile(rb'"([^",]*)"(?=,|$)')
LEVEL = 4  # gzip, 100064 masks of 12 KB: 28 s and 494 MB; level 1 takes 15 s and 524 MB, level 6 117 s and 473 MB
EXAMPLES = 3  # offending rows that a problem names
SMALL, LARGE = 0.01, 0.80  # shares of the picture outside which a mask deserves a look

MEANING = {
    "unreadable": "the file cannot be read to its end",
    "header": "the first line must be img,rle_mask",
    "columns": "a row must have two columns, name and run lengths",
    "missing": "names of the sample are missing",
    "extra": "names are not in the sample",
    "duplicate": "names stand there more than once",
    "odd": "run lengths must be pairs of start and length",
    "integer": "run lengths must be whole numbers",
    "positive": "starts and lengths must be 1 or more",
    "outside": "runs end outside the picture",
    "order": "runs overlap or are not sorted",
    "small": f"less than {SMALL:.0%} of the picture is masked",
    "large": f"more than {LARGE:.0%} of the picture is masked",
}
WARNINGS = ("small", "large")  # the kinds that do not make a file invalid


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
    """What `validate` found. mean_area: share of the picture, 0..1, over the rows without a fault."""

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
            f"{self.path}: {self.rows} rows, {self.mean_area:.2%} of the picture masked on average",
            *(f"problem: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            f"{self.path}: {verdict}",
        ]


def assemble(parts: list[Path], names: list[str], path: Path) -> None:
    """Write `parts`, CSV files that are consecutive slices of `names`, as one .gz or .zip; equal rows, equal bytes."""
    path = Path(path)
    if path.suffix.lower() not in (".gz", ".zip"):
        raise UserError(f"{path}: a submission is written compressed. Let its name end with .csv.gz or .zip.")
    with atomic(path) as file, _compressed(file, path) as out:
        out.write(b",".join(HEADER) + b"\n")
        out.writelines(b"%s,%s\n" % (name.encode(), text) for name, text in _in_order(parts, names))


def _in_order(parts: Iterable[Path], names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    expected = iter(names)
    for part in parts:
        for number, name, text in _records(part):
            wanted = next(expected, "nothing")
            if name != wanted:
                place = f"{part}, line {number}"
                raise UserError(f"{place}: expected {wanted}, found {name}. Delete the part and predict again.")
            yield name, text
    if left := next(expected, None):
        raise UserError(f"{left} and {sum(1 for _ in expected)} more pictures are in no part. Predict them first.")


@contextlib.contextmanager
def _compressed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """Neither time nor file name goes into the archive, so equal rows give equal bytes."""
    if path.suffix.lower() == ".gz":
        with gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as out:
            yield out
        return
    member = path.name[:-4].removesuffix(".csv") + ".csv"
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL)
    with archive, archive.open(member, "w", force_zip64=True) as out:  # 100064 ragged masks may pass 2 GB of text
        yield out


def validate(path: str | Path, sample: str | Path | list[str], height: int = 1280, width: int = 1918) -> Validation:
    """Check a submission (plain, .gz or .zip) against the names wanted and pictures of (height, width) pixels.

    sample: a csv in the submission's form, or the names themselves.

    All faults are collected in one pass. UserError only where the sample cannot be used.
    """
    names = sample if isinstance(sample, list) else (name for _, name, _ in _records(sample))
    seen = dict.fromkeys(names, False)
    found, shares, rows, size = _Findings(), [], 0, height * width
    try:
        for rows, (number, fields) in enumerate(_body(path, seen, found), 1):  # noqa: B007 (its last value is used)
            name = _text(fields[0])
            place = f"line {number} ({name})"
            if seen.get(name, True):
                found.add("duplicate" if name in seen else "extra", place)
            seen[name] = True
            if (area := _check_row(fields, place, size, found)) is not None:
                shares.append(area / size)
                if not SMALL <= shares[-1] <= LARGE:
                    found.add("small" if shares[-1] < SMALL else "large", f"{place}: {shares[-1]:.2%}")
        for name in (name for name, done in seen.items() if not done):
            found.add("missing", name)
    except UserError as error:  # the names after the break cannot be judged
        found.add("unreadable", str(error))
    warnings = [found.pop(kind) for kind in WARNINGS if kind in found]
    return Validation(str(path), rows, list(found.values()), warnings, sum(shares) / max(1, len(shares)))


class _Findings(dict):
    """Kind -> Problem, in the order of discovery."""

    def add(self, kind: str, place: str) -> None:
        problem = self.setdefault(kind, Problem(kind))
        problem.count += 1
        if len(problem.examples) < EXAMPLES:
            problem.examples.append(place)


def _body(path: str | Path, names: dict, found: _Findings) -> Iterator[tuple[int, list[bytes]]]:
    """Rows under the header; where the header was forgotten, the first row too."""
    table = _table(path)
    number, fields = next(table, (1, [b""]))
    if fields != HEADER:
        found.add("header", f"line {number}: {_text(b','.join(fields))[:60]!r}")
        if _text(fields[0]) in names:
            yield number, fields
    yield from table


def _check_row(fields: list[bytes], place: str, size: int, found: _Findings) -> int | None:
    """Masked pixels of a row; None where something is wrong with it, which goes to `found`."""
    if len(fields) != 2:
        return found.add("columns", f"{place}: {len(fields)} columns")
    try:
        values = _numbers(fields[1])
    except ValueError as error:
        odd = [("odd", f"{count} values")] if (count := len(fields[1].split())) % 2 else []
        faults = [*odd, ("integer", str(error))]
    else:
        faults = list(_faults(values, size))
    for kind, detail in faults:
        found.add(kind, f"{place}: {detail}")
    return None if faults else int(values[1::2].sum())


def _faults(values: np.ndarray, size: int) -> Iterator[tuple[str, str]]:
    """Kind and detail of what is wrong with run lengths, (n,) int64, in a picture of `size` pixels."""
    if values.size % 2:
        yield "odd", f"{values.size} values"
    starts, lengths = values[: values.size // 2 * 2 : 2], values[1::2]
    checks = {
        "positive": (starts < 1) | (lengths < 1),
        "outside": (starts > size) | (lengths > size - starts + 1),
        "order": starts[1:] < (starts + lengths)[:-1],
    }
    for kind, wrong in checks.items():
        if wrong.any():
            at = int(wrong.argmax()) + (kind == "order")  # of two that overlap, the later one
            yield kind, f"run {starts[at]} {lengths[at]}"


def score(path: str | Path, truth: str | Path) -> pd.DataFrame:
    """Dice and IoU of every row, in the order of the file: columns img, dice, iou (0..1; two empty masks count 1).

    Works on run lengths alone. UserError where names differ from the truth's or a row is broken.
    """
    rows = []
    for place, name, ours, theirs in _matched(path, truth):
        try:
            common, a, b = overlap(_text(ours), _text(theirs))
        except ValueError as error:
            raise UserError(f"{place} ({name}): {error}. `carvana validate` shows all such rows.") from error
        rows.append((name, float(metrics.dice(common, a, b)), float(metrics.iou(common, a, b))))
    return pd.DataFrame(rows, columns=["img", "dice", "iou"])


def overlap(a_text: str, b_text: str) -> tuple[int, int, int]:
    """Pixels in both masks, in the first, in the second. ValueError where runs are not sorted pairs without overlap."""
    a, b = _edges(a_text), _edges(b_text)
    covered = np.cumsum(np.diff(b, prepend=0) * (np.arange(b.size) % 2))  # masked pixels of b before each of its edges
    areas = int((a[1::2] - a[::2]).sum()), int((b[1::2] - b[::2]).sum())
    if not all(areas):
        return 0, *areas
    until = np.interp(a, b, covered)  # exact: slopes are 0 and 1, and pixel numbers fit a float
    return int((until[1::2] - until[::2]).sum()), *areas


def _edges(text: str) -> np.ndarray:
    """Where runs start and have ended, (2n,) int64, from 0."""
    values = _numbers(text.encode())
    if fault := next(_faults(values, 1 << 40), None):
        raise ValueError(f"{MEANING[fault[0]]} ({fault[1]})")
    return np.stack([values[::2] - 1, values[::2] - 1 + values[1::2]], axis=1).reshape(-1)


def _matched(path: str | Path, truth: str | Path) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Rows with the same name; where both files have the same order, no more than one row of the truth is held."""
    ahead, rest, extra = {}, _records(truth), []
    for number, name, ours in _records(path):
        while name not in ahead and (row := next(rest, None)):
            ahead[row[1]] = row[2]
        if name in ahead:
            yield f"{path}, line {number}", name, ours, ahead.pop(name)
        else:
            extra.append(name)
    missing = [*ahead, *(name for _, name, _ in rest)]
    for what, names in (("missing", missing), ("not in the truth, or twice", extra)):
        if names:
            listed = ", ".join(names[:EXAMPLES])
            raise UserError(f"{path}: {len(names)} names of {truth} are {what}: {listed}. Score the same pictures.")


def _numbers(text: bytes) -> np.ndarray:
    """The whole numbers of a text, (n,) int64, huge ones as the largest int64; ValueError names what is none."""
    if text.translate(None, b"0123456789 "):
        tokens = text.split()
        if wrong := next((token for token in tokens if not re.fullmatch(rb"-?\d+", token)), None):
            raise ValueError(f"{_text(wrong)[:30]!r} is not a whole number")
        text = b" ".join(tokens)
    text = text.strip()
    return np.fromstring(text, np.int64, sep=" ") if text else np.empty(0, np.int64)  # 4 times as fast as split


def _records(path: str | Path) -> Iterator[tuple[int, str, bytes]]:
    """Line number, name and run lengths of each row; UserError unless every row has the two columns of the header."""
    for number, fields in _table(path):
        if len(fields) != 2 or (number == 1 and fields != HEADER):
            raise UserError(f"{path}, line {number}: two columns, img,rle_mask, are expected. Write the file again.")
        if number > 1:
            yield number, _text(fields[0]), fields[1]


def _table(path: str | Path) -> Iterator[tuple[int, list[bytes]]]:
    """Line number, from 1, and fields of every line that is not blank."""
    try:
        with _open(Path(path)) as file:
            if file.peek(2)[:2] in (b"\x1f\x8b", b"PK"):
                raise OSError("it is compressed in a way that its name, .gz or .zip, does not say")
            for number, line in enumerate(file, 1):
                if line := line.rstrip(b"\r\n"):
                    yield number, QUOTED.sub(rb"\1", line).split(b",") if b'"' in line else line.split(b",")
    except BROKEN as error:
        raise UserError(f"{path} cannot be read: {error}. Write or download it again.") from error


def _open(path: Path) -> io.BufferedReader:
    reader = {".gz": gzip.open, ".zip": _member}.get(path.suffix.lower(), Path.open)
    return io.BufferedReader(reader(path, "rb"), 1 << 20)


def _member(path: Path, mode: str) -> BinaryIO:
    archive = zipfile.ZipFile(path, mode[0])
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX") and not name.endswith("/")]
    if len(names) != 1:
        raise zipfile.BadZipFile(f"one CSV is expected inside, found {len(names)} files")
    return archive.open(names[0])


def _text(text: bytes) -> str:
    return text.decode("utf-8", "replace")
