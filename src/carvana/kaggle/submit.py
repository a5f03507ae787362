"""A submission on its way: checked, confirmed, uploaded once, waited for, and kept in the ledger of submissions."""

import contextlib
import csv
import io
import re
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from carvana.errors import UserError
from carvana.files import locked, sha256, stamp, write_text
from carvana.kaggle.client import COMPETITION, PAGE, LostAnswerError, call, listed, once, remedy, sign_in, with_retries
from carvana.kaggle.credentials import scrub
from carvana.kaggle.upload import Upload
from carvana.run import Run
from carvana.submission import Expected, Validation, validate

LISTED = f"{PAGE}/submissions"
POLL = 10  # seconds between two looks at a submission that is not scored yet
LIST = "ListSubmissions", "submissions", "ref"
COLUMNS = ("time", "run", "file", "sha256", "message", "ref", "status", "public_score", "private_score")
MARK = re.compile(r"\[[0-9a-f]{8}\]$")  # ends the description on Kaggle, so that a lost answer can be looked up
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take for one; a ' in front stops it
Row = dict[str, Any]  # of the ledger, by COLUMNS and the user's own; status: unknown, pending, complete or error


@dataclass(frozen=True)
class Entry:
    """What is sent to Kaggle: a file, the description there, and the name of the run that made it ("" unknown).

    again: send it although the ledger says that it was sent, or that this is unknown.
    """

    path: Path
    message: str
    run_name: str = ""
    again: bool = False


def submit(
    entry: Entry, expected: Expected, submissions_dir: Path, yes: bool = False, wait_minutes: float = 10
) -> Row:  # fmt: skip
    """Validate, ask (unless `yes`), upload once, wait for the score; returns the row of `submissions_dir`/ledger.csv.

    A file that the ledger holds already is not sent again, that would waste a try: its score is asked for. UserError
    where the file is not valid, Kaggle refuses or rejects it, nobody is there to confirm, or it stays unknown whether
    Kaggle has taken it.
    """
    path, ledger = entry.path, submissions_dir / "ledger.csv"
    seen, validation = stamp(path), validate(path, expected)
    if not validation.ok:
        raise UserError(f"{path} is not uploaded. {validation.problems[0]}.")
    file_hash, trouble = sha256(path), ""
    if stamp(path) != seen:
        raise UserError(f"{path} was replaced while it was checked, and is not submitted. Start again.")
    row = _sent_row(entry, ledger, file_hash)
    if row:
        known = f"submission {row['ref']}" if row["ref"] else f"sent on {row['time']} as {row['message']}"
        print(f"{path}: the same file is {known} already, so it is not sent again ({ledger})")
    if not row or row["status"] != "complete":
        api = sign_in()
        if not row:
            _confirm(api, entry, validation, yes)
        with locked(submissions_dir / ".lock", "a submission"):  # another process may have sent it meanwhile
            row = _sent_row(entry, ledger, file_hash) or _create(api, entry, ledger, file_hash)
        trouble = _wait(api, ledger, row, wait_minutes)
    if row["status"] == "error":
        advice = remedy(trouble, "Fix the file first.")
        raise UserError(f"{path}: Kaggle rejected submission {row['ref']}: {trouble}. {advice}")
    if row["status"] == "unknown":
        look = f"Look for {row['message']} at {LISTED}. The same command looks again, --again sends the file once more."
        raise UserError(f"{path}: whether Kaggle has taken it is unknown{trouble and f' ({trouble})'}. {look}")
    scores = f"public {row['public_score'] or '-'}, private {row['private_score'] or '-'}"
    print(f"{path}: submission {row['ref']} is {row['status']}, {scores} ({ledger})")
    return row


def _confirm(api: Any, entry: Entry, validation: Validation, yes: bool) -> None:
    path, left = entry.path, _allowed(api)
    if left == 0:
        raise UserError(f"{path} is not uploaded: no submission is left today. The limit ends at midnight UTC.")
    print(*validation.lines(), sep="\n")
    origin = f"of run {entry.run_name or '-'}, {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    print(f"{path}: {origin}, {path.stat().st_size / 1e6:.1f} MB, sha256 {sha256(path)[:12]}")
    print(f"{path}: submissions left today: {'unknown' if left is None else left}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{path} is not uploaded: nobody is there to confirm. Say yes in advance (yes=True, --yes).")
    if input("Upload it to Kaggle? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(f"{path} is not uploaded: not confirmed. Answer y to upload it.")


def _allowed(api: Any) -> int | None:
    """Submissions left today; None where unknown, also for a team without any: the service says 0 then."""
    try:
        asked = "GetSubmissionLimits", {"competitionName": COMPETITION}
        limits = with_retries("The daily limit", call, api, "competitions", *asked)
    except UserError:
        return None
    return limits.get("numAllowedNow") or (0 if limits.get("numToday") else None)


def send(api: Any, upload: Upload) -> str:
    """Bring a submission's file to Kaggle's storage; returns the token that stands for it."""
    modified = int(upload.path.stat().st_mtime)
    fields = {"competitionName": COMPETITION, "fileName": upload.path.name, "lastModifiedEpochSeconds": modified}
    return upload.send(api, "competitions", "StartSubmissionUpload", fields)


def _create(api: Any, entry: Entry, ledger: Path, file_hash: str) -> Row:
    """Upload the file and ask once for a submission of it; returns its row, "unknown" where the answer was lost.

    file_hash: of the file that was validated and confirmed; UserError where it has been replaced since.

    The row is on the disk before that request, so that nothing that happens afterwards sends the file again.
    """
    path, upload = entry.path, Upload(entry.path)
    token = send(api, upload)
    if sha256(path) != file_hash:
        upload.done()
        raise UserError(f"{path} was replaced while it was confirmed or uploaded, and is not submitted. Start again.")
    message = f"{entry.message} [{secrets.token_hex(4)}]"
    row: Row = dict.fromkeys(COLUMNS, "") | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    row |= {"run": entry.run_name, "file": path.name, "sha256": file_hash, "message": message, "status": "unknown"}
    _record(ledger, row)
    upload.done()
    fields = {"competitionName": COMPETITION, "blobFileTokens": token, "submissionDescription": message}
    try:
        answer = once(f"Submission of {path}", call, api, "competitions", "CreateSubmission", fields)
    except LostAnswerError as error:
        print(f"{error} Looking for {message} at {LISTED}")
        return row
    except UserError:
        _record(ledger, row | {"status": "error"})
        raise
    said = scrub(answer.get("message") or "")
    if answer.get("ref"):
        row |= {"ref": str(answer["ref"]), "status": "pending"}
        _record(ledger, row)
    elif said and not said.lower().startswith("success"):  # a refusal looks like a success, without ref
        _record(ledger, row | {"status": "error"})
        raise UserError(f"{path}: Kaggle did not take it ({said}). Look at {LISTED}.")
    return row


def _wait(api: Any, ledger: Path, row: Row, minutes: float) -> str:
    """Look until scored or rejected, or `minutes` are over; keeps `row` and ledger up to date.

    Returns Kaggle's reason, or what was in the way of the last look.
    """
    deadline = time.monotonic() + 60 * minutes
    print(f"{row['file']}: waiting for Kaggle's score, {minutes:g} minutes at most; the same command waits on")
    trouble = ""
    for _ in range(1 + int(60 * minutes / POLL)):
        try:
            entry = next((entry for entry in listed(api, *LIST) if _belongs(entry, row)), None)
            trouble = ""
        except UserError as error:  # the submission stands, whatever happens to the look
            if str(error) != trouble:
                print(trouble := str(error))
            entry = None
        if entry and (result := _result(entry)).items() - row.items():
            row |= result
            _record(ledger, row)
        if entry and row["status"] != "pending":
            return scrub(entry.get("errorDescription") or "no reason given")
        if time.monotonic() + POLL > deadline:
            break
        time.sleep(POLL)
    return trouble


def _belongs(entry: dict[str, Any], row: Row) -> bool:
    """Whether an entry is a row's: by number, and by the mark in its description where the number was lost."""
    if row["ref"]:
        return str(entry["ref"]) == row["ref"]
    mark = MARK.search(row["message"])
    return mark is not None and mark[0] in (entry.get("description") or "")


def _result(entry: dict[str, Any]) -> Row:
    """Number, status and scores of an entry of Kaggle's list, as the ledger writes them."""
    status = str(entry.get("status")).lower()  # Kaggle leaves PENDING out
    scores = {"public_score": entry.get("publicScore"), "private_score": entry.get("privateScore")}
    result = {name: scrub(str(score)) if score is not None else "" for name, score in scores.items()}
    return {"ref": str(entry["ref"]), "status": status if status in ("complete", "error") else "pending"} | result


def ledger_rows(path: Path) -> list[Row]:
    """All rows of a ledger.csv, with the user's own columns; none without a file. UserError where it is broken."""
    return _read(path)[1]


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a ledger."""
    if not path.exists():
        return [*COLUMNS], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            columns, rows = [*(table.fieldnames or ())], list(table)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}. Save it as CSV in UTF-8, or move it away.") from None
    missing = [name for name in COLUMNS if name not in columns]
    fault = f"lacks the column {missing[0]}" if missing else ""
    if len({*columns}) < len(columns):
        fault = "names a column twice"
    for number, row in enumerate(rows, 2):
        whole = None not in row and None not in row.values()
        if not fault and not (whole and len(row["sha256"]) == 64 and (row["ref"] + "0").isdecimal() and row["status"]):
            fault = f"is broken in row {number}"
    if fault:
        raise UserError(f"{path} {fault}. Fix it: commas, the first line {','.join(COLUMNS)}, or move it away.")
    for row in rows:
        row |= {name: row[name][1:] for name in COLUMNS if row[name][:1] == "'" and row[name][1:2] in FORMULA}
    return columns, rows


def ledger_table(submissions_dir: Path, runs_dir: Path) -> pd.DataFrame:
    """Every upload with the out-of-fold Dice of the run that made it.

    Columns: time, run, out_of_fold (NaN where the run has no scores), public_score, private_score, status, message.
    """
    table = pd.DataFrame(ledger_rows(submissions_dir / "ledger.csv"), columns=COLUMNS)
    table["out_of_fold"] = [_out_of_fold(runs_dir, name) for name in table["run"]]
    return table[["time", "run", "out_of_fold", "public_score", "private_score", "status", "message"]]


def _out_of_fold(runs_dir: Path, name: str) -> float | None:
    with contextlib.suppress(UserError):  # a row may be of another tool, and a run's scores damaged
        return Run(runs_dir, name).out_of_fold_dice() if name else None
    return None


def refresh(submissions_dir: Path) -> None:
    """Bring status and scores of the ledger's uploads up to date; reads Kaggle's list once."""
    path = submissions_dir / "ledger.csv"
    entries = list(listed(sign_in(), *LIST))
    for row in ledger_rows(path):
        for entry in entries:
            if _belongs(entry, row):
                _record(path, row | _result(entry))


def _record(path: Path, row: Row) -> None:
    """Add a row to a ledger.csv, in place of the one of the same submission."""
    with locked(path.with_name(".lock"), "a submission"):
        columns, rows = _read(path)
        same = [i for i, old in enumerate(rows) if (old["ref"] or old["message"]) in (row["ref"], row["message"])]
        at = same[0] if same else len(rows)
        rows[at : at + 1] = [(rows[at] if same else {}) | {name: row[name] for name in COLUMNS}]  # and the user's own
        quoted = [{k: "'" + v if k in COLUMNS and v.startswith(FORMULA) else v for k, v in row.items()} for row in rows]
        text = io.StringIO()
        table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(quoted)
        write_text(path, text.getvalue())


def _sent_row(entry: Entry, ledger: Path, file_hash: str) -> Row | None:
    """The ledger's last row of the same file that was not rejected; None for a file that is to be sent."""
    rows = ledger_rows(ledger)  # also for `again`, to find it broken in time
    sent = [row for row in rows if row["sha256"] == file_hash and row["status"] != "error"]
    return sent[-1] if sent and not entry.again else None
