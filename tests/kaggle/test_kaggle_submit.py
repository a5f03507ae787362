import contextlib
import csv
import gzip
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import numpy as np
import pytest
from fake_kaggle import CHUNK, refused

from carvana import cli, files
from carvana.errors import UserError
from carvana.kaggle import client, submit, upload
from carvana.submission import Expected


@pytest.fixture
def sub(tmp_path):
    """Arguments of a good submission of two images of 4 x 5 pixels."""
    ours, sample = tmp_path / "ours.csv", tmp_path / "sample.csv"
    ours.write_text("img,rle_mask\na.jpg,2 3\nb.jpg,1 10\n")
    sample.write_text("img,rle_mask\na.jpg,1 1\nb.jpg,1 1\n")
    entry, expected = submit.Entry(ours, "demo", "r1"), Expected(sample, 4, 5)
    return {"entry": entry, "expected": expected, "submissions_dir": tmp_path / "submissions", "yes": True}


def ledger(sub):
    if not (sub["submissions_dir"] / "ledger.csv").exists():
        return []
    with (sub["submissions_dir"] / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_submit_waits_for_the_score_and_keeps_a_ledger(fake, sub, capfd):
    fake.pending = 2
    row = submit.submit(**sub)
    assert (row["ref"], row["status"]) == ("1000", "complete")
    assert (row["public_score"], row["private_score"]) == ("0.997012", "0.996543")
    assert fake.uploaded == [sub["entry"].path.read_bytes()]
    assert ledger(sub) == [row]
    assert tuple(row) == submit.COLUMNS
    assert (row["run"], row["file"], row["sha256"]) == ("r1", "ours.csv", files.sha256(sub["entry"].path))
    assert row["message"] == fake.submissions[0]["description"]
    assert row["message"].startswith("demo [")
    shown = capfd.readouterr().out
    assert "2 rows, 32.50% of the image masked" in shown
    assert "submissions left today: 4" in shown


def test_the_same_file_is_sent_once_and_another_one_adds_a_row(fake, sub, capfd):
    first = submit.submit(**sub)
    assert submit.submit(**sub) == first
    assert "the same file is submission 1000 already" in capfd.readouterr().out
    assert fake.calls("CreateSubmission") == len(fake.submissions) == len(ledger(sub)) == 1
    sub["entry"].path.write_text("img,rle_mask\na.jpg,2 3\nb.jpg,1 11\n")
    submit.submit(**sub)
    assert [row["ref"] for row in ledger(sub)] == ["1000", "1001"]


def test_a_file_that_was_rejected_may_be_sent_again(fake, sub):
    fake.verdict = {"status": "ERROR", "errorDescription": "no"}
    refused("rejected submission 1000", submit.submit, **sub)
    fake.verdict = {"status": "COMPLETE"}
    assert submit.submit(**sub)["ref"] == "1001"


def test_the_ledger_is_refreshed_and_printed_beside_the_out_of_fold_dice(fake, sub, capfd, tmp_path):
    fake.pending = 99
    submit.submit(**sub, wait_minutes=0)
    fake.pending = 0
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    (run / "scores.csv").write_text("img,car,fold,dice\na,x,0,0.99\nb,y,1,0.98\nc,z,-1,0.5\n")
    places = ["--submissions-dir", str(sub["submissions_dir"]), "--runs-dir", str(tmp_path / "runs")]
    assert cli.main(["ledger", *places, "--offline"]) == 0
    assert "pending" in capfd.readouterr().out
    assert cli.main(["ledger", *places]) == 0
    shown = capfd.readouterr().out
    assert all(text in shown for text in ("r1", "0.985000", "0.997012", "0.996543", "complete"))
    assert ledger(sub)[0]["status"] == "complete"
    (tmp_path / "none").mkdir()
    assert cli.main(["ledger", "--submissions-dir", str(tmp_path / "none")]) == 0
    assert "No submission yet." in capfd.readouterr().out


def test_submit_does_not_wait_longer_than_asked(fake, sub):
    fake.pending = 99
    row = submit.submit(**sub, wait_minutes=0)
    assert (row["status"], row["public_score"]) == ("pending", "")
    assert ledger(sub)[0]["status"] == "pending"


def test_rejected_by_the_scorer(fake, sub):
    fake.verdict = {"status": "ERROR", "errorDescription": "Submission must have 100064 rows"}
    refused("rejected submission 1000: Submission must have 100064 rows", submit.submit, **sub)
    assert ledger(sub)[0]["status"] == "error"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"CreateSubmission": ["refused"]}, "did not take it .You have no submissions left"),
        ({"upload": ["403"]}, "ours.csv: Kaggle's storage refused it .403"),
        ({"CreateSubmission": ["400"]}, "ours.csv: no 400"),
        ({"StartSubmissionUpload": ["403"]}, "Accept the rules"),
    ],
)
def test_a_refused_upload_is_noticed_and_not_repeated(fake, sub, faults, message):
    fake.faults = faults
    refused(message, submit.submit, **sub)
    assert fake.calls("CreateSubmission") <= 1
    assert fake.submissions == []
    assert [row["status"] for row in ledger(sub)] in ([], ["error"])
    assert submit.submit(**sub)["ref"] == "1000"  # nothing was spent, so the same command sends it


def test_when_nothing_can_be_known_the_user_is_told_where_to_look_and_the_next_try_finds_it(fake, sub):
    fake.faults = {"CreateSubmission": ["stored:drop"], "ListSubmissions": ["drop"] * 999}
    expected = r"taken it is unknown .*the line to Kaggle fails.*Look for demo \[\w{8}\] at .*/submissions.*--again"
    refused(expected, submit.submit, **sub)
    assert [row["status"] for row in ledger(sub)] == ["unknown"]
    fake.faults.clear()
    fake.limits = {"numToday": 5}  # a second one would not even be taken
    assert submit.submit(**sub)["ref"] == "1000"
    assert len(fake.submissions) == len(ledger(sub)) == len(fake.uploaded) == 1


@pytest.mark.parametrize("fault", ["drop", "408", "502", "504", "html"])
@pytest.mark.parametrize("late", [0, 30], ids=["listed", "listed late"])
def test_a_lost_answer_is_looked_up_not_sent_twice(fake, sub, fault, late, capfd):
    fake.faults = {"CreateSubmission": [f"stored:{fault}"], "ListSubmissions": ["503"]}
    fake.late = late
    row = submit.submit(**sub)
    assert (row["ref"], row["status"]) == ("1000", "complete")
    assert fake.calls("CreateSubmission") == len(fake.submissions) == len(ledger(sub)) == 1
    assert f"Looking for {row['message']} at {submit.LISTED}" in capfd.readouterr().out


def test_only_again_sends_a_file_anew_whose_fate_stays_unknown(fake, sub):
    fake.faults["CreateSubmission"] = ["drop"]
    for _ in range(2):
        refused("taken it is unknown.*--again", submit.submit, **sub)
    assert (fake.submissions, fake.calls("CreateSubmission"), len(ledger(sub))) == ([], 1, 1)
    sub["entry"] = replace(sub["entry"], again=True)
    assert submit.submit(**sub)["ref"] == "1000"
    assert [row["status"] for row in ledger(sub)] == ["unknown", "complete"]
    assert len({row["message"] for row in ledger(sub)}) == 2  # the earlier one would still be known by its mark


def command(sub):
    expected = ["--sample", sub["expected"].sample, "--height", "4", "--width", "5"]
    options = ["-m", "demo", "--yes", "--submissions-dir", sub["submissions_dir"], *expected]
    return [sys.executable, "-m", "carvana", "submit", sub["entry"].path, *options]


@pytest.mark.parametrize(
    ("phase", "end"),
    [
        ("upload", signal.SIGKILL), ("answer", signal.SIGKILL), ("answer", signal.SIGINT), ("waiting", signal.SIGINT),
        ("waiting", signal.SIGTERM), ("waiting", signal.SIGKILL),
    ],
)  # fmt: skip
def test_the_same_command_twice_is_one_submission_wherever_the_first_ends(fake, sub, phase, end):
    fake.pending = 99
    fake.faults = {"upload": ["stall"]} if phase == "upload" else {}
    fake.faults |= {"CreateSubmission": ["stored:stall"]} if phase == "answer" else {}
    awaited = {"upload": "upload", "answer": "CreateSubmission", "waiting": "ListSubmissions"}[phase]
    process = subprocess.Popen(command(sub), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not fake.calls(awaited):
        os.sched_yield()
    while process.poll() is None:  # Python loses an interruption that comes while it cleans up
        process.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    assert process.returncode in (-end, 1)
    fake.pending = 0
    assert submit.submit(**sub)["status"] == "complete"
    assert submit.submit(**sub)["status"] == "complete"
    assert fake.calls("CreateSubmission") == len(fake.submissions) == len(ledger(sub)) == 1


def test_two_processes_with_the_same_file_send_it_once(fake, sub):
    fake.pending = 0
    both = [subprocess.Popen(command(sub), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert fake.calls("CreateSubmission") == len(fake.submissions) == len(ledger(sub)) == 1


def test_the_command_line_sends_anew_only_with_again(fake, sub, capfd):
    arguments = [str(argument) for argument in command(sub)[3:]]
    for extra in ([], [], ["--again"]):
        assert cli.main(arguments + extra) == 0
    assert [row["ref"] for row in ledger(sub)] == ["1000", "1001"]


def test_a_submission_is_found_far_down_the_list_among_entries_of_states_nobody_knows(fake, sub):
    fake.pending = 99
    submit.submit(**sub, wait_minutes=0)
    fake.pending = 0
    other = {"description": "", "looks": 0, "verdict": {"status": "RESCORING"}}
    fake.submissions[:0] = [other | {"ref": ref} for ref in range(2000, 2045)]
    assert submit.submit(**sub)["status"] == "complete"
    assert fake.calls("CreateSubmission") == 1
    submit.refresh(sub["submissions_dir"])
    assert [row["public_score"] for row in ledger(sub)] == ["0.997012"]


def test_refused_credentials_while_waiting_are_said(fake, sub, capfd):
    fake.faults["ListSubmissions"] = ["401"]
    assert submit.submit(**sub)["status"] == "complete"
    assert "Kaggle refused the credentials" in capfd.readouterr().out


BROKEN = {
    "semicolons": lambda text: text.replace(",", ";"), "no header": lambda text: text.partition("\n")[2],
    "empty": lambda text: "", "latin-1": lambda text: text.replace("demo", "dem\xf6").encode("latin-1"),
    "utf-16": lambda text: text.encode("utf-16"), "binary": lambda text: bytes(range(256)),
    "cut": lambda text: text[:-30], "cut in a quote": lambda text: text[:-30] + '"', "a column gone": lambda text:
    "\n".join(line.rpartition(",")[0] for line in text.splitlines()), "ragged": lambda text: text[:-1] + ",9,9\n",
    "rounded hash": lambda text: re.sub("[0-9a-f]{64}", "6.1E+63", text),
    "a column twice": lambda text: text.replace("time,", "time,time,", 1).replace("\n20", "\n1,20"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_ledger_stops_before_anything_is_spent_and_stays_as_it_is(fake, sub, damage):
    submit.submit(**sub)
    path = sub["submissions_dir"] / "ledger.csv"
    text = BROKEN[damage](path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    sub["entry"].path.write_text("img,rle_mask\na.jpg,2 3\nb.jpg,1 11\n")
    refused(r"ledger.csv .*[Mm]ove it away|ledger.csv .*or move it away", submit.submit, **sub)
    assert fake.calls("CreateSubmission") == 1
    assert path.read_bytes() == before


def test_a_ledger_that_is_a_folder_or_cannot_be_written_stops_before_anything_is_spent(fake, sub, monkeypatch):
    path = sub["submissions_dir"] / "ledger.csv"
    path.mkdir(parents=True)
    refused("ledger.csv cannot be read", submit.submit, **sub)
    path.rmdir()
    monkeypatch.setattr(submit, "write_text", lambda path, text: files.write_text("/proc/none/ledger.csv", text))
    refused("ledger.csv could not be written", submit.submit, **sub)
    assert fake.calls("CreateSubmission") == 0


def test_what_a_person_adds_to_the_ledger_stays(fake, sub):
    submit.submit(**sub)
    path = sub["submissions_dir"] / "ledger.csv"
    with_note = re.sub("(?m)$", ",note", path.read_text().rstrip(), count=1)
    path.write_text("\ufeff" + re.sub("(?m)^(20.*)$", '\\1,"-0.5, René"', with_note), encoding="utf-8")
    sub["entry"].path.write_text("img,rle_mask\na.jpg,2 3\nb.jpg,1 11\n")
    submit.submit(**sub)
    submit.refresh(sub["submissions_dir"])
    assert [(row["ref"], row["note"]) for row in ledger(sub)] == [("1000", "-0.5, René"), ("1001", "")]
    assert all(row["time"].startswith("20") for row in ledger(sub))


def test_what_a_person_adds_to_the_ledger_while_it_waits_stays(fake, sub, monkeypatch):
    path = sub["submissions_dir"] / "ledger.csv"

    def look(*asked):
        if "note" not in path.read_text():
            first, row, *_ = path.read_text().splitlines()
            path.write_text(f"{first},note\n{row},mine\n")
        return listed(*asked)

    listed = client.listed
    monkeypatch.setattr(submit, "listed", look)
    assert submit.submit(**sub)["status"] == "complete"
    assert [(row["status"], row["note"]) for row in ledger(sub)] == [("complete", "mine")]


def test_from_a_folder_below_the_same_file_is_known_to_have_been_sent(fake, sub, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    command = ["submit", str(sub["entry"].path), "-m", "demo", "--sample", str(sub["expected"].sample), "--yes"]
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        assert cli.main([*command, "--height", "4", "--width", "5"]) == 0
    assert fake.calls("CreateSubmission") == len(ledger(sub)) == 1


@pytest.mark.parametrize("message", ["=1+1", "+1", "-1", "@a", "\t=1", "'=1", '=HYPERLINK("x")'])
def test_a_message_is_no_formula_for_a_spreadsheet_and_unchanged_on_kaggle(fake, sub, message):
    sub["entry"] = replace(sub["entry"], message=message, run_name="=r")
    submit.submit(**sub)
    submit.refresh(sub["submissions_dir"])  # reads and writes it once more
    assert fake.submissions[0]["description"].startswith(message)
    assert ledger(sub)[0]["message"].startswith("'" + message.removeprefix("'"))
    assert ledger(sub)[0]["run"] == "'=r"
    assert submit.submit(**sub)["run"] == "=r"


@pytest.fixture
def big(tmp_path):
    path = tmp_path / "big.csv.gz"
    path.write_bytes(os.urandom(5 * CHUNK))
    return path


def send(path):
    api = client.sign_in()
    return submit.send(api, upload.Upload(path))


def test_a_cut_upload_goes_on_where_the_storage_has_it(fake, big):
    fake.faults["upload"] = [f"cut:{CHUNK}", "503", "", "cut:99", "429"]
    assert send(big) == "blob-1"
    assert fake.uploaded == [big.read_bytes()]
    asked = [request.headers.get("Content-Range") for request in fake.requests if request.name == "upload"]
    probe, size = f"bytes */{5 * CHUNK}", 5 * CHUNK
    after = f"bytes {CHUNK}-{size - 1}/{size}", f"bytes {CHUNK + 99}-{size - 1}/{size}"
    assert asked == [None, probe, probe, after[0], probe, probe, after[1]]
    assert fake.received == size
    assert fake.naps == [2, 3, 2, 3]  # Retry-After is heard


def test_where_a_cut_upload_cannot_go_on_it_is_sent_once_more_and_only_once(fake, big, capfd):
    fake.resumable = False
    fake.faults["upload"] = [f"cut:{CHUNK}"]
    send(big)
    assert fake.uploaded == [big.read_bytes()]
    assert "cannot go on where it was cut: once more, in full" in capfd.readouterr().out
    assert fake.calls("StartSubmissionUpload") == 2
    upload.Upload(big).done()
    fake.faults["upload"] = [f"cut:{CHUNK}", "", f"cut:{CHUNK}"]
    refused("breaks again and again", send, big)


def test_an_upload_that_stalls_is_noticed_and_goes_on(fake, big, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", (1, 1))
    fake.faults["upload"] = ["stall"]
    send(big)
    assert fake.uploaded == [big.read_bytes()]


def test_what_an_upload_remembers_is_for_the_owner_alone_and_only_for_that_file(fake, big):
    fake.faults["upload"] = ["503"] * 9
    refused("Upload of .*big.csv.gz: Kaggle is in trouble", send, big)
    note = big.with_name(".big.csv.gz.upload")
    assert note.stat().st_mode & 0o777 == 0o600
    assert upload.Upload(big).cut
    big.write_bytes(b"another")
    assert not upload.Upload(big).cut


def test_a_file_that_is_replaced_while_it_is_uploaded_is_not_sent_as_a_mix(fake, big, monkeypatch):
    fake.faults["upload"] = [f"cut:{CHUNK}"]
    monkeypatch.setattr(time, "sleep", lambda _: big.write_bytes(os.urandom(5 * CHUNK)))  # between two tries
    refused("big.csv.gz was replaced while it was uploaded. Start again", send, big)
    assert fake.uploaded == []


def test_a_file_that_is_replaced_while_it_is_checked_is_not_submitted(fake, sub, monkeypatch):
    def slow(path, expected):
        validation = validate(path, expected)
        path.write_text("img,rle_mask\na.jpg,broken\n")
        return validation

    validate = submit.validate
    monkeypatch.setattr(submit, "validate", slow)
    refused("ours.csv was replaced while it was checked, and is not submitted", submit.submit, **sub)
    assert fake.calls("CreateSubmission") == 0


@pytest.mark.parametrize(("file", "run"), [("v1.2.csv.gz", "v1.2"), ("a.csv", "a")])
def test_the_run_of_a_file_is_its_name_with_all_its_dots(fake, sub, file, run):
    path, expected = sub["entry"].path.with_name(file), sub["expected"]
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as out:
        out.write(sub["entry"].path.read_text())
    places = ["--submissions-dir", str(sub["submissions_dir"]), "--sample", str(expected.sample)]
    sizes = ["--height", str(expected.height), "--width", str(expected.width)]
    assert cli.main(["submit", str(path), "-m", "x", "--yes", *places, *sizes]) == 0
    assert ledger(sub)[0]["run"] == run


def test_a_row_of_another_tool_or_of_a_damaged_run_hides_no_other(fake, sub, tmp_path, capfd):
    submit.submit(**sub | {"entry": replace(sub["entry"], run_name="best,v2")})
    damaged = tmp_path / "runs" / "r2" / "scores.csv"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("img\n")
    sub["entry"].path.write_text("img,rle_mask\na.jpg,2 3\nb.jpg,1 11\n")
    submit.submit(**sub | {"entry": replace(sub["entry"], run_name="r2")})
    places = ["--submissions-dir", str(sub["submissions_dir"]), "--runs-dir", str(tmp_path / "runs")]
    assert cli.main(["ledger", *places, "--offline"]) == 0
    shown = capfd.readouterr().out
    assert "best,v2" in shown and "r2" in shown


def test_a_file_that_is_replaced_while_a_person_confirms_is_not_submitted(fake, sub, monkeypatch):
    def confirm(_):
        sub["entry"].path.write_text("img,rle_mask\na.jpg,2 3 1\nb.jpg,1 11\n")
        return "y"

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", confirm)
    refused("was replaced while it was confirmed", submit.submit, **sub | {"yes": False})
    assert (fake.calls("CreateSubmission"), ledger(sub)) == (0, [])


def test_the_bar_of_an_upload_is_seen(fake, big, capfd):
    fake.faults["upload"] = [f"cut:{CHUNK}"]
    send(big)
    assert re.search(r"uploading: 100%.*5.24M/5.24M", capfd.readouterr().err)


@pytest.mark.parametrize(("said", "advice"), [("a limit of 5 a day", "Wait until the limit"), ("bad rows", "Fix the")])
def test_advice_fits_the_refusal(fake, sub, said, advice):
    fake.verdict = {"status": "ERROR", "errorDescription": said}
    refused(f"{said}. {advice}", submit.submit, **sub)


@pytest.mark.parametrize("size", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_an_upload_cut_five_times_and_killed_costs_no_more_than_a_tenth(fake, big, size):
    big.write_bytes(os.urandom(size * CHUNK))
    cuts = (np.diff(np.sort(np.random.default_rng(size).integers(CHUNK, size * CHUNK, 6))) + 1).tolist()
    fake.faults["upload"] = [fault for cut in cuts[:2] for fault in (f"cut:{cut}", "")]
    code = "import sys; from carvana.kaggle import client, submit, upload; from pathlib import Path; "
    code += "api, path = client.sign_in(), Path(sys.argv[1]); "
    code += "submit.send(api, upload.Upload(path))"
    process = subprocess.Popen([sys.executable, "-c", code, big], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(fake.stored) <= sum(cuts[:2]) + CHUNK:
        os.sched_yield()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    fake.faults["upload"] = ["", *(fault for cut in cuts[2:] for fault in (f"cut:{cut}", ""))]
    send(big)
    assert fake.uploaded == [big.read_bytes()]
    print(f"{size} MB: {fake.received / (size * CHUNK):.4f} of the size received")
    assert fake.received <= 1.1 * size * CHUNK


def test_trouble_while_waiting_does_not_lose_the_submission(fake, sub):
    fake.faults["ListSubmissions"] = ["403", "503"]
    assert submit.submit(**sub)["status"] == "complete"


def test_an_invalid_file_is_refused_before_any_request(fake, sub):
    sub["entry"].path.write_text("img,rle_mask\na.jpg,1 2 3\n")
    refused(r"is not uploaded. run lengths must be pairs.*line 2 \(a.jpg\)", submit.submit, **sub)
    assert fake.requests == []


def test_nothing_is_uploaded_when_the_day_is_over_or_nobody_confirms(fake, sub, monkeypatch):
    sub["yes"] = False
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    refused("nobody is there to confirm", submit.submit, **sub)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    refused("not confirmed", submit.submit, **sub)
    fake.limits = {"numToday": 5, "numTotal": 9}
    refused("no submission is left today", submit.submit, **sub)
    assert fake.calls("StartSubmissionUpload") == 0
    fake.limits = {}  # a team without a submission so far
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert submit.submit(**sub)["status"] == "complete"


def test_the_notebook_asks_for_the_score_until_it_is_there(fake, competition, tmp_path):
    fake.pending = 10**6
    (tmp_path / "submissions").mkdir()
    with gzip.open(tmp_path / "submissions" / "r1.csv.gz", "wb") as file:
        file.write((competition / "truth.csv").read_bytes())
    values = {"data_dir": competition, "runs_dir": tmp_path / "runs", "submissions_dir": tmp_path / "submissions"}
    cells = nbformat.read(files.project_root() / "notebooks" / "06_submit.ipynb", 4).cells

    def run_notebook():  # in this process, where nobody sleeps
        names = {}
        for cell in cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                names |= values | {"run_name": "r1", "submit": True} if cell.id == "parameters" else {}

    for _ in range(2):
        with pytest.raises(UserError, match=r"r1.csv.gz is on Kaggle but has no score yet. The same command asks for"):
            run_notebook()
    fake.pending = 0
    run_notebook()
    assert len(fake.submissions) == 1
