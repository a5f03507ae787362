"""Trackers: each gets every epoch once, goes on after a kill, and what it does wrong is one line."""

import contextlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import tracking as accelerate
from conftest import trainer_of
from PIL import Image
from safetensors.torch import load_file

from carvana import evaluation, plots
from carvana.evaluation.evaluate import Settings
from carvana.run import Run
from carvana.tracking import Point, Tracking

RECIPE = {"epochs": 4, "validate_every": 2}  # two steps an epoch
KEYS = {"train/loss", "train/lr", "train/speed", "valid/dice", "valid/iou"}


class Recorder(accelerate.GeneralTracker):
    """Any tracker: keeps what it is given, and raises in the method whose turn it is."""

    requires_logging_directory = False
    started, logged, images, fails = [], [], [], ""

    def __init__(self, project, **options):
        super().__init__(_blank=True)
        self.started.append((project, options))
        self.fail("__init__")

    def fail(self, method):
        if method == self.fails:
            raise ConnectionError("no answer from https://me:secret@example.org/api?key=secret\nin 3 s")

    def store_init_configuration(self, values):
        self.logged.append(("recipe", values.get("lr")))

    def log(self, values, step=None):
        self.fail("log")
        self.logged += [(name, step, value) for name, value in values.items()]

    def log_images(self, values, step=None):
        self.images += [(name, step, images.shape) for name, images in values.items()]

    def finish(self):
        self.fail("finish")


@pytest.fixture
def recorder(monkeypatch):
    kind = type("Fresh", (Recorder,), {"started": [], "logged": [], "images": [], "fails": ""})
    monkeypatch.setitem(accelerate.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    return kind


def test_trackers_that_take_one_image_at_a_time_get_them_so(shared_competition, tmp_path, recorder, monkeypatch):
    for name in ("aim", "clearml"):
        monkeypatch.setitem(accelerate.LOGGER_TYPE_TO_CLASS, name, recorder)
    with contextlib.closing(Tracking("aim, clearml", Run(tmp_path, "run"), tmp_path / "fold0")) as tracking:
        tracking.log(0, [Point(0, {"valid/dice": 0.5}, np.zeros((2, 8, 9, 3), np.uint8))])
    assert recorder.images == [(f"overlays/{i}", 0, (8, 9, 3)) for _ in range(2) for i in range(2)]


def test_dvclive_goes_on_in_a_folder_of_the_fold(tmp_path, recorder, monkeypatch):
    monkeypatch.setitem(accelerate.LOGGER_TYPE_TO_CLASS, "dvclive", recorder)
    for fold in ("fold0", "fold1"):
        with contextlib.closing(Tracking("dvclive", Run(tmp_path, "run"), tmp_path / fold)) as tracking:
            tracking.log(0, [Point(0, {"valid/dice": 0.5})])
    options = [{"dir": str(tmp_path / fold / "dvclive"), "resume": True} for fold in ("fold0", "fold1")]
    assert recorder.started == [("carvana", option) for option in options]


@pytest.fixture(scope="module")
def untracked(shared_competition, tmp_path_factory):
    trainer = trainer_of(shared_competition, tmp_path_factory.mktemp("run"), **RECIPE)
    plots.train_live(trainer)
    return trainer


def weights(trainer):
    return load_file(trainer.folder / "last.safetensors")


@pytest.mark.parametrize("method", ["__init__", "log", "finish"])
def test_a_tracker_that_fails_is_one_line_without_secrets_and_changes_no_weight(
    shared_competition, tmp_path, recorder, untracked, capsys, method
):
    recorder.fails = method
    trainer = trainer_of(shared_competition, tmp_path, **RECIPE)
    plots.train_live(trainer, tracker="wandb")
    lines = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    reason = "ConnectionError: no answer from https://example.org/api in 3 s"
    assert lines == [f"tracker wandb failed: {reason}. All else goes on without it."]
    assert trainer.finished and len(recorder.started) == 1
    assert all(torch.equal(tensor, weights(untracked)[name]) for name, tensor in weights(trainer).items())


def test_a_tracker_that_is_not_installed_is_one_line(untracked, tmp_path, monkeypatch, capsys):
    shutil.copytree(untracked.run.folder, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracking = Tracking("wandb", Run(tmp_path, "run"), tmp_path / "run" / "fold0")
    for entry in range(2):
        tracking.log(entry, [Point(entry, {"dice": 0.5})])
    tracking.close()
    told = capsys.readouterr().err
    assert told == "tracker wandb is not installed (pip install wandb). All else goes on without it.\n"


def test_every_epoch_is_logged_once_though_the_training_stops_in_between(shared_competition, tmp_path, recorder):
    for _ in range(3):  # a step each
        trainer = trainer_of(shared_competition, tmp_path, **RECIPE)
        plots.train_live(trainer, max_hours=1e-9, tracker="wandb")
    plots.train_live(trainer, tracker="wandb")
    assert trainer.finished
    history = trainer.history
    for name in ("dice", "iou"):
        _, steps, values = zip(*(entry for entry in recorder.logged if entry[0] == f"valid/{name}"), strict=True)
        assert list(steps) == history["step"].tolist()
        assert list(values) == pytest.approx(history[name].tolist(), abs=1e-12)
    assert [step for name, step, _ in recorder.logged[1:] if name == "train/lr"] == [0, 2, 4, 6, 8]
    assert recorder.logged[0] == ("recipe", 3e-3)
    assert recorder.images == [("overlays", step, (4, 96, 128, 3)) for step in (0, 4, 8)]
    assert len({options["id"] for _, options in recorder.started}) == 1 < len(recorder.started)
    assert {options["resume"] for _, options in recorder.started} == {"allow"}
    assert {options["group"] for _, options in recorder.started} == {tmp_path.name}


def test_a_tracker_that_comes_later_gets_what_was_learnt_before_and_another_fold_is_another_run(
    shared_competition, tmp_path, recorder
):
    for fold in (0, 1):
        trainer = trainer_of(shared_competition, tmp_path, fold, **RECIPE | {"epochs": 1})
        plots.train_live(trainer)
        assert recorder.started == [] or fold
        plots.train_live(trainer, tracker="wandb")
        assert recorder.logged[-1][:2] == ("valid/iou", 2)
    names = [options["name"] for _, options in recorder.started]
    assert names == [f"{tmp_path.name}-fold0", f"{tmp_path.name}-fold1"]
    assert len({options["id"] for _, options in recorder.started}) == 2


def test_losses_are_means_of_twenty_steps_that_end_with_the_epoch(recorder, untracked, monkeypatch):
    losses = np.arange(50.0)
    snapshot = SimpleNamespace(losses=losses, lr=0.1, speed=2.0, logits=None)
    monkeypatch.setattr(plots.training, "read_snapshot", lambda *_: snapshot)
    monkeypatch.setattr(plots.training, "snapshot_epochs", lambda _: [3])
    monkeypatch.setattr(untracked, "steps_per_epoch", 50)
    tracking = Tracking("wandb", untracked.run, untracked.folder)
    plots.training.log_epochs(untracked, tracking)
    tracking.path.unlink()
    expected = [("train/loss", 120, 9.5), ("train/loss", 140, 29.5), ("train/loss", 150, 44.5)]
    assert recorder.logged[1:4] == expected
    assert recorder.logged[4:] == [("train/lr", 150, 0.1), ("train/speed", 150, 2.0)]


def test_tensorboard_shows_the_history_the_recipe_and_the_watched_images(shared_competition, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for hours in (1e-9, 0):
        trainer = trainer_of(shared_competition, tmp_path, **RECIPE)
        plots.train_live(trainer, hours, tracker="tensorboard")
    accumulator = events.EventAccumulator(str(trainer.folder / "carvana"), {"images": 0, "scalars": 0}).Reload()
    assert set(accumulator.Tags()["scalars"]) == KEYS
    history = pd.read_csv(trainer.folder / "history.csv")
    for name in ("dice", "iou"):
        seen = accumulator.Scalars(f"valid/{name}")
        assert [event.step for event in seen] == history["step"].tolist()
        assert [event.value for event in seen] == pytest.approx(history[name].tolist(), abs=1e-7)
    rate = {event.step: event.value for event in accumulator.Scalars("train/lr")}
    assert [rate[step] for step in history["step"]] == pytest.approx(history["lr"].tolist(), abs=1e-9)
    losses = [event.value for event in accumulator.Scalars("train/loss")]
    assert [np.mean(losses[:2]), np.mean(losses[2:])] == pytest.approx(history["loss"].tolist()[1:])
    shown = {tag: [event.step for event in accumulator.Images(tag)] for tag in accumulator.Tags()["images"]}
    assert shown == {"overlays": [0, 4, 8]}  # the four side by side
    recipe = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"bce_dice" in recipe and b"optimizer" in recipe


def test_mlflow_goes_on_in_one_run_a_fold(shared_competition, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    for hours in (1e-9, 0):
        trainer = trainer_of(shared_competition, tmp_path / "run", **RECIPE)
        plots.train_live(trainer, hours, tracker="mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (run.info.run_name, run.info.status, run.data.params["loss"]) == ("run-fold0", "FINISHED", "bce_dice")
    seen = mlflow.MlflowClient().get_metric_history(run.info.run_id, "valid/dice")
    history = trainer.history
    assert [entry.step for entry in seen] == history["step"].tolist()
    assert [entry.value for entry in seen] == pytest.approx(history["dice"].tolist(), abs=1e-12)
    stored = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="images"))
    assert {Image.open(path).size for path in stored.glob("*.png")} == {(128, 96)}
    assert len(list(stored.glob("*.png"))) == 12


def test_scores_are_logged_with_their_intervals_a_point_an_evaluation(tmp_path, recorder):
    scores = pd.DataFrame({"car": list("aabbc"), "fold": [0, 0, 1, 1, -1], "dice": 0.5, "iou": [0.2, 0.4, 0.2, 0.4, 0]})
    for _ in range(2):
        evaluation.log_scores("wandb", Run(tmp_path, "run"), scores, Settings([1.0], 0.6))
    points = [entry for entry in recorder.logged if entry[0] != "recipe"]
    values = {name: value for name, step, value in points if step == 1}
    assert values["threshold"] == 0.6
    assert values["out_of_fold/dice_low"] == values["unseen/dice_mean"] == 0.5
    assert "unseen/dice_low" not in values  # a single car has no interval
    assert values["out_of_fold/iou_mean"] == pytest.approx(0.3)
    assert [step for name, step, _ in points if name == "threshold"] == [0, 1]
    assert len({options["id"] for _, options in recorder.started}) == 1
