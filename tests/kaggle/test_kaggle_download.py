import base64
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_kaggle import CHUNK, NAMES, refused, zipped

from carvana import files
from carvana.kaggle import client, download


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_listing_takes_all_pages(fake):
    sizes = download.list_files(client.sign_in())
    assert sizes == {name: len(content) for name, content in fake.files.items()}
    assert fake.calls("ListDataFiles") == 3


def test_download_then_skip(fake, data):
    paths = download.download(data)
    assert [path.name for path in paths] == list(NAMES)
    assert all(path.read_bytes() == fake.files[path.name] for path in paths)
    entries = json.loads((data / "download.json").read_text())
    assert [(entry["name"], entry["size"]) for entry in entries] == [(n, len(fake.files[n])) for n in NAMES]
    assert entries[0]["sha256"] == files.sha256(data / "train.zip")
    left = sorted(path.name for path in data.rglob("*") if path.is_file())
    assert left == sorted([*NAMES, "download.json", "lock"])
    assert fake.calls("storage") == 6
    assert download.download(data) == paths
    assert fake.calls("storage") == 6


def test_what_was_unpacked_is_not_fetched_and_this_is_said(fake, data, capfd):
    download.download(data)
    (data / "test.zip").unlink()
    (data / "test").mkdir()
    download.download(data)
    assert f"{data}: unpacked, so not fetched: test.zip. To have one again: --files NAME" in capfd.readouterr().out
    assert not (data / "test.zip").exists()


def test_what_was_put_there_by_hand_is_kept_if_sound_and_replaced_if_not(fake, data):
    data.mkdir()
    (data / "train.zip").write_bytes(fake.files["train.zip"])
    (data / "test.zip").write_bytes(bytes(len(fake.files["test.zip"])))  # the right size alone does not do
    download.download(data, ["train.zip", "test.zip"])
    assert fake.calls("storage") == 1
    assert (data / "test.zip").read_bytes() == fake.files["test.zip"]
    (data / "test.zip").write_bytes(b"changed since")
    download.download(data, ["train.zip", "test.zip"])
    assert fake.calls("storage") == 2


def test_zips_that_were_attached_or_copied_are_read_through(data):
    data.mkdir()
    whole = zipped(3000)
    (data / "train.zip").write_bytes(whole)
    assert download.verify(data) == [data / "train.zip"]
    (data / "train.zip").write_bytes(whole[:1000] + bytes(9) + whole[1009:])
    refused("train.zip is broken: picture.jpg. Download it again", download.verify, data)


def test_high_quality_and_names_with_or_without_zip(fake, data):
    fake.files = {"train_hq.zip": zipped(), "test_hq.zip": zipped(), **fake.files}
    assert download.download(data, hq=True)[0].name == "train_hq.zip"
    assert download.download(data, ["metadata.csv"])[0].name == "metadata.csv.zip"
    fake.files["plain.csv"] = zipped(500)  # listed as the file, served as a zip of it
    fake.sizes["plain.csv"] = 500
    assert download.download(data, ["plain.csv.zip"])[0].name == "plain.csv.zip"
    calls = fake.calls("storage")
    (data / "download.json").unlink()
    download.download(data, ["plain.csv"])
    assert fake.calls("storage") == calls


def test_unknown_file(fake, data):
    expected = 'trian.zip is no file of the competition, did you mean "train.zip"'
    refused(expected, download.download, data, ["trian.zip"])
    assert fake.calls("DownloadDataFile") == 0


def test_a_listing_without_sizes(fake, data):
    fake.sizes["train.zip"] = 0
    assert [path.name for path in download.download(data, ["train.zip"])] == ["train.zip"]


def test_half_a_table_of_unknown_size_is_fetched_anew(fake, data):
    fake.files["plain.csv"], fake.sizes["plain.csv"] = b"img,rle_mask\n" * CHUNK, 0
    fake.faults["storage"] = [f"cut:{CHUNK}"] + ["503"] * 9
    refused("plain.csv: Kaggle is in trouble", download.download, data, ["plain.csv"])
    fake.faults.clear()
    download.download(data, ["plain.csv"])
    assert (data / "plain.csv").read_bytes() == fake.files["plain.csv"]


def test_full_disk_is_noticed_before_the_download(fake, data):
    fake.sizes["test.zip"] = 1 << 60
    refused("are needed and .* are free", download.download, data)
    assert fake.calls("DownloadDataFile") == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("401", "refused the credentials of the environment variables KAGGLE_USERNAME and KAGGLE_KEY"),
        ("403", f"Accept the rules at {client.PAGE}/rules"),
        ("404", "does not know it"),
    ],
)
@pytest.mark.parametrize("call", ["ListDataFiles", "DownloadDataFile"])
def test_refusals_are_final_and_explained(fake, data, call, status, message):
    fake.faults[call] = [status]
    text = refused(message, download.download, data, ["train.zip"])
    assert text.startswith("The list of files" if call == "ListDataFiles" else "train.zip")
    assert f"no {status}" in text
    assert fake.calls(call) == 1
    assert not (data / "train.zip").exists()


def test_trouble_is_waited_for(fake, data):
    fake.faults = {"ListDataFiles": ["429", "503", "html"], "DownloadDataFile": ["drop", "500"]}
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    assert fake.naps[:3] == [3, 3, 8]  # what the server asks for, then our own


def test_trouble_that_stays_is_reported(fake, data):
    fake.faults["ListDataFiles"] = ["503"] * 9
    refused("The list of files: Kaggle is in trouble .503: no 503", download.download, data)
    assert fake.calls("ListDataFiles") == client.TRIES
    fake.faults["ListDataFiles"] = ["drop"] * 9
    refused("The list of files: the line to Kaggle fails .ConnectionError", download.download, data)


def test_a_server_that_never_answers(fake, data, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", (1, 0.1))
    fake.faults["ListDataFiles"] = ["stall"] * 9
    refused("the line to Kaggle fails .ReadTimeout", download.download, data)


def test_a_broken_line_goes_on_where_it_broke(fake, data):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    fake.faults["storage"] = [f"cut:{CHUNK + 5000}", f"cut:{2 * CHUNK + 9000}"]
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    asked = [request.headers for request in fake.requests if request.name == "storage"]
    firsts = [int(headers.get("Range", "bytes=0-")[6:-1]) for headers in asked]
    lost = np.array([CHUNK + 5000, 2 * CHUNK + 9000]) - firsts[1:]
    assert firsts[0] == 0 and (lost >= 0).all() and (lost < download.PIECE).all()
    assert asked[1]["If-Range"] == f'"{zlib.crc32(fake.files["train.zip"])}"'


def test_tries_are_counted_anew_while_it_progresses(fake, data):
    fake.files["train.zip"] = zipped(12 * CHUNK)
    fake.at_once = CHUNK + 9
    download.download(data, ["train.zip"])
    assert fake.calls("storage") > 2 * client.TRIES
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]


@pytest.mark.parametrize(
    ("fault", "reason"), [("short", "is broken: not a zip file"), ("html", "a page arrived instead of the file")]
)
def test_half_a_file_or_a_page_is_never_taken_for_the_file(fake, data, fault, reason):
    fake.faults["storage"] = [fault]
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    fake.faults["storage"] = [fault] * 30
    refused(f"test.zip: .*{reason}", download.download, data, ["test.zip"])
    assert not (data / "test.zip").exists()
    assert "test.zip" not in (data / "download.json").read_text()


@pytest.mark.parametrize("faults", [
    ["expired", "html"], ["shifted"], ["whole"], ["503", "short"], ["drop"],
    ["416 for a part"] * 3, ["gzip", "gzip"], ["206 unasked"],  # a part that cannot go on starts anew
])  # fmt: skip
def test_what_comes_behind_a_part_never_spoils_it(fake, data, faults):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    fake.faults["storage"] = [f"cut:{CHUNK + 5000}", *faults]
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]


def test_a_file_that_changes_on_the_server_is_begun_anew(fake, data, monkeypatch):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    fake.faults["storage"] = [f"cut:{CHUNK + 5000}"] + ["503"] * 9
    refused("train.zip: Kaggle is in trouble", download.download, data, ["train.zip"])
    fake.faults.clear()
    fake.files["train.zip"] = zipped(3 * CHUNK)  # of the same size
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]


def test_a_disk_that_fills_on_the_way_keeps_what_has_come(fake, data, monkeypatch):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    taken = io.BufferedWriter.write

    class Full(io.BufferedWriter):
        def write(self, piece):
            if self.tell() > CHUNK:
                raise OSError(errno.ENOSPC, "No space left on device")
            return taken(self, piece)

    def opened(path, mode="r", *values, **options):
        file = usual(path, mode, *values, **options)
        return Full(file.detach()) if path.parent.name == ".download" and mode == "wb" else file

    usual = Path.open
    monkeypatch.setattr(Path, "open", opened)
    refused("train.zip: the disk is full. Free space and start again", download.download, data, ["train.zip"])
    monkeypatch.setattr(Path, "open", usual)
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    assert fake.sent < 1.7 * len(fake.files["train.zip"])


def test_a_second_download_into_the_same_folder_waits_for_the_first(fake, data):
    fake.files["train.zip"] = zipped(3 * CHUNK)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(download.download, data, ["train.zip"]) for _ in range(2)]
    assert [found.result() for found in both] == [[data / "train.zip"]] * 2
    assert fake.calls("storage") == 1


def killed_download(data: Path, after: int) -> None:
    """A process that downloads train.zip, killed once `after` bytes are there."""
    command = [sys.executable, "-m", "carvana", "download", "--data-dir", data, "--files", "train.zip"]
    process, part = subprocess.Popen(command, stderr=subprocess.DEVNULL), data / ".download" / "train.zip"
    while process.poll() is None and not (part.exists() and part.stat().st_size >= after):
        os.sched_yield()
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("size", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_five_cuts_and_a_kill_cost_no_more_than_a_tenth(fake, data, size):
    fake.files["train.zip"] = zipped(size * CHUNK)
    cuts = np.sort(np.random.default_rng(size).integers(CHUNK, size * CHUNK, 5))
    fake.faults["storage"] = [f"cut:{cut}" for cut in cuts[:2]]
    killed_download(data, (cuts[1] + cuts[2]) // 2)
    fake.faults["storage"] = [f"cut:{cut}" for cut in cuts[2:]]
    download.download(data, ["train.zip"])
    assert files.sha256(data / "train.zip") == hashlib.sha256(fake.files["train.zip"]).hexdigest()
    print(f"{size} MB: {fake.sent / len(fake.files['train.zip']):.4f} of the size sent")
    assert fake.sent <= 1.1 * len(fake.files["train.zip"]) + 8 * CHUNK * (size < 100)  # what a socket holds at a kill


def test_an_expired_address_is_asked_for_anew(fake, data):
    fake.faults["storage"] = ["expired"]
    download.download(data, ["train.zip"])
    assert fake.calls("DownloadDataFile") == 2
    fake.faults["storage"] = ["expired"] * 9
    refused("test.zip: Kaggle is in trouble", download.download, data, ["test.zip"])


@pytest.mark.parametrize("fault", ["stall page", "cut page", "endless page"])
def test_an_error_page_that_does_not_end_is_one_line_without_the_address(fake, data, fault, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", (1, 0.2))
    monkeypatch.setattr(client, "LONGEST_ANSWER", (1 << 16, 5))
    fake.faults["storage"] = [fault]
    download.download(data, ["train.zip"])
    assert (data / "train.zip").read_bytes() == fake.files["train.zip"]
    fake.faults["storage"] = [fault] * 99
    refused("test.zip: ", download.download, data, ["test.zip"])


def test_a_gap_of_minutes_is_waited_for_and_said(fake, data, capfd):
    fake.faults = {"DownloadDataFile": ["drop"] * (client.TRANSFER_TRIES - 1)}
    download.download(data, ["train.zip"])
    assert sum(fake.naps) > 180
    assert "train.zip: no answer to use (ConnectionError); try 2 of 9 in 2 s" in capfd.readouterr().out


def test_a_file_that_does_not_end_is_given_up(fake, data, monkeypatch):
    monkeypatch.setattr(download, "LONGEST", CHUNK)
    fake.files["plain.csv"], fake.sizes["plain.csv"] = bytes(9 * CHUNK), 0
    refused("plain.csv: what arrives does not end", download.download, data, ["plain.csv"])
    assert not (data / "plain.csv").exists()


@pytest.mark.parametrize("error", [EOFError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), NotImplementedError()])
def test_a_zip_that_cannot_be_tested_is_broken(data, error, monkeypatch):
    data.mkdir()
    (data / "train.zip").write_bytes(zipped())

    def broken(_):
        raise error

    monkeypatch.setattr(download.zipfile.ZipFile, "testzip", broken)
    refused("train.zip is broken: .*Download it again", download.verify, data)


def test_two_files_of_one_name_are_refused_before_either_comes(fake, data):
    fake.files = {"a/x.csv": b"1", "b/x.csv": b"2"}
    refused("two of a/x.csv, b/x.csv would get the same name", download.download, data, ["a/x.csv", "b/x.csv"])
    assert fake.calls("DownloadDataFile") == 0


def test_a_list_that_does_not_end_is_given_up(fake, data, monkeypatch):
    fake.page_size, numbers = 1, iter(range(10**9))

    def page(body):
        return {"files": [{"name": f"{next(numbers)}.csv"}], "nextPageToken": f"{next(numbers)}"}

    monkeypatch.setattr(fake, "listdatafiles", page)
    monkeypatch.setattr(client, "PAGES", 9)
    assert len(download.list_files(client.sign_in())) == 9


def test_a_wait_for_another_process_is_said_and_ends(tmp_path, capfd):
    def waiting():
        with files.locked(tmp_path / "lock", "a download", 0):
            pytest.fail("two hold the lock")

    held = files.locked(tmp_path / "lock", "a download"), files.locked(tmp_path / "lock", "a download")
    with held[0], held[1], ThreadPoolExecutor() as pool:  # another thread waits as another process would
        refused("a download of another process has not ended", pool.submit(waiting).result)
    assert "waiting for a download of another process, 0 hours at most" in capfd.readouterr().out
    with files.locked(tmp_path / "lock", "a download", 0):
        assert (tmp_path / "lock").exists()


def test_a_byte_at_a_time_is_given_up_and_what_came_is_kept(fake, data, monkeypatch):
    monkeypatch.setattr(client, "SLOWEST", (1000, 0.2))
    fake.faults["storage"] = ["slow"] * 9
    refused("train.zip: [0-9]+ bytes a second come. Check the network", download.download, data, ["train.zip"])
    assert fake.calls("storage") == 1  # no try of many that each take minutes
    assert 0 < (data / ".download" / "train.zip").stat().st_size < 1000


def test_a_file_of_unknown_size_has_the_hash_that_the_storage_says(fake, data):
    fake.files["plain.csv"], fake.sizes["plain.csv"] = b"img,rle_mask\n", 0
    md5 = base64.b64encode(hashlib.md5(b"img,rle_mask\n").digest()).decode()
    fake.goog_hash = f"crc32c=AAAAAA==,md5={md5}"
    download.download(data, ["plain.csv"])
    (data / "plain.csv").unlink()
    fake.goog_hash = f"crc32c=AAAAAA==,md5={base64.b64encode(bytes(16)).decode()}"
    refused("plain.csv: .*another MD5 than Kaggle's storage says", download.download, data, ["plain.csv"])
    assert not (data / "plain.csv").exists()
