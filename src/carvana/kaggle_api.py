"""The only place that knows Kaggle: credentials, download and submission through the official client.

The client is imported late and kept in check, because importing it authenticates, its requests wait for ever, it prints
what nobody asked for, and it reports some refusals as success.
"""

import contextlib
import io
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from carvana import ledger, submission
from carvana.files import UserError, read_json, sha256

COMPETITION = "carvana-image-masking-challenge"
PAGE = f"https://www.kaggle.com/competitions/{COMPETITION}"
SETTINGS = "https://www.kaggle.com/settings"
TIMEOUT = (30, 120)  # seconds to connect, and between two bytes
TRIES = 4  # failures in a row without a byte of progress
POLL = 10  # seconds between two looks at a submission that is not scored yet


def credentials_source() -> str:
    """Where the client will take its credentials from, found as it does but without contacting anything.

    UserError where there are none, or where they cannot work.
    """
    source = _token_source() or _key_source()
    if not source:
        raise UserError(
            f"No Kaggle credentials. Create a token at {SETTINGS} and save it as ~/.kaggle/kaggle.json "
            "(kaggle.json.example shows its form), or give a data_dir that already holds the files."
        )
    return source


def _token_source() -> str | None:
    notebook = ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_DATA_PROXY_URL", "KAGGLE_API_V1_TOKEN")
    if all(os.environ.get(name) for name in notebook) and Path(os.environ[notebook[-1]]).is_file():
        return "this Kaggle notebook"
    if os.environ.get("KAGGLE_API_TOKEN"):
        return "the environment variable KAGGLE_API_TOKEN"
    files = [Path("~/.kaggle").expanduser() / name for name in ("access_token", "access_token.txt")]
    return next((str(file) for file in files if file.is_file() and file.read_text().strip()), None)


def _key_source() -> str | None:
    path = _config_file()
    given = {field: os.environ.get(f"KAGGLE_{field.upper()}") for field in ("username", "key")}
    if all(given.values()):
        return "the environment variables KAGGLE_USERNAME and KAGGLE_KEY"
    stored = _stored_key(path)
    if given["username"] and stored.get("username", given["username"]) != given["username"]:
        raise UserError(f"KAGGLE_USERNAME is not the user of {path}. Set KAGGLE_KEY too, or unset KAGGLE_USERNAME.")
    if stored:
        return str(path)
    oauth = Path("~/.kaggle/credentials.json").expanduser()
    return str(oauth) if oauth.is_file() else None


def _config_file() -> Path:
    home = Path("~/.kaggle").expanduser()
    if sys.platform.startswith("linux") and not home.exists():
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle"
    return Path(os.environ.get("KAGGLE_CONFIG_DIR") or home) / "kaggle.json"


def _stored_key(path: Path) -> dict:
    """Contents of kaggle.json, {} without one; the client would ignore a broken one without a word."""
    if not path.is_file():
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(stored.get(field) for field in ("username", "key")):
        raise UserError(f"{path} must hold username and key, like kaggle.json.example. Download it from {SETTINGS}.")
    if stored["username"] == "your-kaggle-username":
        raise UserError(f"{path} still holds the example. Put your own username and key from {SETTINGS} there.")
    return stored


def client() -> Any:
    """The official client, authenticated; every call of it goes through `ask`. UserError where it does not work."""
    source = credentials_source()
    try:
        with _tamed():
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.args = [option for option in api.args if option != "--verbose"]  # would print the key
            api.config = str(_config_file())  # the class keeps the one of its import
            api.authenticate()
    except SystemExit:
        raise UserError(f"Kaggle refused the credentials of {source}. Create new ones at {SETTINGS}.") from None
    except ImportError as error:
        raise UserError(f"Package kaggle does not work ({_scrub(error)}). Install requirements.txt again.") from None
    except Exception as error:
        raise _refusal(error, "Signing in") from None
    return api


@contextlib.contextmanager
def _tamed(bar: bool = False) -> Iterator[None]:
    """Every request gets a time-out, and nothing is printed except, on demand, the client's progress bar."""
    send, said = HTTPAdapter.send, io.StringIO()

    def bounded(adapter: HTTPAdapter, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        return send(adapter, request, **{**options, "timeout": TIMEOUT})

    HTTPAdapter.send = bounded
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(sys.stderr if bar else said):
            yield
    finally:
        HTTPAdapter.send = send


def ask(what: str, call: Callable, *values: Any, grown: Callable[[], int] | None = None, **options: Any) -> Any:
    """Call the client, again where that can help; UserError begins with `what` and says why Kaggle refused.

    grown: bytes that are there already; tries are counted anew whenever they have grown.
    """
    failures, best = 0, 0
    while True:
        try:
            with _tamed(bar=grown is not None):
                return call(*values, **options)
        except (Exception, SystemExit) as error:
            size = grown() if grown else 0
            failures, best = (1 if size > best else failures + 1), max(best, size)
            if failures >= TRIES or not _passing(error):
                raise _refusal(error, what) from None
            time.sleep(_pause(error, failures))


def _status(error: BaseException) -> int:
    """HTTP status, 0 without an answer; an address that Kaggle has signed and that has expired counts as 503."""
    response = getattr(error, "response", None)
    if response is None:
        return 0
    if response.history and response.status_code in (400, 403, 410):
        return 503
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return max(response.status_code, response.json().get("code", 0))
    return response.status_code


def _passing(error: BaseException) -> bool:
    """Whether it may go away: too many requests, server trouble, a broken line, a page that is no answer."""
    status = _status(error)
    no_answer = status < 400 and isinstance(error, requests.RequestException | ValueError)
    return no_answer or status == 429 or status >= 500


def _pause(error: BaseException, failures: int) -> float:
    """Seconds until the next try: what the server asks for, else 2, 4, 8."""
    response = getattr(error, "response", None)
    wanted = response.headers.get("Retry-After", "") if response is not None else ""
    return min(60, int(wanted)) if wanted.isdigit() else 2**failures


def _refusal(error: BaseException, what: str) -> UserError:
    status, said = _status(error), _scrub(error)
    advice = {
        401: f"Kaggle refused the credentials of {credentials_source()}. Create new ones at {SETTINGS}.",
        403: f"Kaggle refused access. Accept the rules at {PAGE}/rules with this account ({credentials_source()}).",
        404: "Kaggle does not know it. Check the name.",
        429: "Kaggle wants fewer requests. Wait some minutes and start again.",
    }
    if status in advice:
        return UserError(f"{what}: {advice[status]} ({status}: {said})")
    if status >= 500:
        return UserError(f"{what}: Kaggle is in trouble ({status}: {said}). Start again later.")
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return UserError(f"{what}: the line to Kaggle fails ({type(error).__name__}). Check the network, start again.")
    return UserError(f"{what}: {said or type(error).__name__}. Start again; if it stays, see {PAGE}.")


def _scrub(error: BaseException | str) -> str:
    """A message on one line without keys and without signed addresses."""
    text = re.sub(r"\?\S+", "?...", " ".join(str(error).split()))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        text = text.replace(json.loads(_config_file().read_text()).get("key") or "\n", "***")
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        text = text.replace(os.environ.get(name) or "\n", "***")
    return text[:200]


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
    api = client()
    _confirm(api, path, check, yes)
    mark = secrets.token_hex(4)
    values = (datetime.now(UTC).isoformat(timespec="seconds"), run, path.name, sha256(path), f"{message} [{mark}]")
    row = dict(zip(ledger.COLUMNS, (*values, "", "pending", "", ""), strict=True))
    row["ref"] = _upload(api, path, row["message"], mark)
    ledger.record(book, row)  # before the wait: a killed run must not lose it
    reason = _wait(api, mark, row, time.monotonic() + 60 * wait_minutes)
    ledger.record(book, row)
    if row["status"] == "error":
        raise UserError(f"{path}: Kaggle rejected submission {row['ref']}: {_scrub(reason)}. Mend the file first.")
    scores = f"public {row['public_score'] or '-'}, private {row['private_score'] or '-'}"
    print(f"{path}: submission {row['ref']} is {row['status']}, {scores} ({book})")
    return row


def _confirm(api: Any, path: Path, check: submission.Validation, yes: bool) -> None:
    left = _allowed(api)
    if left == 0:
        raise UserError(f"{path} is not uploaded: no submission is left today. The limit ends at midnight UTC.")
    print(*check.lines(), sep="\n")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; submissions left today: {'unknown' if left is None else left}")
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


def _upload(api: Any, path: Path, description: str, mark: str) -> int:
    """Number of the submission. Sends once: whether a lost answer was a success is looked up under `mark`."""
    try:
        with _tamed():
            answer = api.competition_submit(str(path), description, COMPETITION, quiet=True)
        ref, said = answer.ref, answer.message or "no reason given"  # a refusal looks like a success, without ref
    except (Exception, SystemExit) as error:
        if 400 <= _status(error) < 500:
            raise _refusal(error, f"Upload of {path}") from None
        ref, said = 0, str(error)
    for seconds in (0, 2, 4):  # the list may be a little late
        if not ref:
            time.sleep(seconds)
            ref = getattr(_find(api, mark), "ref", 0)
    if not ref:
        raise UserError(f"{path}: Kaggle did not take it ({_scrub(said)}). Look for [{mark}] at {PAGE}/submissions.")
    return ref


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
