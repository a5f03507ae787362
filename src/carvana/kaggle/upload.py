"""Bytes to Kaggle's storage: a cut or killed upload goes on where it was.

The client would send a cut upload again from its start.
"""

import json
import re
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from carvana.errors import UserError
from carvana.files import atomic, read_json, stamp
from carvana.kaggle.client import call, with_retries
from carvana.parallel import progress


class Upload:
    """A file on its way to Kaggle's storage, noted in a file beside it, so that a killed upload goes on."""

    def __init__(self, path: Path):
        self.path, self.note = path, path.with_name(f".{path.name}.upload")
        self.stamp = stamp(path)
        note = read_json(self.note) if self.note.exists() else {}
        self.cut, self.arrived = note.get("stamp") == self.stamp, 0  # cut: the storage may have a part of it
        self.facts: dict[str, Any] = note if self.cut else {"stamp": self.stamp}

    def send(self, api: Any, area: str, method: str, fields: dict[str, Any]) -> str:
        """Bring every byte there; returns the token that stands for the file.

        area, method, fields: the request that begins an upload, as for `call`, but for the length.
        """
        what, size = f"Upload of {self.path}", self.path.stat().st_size
        with progress(None, "uploading", "B", total=size, unit_scale=True) as bar:  # here, where stderr is seen
            for again in (False, True):
                if "token" not in self.facts:
                    answer = with_retries(what, call, api, area, method, fields | {"contentLength": size})
                    self.facts |= {"token": answer.get("token", ""), "address": answer.get("createUrl", "")}
                    self.save()
                if with_retries(what, self._put, size, bar, grown=lambda: self.arrived):
                    return str(self.facts["token"])
                if not again:
                    bar.write(f"{what} cannot go on where it was cut: once more, in full")
                del self.facts["token"]
                self.cut, self.arrived = False, 0
        raise UserError(f"{what}: the line to Kaggle's storage breaks again and again. Start again later.")

    def save(self) -> None:
        """Note what has been agreed on; only the owner can read it."""
        with atomic(self.note, 0o600) as file:
            file.write(json.dumps(self.facts).encode())

    def done(self) -> None:
        """Forget it."""
        self.note.unlink(missing_ok=True)

    def _put(self, size: int, bar: tqdm) -> bool:
        """One try from where the storage has it; False where it does not say where that is."""
        if stamp(self.path) != self.stamp:
            self.done()
            raise UserError(f"{self.path} was replaced while it was uploaded. Start again.")
        if self.cut:
            where = self._where(size)
            if where is None:
                return False
            self.arrived = where
        self.cut, first = True, self.arrived
        bar.update(first - bar.n)
        if first == size:
            return True
        headers = {"Content-Range": f"bytes {first}-{size - 1}/{size}"} if first else {}
        with self.path.open("rb") as file:
            file.seek(first)
            response = requests.put(self.facts["address"], data=CallbackIOWrapper(bar.update, file), headers=headers)
        return self._taken(response)

    def _where(self, size: int) -> int | None:
        """Bytes that the storage has; None where it does not say."""
        headers = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
        response = requests.put(self.facts["address"], headers=headers)
        if response.status_code in (200, 201):
            return size
        if response.status_code == 308:
            last = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
            return int(last[1]) + 1 if last else 0
        if response.status_code == 429 or response.status_code >= 500:
            response.raise_for_status()
        return None

    def _taken(self, response: requests.Response) -> bool:
        status = response.status_code
        if status in (200, 201):
            return True
        if status in (408, 429) or status >= 500:
            response.raise_for_status()
        if status == 308:
            raise requests.ConnectionError("not all has arrived")
        self.done()
        raise UserError(f"Upload of {self.path}: Kaggle's storage refused it ({status}). Start again later.")
