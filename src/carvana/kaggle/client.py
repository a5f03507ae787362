"""The only place that knows Kaggle's client: calls that end, are repeated, and say why they failed.

The client is imported late and kept in check, because importing it authenticates, its requests wait for ever, it prints
what nobody asked for, and it reports some refusals as success.
"""

import contextlib
import errno
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from carvana.errors import UserError
from carvana.kaggle.credentials import SETTINGS, config_file, credentials_source, scrub, warn_if_open

COMPETITION = "carvana-image-masking-challenge"
PAGE = f"https://www.kaggle.com/competitions/{COMPETITION}"
TIMEOUT = (15, 60)  # seconds to connect, and between two bytes
TRIES, TRANSFER_TRIES = 4, 9  # failures in a row: 14 s apart in all, and 4 minutes where a file would be lost
SERVICES = {  # of the areas that are asked, as Kaggle names them
    "competitions": "CompetitionApiService", "blobs": "BlobApiService", "datasets": "DatasetApiService",
    "kernels": "KernelsApiService",
}  # fmt: skip
PAGE_SIZE, PAGES = 20, 1000  # of Kaggle's lists, and how many pages are read at most
LONGEST_ANSWER = 16 << 20, 120  # bytes and seconds of what is no file
PIECE = 1 << 16  # bytes of a file that are handed on at once, at most lost when a line is cut
SLOWEST = 1000, 120  # bytes a second of a file that must come, over so many seconds


class LostAnswerError(UserError):
    """Nobody knows whether a request has done its work."""


def sign_in() -> Any:
    """The official client, authenticated, whose calls go through `with_retries`; UserError where it does not work."""
    source = credentials_source()
    warn_if_open(Path(source))
    try:
        with patched_http():
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.args = [option for option in api.args if option != "--verbose"]  # would print the key
            api.config = str(config_file())  # the class keeps the one of its import
            api.authenticate()
    except (SystemExit, NameError):  # Jupyter has no exit() for the client to call
        raise UserError(f"Kaggle refused the credentials of {source}. Create new ones at {SETTINGS}.") from None
    except ImportError as error:
        raise UserError(f"Package kaggle does not work ({scrub(error)}). Install requirements.txt again.") from None
    except Exception as error:
        raise refusal(error, "Signing in") from None
    return api


@contextlib.contextmanager
def patched_http(**headers: str) -> Iterator[None]:
    """Every request gets a time-out, every GET these headers too, answers an end, and nothing is printed."""
    send, said = HTTPAdapter.send, io.StringIO()

    def bounded(adapter: HTTPAdapter, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        if request.method == "GET":
            request.headers.update(headers)
        response = send(adapter, request, **{**options, "timeout": TIMEOUT})
        answer = request.method != "GET" and "json" in response.headers.get("Content-Type", "")  # files come by GET
        if answer or not options.get("stream") or response.status_code >= 300:
            _read(response)
        return response

    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), patch.object(HTTPAdapter, "send", bounded):
        yield


def _read(response: requests.Response) -> None:
    """Read an answer that is no file, though not for ever."""
    body, ends = bytearray(), time.monotonic() + LONGEST_ANSWER[1]
    for piece in response.iter_content(64):  # so few that the clock is looked at in time
        body += piece
        if len(body) > LONGEST_ANSWER[0] or time.monotonic() > ends:
            response.close()
            raise requests.ConnectionError("the answer does not end")
    response._content = bytes(body)


def paced(response: requests.Response, name: str) -> Iterator[bytes]:
    """The body of a file, as it comes; UserError where it comes too slowly ever to end."""
    since, size = time.monotonic(), 0
    try:
        while piece := response.raw.read1(PIECE, decode_content=True):
            yield piece
            size, seconds = size + len(piece), time.monotonic() - since
            if seconds > SLOWEST[1]:
                if size < SLOWEST[0] * seconds:
                    raise UserError(
                        f"{name}: {size / seconds:.0f} bytes a second come. Check the network, start again."
                    )
                since, size = time.monotonic(), 0
    except HTTPError as error:  # of urllib3, which requests hides only in its own way to read
        raise requests.ConnectionError(error) from None


def with_retries(what: str, call: Callable[..., Any], *values: Any, grown: Callable[[], int] | None = None) -> Any:
    """Call the client, again where that can help; UserError begins with `what` and says why Kaggle refused.

    grown: of a transfer, bytes that are there already; tries are counted from 0 whenever they have grown.
    """
    failures, best, tries = 0, 0, TRANSFER_TRIES if grown else TRIES
    while True:
        try:
            with patched_http():
                return call(*values)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            size = grown() if grown else 0
            failures, best = (1 if size > best else failures + 1), max(best, size)
            if failures >= tries or not _passing(error):
                raise refusal(error, what) from None
            pause, reason = _pause(error, failures), status_of(error) or type(error).__name__
            print(f"{what}: no answer to use ({reason}); try {failures + 1} of {tries} in {pause:.0f} s", flush=True)
            time.sleep(pause)


def status_of(error: BaseException) -> int:
    """HTTP status, 0 without an answer; an address that Kaggle has signed and that has expired counts as 503."""
    response = getattr(error, "response", None)
    if response is None:
        return 0
    if response.history and response.status_code in (400, 403, 410, 416):
        return 503
    with contextlib.suppress(ValueError, AttributeError, TypeError, RuntimeError, requests.RequestException):
        return max(response.status_code, response.json().get("code", 0))
    return response.status_code


def _passing(error: BaseException) -> bool:
    """Whether it may go away: too many requests, server trouble, a broken line, a page that is no answer."""
    status = status_of(error)
    no_answer = status < 400 and isinstance(error, requests.RequestException | ValueError)
    return no_answer or status in (408, 429) or status >= 500


def _pause(error: BaseException, failures: int) -> float:
    """Seconds until the next try: what the server asks for, else 2, 4, 8 ... 60."""
    response = getattr(error, "response", None)
    wanted = response.headers.get("Retry-After", "") if response is not None else ""
    return min(60, int(wanted)) if wanted.isdigit() else min(60, 2**failures)


def refusal(error: BaseException, what: str) -> UserError:
    """What a user sees of an error of the client."""
    status, said = status_of(error), scrub(error)
    ours = "competitions." in getattr(getattr(error, "response", None), "url", "")
    rules = f"Accept the rules at {PAGE}/rules" if ours else "Look whether it is yours to change,"
    advice = {
        401: f"Kaggle refused the credentials of {credentials_source()}. Create new ones at {SETTINGS}.",
        403: f"Kaggle refused access. {rules} with this account ({credentials_source()}).",
        404: "Kaggle does not know it. Check the name.",
        429: "Kaggle wants fewer requests. Wait some minutes and start again.",
    }
    if status in advice:
        return UserError(f"{what}: {advice[status]} ({status}: {said})")
    if status >= 500:
        return UserError(f"{what}: Kaggle is in trouble ({status}: {said}). Start again later.")
    if getattr(error, "errno", None) == errno.ENOSPC:
        return UserError(f"{what}: the disk is full. Free space and start again; what has arrived is kept.")
    if isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError):
        return UserError(f"{what}: the line to Kaggle fails ({type(error).__name__}). Check the network, start again.")
    return UserError(f"{what}: {said or type(error).__name__}. Start again; if it stays, see {PAGE}.")


def remedy(said: str, otherwise: str) -> str:
    """What to do about a refusal: wait where it is a limit, else what the caller advises."""
    return "Wait until the limit ends." if re.search("(?i)limit|quota|exceed|too many", said) else otherwise


class _Message(dict):
    """Fields of a request or of an answer, as Kaggle names them.

    The classes of its client refuse a whole list for one entry with a state that they do not know.
    """

    def to_dict(self) -> dict[str, Any]:
        """What the client sends."""
        return dict(self)

    @classmethod
    def prepare_from(cls, response: requests.Response) -> "_Message":
        """What the client hands on; ValueError for a page or anything else that is no answer."""
        if not isinstance(fields := response.json(), dict):
            raise ValueError("Kaggle's answer is no object")
        return cls(fields)


def call(api: Any, area: str, method: str, fields: dict[str, Any], streamed: bool = False) -> Any:
    """One request with these fields, named as on the wire; returns the answer's fields as a dict.

    area: one of SERVICES. streamed: the answer is a file, returned as a response.
    """
    from kagglesdk.common.types.http_redirect import HttpRedirect  # the client streams this kind alone

    service, kind = f"{area}.{SERVICES[area]}", HttpRedirect if streamed else _Message
    with patched_http(), api.build_kaggle_client() as kaggle:
        return kaggle.http_client().call(service, method, _Message(fields), kind)


def listed(api: Any, method: str, kind: str, key: str) -> Iterator[dict[str, Any]]:
    """All entries of a list of the competition, from all its pages.

    method: as on the wire. kind: "files" or "submissions". key: the field that tells entries apart.
    """
    token, seen = "", {None}
    for page in range(1, PAGES + 1):  # a server that goes on listing must not hold us for ever
        fields = {"competitionName": COMPETITION, "pageToken": token, "pageSize": PAGE_SIZE}
        fields |= {"page": page} if kind == "submissions" else {}  # which come without a token
        answer = with_retries(f"The list of {kind}", call, api, "competitions", method, fields)
        every = answer.get(kind) or []
        entries = [entry for entry in every if entry and entry.get(key) not in seen]
        yield from entries
        seen |= {entry[key] for entry in entries}
        token = answer.get("nextPageToken") or ""
        if not entries or not token and len(every) < PAGE_SIZE:
            return


def once(what: str, request: Callable[..., Any], *values: Any) -> Any:
    """A request that spends something, so that it must not be repeated; UserError where Kaggle refuses it.

    LostAnswerError where it may have done its work; `what` names the thing in the messages.
    """
    try:
        with patched_http():
            return request(*values)
    except Exception as error:
        if 400 <= status_of(error) < 500 and status_of(error) != 408:  # a gateway says 408 of what may have arrived
            raise refusal(error, what) from None
        raise LostAnswerError(f"{what}: Kaggle's answer was lost ({scrub(error) or type(error).__name__}).") from None
