import base64
import csv
import io
import json
import os
import socket
import sys
import time
import zipfile
from pathlib import Path

import pytest
import requests
from fake_kaggle import CHUNK, KEY, USER, guarded, hide_credentials

from carvana import cli, files, kaggle_api, transfer
from carvana import ledger as books
from carvana.files import UserError

NAMES = ("train.zip", *transfer.TABLES, "test.zip")


def zipped(size: int = 3000) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("picture.jpg", os.urandom(size))
    return data.getvalue()


@pytest.fixture
def fake(monkeypatch, tmp_path, capfd):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with guarded(monkeypatch, tmp_path) as fake:
        fake.naps = naps
        fake.files |= {name: zipped() for name in NAMES}
        yield fake
    for request in fake.requests:
        basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        wanted = (None,) if request.name in ("storage", "upload") else (basic, f"Bearer {KEY}")
        assert request.headers.get("Authorization") in wanted  # the key goes to the service alone
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def sub(tmp_path):
    """Arguments of a good submission of two pictures of 4 x 5 pixels."""
    ours, sample = tmp_path / "ours.csv", tmp_path / "sample.csv"
    ours.write_text("img,rle_mask\na.jpg,2 3\nb.jpg,1 10\n")
    sample.write_text("img,rle_mask\na.jpg,1 1\nb.jpg,1 1\n")
    where = {"path": ours, "sample": sample, "submissions_dir": tmp_path / "submissions"}
    return {**where, "message": "demo", "run": "r1", "yes": True, "height": 4, "width": 5}


def refused(expected, call, *values, **options):
    with pytest.raises(UserError, match=expected) as caught:
        call(*values, **options)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert "signature" not in str(caught.value)
    return str(caught.value)


def ledger(sub):
    with (sub["submissions_dir"] / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_net_holds(fake):
    with pytest.raises(AssertionError, match="tried to reach api.kaggle.com"):
        socket.create_connection(("api.kaggle.com", 443), timeout=1)
    with pytest.raises(AssertionError, match="tried to reach"):
        socket.socket().connect(("192.0.2.1", 443))
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get("https://api.kaggle.com", timeout=1)
    endpoint = kaggle_api.client().build_kaggle_client().http_client()._endpoint
    assert endpoint == f"http://127.0.0.1:{fake.port}"


def test_listing_takes_all_pages(fake):
    sizes = transfer.list_files(kaggle_api.client())
    assert sizes == {name: len(content) for name, content in fake.files.items()}
    assert fake.calls("ListDataFiles") == 3


def test_download_then_skip(fake, data):
    paths = transfer.download(data)
    assert [path.name for path in paths] == list(NAMES)
    assert all(path.read_bytes() == fake.files[path.name] for path in paths)
    entries = json.loads((data / "download.json").read_text())
    assert [(entry["name"], entry["size"]) for entry in entries] == [(n, len(fake.files[n])) for n in NAMES]
    assert entries[0]["sha256"] == files.sha256(data / "train.zip")
    assert sorted(path.name for path in data.rglob("*") if path.is_file()) == sorted([*NAMES, "download.json"])
    assert fake.calls("storage") == 6
    assert transfer.download(data) == paths
    assert fake.calls("storage") == 6


def test_what_was_put_there_by_hand_is_kept_if_sound_and_replaced_if_not(fake, data):
    data.mkdir()
    (data / "train.zip").write_bytes(fake.files["train.zip"])
    (data / "test.zip").write_bytes(bytes(len(fake.files["test.zip"])))  # the right size alone does not do
    transfer.download(data, ["train.zip", "test.zip"])
    assert fake.calls("storage") == 1
    assert (data / "test.zip").read_bytes() == fake.files["test.zip"]
    (data / "test.zip").write_bytes(b"changed since")
    transfer.download(data, ["train.zip", "test.zip"])
    assert fake.calls("storage") == 2


def test_high_quality_and_names_with_or_without_zip(fake, data):
    fake.files = {"train_hq.zip": zipped(), "test_hq.zip": zipped(), **fake.files}
    assert transfer.download(data, hq=True)[0].name == "train_hq.zip"
    assert transfer.download(data, ["metadata.csv"])[0].name == "metadata.csv.zip"
    fake.files["plain.csv"] = zipped(500)  # listed as the file, served as a zip of it
    fake.sizes["plain.csv"] = 500
    assert transfer.download(data, ["plain.csv.zip"])[0].name == "plain.csv.zip"
    calls = fake.calls("storage")
    (data / "download.json").unlink()
    transfer.download(data, ["plain.csv"])
    assert fake.calls("storage") == calls


def test_unknown_file(fake, data):
    expected = 'trian.zip is no file of the competition, did you mean "train.zip"'
    refused(expected, transfer.download, data, ["trian.zip"])
    assert fake.calls("DownloadDataFile") == 0


def test_a_listing_without_sizes(fake, data):
    fake.sizes["train.zip"] = 0
    assert [path.name for path in transfer.download(data, ["train.zip"])] == ["train.zip"]


def test_full_disk_is_noticed_before_the_download(fake, data):
    fake.sizes["test.zip"] = 1 << 60
    refused("are needed and .* are free", transfer.download, data)
    assert fake.calls("DownloadDataFile") == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("401", "refused the credentials of the environment variables KAGGLE_USERNAME and KAGGLE_KEY"),
        ("403", f"Accept the rules at {kaggle_api.PAGE}/rules"),
        ("404", "does not know it"),
    ],
)
@pytest.mark.parametrize("call", ["ListDataFiles", "DownloadDataFile"])
def test_refusals_are_final_and_explained(fake, data, call, status, message):
    fake.faults[call] = [status]
    text = refused(message, transfer.download, data, ["train.zip"])
    assert text.startswith("The list of files" if call == "ListDataFiles" else "train.zip")
    assert f"no {status}" in text
    assert fake.calls(call) == 1
    assert not (data / "train.zip").exists()


def test_trouble_is_waited_for(fake, data):
    fake.faults = {"ListDataFiles": ["429", "503", "html"], "DownloadDataFile": ["drop", "500"]}
    transfer.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    assert fake.naps[:3] == [3, 3, 8]  # what the server asks for, then our own


def test_trouble_that_stays_is_reported(fake, data):
    fake.faults["ListDataFiles"] = ["503"] * 9
    refused("The list of files: Kaggle is in trouble .503: no 503", transfer.download, data)
    assert fake.calls("ListDataFiles") == kaggle_api.TRIES
    fake.faults["ListDataFiles"] = ["drop"] * 9
    refused("The list of files: the line to Kaggle fails .ConnectionError", transfer.download, data)


def test_a_server_that_never_answers(fake, data, monkeypatch):
    monkeypatch.setattr(kaggle_api, "TIMEOUT", (1, 0.1))
    fake.faults["ListDataFiles"] = ["stall"] * 9
    refused("the line to Kaggle fails .ReadTimeout", transfer.download, data)


def test_a_broken_line_goes_on_where_it_broke(fake, data):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    fake.faults["storage"] = [f"cut:{CHUNK + 5000}", f"cut:{2 * CHUNK + 9000}"]
    transfer.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    ranges = [request.headers.get("Range") for request in fake.requests if request.name == "storage"]
    assert ranges == [None, f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"]


def test_tries_are_counted_anew_while_it_progresses(fake, data):
    fake.files["train.zip"] = zipped(30 * CHUNK)
    fake.at_once = CHUNK + 9  # and the client alone goes on five times
    transfer.download(data, ["train.zip"])
    assert fake.calls("DownloadDataFile") > kaggle_api.TRIES
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]


@pytest.mark.parametrize("fault", ["short", "html"])
def test_half_a_file_or_a_page_is_never_taken_for_the_file(fake, data, fault):
    fake.faults["storage"] = [fault]
    transfer.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    fake.faults["storage"] = [fault] * 30
    refused("test.zip: what arrived is broken: not a zip file", transfer.download, data, ["test.zip"])
    assert not (data / "test.zip").exists()
    assert "test.zip" not in (data / "download.json").read_text()


def test_an_error_page_behind_a_part_spoils_nothing(fake, data):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    fake.faults["storage"] = [f"cut:{CHUNK + 5000}", "expired", "html"]
    transfer.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]


def test_an_expired_address_is_asked_for_anew(fake, data):
    fake.faults["storage"] = ["expired"]
    transfer.download(data, ["train.zip"])
    assert fake.calls("DownloadDataFile") == 2
    fake.faults["storage"] = ["expired"] * 9
    refused("test.zip: Kaggle is in trouble", transfer.download, data, ["test.zip"])


def test_no_credentials(monkeypatch, tmp_path):
    home = hide_credentials(monkeypatch, tmp_path)
    refused("No Kaggle credentials.*kaggle.json.example", transfer.download, tmp_path)
    (home / ".kaggle" / "kaggle.json").write_text((Path(__file__).parents[1] / "kaggle.json.example").read_text())
    refused("still holds the example", kaggle_api.credentials_source)
    (home / ".kaggle" / "kaggle.json").write_text('{"username": "a"}')
    refused("must hold username and key", kaggle_api.credentials_source)
    (home / ".kaggle" / "kaggle.json").write_text("{broken")
    refused("kaggle.json cannot be read as JSON", kaggle_api.credentials_source)


def test_where_credentials_come_from(monkeypatch, tmp_path):
    folder = hide_credentials(monkeypatch, tmp_path) / ".kaggle"
    (folder / "credentials.json").write_text("{}")
    assert kaggle_api.credentials_source() == str(folder / "credentials.json")
    (folder / "kaggle.json").write_text(json.dumps({"username": "a", "key": KEY}))
    assert kaggle_api.credentials_source() == str(folder / "kaggle.json")
    monkeypatch.setenv("KAGGLE_USERNAME", "b")
    refused("KAGGLE_USERNAME is not the user", kaggle_api.credentials_source)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert "KAGGLE_USERNAME and KAGGLE_KEY" in kaggle_api.credentials_source()
    (folder / "access_token").write_text(KEY)
    assert kaggle_api.credentials_source() == str(folder / "access_token")
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    assert "KAGGLE_API_TOKEN" in kaggle_api.credentials_source()


def test_key_file_is_read_anew_in_the_same_process(fake, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "kaggle.json").write_text(json.dumps({"username": "carol", "key": "x1"}))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(folder))
    assert kaggle_api.client().config_values["username"] == "carol"


def test_a_token_that_kaggle_does_not_take(fake, monkeypatch):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    transfer.list_files(kaggle_api.client())
    for status in ("403", "401"):  # the client tells them apart, a user need not
        fake.faults["IntrospectToken"] = [status]
        refused("refused the credentials of the environment variable KAGGLE_API_TOKEN", kaggle_api.client)
    monkeypatch.setattr(kaggle_api, "TIMEOUT", (1, 0.1))
    fake.faults["IntrospectToken"] = ["stall"]
    refused("Signing in: the line to Kaggle fails", kaggle_api.client)


def test_a_client_that_cannot_be_imported(fake, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "six", None)
    refused("Package kaggle does not work .*six.*requirements.txt", kaggle_api.client)


def test_the_client_is_quiet_and_time_outs_do_not_stay(fake, capfd):
    send = requests.adapters.HTTPAdapter.send
    transfer.list_files(kaggle_api.client())
    assert capfd.readouterr() == ("", "")
    assert requests.adapters.HTTPAdapter.send is send


def test_submit_waits_for_the_score_and_keeps_a_ledger(fake, sub, capfd):
    fake.pending = 2
    row = kaggle_api.submit(**sub)
    assert (row["ref"], row["status"]) == (1000, "complete")
    assert (row["public_score"], row["private_score"]) == ("0.997012", "0.996543")
    assert fake.uploaded == [sub["path"].read_bytes()]
    assert ledger(sub) == [{**row, "ref": "1000"}]
    assert tuple(row) == books.COLUMNS
    assert (row["run"], row["file"], row["sha256"]) == ("r1", "ours.csv", files.sha256(sub["path"]))
    assert row["message"] == fake.submissions[0]["description"]
    assert row["message"].startswith("demo [")
    shown = capfd.readouterr().out
    assert "2 rows, 32.50% of the picture masked" in shown
    assert "submissions left today: 4" in shown
    kaggle_api.submit(**sub)
    assert [entry["ref"] for entry in ledger(sub)] == ["1000", "1001"]


def test_the_ledger_is_refreshed_and_printed_beside_the_out_of_fold_dice(fake, sub, capfd, tmp_path):
    fake.pending = 99
    kaggle_api.submit(**sub, wait_minutes=0)
    fake.pending = 0
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    (run / "scores.csv").write_text("img,fold,dice\na,0,0.99\nb,1,0.98\nc,-1,0.5\n")
    places = ["--submissions-dir", str(sub["submissions_dir"]), "--runs-dir", str(tmp_path / "runs")]
    assert cli.main(["ledger", *places, "--offline"]) == 0
    assert "pending" in capfd.readouterr().out
    assert cli.main(["ledger", *places]) == 0
    shown = capfd.readouterr().out
    assert all(text in shown for text in ("r1", "0.985000", "0.997012", "0.996543", "complete"))
    assert ledger(sub)[0]["status"] == "complete"
    assert cli.main(["ledger", "--submissions-dir", str(tmp_path / "none")]) == 0
    assert "No submission yet." in capfd.readouterr().out


def test_submit_does_not_wait_longer_than_asked(fake, sub):
    fake.pending = 99
    row = kaggle_api.submit(**sub, wait_minutes=0)
    assert (row["status"], row["public_score"]) == ("pending", "")
    assert ledger(sub)[0]["status"] == "pending"


def test_rejected_by_the_scorer(fake, sub):
    fake.verdict = {"status": "ERROR", "errorDescription": "Submission must have 100064 rows"}
    refused("rejected submission 1000: Submission must have 100064 rows", kaggle_api.submit, **sub)
    assert ledger(sub)[0]["status"] == "error"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"CreateSubmission": ["refused"]}, "did not take it .You have no submissions left"),
        ({"upload": ["403"]}, "did not take it .Could not submit to competition"),
        ({"CreateSubmission": ["400"]}, "ours.csv: no 400"),
        ({"StartSubmissionUpload": ["403"]}, "Accept the rules"),
        ({"CreateSubmission": ["drop"]}, "did not take it .*submissions"),
    ],
)
def test_a_refused_upload_is_noticed_and_not_repeated(fake, sub, faults, message):
    fake.faults = faults
    refused(message, kaggle_api.submit, **sub)
    assert fake.calls("CreateSubmission") <= 1
    assert fake.submissions == []
    assert not (sub["submissions_dir"] / "ledger.csv").exists()


def test_when_nothing_can_be_known_the_user_is_told_where_to_look(fake, sub):
    fake.faults = {"CreateSubmission": ["lost"], "ListSubmissions": ["drop"] * 9}
    refused(r"Whether \[\w{8}\] has arrived at .*/submissions is unknown: the line", kaggle_api.submit, **sub)
    assert len(fake.submissions) == 1


def test_a_lost_answer_is_looked_up_not_sent_twice(fake, sub):
    fake.faults = {"CreateSubmission": ["lost"], "ListSubmissions": ["503"]}
    row = kaggle_api.submit(**sub)
    assert (row["ref"], row["status"]) == (1000, "complete")
    assert fake.calls("CreateSubmission") == len(fake.submissions) == len(ledger(sub)) == 1


def test_trouble_while_waiting_does_not_lose_the_submission(fake, sub):
    fake.faults["ListSubmissions"] = ["403", "503"]
    assert kaggle_api.submit(**sub)["status"] == "complete"


def test_an_invalid_file_is_refused_before_any_request(fake, sub):
    sub["path"].write_text("img,rle_mask\na.jpg,1 2 3\n")
    refused(r"is not uploaded. run lengths must be pairs.*line 2 \(a.jpg\)", kaggle_api.submit, **sub)
    assert fake.requests == []


def test_nothing_is_uploaded_when_the_day_is_over_or_nobody_confirms(fake, sub, monkeypatch):
    sub["yes"] = False
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    refused("nobody is there to confirm", kaggle_api.submit, **sub)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    refused("not confirmed", kaggle_api.submit, **sub)
    fake.limits = {"numToday": 5, "numTotal": 9}
    refused("no submission is left today", kaggle_api.submit, **sub)
    assert fake.calls("StartSubmissionUpload") == 0
    fake.limits = {}  # a team without a submission so far
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert kaggle_api.submit(**sub)["status"] == "complete"
