"""A kernel's session followed to its end: state and log, its output fetched, and what to do next.

A note beside the kernel tells which session was started and what of it has come, so that nothing is started or fetched
twice.
"""

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import requests

from carvana.errors import UserError
from carvana.files import read_json, resolve, write_json
from carvana.kaggle.client import PAGE_SIZE, PAGES, TIMEOUT, call, paced, sign_in, with_retries
from carvana.kaggle.credentials import scrub
from carvana.kaggle.kernels import NOTE, kernel_state, note_session, push, running

POLL, HOURS = 30, 13  # seconds between two looks; a session of 12 hours and the queue before it
FAILURES = 70  # looks in a row that fail: the client takes a new token half an hour after the old one has expired
TAIL = 10  # lines of the log that are shown at once
OWNER = ".kaggle"  # in a run's folder: the kernel that it came from


def push_and_wait(folder: Path, resume: bool, runs_dir: Path) -> None:
    """`push`, or the session that runs or whose output has not come yet; follows it, and fetches its output.

    UserError where it failed on Kaggle (what it left is fetched all the same), or is not over in time.
    """
    path = folder / "kernel" / NOTE
    if path.exists():
        print("The output of the last push has not been fetched: it comes first, nothing new is started.", flush=True)
    elif kernel := running(folder):
        note_session(folder, kernel)
    else:
        push(folder, resume)
    note = read_json(path, dict[str, Any])
    kernel = note["kernel"]
    print(f"{kernel}: Ctrl-C leaves it running on Kaggle, and the same command takes it up again", flush=True)
    state = _follow(kernel, note["started"])
    names = _fetch(sign_in(), note, path, resolve(runs_dir))
    path.unlink()
    print(f"{kernel}: {len(names)} files have come into {resolve(runs_dir)}")
    if state != "COMPLETE":
        raise UserError(f"{kernel} ended as {state} on Kaggle. Fix what the log says, then push again with --resume.")
    if files := [resolve(runs_dir) / name for name in names if name.endswith(".csv.gz")]:
        print(f'Next: carvana submit {shlex.quote(str(files[0]))} -m "MESSAGE" --sample SAMPLE_SUBMISSION')
    else:
        print(f"No submission yet. Next: carvana kernel push {shlex.quote(str(folder))} --resume --wait")


def _follow(kernel: str, started: float) -> str:
    """Show state and log until the session has ended; returns how."""
    api, asked = sign_in(), _asked(kernel)
    shown, seen, failures = "", 0, 0
    for _ in range(3600 * HOURS // POLL):
        try:
            state = kernel_state(api, asked) or "not there yet"
            log = _log(_output(api, asked, ""))
            failures = 0
        except UserError as error:  # the session goes on, whatever happens to the look
            failures += 1
            if failures == FAILURES:
                raise
            with contextlib.suppress(UserError):
                api = sign_in()  # a token may have expired
            state, log = f"no look ({error})", []
        if state != shown or log[seen:]:
            spent = f"{(time.time() - started) / 3600:.1f} hours of {HOURS} at most"
            print(f"{kernel}: {state}, {spent}", *log[seen:][-TAIL:], sep="\n  ", flush=True)
        shown, seen = state, max(seen, len(log))
        if state in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED"):
            return state
        time.sleep(POLL)
    raise UserError(f"{kernel} is {shown} after {HOURS} hours. Look at it on Kaggle; the same command goes on.")


def _asked(kernel: str) -> dict[str, str]:
    """The fields that name a session: USER/SLUG/VERSION, or the last one of USER/SLUG."""
    user, slug, *version = kernel.split("/")
    return {"userName": user, "kernelSlug": slug} | ({"versionLabel": f"v{version[0]}"} if version else {})


def _output(api: Any, asked: dict[str, Any], token: str) -> dict[str, Any]:
    fields = asked | {"pageSize": PAGE_SIZE, "pageToken": token}
    what = f"The output of {asked['userName']}/{asked['kernelSlug']}"
    return with_retries(what, call, api, "kernels", "ListKernelSessionOutput", fields)


def _log(answer: dict[str, Any]) -> list[str]:
    """Lines of a session's log, which Kaggle gives as JSON, or as text while it runs."""
    text = str(answer.get("log") or "")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = "".join(entry["data"] for entry in json.loads(text))
    return [line for line in map(scrub, text.splitlines()) if line]


def _fetch(api: Any, note: dict[str, Any], path: Path, runs_dir: Path) -> list[str]:
    """Bring a session's runs and submissions into `runs_dir`; returns all names, below it, that have come by now."""
    owner = "/".join(note["kernel"].split("/")[:2])
    for entry in _listed(api, _asked(note["kernel"])):
        name = _place(str(entry.get("fileName")), runs_dir)
        if name and name not in note["fetched"]:
            _claim(runs_dir / PurePosixPath(name).parts[0], owner)
            with_retries(name, _receive, str(entry.get("url")), runs_dir / name)
            note["fetched"].append(name)
            write_json(path, note)
    return note["fetched"]


def _listed(api: Any, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file of the output; a page's files are taken before the next page, as their addresses expire."""
    token = ""
    for _ in range(PAGES):
        answer = _output(api, asked, token)
        yield from answer.get("files") or []
        if not answer.get("files") or not (token := answer.get("nextPageToken") or ""):
            return


def _place(name: str, runs_dir: Path) -> str | None:
    """Where a file of the output belongs below `runs_dir`; None for one that is not the run's, or leads elsewhere."""
    parts = name.split("/")
    if parts[-1] == ".lock":  # of the run there
        return None
    if len(parts) > 2 and parts[0] == "runs":
        parts = parts[1:]
    elif len(parts) == 1 and name.endswith(".csv.gz"):
        parts = [name.removesuffix(".csv.gz"), name]
    else:
        return None
    odd = any(not part or part[0] == "." or not part.isprintable() or {*part} & {*'\\:*?"<>|'} for part in parts)
    if odd or not (runs_dir / "/".join(parts)).resolve().is_relative_to(runs_dir.resolve()):
        print(f"{scrub(name)}: left out, it leads outside {runs_dir} or has no usual name")
        return None
    return "/".join(parts)


def _claim(folder: Path, kernel: str) -> None:
    """Note whose a run's folder is; UserError where it is a run of this machine."""
    owner = folder / OWNER
    if not owner.exists() and folder.exists() or owner.exists() and read_json(owner) != kernel:
        raise UserError(f"{folder} is another run, and stays. Give --runs-dir, the same command then goes on.")
    write_json(owner, kernel)


def _receive(url: str, path: Path) -> None:
    """One file, under its name only when it is whole."""
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with requests.get(url, stream=True, timeout=TIMEOUT) as response, part.open("wb") as file:
        if response.status_code in (400, 403, 410):
            raise UserError(f"{path.name}: the address that Kaggle gave for it has expired. The same command goes on.")
        response.raise_for_status()
        if "html" in response.headers.get("Content-Type", "") and path.suffix != ".html":
            raise ValueError("a page arrived instead of the file")
        for piece in paced(response, path.name):
            file.write(piece)
    part.replace(path)
