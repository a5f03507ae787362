"""Who asks: where the credentials for Kaggle are, and how nothing that is shown ever holds them."""

import base64
import contextlib
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from carvana.errors import UserError
from carvana.files import read_json

SETTINGS = "https://www.kaggle.com/settings"
HOME = Path("~/.kaggle")  # where the client looks, whatever KAGGLE_CONFIG_DIR says


def credentials_source() -> str:
    """Where the client will take its credentials from, found as it does but without contacting anything.

    UserError where there are none, or where they cannot work.
    """
    if source := _token_source() or _key_source():
        return source
    raise UserError(
        f"No Kaggle credentials. Create a token at {SETTINGS} and save it as ~/.kaggle/access_token, or a "
        "legacy key as ~/.kaggle/kaggle.json, or give a data_dir that already holds the files."
    )


def username() -> str:
    """The account's name, as environment or kaggle.json give it; UserError where they do not."""
    name = os.environ.get("KAGGLE_USERNAME") or _stored_key(config_file()).get("username")
    if not name:
        raise UserError("The name of the Kaggle account is unknown. Give it: --user NAME.")
    return name


def _token_source() -> str:
    notebook = ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_DATA_PROXY_URL", "KAGGLE_API_V1_TOKEN")
    if all(os.environ.get(name) for name in notebook) and Path(os.environ[notebook[-1]]).is_file():
        return "this Kaggle notebook"
    source, token = "the environment variable KAGGLE_API_TOKEN", _variable("KAGGLE_API_TOKEN")
    files = [HOME.expanduser() / name for name in ("access_token", "access_token.txt")]
    for file in [Path(token)] if token else files:  # the variable may name a file too
        with contextlib.suppress(OSError):
            if text := file.read_text(errors="replace").strip():
                source, token = str(file), text
                break
    return _checked(token, source)


def _key_source() -> str | None:
    path, name, key = config_file(), _variable("KAGGLE_USERNAME"), _variable("KAGGLE_KEY")
    if name and key:
        return _checked(name + key, "the environment variables KAGGLE_USERNAME and KAGGLE_KEY")
    stored = _stored_key(path)
    if name and stored.get("username", name) != name:
        raise UserError(f"KAGGLE_USERNAME is not the user of {path}. Set KAGGLE_KEY too, or unset KAGGLE_USERNAME.")
    if stored:
        return _checked(f"{stored['username']}{key or stored['key']}", str(path))
    oauth = HOME.expanduser() / "credentials.json"
    return str(oauth) if os.path.isfile(oauth) else None  # noqa: PTH113 (no error without rights)


def _variable(name: str) -> str:
    """A variable of the environment, without the line break that a copy brings along: the client would send it."""
    if name in os.environ:
        os.environ[name] = os.environ[name].strip()
    return os.environ.get(name, "")


def _checked(secret: str, source: str) -> str:
    """The source, "" without a secret; UserError where it could not be part of a request, whose error would show it."""
    if secret and not re.fullmatch("[!-~]+", secret):
        fault = "a blank, a line break or a foreign character is inside"
        raise UserError(f"{source}: {fault}. Copy it again from {SETTINGS}.")
    return source if secret else ""


def config_file() -> Path:
    """kaggle.json where the client looks for it."""
    home = HOME.expanduser()
    if sys.platform.startswith("linux") and not os.path.exists(home):  # noqa: PTH110 (no error without rights)
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle"
    return Path(os.environ.get("KAGGLE_CONFIG_DIR") or home) / "kaggle.json"


def _stored_key(path: Path) -> dict[str, Any]:
    """Contents of kaggle.json, {} without one; the client would ignore a broken one without a word."""
    if not os.path.isfile(path):  # noqa: PTH113 (no error without rights)
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(stored.get(field) for field in ("username", "key")):
        raise UserError(f"{path} must hold username and key, like kaggle.json.example. Download it from {SETTINGS}.")
    if stored["username"] == "your-kaggle-username":
        raise UserError(f"{path} still holds the example. Put your own username and key from {SETTINGS} there.")
    return stored


@functools.cache  # once, however often the client signs in
def warn_if_open(path: Path) -> None:
    """Tell of a key file that others on the machine can read."""
    if path.is_file() and path.stat().st_mode & 0o077:
        print(f"Warning: others on this machine can read {path}. Close it: chmod 600 {path}")


def scrub(error: BaseException | str) -> str:
    """One line of plain text, without secrets in any form, signed addresses and control codes of a terminal."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\))", "", str(error))
    text = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(?i)\b(basic|bearer) +[^\s'\"]+", r"\1 ***", text)
    return re.sub(r"\?\S+|(?i:signature|token)=\S+", "?...", text)[:300]


def _secrets() -> set[str]:
    """All that the client may send to prove who it is: plain, and as base64 and addresses show it."""
    home, names = HOME.expanduser(), ("KAGGLE_KEY", "KAGGLE_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_API_V1_TOKEN")
    texts, users = [os.environ.get(name, "") for name in names], {os.environ.get("KAGGLE_USERNAME", "")}
    files = [home / name for name in ("access_token", "access_token.txt", "kaggle.json", "credentials.json")]
    for path in (*map(Path, texts[2:]), *files, config_file()):  # a token may also be the path of a file
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(errors="replace")
            fields = re.findall(r'"(\w+)"\s*:\s*"([^"]+)"', text)  # also of a broken file
            users |= {value for name, value in fields if name == "username"}
            texts += [value for name, value in fields if re.search("key|token", name)] if fields else [text]
    plain = {part for text in texts for part in (text.strip(), *text.split()) if len(part) > 5}
    coded = {base64.b64encode(text.encode()).decode() for s in plain for text in (s, *(f"{u}:{s}" for u in users))}
    return plain | coded | {quote(secret, safe="") for secret in plain}
