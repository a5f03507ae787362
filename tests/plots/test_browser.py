"""The browser shows what its controls say, checked on its pixels, without a front end."""

import shutil
import time

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch
from conftest import ENCODER, ellipse
from matplotlib.colors import to_rgb

from carvana import metrics, models, rle
from carvana.data import Competition
from carvana.errors import UserError
from carvana.inference import Ensemble, EnsembleSpec, predict_probabilities
from carvana.plots import browser, style
from carvana.run import Run

CARS = [f"{i + 1:012x}" for i in range(4)]


@pytest.fixture(scope="module")
def runs(shared_competition, tmp_path_factory):
    """A run with two untrained folds of which fold 1 has the cars 2 and 3, and Dice that rise with car and view."""
    folder = tmp_path_factory.mktemp("runs")
    run, config = Run(folder, "a"), models.ModelConfig("unet", ENCODER, "16,8,8,8,8", 96, 128)
    for fold in (0, 1):
        torch.manual_seed(fold)
        models.save_checkpoint(run.checkpoint(fold), models.SegmentationModel(config).state_dict(), config)
    pd.DataFrame({"car": CARS, "fold": [0, 0, 1, 1]}).to_csv(run.folder / "folds.csv", index=False)
    scores = Competition(shared_competition).samples[["img", "car"]]
    scores = scores.assign(fold=[0] * 8 + [1] * 8, dice=0.9 + 0.004 * np.arange(16))
    scores.to_csv(run.scores_path, index=False)
    return folder


@pytest.fixture
def shown(runs, shared_competition):
    return browser.browse(Competition(shared_competition), runs)


def pixels(shown):
    return simplejpeg.decode_jpeg(shown.screen.value)


def test_it_opens_with_the_worst_image_and_orders_by_score(shown):
    assert shown.sample["img"] == f"{CARS[0]}_01.jpg"
    assert (shown.car.value, shown.view.value, shown.rank.max) == (CARS[0], 1, 16)
    shown.order.value = "best first"
    assert shown.sample["img"] == f"{CARS[3]}_04.jpg"
    assert shown.car.options[0] == CARS[3]
    shown.rank.value = 2
    assert (shown.car.value, shown.view.value) == (CARS[3], 3)


def test_runs_of_other_cars_are_not_offered(runs, shared_competition):
    for name, cars in (("foreign", ["x"]), ("lost", [])):
        folder = runs / name / "fold0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "best.safetensors").touch()
        if cars:
            pd.DataFrame({"car": cars, "fold": [0]}).to_csv(runs / name / "folds.csv", index=False)
    shown = browser.browse(Competition(shared_competition), runs)
    assert shown.run.options == ("a",)


def test_car_and_view_lead_to_the_image(shown):
    shown.car.value = CARS[2]
    assert shown.sample["img"] == f"{CARS[2]}_01.jpg"
    shown.view.value = 3
    assert shown.sample["img"] == f"{CARS[2]}_03.jpg"
    assert shown.rank.value == 11
    assert "fold 1" in shown.caption.value and f"{CARS[2]}_03.jpg" in shown.caption.value
    assert "Dice 0.940000 in scores.csv" in shown.caption.value


def test_layers_are_painted_alone_and_together(shown):
    for layer in shown.layers.values():
        layer.value = False
    assert pixels(shown).shape == (640, 840, 3)  # 96 x 126, as large as fits
    assert pixels(shown).min() > 250
    shown.layers["image"].value = True
    image = pixels(shown)
    assert 180 < image[320, 420].mean() < 220  # the ellipse is bright, the background dark
    assert image[5, 5].mean() < 100
    shown.layers["mask"].value = True
    edge = np.abs(pixels(shown).astype(int) - image).max(2) > 60
    assert 0 < edge.mean() < 0.02
    assert edge[320, 220:234].any() and not edge[320, 240:500].any()  # the ellipse begins at column 34 of 126


def test_differences_have_the_colours_of_every_figure():
    true, predicted = ellipse(0, 1), np.roll(ellipse(0, 1), 6, axis=1)
    black = np.zeros((*true.shape, 3), np.uint8)
    painted = browser.painted(black, true, predicted.astype(np.float32), {"image", "difference"})
    colours = {tuple(colour) for colour in painted.reshape(-1, 3)}
    missed, taken = (tuple(round(0.75 * 255 * part) for part in to_rgb(colour)) for colour in style.ERROR_TEXTS)
    assert colours == {(0, 0, 0), missed, taken}
    assert (painted[320, :420] == missed).all(-1).any() and (painted[320, 420:] == taken).all(-1).any()
    assert not (painted[320, :420] == taken).all(-1).any()


def test_a_single_wrong_pixel_of_a_large_image_is_seen():
    true = np.zeros((1280, 1918), bool)
    predicted = true.astype(np.float32)
    predicted[640, 959] = 1
    painted = browser.painted(np.zeros((1280, 1918, 3), np.uint8), true, predicted, {"image", "difference"})
    assert painted.shape == (640, 959, 3)
    assert painted.any(2).sum() >= 1


def test_the_probability_is_of_the_network_that_has_not_seen_the_car_and_is_kept(shown, runs, shared_competition):
    competition = Competition(shared_competition)
    shown.car.value = CARS[3]
    name = shown.sample["img"]
    kept = shown.probability("a", name, 1)
    misses = shown.probability.cache_info().misses
    ensemble = Ensemble(EnsembleSpec.equal([Run(runs, "a").checkpoint(1)], ["none"]))
    expected = next(predict_probabilities(ensemble, competition.train_images, [name]))
    assert np.array_equal(kept, expected)
    shown.layers["probability"].value = True
    shown.layers["image"].value = False
    assert shown.probability.cache_info().misses == misses
    row = competition.samples.set_index("img").loc[name]
    dice = metrics.dice(metrics.pixel_counts(kept > 0.5, rle.decode(row["rle"], 96, 126)))
    assert f"as shown {float(dice):.6f}" in shown.caption.value


def test_the_place_where_most_is_wrong_is_enlarged(shown):
    whole = pixels(shown)
    shown.zoom.value = True
    assert pixels(shown).shape[0] == 640
    assert not np.array_equal(pixels(shown), whole[: pixels(shown).shape[0], : pixels(shown).shape[1]])


def test_a_switch_at_full_size_takes_less_than_300_ms(tmp_path):
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (1280, 1918, 3), dtype=np.uint8)
    true = np.zeros((1280, 1918), bool)
    true[300:900, 400:1500] = True
    began = time.process_time()
    painted = browser.painted(image, true, true.astype(np.float32) * 0.9, set(browser.LAYERS))
    simplejpeg.encode_jpeg(painted)
    assert time.process_time() - began < 0.6  # seconds of all threads


def test_cars_of_a_fold_that_is_not_trained_are_left_out(runs, shared_competition, tmp_path):
    for name in ("a/folds.csv", "a/fold0/best.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((runs / name).read_bytes())
    shown = browser.browse(Competition(shared_competition), tmp_path)
    assert list(shown.car.options) == CARS[:2]
    assert "scores.csv" not in shown.caption.value


def test_what_is_wrong_with_another_run_stops_no_look_at_this_one(runs, shared_competition, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    shutil.copytree(runs / "a", tmp_path / "old")
    (tmp_path / "old" / "folds.csv").write_text("car,fold\nx,\n")
    assert list(browser.browse(Competition(shared_competition), tmp_path, "a").run.options) == ["a"]


def test_a_folder_without_a_trained_run_and_an_unknown_run_are_refused(runs, shared_competition, tmp_path):
    with pytest.raises(UserError, match="holds no trained run"):
        browser.browse(Competition(shared_competition), tmp_path)
    with pytest.raises(UserError, match='run_name aa has no trained fold .* did you mean "a"'):
        browser.browse(Competition(shared_competition), runs, "aa")
