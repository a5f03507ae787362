import json

import pytest
from conftest import RECIPE
from fake_kaggle import USER, refused

from carvana import cli
from carvana.kaggle import client, kernels, session

SLUG = f"{USER}/carvana-tiny"
OUTPUT = {"runs/tiny/scores.csv": b"img,dice", "runs/tiny/fold0/best.safetensors": bytes(300), "tiny.csv.gz": b"gz"}


@pytest.fixture
def built(fake, tmp_path):
    profile = tmp_path / "tiny.yaml"
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in (RECIPE | {"run_name": "tiny"}).items()]
    profile.write_text("".join(lines))
    fake.verdict, fake.output = {}, dict(OUTPUT)
    return kernels.build(kernels.KernelPlan(profile, USER, wheels=False), tmp_path / "built")


def wait(built, runs):
    return cli.main(["kernel", "push", str(built), "--wait", "--runs-dir", str(runs)])


def files(runs):
    return {path.relative_to(runs).as_posix(): path.read_bytes() for path in runs.rglob("*") if path.is_file()}


def test_a_session_is_followed_its_output_fetched_and_the_next_step_said(fake, built, tmp_path, capfd):
    fake.sessions, runs = ["COMPLETE", "COMPLETE", "QUEUED", "RUNNING", "RUNNING"], tmp_path / "runs"
    fake.log = json.dumps([{"stream_name": "stdout", "time": 1.0, "data": f"epoch {i}\n"} for i in range(30)])
    assert wait(built, runs) == 0
    shown = capfd.readouterr().out
    assert f"{SLUG}/1: QUEUED, 0.0 hours of 13 at most" in shown and f"{SLUG}/1: RUNNING" in shown
    assert shown.count("epoch 29") == 1 and "epoch 19" not in shown
    assert f'Next: carvana submit {runs}/tiny/tiny.csv.gz -m "MESSAGE"' in shown
    owner = {"tiny/.kaggle": json.dumps(SLUG).encode() + b"\n"}
    assert files(runs) == owner | {
        "tiny/scores.csv": b"img,dice", "tiny/fold0/best.safetensors": bytes(300), "tiny/tiny.csv.gz": b"gz",
    }  # fmt: skip
    asked = [json.loads(request.body) for request in fake.requests if request.name == "GetKernelSessionStatus"]
    assert asked[-1] == {"userName": USER, "kernelSlug": "carvana-tiny", "versionLabel": "v1"}


@pytest.mark.parametrize("cut", ["following", "fetching"])
def test_an_interrupted_wait_is_taken_up_without_a_second_session(fake, built, tmp_path, monkeypatch, cut):
    runs, fake.session = tmp_path / "runs", "RUNNING" if cut == "following" else "COMPLETE"
    name = "_log" if cut == "following" else "_claim"
    kept, calls = getattr(session, name), []

    def interrupted(*values):
        calls.append(values)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*values)

    fake.sessions = ["COMPLETE"] * 2  # of the looks before the push
    monkeypatch.setattr(session, name, interrupted)
    assert wait(built, runs) == 1
    fake.session = "COMPLETE"
    assert wait(built, runs) == 0
    assert fake.calls("SaveKernel") == 1
    assert fake.calls("storage") == len(OUTPUT)
    assert len(files(runs)) == 4
    assert wait(built, runs) == 0  # all has come: a new session, whose files take the place of the old ones
    assert fake.calls("SaveKernel") == 2


def test_what_a_plain_push_has_started_is_followed_also_when_it_has_ended(fake, built, tmp_path, capfd):
    fake.sessions, fake.output["runs/tiny/.lock"] = ["COMPLETE"], b""
    assert cli.main(["kernel", "push", str(built)]) == 0
    assert wait(built, tmp_path / "runs") == 0
    shown = capfd.readouterr().out
    assert "The output of the last push has not been fetched: it comes first, nothing new is started" in shown
    assert "left out" not in shown
    assert fake.calls("SaveKernel") == 1
    assert (tmp_path / "runs" / "tiny" / "scores.csv").exists()


def test_a_version_that_kaggle_does_not_say_is_the_last_one(fake, built, tmp_path):
    fake.verdict = {"versionNumber": 0}
    assert wait(built, tmp_path / "runs") == 0
    asked = [json.loads(request.body) for request in fake.requests if request.name == "GetKernelSessionStatus"]
    assert asked[-1] == {"userName": USER, "kernelSlug": "carvana-tiny"}


def test_what_is_to_be_typed_next_can_be_copied(fake, built, tmp_path, capfd):
    runs = tmp_path / "my runs"
    assert wait(built, runs) == 0
    assert f"Next: carvana submit '{runs}/tiny/tiny.csv.gz' -m" in capfd.readouterr().out


@pytest.mark.parametrize("state", ["queued", "", "newScript"])
def test_a_session_that_waits_is_seen_however_kaggle_writes_it(fake, built, state):
    fake.session = state
    assert kernels.running(built) == SLUG


def test_a_session_that_was_cancelled_has_ended_however_kaggle_writes_it(fake, built, tmp_path):
    fake.sessions, fake.session = ["COMPLETE"] * 2, "cancelAcknowledged"
    refused("ended as CANCEL_ACKNOWLEDGED", session.push_and_wait, built, False, tmp_path / "runs")


def test_a_session_that_runs_already_is_followed(fake, built, tmp_path):
    fake.sessions = ["RUNNING", "RUNNING"]
    assert wait(built, tmp_path / "runs") == 0
    assert fake.calls("SaveKernel") == fake.calls("CreateDatasetVersion") == 0
    assert (tmp_path / "runs" / "tiny" / "scores.csv").exists()


@pytest.mark.parametrize("name", [
    "runs/../../x.csv", "runs/tiny/../../../x", "/runs/tiny/x", "runs//etc/x", "runs/tiny/..\\..\\x", "runs/C:/x",
    "runs/.git/config", "../x.csv.gz", "..csv.gz", "runs/link/x", "runs/tiny/a\nb", "runs/tiny/\x00", "",
])  # fmt: skip
def test_no_name_leads_out_of_the_folder(fake, built, tmp_path, name):
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    runs.mkdir()
    outside.mkdir()
    (runs / "link").symlink_to(outside)
    (outside / ".kaggle").write_text(json.dumps(SLUG))
    before = {path for path in tmp_path.rglob("*") if "built" not in path.parts}
    fake.output = {name: b"foreign", "runs/tiny/scores.csv": b"ours"}
    assert wait(built, runs) == 0
    after = {path for path in tmp_path.rglob("*") if "built" not in path.parts} - before
    assert after == {runs / "tiny", runs / "tiny" / ".kaggle", runs / "tiny" / "scores.csv"}


def test_a_run_of_this_machine_stays(fake, built, tmp_path, capfd):
    mine = tmp_path / "runs" / "tiny" / "scores.csv"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert wait(built, tmp_path / "runs") == 1
    assert "tiny is another run, and stays. Give --runs-dir" in capfd.readouterr().err
    assert mine.read_bytes() == b"mine"
    assert wait(built, tmp_path / "other") == 0
    assert fake.calls("SaveKernel") == 1


def test_a_failed_session_is_told_and_what_it_left_is_fetched(fake, built, tmp_path):
    fake.sessions, fake.session, fake.log = ["COMPLETE"] * 2, "ERROR", "Traceback\nUserError: no data\n"
    text = refused("carvana-tiny/1 ended as ERROR", session.push_and_wait, built, False, tmp_path / "runs")
    assert "--resume" in text
    assert (tmp_path / "runs" / "tiny" / "scores.csv").exists()


def test_trouble_while_it_is_looked_at_is_waited_for_but_not_for_ever(fake, built, tmp_path, capfd, monkeypatch):
    fake.faults["ListKernelSessionOutput"] = ["503"] * client.TRIES
    assert wait(built, tmp_path / "runs") == 0
    assert "no look (The output of tester/carvana-tiny: Kaggle is in trouble" in capfd.readouterr().out
    fake.faults["ListKernelSessionOutput"] = ["401"] * (session.FAILURES - 1)
    tokens = []
    monkeypatch.setattr(session, "sign_in", lambda: tokens.append(1) or client.sign_in())
    assert wait(built, tmp_path / "runs") == 0
    assert len(tokens) > session.FAILURES  # one of which is new
    fake.faults["ListKernelSessionOutput"] = ["401"] * session.FAILURES
    refused("refused the credentials", session.push_and_wait, built, False, tmp_path / "runs")


def test_a_wait_ends(fake, built, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "HOURS", 1)
    fake.sessions, fake.session = ["COMPLETE"] * 2, "RUNNING"
    refused("is RUNNING after 1 hours", session.push_and_wait, built, False, tmp_path / "runs")


def test_an_address_that_has_expired_is_said_and_the_same_command_goes_on(fake, built, tmp_path):
    fake.faults["storage"] = ["", "expired"]
    refused("best.safetensors: the address .* expired", session.push_and_wait, built, False, tmp_path / "runs")
    assert wait(built, tmp_path / "runs") == 0
    assert (fake.calls("SaveKernel"), len(files(tmp_path / "runs"))) == (1, 4)


def test_half_a_file_never_gets_its_name(fake, built, tmp_path, monkeypatch):
    fake.faults["storage"] = ["cut:3", "html", "503"]
    fake.output = {"runs/tiny/x.bin": bytes(3000)}
    assert wait(built, tmp_path / "runs") == 0
    assert files(tmp_path / "runs").keys() == {"tiny/.kaggle", "tiny/x.bin"}
    assert (tmp_path / "runs" / "tiny" / "x.bin").read_bytes() == bytes(3000)
    monkeypatch.setattr(client, "LONGEST_ANSWER", (2000, 120))
    for kind in ("html", "json"):  # here a page is the file
        fake.output, fake.faults["storage"] = {f"runs/tiny/report.{kind}": bytes(5000)}, [f"as {kind}"]
        assert wait(built, tmp_path / "runs") == 0
        assert (tmp_path / "runs" / "tiny" / f"report.{kind}").read_bytes() == bytes(5000)
