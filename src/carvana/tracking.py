"""Trackers such as TensorBoard, Weights & Biases or MLflow, through Accelerate's classes, and never in their way."""

import contextlib
import math
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic's demand on Python 3.11

from carvana.errors import UserError
from carvana.files import parse_list, read_json, write_json
from carvana.run import Run

PROJECT = "carvana"  # under which a tracker keeps all runs


class Point(NamedTuple):
    """What is logged at one step: numbers by name, where they are finite, and images (n, H, W, 3) uint8."""

    step: int
    values: dict[str, float]
    images: np.ndarray | None = None


class Note(TypedDict):
    """What tracker.json holds: the id of this part of the run, and how many entries each tracker has."""

    id: str
    logged: dict[str, int]


class Tracking:
    """Logs numbered entries of one part of a run, each entry once to each tracker, whatever is killed in between.

    names: the parameter `tracker`. folder: of the part, a fold or the evaluation; deleted with it, the part begins
    anew. A tracker that is not installed or fails says so in one line and is left alone: nothing here raises.
    """

    def __init__(self, names: str, run: Run, folder: Path):
        self.run, self.folder, self.path = run, folder, folder / "tracker.json"
        self.trackers: dict[str, Any] = dict.fromkeys(parse_list(names))  # None: not started yet
        self.note: Note = {"id": uuid.uuid4().hex, "logged": {}}
        with contextlib.suppress(UserError):
            self.note = read_json(self.path, Note)

    def lacking(self, entry: int) -> list[str]:
        """The trackers that wait for an entry."""
        return [name for name in self.trackers if self.note["logged"].get(name, 0) <= entry]

    def log(self, entry: int, points: list[Point]) -> None:
        """Log the points of an entry, in the order of their steps, where they are not logged yet."""
        for name in self.lacking(entry):
            with self._in_one_line(name):
                self.trackers[name] = self.trackers[name] or self._start(name)
                for step, values, images in points:
                    if images is not None:
                        _log_images(name, self.trackers[name], images, step)
                    finite = {key: value for key, value in values.items() if math.isfinite(value)}
                    self.trackers[name].log(finite, step=step)
                self.note["logged"][name] = entry + 1
                write_json(self.path, self.note)

    def close(self) -> None:
        """End what has been started."""
        for name, tracker in list(self.trackers.items()):
            with self._in_one_line(name):
                if tracker:
                    tracker.finish()

    def _start(self, name: str) -> Any:
        write_json(self.path, self.note)  # before anybody hears of the id
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(PROJECT, *[str(self.folder)][: kind.requires_logging_directory], **self._options(name))
        tracker.start()
        recipe = self.run.note("run").get("parameters", {})
        if name == "tensorboard":  # Accelerate would show its recipe as a run of its own
            tracker.tracker.add_hparams(recipe, {}, run_name=".")
        elif not self.note["logged"].get(name):
            tracker.store_init_configuration(recipe)
        return tracker

    def _options(self, name: str) -> dict[str, Any]:
        """What makes a tracker go on in the run that this part has begun, and group it with the others."""
        group, identity = self.run.name, self.note["id"]
        title = f"{group}-{self.folder.name}"
        if name == "wandb":
            return {"id": identity, "resume": "allow", "name": title, "group": group, "dir": str(self.folder)}
        if name == "trackio":
            return {"name": f"{title}-{identity[:6]}", "resume": "allow", "group": group}
        if name == "dvclive":  # which would begin anew in one folder for all
            return {"dir": str(self.folder / "dvclive"), "resume": True}
        if name == "mlflow":
            import mlflow

            wanted = {"filter_string": f"tags.carvana = '{identity}'", "output_format": "list"}
            begun = [run.info.run_id for run in mlflow.search_runs(search_all_experiments=True, **wanted)]
            return {"run_name": title, "run_id": (begun or [None])[0], "tags": {"carvana": identity, "group": group}}
        return {}

    @contextlib.contextmanager
    def _in_one_line(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever another's code may raise
            del self.trackers[name]
            line = re.sub(r"(?<=//)[^/\s]*@|\?\S+", "", " ".join(f"{type(error).__name__}: {error}".split()))[:200]
            reason = f"is not installed (pip install {name})" if isinstance(error, ImportError) else f"failed: {line}"
            tqdm.write(f"tracker {name} {reason}. All else goes on without it.\n", sys.stderr, end="")


def _log_images(name: str, tracker: Any, images: np.ndarray, step: int) -> None:
    if name == "mlflow":
        import mlflow

        for i, image in enumerate(images):
            mlflow.log_image(image, key=f"overlays/{i}", step=step)
    elif name in ("aim", "clearml"):  # take one image at a time
        tracker.log_images({f"overlays/{i}": image for i, image in enumerate(images)}, step=step)
    elif hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if name == "tensorboard" else {}
        tracker.log_images({"overlays": images}, step=step, **layout)
