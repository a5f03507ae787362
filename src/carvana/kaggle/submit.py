"""A submission on its way: checked, confirmed, uploaded once, waited for, and written into the ledger."""

import contextlib
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from carvana import submission
from carvana.files import UserError, sha256
from carvana.kaggle import ledger
from carvana.kaggle.client import COMPETITION, PAGE, ask, call, client, refusal, scrub, status_of
from carvana.kaggle.download import Upload

POLL = 10  # seconds between two looks at a submission that is not scored yet


def submit(
    path: str | Path,
    message: str,
    sample: str | Path,
    submissions_dir: str | Path,
    run: str = "",
    yes: bool = False,
    height: int = 1280,
    width: int = 1918,
    wait_minutes: float = 10,
) -> dict:
    """Validate, ask (unless `yes`), upload once, wait for the score; returns the row that it adds to `ledger.csv`.

    UserError where the file is not valid, Kaggle refuses or rejects it, or nobody is there to confirm.
    """
    path, book = Path(path), Path(submissions_dir) / "ledger.csv"
    check = submission.validate(path, sample, height, width)
    if not check.ok:
        raise UserError(f"{path} is not uploaded. {check.problems[0]}.")
    api, sent, file_hash = client(), Upload(path), sha256(path)
    ref = sent.resumed and getattr(_find(api, sent.mark), "ref", 0)
    if not ref:
        _confirm(api, path, run, file_hash, check, yes)
    description = f"{message} [{sent.mark}]"
    ref = ref or _upload(api, sent, description)
    values = (datetime.now(UTC).isoformat(timespec="seconds"), run, path.name, file_hash, description)
    row = dict(zip(ledger.COLUMNS, (*values, ref, "pending", "", ""), strict=True))
    ledger.record(book, row)  # before the wait: a killed run must not lose it
    sent.done()
    reason = _wait(api, sent.mark, row, time.monotonic() + 60 * wait_minutes)
    ledger.record(book, row)
    if row["status"] == "error":
        raise UserError(f"{path}: Kaggle rejected submission {row['ref']}: {scrub(reason)}. Mend the file first.")
    scores = f"public {row['public_score'] or '-'}, private {row['private_score'] or '-'}"
    print(f"{path}: submission {row['ref']} is {row['status']}, {scores} ({book})")
    return row


def _confirm(api: Any, path: Path, run: str, file_hash: str, check: submission.Validation, yes: bool) -> None:
    left = _allowed(api)
    if left == 0:
        raise UserError(f"{path} is not uploaded: no submission is left today. The limit ends at midnight UTC.")
    print(*check.lines(), sep="\n")
    made = f"of run {run or '-'}, {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    print(f"{path}: {made}, {path.stat().st_size / 1e6:.1f} MB, sha256 {file_hash[:12]}")
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
        limits = ask("The daily limit", api.competition_get_submission_limits, COMPETITION)
        return limits.num_allowed_now if limits.num_allowed_now or limits.num_today else None
    return None


def _upload(api: Any, sent: Upload, description: str) -> int:
    """Number of the submission. Submits once: whether a lost answer was a success is looked up under the mark."""
    token = sent.send(lambda: _start(api, sent.path))
    try:
        fields = {"competition_name": COMPETITION, "blob_file_tokens": token, "submission_description": description}
        answer = call(api, "competitions", "create_submission", **fields)
        ref, said = answer.ref, answer.message or "no reason given"  # a refusal looks like a success, without ref
    except Exception as error:
        if 400 <= status_of(error) < 500:
            sent.done()
            raise refusal(error, f"Submission of {sent.path}") from None
        ref, said = 0, str(error)
    for seconds in (0, 2, 4):  # the list may be a little late
        if not ref:
            time.sleep(seconds)
            ref = getattr(_find(api, sent.mark), "ref", 0)
    if not ref:
        sent.done()
        raise UserError(
            f"{sent.path}: Kaggle did not take it ({scrub(said)}). Look for [{sent.mark}] at {PAGE}/submissions."
        )
    return ref


def _start(api: Any, path: Path) -> tuple[str, str]:
    """Token of a new upload and the address that takes it."""
    stat = path.stat()
    fields = {"content_length": stat.st_size, "last_modified_epoch_seconds": int(stat.st_mtime)}
    fields |= {"competition_name": COMPETITION, "file_name": path.name}
    answer = ask(f"Upload of {path}", call, api, "competitions", "start_submission_upload", **fields)
    return answer.token, answer.create_url


def _find(api: Any, mark: str) -> Any:
    what = f"Whether [{mark}] has arrived at {PAGE}/submissions is unknown"
    found = ask(what, api.competition_submissions, COMPETITION)
    return next((entry for entry in found or [] if entry and mark in (entry.description or "")), None)


def _wait(api: Any, mark: str, row: dict, deadline: float) -> str:
    """Look until scored, rejected or `deadline`; fills status and scores of `row`, returns Kaggle's reason."""
    while True:
        with contextlib.suppress(UserError):  # the submission stands, whatever happens to the look
            if found := _find(api, mark):
                row |= _result(found)
                if row["status"] != "pending":
                    return found.error_description or ""
        if time.monotonic() >= deadline:
            return ""
        time.sleep(POLL)


def refresh(submissions_dir: str | Path) -> None:
    """Bring status and scores of the ledger's uploads up to date; asks Kaggle once."""
    path = Path(submissions_dir) / "ledger.csv"
    known = {
        str(entry.ref): entry for entry in ask(f"{PAGE}/submissions", client().competition_submissions, COMPETITION)
    }
    for row in ledger.rows(path):
        if found := known.get(row["ref"]):
            ledger.record(path, row | _result(found))


def _result(found: Any) -> dict:
    """Status and scores of an entry of Kaggle's list, as the ledger writes them."""
    status = getattr(found.status, "name", "PENDING").lower()  # a new kind of status has no name
    return {"status": status, "public_score": found.public_score or "", "private_score": found.private_score or ""}
