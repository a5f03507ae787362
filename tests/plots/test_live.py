"""Training that one watches: one output each, drawn from files, and none of it changes what is learnt."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.colors import to_rgb
from safetensors.torch import load_file
from test_training import begun, fold_of

from carvana.data import competition as photos
from carvana.data import dataset, folds
from carvana.files import read_json
from carvana.plots import explore as figures
from carvana.plots import training as live
from carvana.training import trainer as training
from carvana.training.recipe import Recipe

RECIPE = {"epochs": 4, "validate_every": 2}


@pytest.fixture(scope="module")
def watched(shared_competition, tmp_path_factory):
    """A fold that was trained under the eyes of a notebook, and the messages that it sent there."""
    InteractiveShell.instance()
    state = fold_of(shared_competition, tmp_path_factory.mktemp("run"), **RECIPE)
    with capture_output() as captured:
        history = live.train(state)
    return state, history, captured


def test_watching_changes_nothing_that_is_learnt(watched, shared_competition, tmp_path):
    state, history, _ = watched
    alone = training.train(fold_of(shared_competition, tmp_path, **RECIPE))
    measured = ["seconds", "speed"]
    pd.testing.assert_frame_equal(history.drop(columns=measured), alone.drop(columns=measured))
    made, wanted = (load_file(folder / "last.safetensors") for folder in (state.folder, tmp_path / "fold0"))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


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


def test_every_epoch_is_kept_with_its_losses_rate_speed_and_the_same_pictures(watched):
    state, history, _ = watched
    assert live.epochs_kept(state) == [0, 1, 2, 3, 4]
    assert [len(live._kept(state, epoch, "losses")[0]) for epoch in range(5)] == [0, 2, 2, 2, 2]
    assert np.mean(np.concatenate([live._kept(state, epoch, "losses")[0] for epoch in (3, 4)])) == pytest.approx(
        history["loss"].iloc[-1]
    )
    assert live._kept(state, 4, "lr")[0] == history["lr"].iloc[-1]
    assert live._kept(state, 4, "speed")[0] == pytest.approx(history["speed"].iloc[-1], abs=0.01)
    assert len(state.watched) == 4 and set(state.watched) <= set(state.valid_rows)


def test_kept_logits_are_those_of_the_network_that_is_scored(watched):
    state, *_ = watched
    kept = live._kept(state, 4, "logits")[0]
    logits = np.stack([own for _, own in state._predict(state.watched)])
    assert kept.dtype == np.int8
    assert np.abs(kept / 16 - logits.clip(-7.9, 7.9)).max() <= 0.5 / 16 + 0.04  # clipped at 127 / 16


def test_curves_say_what_the_files_hold(watched):
    state, history, _ = watched
    loss, dice, rate, pace = live.curves(state).axes
    assert loss.lines[-1].get_xdata().tolist() == [0.5, 1.5, 2.5, 3.5]
    assert dice.get_title(loc="left").startswith(f"Best Dice {history['dice'].max():.6f}")
    assert rate.lines[0].get_ydata()[-1] == history["lr"].iloc[-1]
    assert np.isnan(pace.lines[0].get_ydata()[0]) and (pace.lines[0].get_ydata()[1:] > 0).all()


def test_the_strip_has_a_row_a_picture_and_a_column_an_epoch(watched):
    state, *_ = watched
    axes = [ax for ax in live.strip(state).axes if ax.images]
    titles = [ax.get_title() for ax in axes]
    assert titles[:6] == [
        state.pictures["img"].iloc[state.watched[0]][:-4],
        "untrained",
        *(f"epoch {i}" for i in (1, 2, 3, 4)),
    ]
    assert len(axes) == 24
    row = state.watched[0]
    window = live.densest(live.outline(state.source[row][1] > 127), live.SHARE)
    assert np.array_equal(axes[0].images[0].get_array(), state.source[row][0][window])


def test_training_that_was_stopped_goes_on_with_the_same_strip(watched, shared_competition, tmp_path):
    state, *_ = watched
    stopped = fold_of(shared_competition, tmp_path, **RECIPE)
    save, stopped.save = stopped.save, lambda: None  # a state takes a second
    for _ in range(4):
        training.train(stopped, max_hours=1e-9)  # a step each
    stopped.save = save
    training.train(stopped, max_hours=1e-9)
    again = fold_of(shared_competition, tmp_path, **RECIPE)
    assert live.epochs_kept(again) == [0, 1, 2] and again.step == 5
    (again.folder / "watch" / "0003.npz").write_bytes(b"of a step that a kill took back")
    with capture_output():
        live.train(again)
    assert live.epochs_kept(again) == [0, 1, 2, 3, 4]
    for epoch in range(5):
        for name in ("logits", "losses", "lr"):
            assert np.array_equal(live._kept(again, epoch, name)[0], live._kept(state, epoch, name)[0])


def test_a_script_trains_without_a_display(shared_competition, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(live, "get_ipython", lambda: None)
    assert len(live.train(fold_of(shared_competition, tmp_path, epochs=1))) == 2
    shown = capfd.readouterr()
    assert "100%|" in shown.err
    assert "Figure" not in shown.out


@pytest.mark.slow
def test_training_in_processes_of_its_own_is_watched_from_its_files(shared_competition, tmp_path):
    InteractiveShell.instance()
    run_dir = begun(shared_competition, tmp_path, batch_size=2)
    chosen, pictures = Recipe.of(read_json(run_dir / "run.json")["parameters"]), photos.index(shared_competition)
    source = dataset.Decoded(photos.photographs(shared_competition, "train"), pictures, chosen.height, chosen.width)
    state = training.Fold(chosen, pictures, source, folds.read_folds(run_dir), 0, run_dir, processes=2)
    with capture_output() as captured:
        live.train(state)
    assert live.epochs_kept(state) == [0, 1, 2]
    assert len([shown for shown in captured._outputs if not shown["update"]]) == 3
    assert "%|" not in captured.stderr


def test_a_fold_from_before_there_was_anything_to_watch_is_still_drawn(watched, shared_competition):
    state, *_ = watched
    kept = {path: path.read_bytes() for path in (state.folder / "watch").iterdir()}
    for path in kept:
        path.unlink()
    with capture_output() as captured:
        live.train(fold_of(shared_competition, state.run_dir, **RECIPE))
    for path, data in kept.items():
        path.write_bytes(data)
    assert ["image/png" in shown["data"] for shown in captured._outputs[-2:]] == [True, True]


def test_what_is_no_progress_bar_stays_on_stderr(capsys):
    shown = live._Display(SimpleNamespace())
    shown.write("a warning\n")
    assert capsys.readouterr().err == "a warning\n"


def test_the_densest_place_is_around_the_marked_pixels_and_inside_the_picture():
    marked = np.zeros((40, 60), bool)
    marked[30:34, 50:54] = True
    rows, columns = live.densest(marked, 0.25)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (10, 15)
    assert marked[rows, columns].sum() == 16
    marked[:], marked[0, 0] = False, True
    assert live.densest(marked, 0.25) == (slice(0, 10), slice(0, 15))


def test_hesitations_are_framed_and_tinted(shared_competition):
    archive = photos.photographs(shared_competition, "train")
    probability = np.zeros((96, 126), np.float32)
    probability[:, :60], probability[40:44, 56:60] = 1, 0.5
    figure = live.hesitations(archive, archive.names[:1], [probability], ["title"])
    whole, place = [ax for ax in figure.axes if ax.images]
    photograph = photos.full_picture(archive, archive.names[0])
    assert np.array_equal(whole.images[0].get_array(), photograph)
    rows, columns = live.densest(probability == 0.5, live.CLOSE)
    tinted = place.images[0].get_array()[41 - rows.start, 57 - columns.start]
    assert np.allclose(tinted, 0.4 * photograph[41, 57] + 0.6 * 255 * np.array(to_rgb(figures.MARK)), atol=1)
    frame = whole.patches[-1]
    assert frame.get_x() <= 56 and frame.get_x() + frame.get_width() >= 60
    assert "100% of the pixels" in figure._suptitle.get_text()
    assert place.images[0].get_array().shape == (12, 16, 3)
