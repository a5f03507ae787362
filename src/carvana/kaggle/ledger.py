"""The ledger of submissions: a row for every upload, and what it stands beside."""

import csv
import io
from pathlib import Path

import pandas as pd

from carvana.files import write_text

COLUMNS = ("time", "run", "file", "sha256", "message", "ref", "status", "public_score", "private_score")


def rows(path: Path) -> list[dict]:
    """All rows of a ledger.csv, by column; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def record(path: Path, row: dict) -> None:
    """Add a row, in place of the one with the same ref."""
    text, kept = io.StringIO(), rows(path)
    refs = [old.get("ref") for old in kept]
    at = refs.index(str(row["ref"])) if str(row["ref"]) in refs else len(kept)
    table = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows([*kept[:at], row, *kept[at + 1 :]])
    write_text(path, text.getvalue())


def submitted(submissions_dir: str | Path, file_hash: str) -> dict | None:
    """The row of a file that was uploaded before and not rejected: sending it again would waste a try."""
    found = rows(Path(submissions_dir) / "ledger.csv")
    sent = [row for row in found if row["sha256"] == file_hash and row["status"] != "error"]
    return sent[-1] if sent else None


def beside_runs(submissions_dir: str | Path, runs_dir: str | Path) -> pd.DataFrame:
    """Every upload with the out-of-fold Dice of the run that made it.

    Columns: time, run, out_of_fold (NaN where the run has no scores), public_score, private_score, status, message.
    """
    found = pd.DataFrame(rows(Path(submissions_dir) / "ledger.csv"), columns=COLUMNS)
    found["out_of_fold"] = [_out_of_fold(Path(runs_dir) / run / "scores.csv") if run else None for run in found["run"]]
    return found[["time", "run", "out_of_fold", "public_score", "private_score", "status", "message"]]


def _out_of_fold(path: Path) -> float | None:
    if not path.exists():
        return None
    scores = pd.read_csv(path, usecols=["fold", "dice"])
    return scores.loc[scores["fold"] >= 0, "dice"].mean()
