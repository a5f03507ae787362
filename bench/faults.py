"""What happens when something breaks between this machine and Kaggle: the kaggle client alone, and this suite.

Both run unchanged, as processes of their own, against the server of the tests on 127.0.0.1; a process that has not
ended after 20 s is called hanging. Pauses between tries are skipped for both. A submission is started twice, as by a
person who does not believe the first end.

python bench/faults.py
"""

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from textwrap import shorten

import pytest
from common import RESULTS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_kaggle import CHUNK, guarded, zipped

from carvana.files import write_text
from carvana.kaggle import kernels
from carvana.kaggle.client import COMPETITION

LIMIT = 20  # seconds
WHOLE = 6  # MB of the file
DOWNLOADS = {  # what the storage or the service does wrong, in this order
    "the listing is refused (401)": {"ListDataFiles": ["401"] * 9, "DownloadDataFile": ["401"] * 9},
    "the rules are not accepted (403)": {"ListDataFiles": ["403"] * 9, "DownloadDataFile": ["403"] * 9},
    "too many requests, once (429)": {"ListDataFiles": ["429"], "DownloadDataFile": ["429"]},
    "the service fails once (503)": {"ListDataFiles": ["503"], "DownloadDataFile": ["503"]},
    "an answer never comes": {"ListDataFiles": ["stall"], "DownloadDataFile": ["stall"]},
    "the body stops and the line stays open": {"storage": ["stall"]},
    "the line is cut": {"storage": [f"cut:{2 * CHUNK}"]},
    "cut, then another piece than was asked for": {"storage": [f"cut:{2 * CHUNK}", "shifted"]},
    "cut, then the signed address has expired": {"storage": [f"cut:{2 * CHUNK}"] + ["expired"] * 2},
    "cut, then a log-in page with status 200": {"storage": [f"cut:{2 * CHUNK}", "html"]},
    "cut, then Range is ignored": {"storage": [f"cut:{2 * CHUNK}", "whole"]},
    "a page in the place of the file": {"storage": ["html"]},
    "half the file, without a length": {"storage": ["short"]},
    "cut, then the rest is refused (416)": {"storage": [f"cut:{2 * CHUNK}", "416 for a part"]},
    "packed by gzip though nobody asked": {"storage": ["gzip"] * 2},
    "a page of an error that stalls": {"storage": ["stall page"]},
}
SUBMISSIONS = {
    "the upload is refused (403)": {"upload": ["403"] * 20},
    "the upload is cut at 5 of 6 MB": {"upload": [f"cut:{5 * CHUNK}"]},
    "the upload is cut, no resumption offered": {"upload": [f"cut:{5 * CHUNK}"], "resumable": False},
    "the upload is never answered": {"upload": ["stall"]},
    "the submission is refused with status 200": {"CreateSubmission": ["refused"]},
    "the answer to the submission is lost": {"CreateSubmission": ["stored:drop"]},
    "the answer is lost, and the list is late": {"CreateSubmission": ["stored:drop"], "late": 30},
    "a gateway says 408 of what has arrived": {"CreateSubmission": ["stored:408"], "late": 30},
    "no submission is left today": {"limits": {"numToday": 5}, "CreateSubmission": ["400"]},
    "the scorer rejects the file": {"verdict": {"status": "ERROR", "errorDescription": "Wrong rows"}},
}
PUSHES = {
    "the push is refused": {"verdict": {"error": "Notebook not found"}},
    "the competition is not known": {"verdict": {"invalidCompetitionSources": [COMPETITION]}},
}


def started(command: list) -> tuple[str, str]:
    """How a process ended, and its last line."""
    options = {"capture_output": True, "text": True, "timeout": LIMIT, "check": False}
    try:
        ended = subprocess.run(
            [sys.executable, *map(str, command)], env={**os.environ, "FAKE_NO_SLEEP": "1"}, **options
        )
    except subprocess.TimeoutExpired:
        return "hangs", ""
    lines = [line.strip() for line in (ended.stdout + "\n" + ended.stderr).split("\n") if line.strip()]
    return f"exit code {ended.returncode}", lines[-1].rpartition("\r")[2] if lines else "says nothing"


def ours(*arguments) -> list:
    code = "import sys; from carvana import cli; from carvana.kaggle import client, submit; "
    code += "client.TIMEOUT = 2, 2; submit.POLL = 30; "
    return ["-c", code + "sys.exit(cli.main(sys.argv[1:]))", *arguments]


def bare(*arguments) -> list:
    return ["-m", "kaggle", *arguments]


def told(ending: str, line: str, folder: Path) -> str:
    line = line.replace(str(folder), "").replace("|", "/").replace("<", "‹").replace(">", "›")
    return f"{ending}" + (f": {shorten(line, 180)}" if line and ending != "exit code 0" else "")


def download(fake, folder: Path, who: str) -> str:
    command = bare("competitions", "download", COMPETITION, "-f", "train.zip", "-p", folder)
    if who == "ours":
        command = ours("download", "--data-dir", folder, "--files", "train.zip")
    ways = []
    for _ in range(2):
        ending, line = started(command)
        path = folder / "train.zip"
        state = "no file" if not path.exists() else "file right" if path.read_bytes() == fake.files["train.zip"] else ""
        if not state:
            size = "of full size" if path.stat().st_size == len(fake.files["train.zip"]) else "of another size"
            state = f"**file wrong ({size})**"
        ways.append(f"{told(ending, line, folder)}; {state}")
        if state == "file right":
            break
    return " — run again: ".join(ways) if len(ways) > 1 and ways[0] != ways[1] else ways[0]


def submit(fake, folder: Path, who: str) -> str:
    path, sample = folder / "s.csv", folder / "sample.csv"
    sample.write_text("img,rle_mask\na.jpg,1 1\n")
    path.write_text("img,rle_mask\na.jpg," + " ".join(f"{2 * i + 1} 1" for i in range(6 * CHUNK // 9)) + "\n")
    command = bare("competitions", "submit", COMPETITION, "-f", path, "-m", "try")
    if who == "ours":
        command = ours("submit", path, "-m", "try", "--sample", sample, "--yes", "--submissions-dir", folder)
        command += ["--height", "2000", "--width", "2000"]
    ways = []
    for _ in range(2):
        ending, line = started(command)
        sent = f"{fake.received / path.stat().st_size:.1f} x its size sent"
        ways.append(f"{told(ending, line, folder)}; {len(fake.submissions)} on Kaggle, {sent}")
    return " — run again: ".join(ways)


def push(fake, folder: Path, who: str) -> str:
    profile = folder / "tiny.yaml"
    profile.write_text('run_name: tiny\nencoder_weights: ""\n')
    built = kernels.build(kernels.KernelPlan(profile, "tester", wheels=False), folder / "built")
    command = ours("kernel", "push", built) if who == "ours" else bare("kernels", "push", "-p", built / "kernel")
    return told(*started(command), folder)


def played(act, faults: dict, who: str) -> str:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        guarded(patch, Path(folder)) as fake,
    ):
        fake.files["train.zip"] = zipped(WHOLE * CHUNK)
        for name, value in faults.items():
            if hasattr(fake, name):
                setattr(fake, name, value)
            else:
                fake.faults[name] = list(value)
        place = Path(folder) / "place"
        place.mkdir()
        return act(fake, place, who)


def main() -> None:
    lines = [f"| what breaks | kaggle {metadata.version('kaggle')} | ours |", "|---|---|---|"]
    for title, act, cases in (("Download", download, DOWNLOADS), ("Submission", submit, SUBMISSIONS),
                              ("Kernel", push, PUSHES)):  # fmt: skip
        for case, faults in cases.items():
            lines.append(f"| {title}: {case} | {played(act, faults, 'bare')} | {played(act, faults, 'ours')} |")
            print(lines[-1], flush=True)
    story = f"{__doc__.split('python bench')[0].strip()}\n\nCommand: `.venv/bin/python bench/faults.py`."
    write_text(RESULTS / "faults.md", f"# Faults\n\n{story}\n\n{chr(10).join(lines)}\n")


if __name__ == "__main__":
    main()
