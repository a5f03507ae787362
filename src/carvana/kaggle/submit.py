"""A submission on its way: checked, confirmed, uploaded once, waited for, and kept in the ledger of submissions."""

import contextlib
import csv
import io
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from carvana.errors import UserError
from carvana.files import sha256, write_text
from carvana.kaggle.client import COMPETITION, PAGE, call, refusal, scrub, sign_in, status_of, with_retries
from carvana.kaggle.upload import Upload
from carvana.run import Run
from carvana.submission import Expected, Validation, validate

POLL = 10  # seconds between two looks at a submission that is not scored yet
COLUMNS = ("time", "run", "file", "sha256", "message", "ref", "status", "public_score", "private_score")
Row = dict[str, Any]  # of the ledger, by COLUMNS


@dataclass(frozen=True)
class Entry:
    """What is sent to Kaggle: a file, the description there, and the name of the run that made it ("" unknown)."""

    path: Path
    message: str
    run_name: str = ""


def submit(
    entry: Entry, expected: Expected, submissions_dir: Path, yes: bool = False, wait_minutes: float = 10
) -> Row:  # fmt: skip
    """Validate, ask (unless `yes`), upload once, wait for the score; returns the row of `submissions_dir`/ledger.csv.

    A file that the ledger holds already is not sent again: that would waste a try. UserError where the file is not
    valid, Kaggle refuses or rejects it, or nobody is there to confirm.
    """
    path, ledger = entry.path, submissions_dir / "ledger.csv"
    validation = validate(path, expected)
    if not validation.ok:
        raise UserError(f"{path} is not uploaded. {validation.problems[0]}.")
    file_hash = sha256(path)
    if earlier := _earlier_row(ledger, file_hash):
        print(f"{path}: the same file is submission {earlier['ref']} already, so it is not sent again ({ledger})")
        return earlier
    api, upload = sign_in(), Upload(path)
    ref = upload.resumed and getattr(_listed_entry(api, upload.mark), "ref", 0)
    if not ref:
        _confirm(api, entry, file_hash, validation, yes)
    description = f"{entry.message} [{upload.mark}]"
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": entry.run_name, "file": path.name}
    row |= {"sha256": file_hash, "message": description, "ref": ref or _upload(api, upload, description)}
    row |= {"status": "pending", "public_score": "", "private_score": ""}
    _record(ledger, row)  # before the wait: a killed run must not lose it
    upload.done()
    reason = _wait(api, upload.mark, row, time.monotonic() + 60 * wait_minutes)
    _record(ledger, row)
    if row["status"] == "error":
        raise UserError(f"{path}: Kaggle rejected submission {row['ref']}: {scrub(reason)}. Mend the file first.")
    scores = f"public {row['public_score'] or '-'}, private {row['private_score'] or '-'}"
    print(f"{path}: submission {row['ref']} is {row['status']}, {scores} ({ledger})")
    return row


def _confirm(api: Any, entry: Entry, file_hash: str, validation: Validation, yes: bool) -> None:
    path, left = entry.path, _allowed(api)
    if left == 0:
        raise UserError(f"{path} is not uploaded: no submission is left today. The limit ends at midnight UTC.")
    print(*validation.lines(), sep="\n")
    origin = f"of run {entry.run_name or '-'}, {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    print(f"{path}: {origin}, {path.stat().st_size / 1e6:.1f} MB, sha256 {file_hash[:12]}")
    print(f"{path}: submissions left today: {'unknown' if left is None else left}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{path} is not uploaded: nobody is there to confirm. Say yes in advance (yes=True, --yes).")
    if input("Upload it to Kaggle? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(f"{path} is not uploaded: not confirmed. Answer y to upload it.")


def _allowed(api: Any) -> int | None:
    """Submissions left today; None where unknown, also for a team without any: the service says 0 then."""
    with contextlib.suppress(UserError, AttributeError):
        limits = with_retries("The daily limit", api.competition_get_submission_limits, COMPETITION)
        return limits.num_allowed_now if limits.num_allowed_now or limits.num_today else None
    return None


def _upload(api: Any, upload: Upload, description: str) -> int:
    """Number of the submission. Submits once: whether a lost answer was a success is looked up under the mark."""
    token = upload.send(lambda: start_upload(api, upload.path))
    try:
        fields = {"competition_name": COMPETITION, "blob_file_tokens": token, "submission_description": description}
        answer = call(api, "competitions", "create_submission", **fields)
        ref, said = answer.ref, answer.message or "no reason given"  # a refusal looks like a success, without ref
    except Exception as error:
        if 400 <= status_of(error) < 500:
            upload.done()
            raise refusal(error, f"Submission of {upload.path}") from None
        ref, said = 0, str(error)
    for seconds in (0, 2, 4):  # the list may be a little late
        if not ref:
            time.sleep(seconds)
            ref = getattr(_listed_entry(api, upload.mark), "ref", 0)
    if not ref:
        upload.done()
        look = f"Look for [{upload.mark}] at {PAGE}/submissions."
        raise UserError(f"{upload.path}: Kaggle did not take it ({scrub(said)}). {look}")
    return int(ref)


def start_upload(api: Any, path: Path) -> tuple[str, str]:
    """Token of a new upload and the address that takes it."""
    stat = path.stat()
    fields = {"content_length": stat.st_size, "last_modified_epoch_seconds": int(stat.st_mtime)}
    fields |= {"competition_name": COMPETITION, "file_name": path.name}
    answer = with_retries(f"Upload of {path}", call, api, "competitions", "start_submission_upload", **fields)
    return answer.token, answer.create_url


def _listed_entry(api: Any, mark: str) -> Any:
    """Kaggle's own entry of the upload with this mark, None where its list has none."""
    what = f"Whether [{mark}] has arrived at {PAGE}/submissions is unknown"
    listed = with_retries(what, api.competition_submissions, COMPETITION)
    return next((entry for entry in listed or [] if entry and mark in (entry.description or "")), None)


def _wait(api: Any, mark: str, row: Row, deadline: float) -> str:
    """Look until scored, rejected or `deadline`; fills status and scores of `row`, returns Kaggle's reason."""
    while True:
        with contextlib.suppress(UserError):  # the submission stands, whatever happens to the look
            if entry := _listed_entry(api, mark):
                row |= _result(entry)
                if row["status"] != "pending":
                    return entry.error_description or ""
        if time.monotonic() >= deadline:
            return ""
        time.sleep(POLL)


def _result(entry: Any) -> Row:
    """Status and scores of an entry of Kaggle's list, as the ledger writes them."""
    status = getattr(entry.status, "name", "PENDING").lower()  # a new kind of status has no name
    return {"status": status, "public_score": entry.public_score or "", "private_score": entry.private_score or ""}


def ledger_rows(path: Path) -> list[Row]:
    """All rows of a ledger.csv; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ledger_table(submissions_dir: Path, runs_dir: Path) -> pd.DataFrame:
    """Every upload with the out-of-fold Dice of the run that made it.

    Columns: time, run, out_of_fold (NaN where the run has no scores), public_score, private_score, status, message.
    """
    table = pd.DataFrame(ledger_rows(submissions_dir / "ledger.csv"), columns=COLUMNS)
    table["out_of_fold"] = [Run(runs_dir, name).out_of_fold_dice() if name else None for name in table["run"]]
    return table[["time", "run", "out_of_fold", "public_score", "private_score", "status", "message"]]


def refresh(submissions_dir: Path) -> None:
    """Bring status and scores of the ledger's uploads up to date; asks Kaggle once."""
    path, listed = submissions_dir / "ledger.csv", f"{PAGE}/submissions"
    entries = with_retries(listed, sign_in().competition_submissions, COMPETITION)
    by_ref = {str(entry.ref): entry for entry in entries}
    for row in ledger_rows(path):
        if entry := by_ref.get(row["ref"]):
            _record(path, row | _result(entry))


def _record(path: Path, row: Row) -> None:
    """Add a row to a ledger.csv, in place of the one with the same ref."""
    text, rows = io.StringIO(), ledger_rows(path)
    refs = [old.get("ref") for old in rows]
    at = refs.index(str(row["ref"])) if str(row["ref"]) in refs else len(rows)
    table = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows([*rows[:at], row, *rows[at + 1 :]])
    write_text(path, text.getvalue())


def _earlier_row(path: Path, file_hash: str) -> Row | None:
    """The ledger's last row of a file that was uploaded before and not rejected."""
    sent = [row for row in ledger_rows(path) if row["sha256"] == file_hash and row["status"] != "error"]
    return sent[-1] if sent else None
