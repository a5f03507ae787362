"""The only place that knows Kaggle's client: credentials, and calls that end, are repeated, and say why they failed.

The client is imported late and kept in check, because importing it authenticates, its requests wait for ever, it prints
what nobody asked for, and it reports some refusals as success.
"""

import base64
import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter

from carvana.errors import UserError
from carvana.files import read_json

COMPETITION = "carvana-image-masking-challenge"
PAGE = f"https://www.kaggle.com/competitions/{COMPETITION}"
SETTINGS = "https://www.kaggle.com/settings"
HOME = Path("~/.kaggle")  # where the client looks, whatever KAGGLE_CONFIG_DIR says
TIMEOUT = (15, 60)  # seconds to connect, and between two bytes
TRIES, TRANSFER_TRIES = 4, 9  # failures in a row: 14 s apart in all, and 4 minutes where a file would be lost
LONGEST_ANSWER = 16 << 20, 120  # bytes and seconds of what is no file


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


def username() -> str:
    """The account's name, as environment or kaggle.json give it; UserError where they do not."""
    name = os.environ.get("KAGGLE_USERNAME") or _stored_key(_config_file()).get("username")
    if not name:
        raise UserError("The name of the Kaggle account is unknown. Give it: --user NAME.")
    return name


def _token_source() -> str | None:
    notebook = ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_DATA_PROXY_URL", "KAGGLE_API_V1_TOKEN")
    if all(os.environ.get(name) for name in notebook) and Path(os.environ[notebook[-1]]).is_file():
        return "this Kaggle notebook"
    source, token = "the environment variable KAGGLE_API_TOKEN", _variable("KAGGLE_API_TOKEN")
    for file in (HOME / name for name in ("access_token", "access_token.txt")):
        if not token and file.expanduser().is_file():
            source, token = str(file.expanduser()), file.expanduser().read_text(errors="replace").strip()
    return _checked(token, source) and source


def _key_source() -> str | None:
    path, name, key = _config_file(), _variable("KAGGLE_USERNAME"), _variable("KAGGLE_KEY")
    if name and key:
        return _checked(name + key, "the environment variables KAGGLE_USERNAME and KAGGLE_KEY")
    stored = _stored_key(path)
    if name and stored.get("username", name) != name:
        raise UserError(f"KAGGLE_USERNAME is not the user of {path}. Set KAGGLE_KEY too, or unset KAGGLE_USERNAME.")
    if stored:
        _checked(f"{stored['username']}{key or stored['key']}", str(path))
        return str(path)
    oauth = HOME.expanduser() / "credentials.json"
    return str(oauth) if oauth.is_file() else None


def _variable(name: str) -> str:
    """A variable of the environment, without the line break that a copy brings along: the client would send it."""
    if name in os.environ:
        os.environ[name] = os.environ[name].strip()
    return os.environ.get(name, "")


def _checked(secret: str, source: str) -> str:
    """The source; UserError where the secret could not be part of a request, whose error would show it."""
    if secret and not re.fullmatch("[!-~]+", secret):
        raise UserError(
            f"{source}: a blank, a line break or a foreign character is inside. Copy it anew from {SETTINGS}."
        )
    return source if secret else ""


def _config_file() -> Path:
    home = HOME.expanduser()
    if sys.platform.startswith("linux") and not home.exists():
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle"
    return Path(os.environ.get("KAGGLE_CONFIG_DIR") or home) / "kaggle.json"


def _stored_key(path: Path) -> dict[str, Any]:
    """Contents of kaggle.json, {} without one; the client would ignore a broken one without a word."""
    if not path.is_file():
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(stored.get(field) for field in ("username", "key")):
        raise UserError(f"{path} must hold username and key, like kaggle.json.example. Download it from {SETTINGS}.")
    if stored["username"] == "your-kaggle-username":
        raise UserError(f"{path} still holds the example. Put your own username and key from {SETTINGS} there.")
    return stored


def sign_in() -> Any:
    """The official client, authenticated, whose calls go through `with_retries`; UserError where it does not work."""
    source = credentials_source()
    _warn_if_open(Path(source))
    try:
        with patched_http():
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.args = [option for option in api.args if option != "--verbose"]  # would print the key
            api.config = str(_config_file())  # the class keeps the one of its import
            api.authenticate()
    except SystemExit:
        raise UserError(f"Kaggle refused the credentials of {source}. Create new ones at {SETTINGS}.") from None
    except ImportError as error:
        raise UserError(f"Package kaggle does not work ({scrub(error)}). Install requirements.txt again.") from None
    except Exception as error:
        raise refusal(error, "Signing in") from None
    return api


def _warn_if_open(path: Path) -> None:
    if path.is_file() and path.stat().st_mode & 0o077:
        print(f"Warning: others on this machine can read {path}. Close it: chmod 600 {path}")


@contextlib.contextmanager
def patched_http(**headers: str) -> Iterator[None]:
    """Every request gets a time-out, every GET these headers too, answers an end, and nothing is printed."""
    send, said = HTTPAdapter.send, io.StringIO()

    def bounded(adapter: HTTPAdapter, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        if request.method == "GET":
            request.headers.update(headers)
        response = send(adapter, request, **{**options, "timeout": TIMEOUT})
        page = re.search("json|html|xml", response.headers.get("Content-Type", ""))
        if page or not options.get("stream") or response.status_code >= 300:
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


def with_retries(what: str, call: Callable[..., Any], *values: Any, grown: Callable[[], int] | None = None) -> Any:
    """Call the client, again where that can help; UserError begins with `what` and says why Kaggle refused.

    grown: of a transfer, bytes that are there already; tries are counted anew whenever they have grown.
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


def scrub(error: BaseException | str) -> str:
    """One line of plain text, without secrets in any form, signed addresses and control codes of a terminal."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\))", "", str(error))
    text = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(?i)\b(basic|bearer) +[^\s'\"]+", r"\1 ***", text)
    return re.sub(r"\?\S+|(?i:signature|token)=\S+", "?...", text)[:200]


def _secrets() -> set[str]:
    """All that the client may send to prove who it is: plain, and as base64 and addresses show it."""
    variables = [os.environ.get(name, "") for name in ("KAGGLE_KEY", "KAGGLE_TOKEN", "KAGGLE_API_TOKEN")]
    names, texts, users = ("access_token", "access_token.txt"), list(variables), {os.environ.get("KAGGLE_USERNAME", "")}
    paths: list[str | Path] = [
        variables[-1],
        os.environ.get("KAGGLE_API_V1_TOKEN", ""),
        *(HOME.expanduser() / name for name in names),
    ]
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            texts.append(Path(path).read_text(errors="replace"))
    for path in (_config_file(), HOME.expanduser() / "kaggle.json", HOME.expanduser() / "credentials.json"):
        with contextlib.suppress(OSError):
            fields = re.findall(r'"(\w+)"\s*:\s*"([^"]+)"', path.read_text(errors="replace"))  # also of a broken file
            users |= {value for name, value in fields if name == "username"}
            texts += [value for name, value in fields if name == "key" or name.endswith("token")]
    plain = {part for text in texts for part in (text.strip(), *text.split()) if len(part) > 3}
    coded = {base64.b64encode(text.encode()).decode() for s in plain for text in (s, *(f"{u}:{s}" for u in users))}
    return plain | coded | {quote(secret, safe="") for secret in plain}


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

    area: "competitions", "blobs" or "datasets" of the service. streamed: the answer is a file, returned as a response.
    """
    from kagglesdk.common.types.http_redirect import HttpRedirect  # the client streams this kind alone

    service, kind = f"{area}.{area[:-1].title()}ApiService", HttpRedirect if streamed else _Message
    with patched_http(), api.build_kaggle_client() as kaggle:
        return kaggle.http_client().call(service, method, _Message(fields), kind)
