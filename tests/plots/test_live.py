"""Training that one watches: one output each, drawn from files, and none of it changes what is learnt."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import begun, trainer_of
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.colors import to_rgb
from safetensors.torch import load_file

from carvana.data import Competition
from carvana.data.images import read_full_image
from carvana.parallel import Processes
from carvana.plots import overlays, style
from carvana.plots import training as live
from carvana.training import Recipe, Trainer
from carvana.training.launch import train
from carvana.training.state import read_snapshot, snapshot_epochs

RECIPE = {"epochs": 4, "validate_every": 2}


@pytest.fixture(scope="module")
def watched(shared_competition, tmp_path_factory):
    """A fold that was trained under the eyes of a notebook, and the messages that it sent there."""
    InteractiveShell.instance()
    trainer = trainer_of(shared_competition, tmp_path_factory.mktemp("run"), **RECIPE)
    with capture_output() as captured:
        history = live.train_live(trainer)
    yield trainer, history, captured
    InteractiveShell.clear_instance()  # else all later trainings of this process draw too


def test_watching_changes_nothing_that_is_learnt(watched, shared_competition, tmp_path):
    trainer, history, _ = watched
    alone = train(trainer_of(shared_competition, tmp_path, **RECIPE))
    measured = ["seconds", "speed"]
    pd.testing.assert_frame_equal(history.drop(columns=measured), alone.drop(columns=measured))
    actual, expected = (load_file(folder / "last.safetensors") for folder in (trainer.folder, tmp_path / "fold0"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_notebook_gets_three_outputs_that_are_renewed_in_place(watched):
    *_, captured = watched
    first = [shown for shown in captured._outputs if not shown["update"]]
    assert len(first) == 3
    ids = {shown["transient"]["display_id"] for shown in first}
    assert {shown["transient"]["display_id"] for shown in captured._outputs} == ids
    assert captured.stderr == ""  # bars are in the first output
    last = [shown["data"] for shown in captured._outputs if "image/png" not in shown["data"]][-1]["text/plain"]
    assert "100%|" in last and "\n" not in last
    assert [shown["data"]["image/png"][1:4] for shown in captured._outputs[-2:]] == [b"PNG", b"PNG"]


def test_every_epoch_is_kept_with_its_losses_rate_speed_and_the_same_images(watched):
    trainer, history, _ = watched
    assert snapshot_epochs(trainer.folder) == [0, 1, 2, 3, 4]
    snapshots = [read_snapshot(trainer.folder, epoch) for epoch in range(5)]
    assert [len(snapshot.losses) for snapshot in snapshots] == [0, 2, 2, 2, 2]
    late = np.concatenate([snapshot.losses for snapshot in snapshots[3:]])
    assert late.mean() == pytest.approx(history["loss"].iloc[-1])
    assert snapshots[4].lr == history["lr"].iloc[-1]
    assert snapshots[4].speed == pytest.approx(history["speed"].iloc[-1], abs=0.01)
    bare = read_snapshot(trainer.folder, 4, with_logits=False)
    assert bare.logits.size == 0 and bare.lr == snapshots[4].lr and np.array_equal(bare.losses, snapshots[4].losses)
    assert len(trainer.preview_rows) == 4 and set(trainer.preview_rows) <= set(trainer.valid_rows)


def test_kept_logits_are_those_of_the_network_that_is_scored(watched):
    trainer, *_ = watched
    kept = read_snapshot(trainer.folder, 4).logits
    predicted = trainer.validator.predict(trainer.state.network, trainer.preview_rows)
    logits = np.stack([of_row for _, of_row in predicted])
    assert np.abs(kept - logits.clip(-7.9, 7.9)).max() <= 0.5 / 16 + 0.04  # clipped at 127 / 16


def test_curves_say_what_the_files_hold(watched):
    trainer, history, _ = watched
    loss, dice, rate, pace = live.training_curves(trainer).axes
    assert loss.lines[-1].get_xdata().tolist() == [0.5, 1.5, 2.5, 3.5]
    assert dice.get_title(loc="left").startswith(f"Best Dice {history['dice'].max():.6f}")
    assert rate.lines[0].get_ydata()[-1] == history["lr"].iloc[-1]
    assert np.isnan(pace.lines[0].get_ydata()[0]) and (pace.lines[0].get_ydata()[1:] > 0).all()


def test_the_strip_has_a_row_an_image_and_a_column_an_epoch(watched):
    trainer, *_ = watched
    axes = [ax for ax in live.edge_strip(trainer).axes if ax.images]
    row = trainer.preview_rows[0]
    epochs = [f"epoch {i}" for i in (1, 2, 3, 4)]
    assert [ax.get_title() for ax in axes[:6]] == [trainer.samples["img"].iloc[row][:-4], "before training", *epochs]
    assert len(axes) == 24
    image, target = trainer.source[row]
    window = overlays.densest(overlays.edge_pixels(target > 127), live.STRIP_SHARE)
    assert np.array_equal(axes[0].images[0].get_array(), image[window])


def test_training_that_was_stopped_goes_on_with_the_same_strip(watched, shared_competition, tmp_path):
    trainer, *_ = watched
    stopped = trainer_of(shared_competition, tmp_path, **RECIPE)
    save, stopped.state.save = stopped.state.save, lambda: None  # a state takes a second
    for _ in range(4):
        train(stopped, max_hours=1e-9)  # a step each
    stopped.state.save = save
    train(stopped, max_hours=1e-9)
    again = trainer_of(shared_competition, tmp_path, **RECIPE)
    assert snapshot_epochs(again.folder) == [0, 1, 2] and again.state.step == 5
    (again.folder / "watch" / "0003.npz").write_bytes(b"of a step that a kill took back")
    with capture_output():
        live.train_live(again)
    assert snapshot_epochs(again.folder) == [0, 1, 2, 3, 4]
    for epoch in range(5):
        kept, expected = (read_snapshot(folder, epoch) for folder in (again.folder, trainer.folder))
        assert np.array_equal(kept.logits, expected.logits)
        assert np.array_equal(kept.losses, expected.losses) and kept.lr == expected.lr


def test_a_script_trains_without_a_display(shared_competition, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(live, "get_ipython", lambda: None)
    assert len(live.train_live(trainer_of(shared_competition, tmp_path, epochs=1))) == 2
    shown = capfd.readouterr()
    assert "100%|" in shown.err
    assert "Figure" not in shown.out


@pytest.mark.slow
def test_training_in_processes_of_its_own_is_watched_from_its_files(shared_competition, tmp_path):
    InteractiveShell.instance()
    run = begun(shared_competition, tmp_path / "run", batch_size=2)
    chosen = Recipe.from_parameters(run.parameters())
    trainer = Trainer(run, Competition(shared_competition), chosen, 0, processes=Processes(2))
    with capture_output() as captured:
        live.train_live(trainer)
    assert snapshot_epochs(trainer.folder) == [0, 1, 2]
    assert len([shown for shown in captured._outputs if not shown["update"]]) == 3
    assert "%|" not in captured.stderr


def test_what_is_no_progress_bar_stays_on_stderr(capsys):
    shown = live.LiveDisplay(SimpleNamespace(), None)
    shown.write("a warning\n")
    assert capsys.readouterr().err == "a warning\n"


def test_the_densest_place_is_around_the_marked_pixels_and_inside_the_image():
    marked = np.zeros((40, 60), bool)
    marked[30:34, 50:54] = True
    rows, columns = overlays.densest(marked, 0.25)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (10, 15)
    assert marked[rows, columns].sum() == 16
    marked[:], marked[0, 0] = False, True
    assert overlays.densest(marked, 0.25) == (slice(0, 10), slice(0, 15))


def test_hesitations_are_framed_and_tinted(shared_competition):
    images = Competition(shared_competition).train_images
    probability = np.zeros((96, 126), np.float32)
    probability[:, :60], probability[40:44, 56:60] = 1, 0.5
    figure = overlays.hesitations(images, {images.names[0]: "title"}, [probability])
    whole, place = [ax for ax in figure.axes if ax.images]
    image = read_full_image(images, images.names[0])
    assert np.array_equal(whole.images[0].get_array(), image)
    rows, columns = overlays.densest(probability == 0.5)
    tinted = place.images[0].get_array()[41 - rows.start, 57 - columns.start]
    assert np.allclose(tinted, 0.4 * image[41, 57] + 0.6 * 255 * np.array(to_rgb(style.HIGHLIGHT_COLOUR)), atol=1)
    frame = whole.patches[-1]
    assert frame.get_x() <= 56 and frame.get_x() + frame.get_width() >= 60
    assert "100% of the pixels" in figure.get_suptitle()
    assert place.images[0].get_array().shape == (12, 16, 3)
    low = overlays.hesitations(images, {images.names[0]: "title"}, [0.45 * (probability == 1)], threshold=0.4)
    assert [len(ax.collections) for ax in low.axes if ax.images][0] == len(whole.collections) == 1
