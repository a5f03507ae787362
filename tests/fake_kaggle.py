"""A small Kaggle on 127.0.0.1, and the net that keeps the real client away from the real service.

    with guarded(monkeypatch, tmp_path) as fake:
        fake.files["train.zip"] = b"..."
        fake.faults["ListDataFiles"] = ["503"]     # what goes wrong with the next calls, in this order

The client runs unchanged over HTTP. Three layers hold it here: no home and no variable with real credentials, proxies
that lead nowhere, and sockets that refuse every address but the own machine.
"""

import contextlib
import gzip
import io
import json
import os
import re
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from confined.sitecustomize import block_network

import carvana
from carvana import submission
from carvana.errors import UserError
from carvana.kaggle import download

USER, KEY = "tester", "0f00ba12SECRETKEYdeadbeef"
CONFINED = Path(__file__).parent / "confined"
CHUNK = 1 << 20

NAMES = ("train.zip", *download.TABLES, "test.zip")


SDK = Path(find_spec("kagglesdk").submodule_search_locations[0])
METHODS = {  # service/method of all that Kaggle answers, as the client's own classes ask for it
    "/".join(names)
    for path in SDK.glob("*/services/*.py")
    for names in re.findall(r'\.call\(\s*"([\w.]+)",\s*"(\w+)"', path.read_text())
}


class Request(NamedTuple):
    method: str
    name: str  # the API method, or the path
    headers: dict
    body: bytes


class FakeKaggle:
    """State of the service; the handler below only speaks HTTP."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}  # where the listing says something else than the file
        self.page_size = 2
        self.faults: dict[str, list[str]] = {}
        self.requests: list[Request] = []
        self.submissions: list[dict] = []
        self.verdict = {"status": "COMPLETE", "publicScore": "0.997012", "privateScore": "0.996543"}
        self.pending = 1  # looks until the verdict
        self.late = 0  # looks until the list shows a new submission
        self.limits = {"numToday": 1, "numTotal": 7, "numAllowedNow": 4}
        self.dataset: dict = {}
        self.kernels: list[dict] = []
        self.session = "COMPLETE"  # of the last version of the kernel
        self.sessions: list[str] = []  # its states before that, one a look
        self.output: dict[str, bytes] = {}  # files that it left
        self.log = ""
        self.goog_hash = ""  # what the storage says of a file
        self.stored = bytearray()  # of the upload under way
        self.uploaded: list[bytes] = []
        self.resumable, self.turn = True, 0
        self.score = lambda file: self.verdict  # of an uploaded file
        self.at_once = 1 << 40  # bytes until the line breaks
        self.sent = self.received = 0  # bytes of files from and to the storage
        self.port = 0
        self.stalled = threading.Event()  # set at the end, so that no thread is left behind

    def calls(self, name: str) -> int:
        return sum(request.name == name for request in self.requests)

    def fault(self, name: str) -> str:
        plan = self.faults.get(name, [])
        return plan.pop(0) if plan else ""

    def listdatafiles(self, body: dict) -> dict:
        first = int(body.get("pageToken") or 0)
        names = list(self.files)
        page = [
            {"name": name, "totalBytes": self.sizes.get(name, len(self.files[name]))}
            for name in names[first : first + self.page_size]
        ]
        more = first + self.page_size < len(names)
        return {"files": page, "nextPageToken": str(first + self.page_size) if more else ""}

    def startsubmissionupload(self, body: dict) -> dict:
        self.stored.clear()
        return {"token": "blob-1", "createUrl": f"http://localhost:{self.port}/upload/1?signature=abc"}

    def createsubmission(self, body: dict) -> dict:
        ref = 1000 + len(self.submissions)
        entry = {"ref": ref, "description": body["submissionDescription"], "looks": 0}
        self.submissions.insert(0, entry | {"verdict": self.score(self.uploaded[-1])})
        return {"message": "Successfully submitted", "ref": ref}

    def listsubmissions(self, body: dict) -> dict:
        first = (body.get("page", 1) - 1) * body["pageSize"]
        for entry in self.submissions if first == 0 else ():
            entry["looks"] += 1
        listed = [entry for entry in self.submissions if entry["looks"] > self.late]
        return {"submissions": [self.shown(entry) for entry in listed[first : first + body["pageSize"]]]}

    def shown(self, entry: dict) -> dict:
        verdict = entry["verdict"] if entry["looks"] > self.late + self.pending else {"status": "PENDING"}
        return {"ref": entry["ref"], "description": entry["description"], **verdict}

    def getsubmissionlimits(self, body: dict) -> dict:
        return self.limits

    def getdatasetstatus(self, body: dict) -> dict:
        return {"status": "READY"}

    def startblobupload(self, body: dict) -> dict:
        self.stored.clear()
        return {"token": body["name"], "createUrl": f"http://localhost:{self.port}/upload/1?signature=abc"}

    def createdataset(self, body: dict) -> dict:
        self.dataset = body
        return {"ref": f"{body['ownerSlug']}/{body['slug']}", "status": "Ok"}

    def createdatasetversion(self, body: dict) -> dict:
        self.dataset = body
        return {"status": "Ok"}

    def savekernel(self, body: dict) -> dict:
        self.kernels.append(body)
        return {"ref": body["slug"], "url": "http://localhost/x", "versionNumber": len(self.kernels), **self.verdict}

    def getkernelsessionstatus(self, body: dict) -> dict:
        return {"status": self.sessions.pop(0) if self.sessions else self.session}

    def listkernelsessionoutput(self, body: dict) -> dict:
        first, entries = int(body.get("pageToken") or 0), []
        for i, content in enumerate(self.output.values()):
            self.files[f"output-{i}"] = content  # by number: the names lead anywhere
            entries.append(f"http://localhost:{self.port}/storage/output-{i}?signature=abc")
        page = [{"fileName": name, "url": url} for name, url in zip(self.output, entries, strict=True)]
        last = first + self.page_size
        return {"files": page[first:last], "log": self.log, "nextPageToken": str(last) if page[last:] else ""}

    def introspecttoken(self, body: dict) -> dict:
        return {"active": True, "username": USER}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def fake(self) -> FakeKaggle:
        return self.server.fake

    def note(self, name: str) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.requests.append(Request(self.command, name, dict(self.headers), body))
        return body

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("X-Kaggle-APIVersion", "9.9.9")  # makes the client print that it is old
        self.end_headers()
        self.wfile.write(body)

    def go_wrong(self, fault: str) -> bool:
        """Faults that any request may meet; True when one was played."""
        if fault.isdigit():
            message = {"code": int(fault), "message": f"no {fault}"}
            self.answer(int(fault), json.dumps(message).encode(), Retry_After="3")
        elif fault == "html":
            self.answer(200, b"<html>please log in</html>", "text/html")
        elif fault == "drop":
            self.close_connection = True
        elif fault == "stall":
            self.fake.stalled.wait(20)
            self.close_connection = True
        else:
            return False
        return True

    def do_POST(self):
        name = self.path.rsplit("/", 1)[-1]
        known = "/".join(self.path.split("/")[-2:]) in METHODS
        body = json.loads(self.note(name) or b"{}")
        fault = self.fake.fault(name) if known else "404"
        if self.go_wrong(fault):
            return
        if name == "DownloadDataFile":
            where = f"http://localhost:{self.fake.port}/storage/{body['fileName']}?signature=abc"
            self.answer(302, b"", Location=where)
            return
        if fault == "refused":
            self.answer(200, json.dumps({"message": "You have no submissions left", "ref": 0}).encode())
            return
        reply = getattr(self.fake, name.lower())(body)
        if self.go_wrong(fault.removeprefix("stored:")):  # it was done, but the answer does not say so
            return
        self.answer(200, json.dumps(reply).encode())

    def do_PUT(self):
        """Storage that takes a file, also in pieces: `Content-Range: bytes */SIZE` asks what is there."""
        asked, length = self.headers.get("Content-Range", ""), int(self.headers["Content-Length"])
        fault, stored = self.fake.fault("upload"), self.fake.stored
        self.fake.requests.append(Request("PUT", "upload", dict(self.headers), b""))
        if self.go_wrong(fault):
            self.close_connection = True  # the body was not read
            return
        if asked.startswith("bytes */") and not self.fake.resumable:
            self.answer(404, b"")
            return
        if not asked.startswith("bytes */"):
            self.fake.turn = turn = self.fake.turn + 1  # what an older request still has on the way does not count
            del stored[int(asked[6:].split("-")[0]) if asked else 0 :]
            left = min(length, int(fault[4:])) if fault.startswith("cut:") else length
            while left and (piece := self.rfile.read(min(CHUNK // 8, left))) and self.fake.turn == turn:
                stored += piece
                left, length = left - len(piece), length - len(piece)
                self.fake.received += len(piece)
            if length:
                self.close_connection = True
                return
        if asked and len(stored) < int(asked.rpartition("/")[2]):
            self.answer(308, b"", **({"Range": f"bytes=0-{len(stored) - 1}"} if stored else {}))
            return
        self.fake.uploaded.append(bytes(stored))
        self.answer(200, b"")

    def do_GET(self):
        self.note("storage")
        fault = self.fake.fault("storage")
        whole = self.fake.files[self.path.split("?")[0].removeprefix("/storage/")]
        if fault in ("stall page", "cut page", "endless page"):
            self.break_off_a_page(fault)
        elif fault == "416" or (fault == "416 for a part" and "Range" in self.headers):
            self.answer(416, b"")
        elif fault == "gzip":
            packed = gzip.compress(whole)
            stop = len(packed) // 2 if self.fake.faults["storage"] else len(packed)
            self.send_response(200)
            for name, value in {"Content-Encoding": "gzip", "Content-Length": len(packed), "ETag": '"z"'}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(packed[:stop])
            self.close_connection = True
        elif fault == "slow":
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            for at in range(len(whole)):
                self.wfile.write(whole[at : at + 1])
                self.fake.stalled.wait(0.02)
        elif fault.startswith("as "):
            self.answer(200, whole, f"application/{fault[3:]}")
        elif fault == "expired":
            self.answer(403, b"<Error>Request has expired</Error>", "application/xml")
        elif fault == "short":  # no length, so the client cannot notice
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
        elif not self.go_wrong(fault):
            self.send_range(whole, fault)

    def break_off_a_page(self, fault: str) -> None:
        """An error page that is cut, stalls or does not end."""
        self.send_response(500 if fault == "endless page" else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        self.wfile.write(b"{")
        if fault == "stall page":
            self.fake.stalled.wait(20)
        while fault == "endless page":
            self.wfile.write(bytes(CHUNK))
        self.close_connection = True

    def send_range(self, whole: bytes, fault: str) -> None:
        """The body from Range on; promised whole, but the line breaks at "cut:N", or it is not what was asked for."""
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        tag = f'"{zlib.crc32(whole)}"'
        if fault == "whole" or self.headers.get("If-Range", tag) != tag:
            first = 0
        first -= 7 * (fault == "shifted")
        unasked = fault == "206 unasked"
        self.send_response(206 if first or unasked else 200)
        for name, value in {"ETag": tag, "Accept-Ranges": "bytes", "Content-Type": "application/zip"}.items():
            self.send_header(name, value)
        if first or unasked:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        if self.fake.goog_hash:
            self.send_header("x-goog-hash", self.fake.goog_hash)
        self.send_header("Last-Modified", "Mon, 24 Jul 2017 00:00:00 GMT")
        self.send_header("Content-Length", str(len(whole) - first))
        self.end_headers()
        stop = int(fault[4:]) if fault.startswith("cut:") else len(whole)
        stop = min(stop, first + self.fake.at_once)
        for at in range(first, stop, CHUNK):
            self.fake.sent += self.wfile.write(whole[at : min(at + CHUNK, stop)])
        self.close_connection = stop < len(whole)


def hide_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home and none of the variables that the client reads; returns the home."""
    for name in [name for name in os.environ if name.startswith("KAGGLE") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    for name, value in {"HOME": home, "KAGGLE_CONFIG_DIR": home / ".kaggle"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return home


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that hangs up is what the tests are about."""


@contextlib.contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A running `FakeKaggle` which is all that the client, with a false key, can reach."""
    hide_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    block_network(monkeypatch.setattr)
    server = Server(("127.0.0.1", 0), Handler)
    server.fake = fake = FakeKaggle()
    fake.port = server.server_address[1]
    monkeypatch.setenv("FAKE_KAGGLE_PORT", str(fake.port))  # for the processes that a test starts
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CONFINED), str(Path(carvana.__file__).parents[1])]))
    from kagglesdk import kaggle_env  # has no side effects, unlike kaggle

    for name in kaggle_env._env_to_endpoint:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, name, f"http://127.0.0.1:{fake.port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.stalled.set()
        server.shutdown()
        server.server_close()
        thread.join()


def serve(fake: FakeKaggle, competition: Path) -> None:
    """Offer a competition's folder as Kaggle does, as zips, and score what is submitted with its truth."""
    for name in NAMES:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for path in sorted(competition.glob(f"{name.removesuffix('.zip')}*")):
                for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.suffix == ".csv" else []:
                    archive.write(file, file.relative_to(competition))
        fake.files[name] = data.getvalue()

    def score(file: bytes) -> dict:
        path = competition / "submitted.csv.gz"
        path.write_bytes(file)
        dice = submission.score(path, competition / "truth.csv")["dice"].mean()
        return {"status": "COMPLETE", "publicScore": f"{dice:.6f}", "privateScore": f"{dice:.6f}"}

    fake.score, fake.pending = score, 0


def zipped(size: int = 3000) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("picture.jpg", os.urandom(size))
    return data.getvalue()


def refused(expected, call, /, *values, **options):
    with pytest.raises(UserError, match=expected) as caught:
        call(*values, **options)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert "signature" not in str(caught.value)
    return str(caught.value)
