"""The browser shows what its controls say, checked on its pixels, without a front end."""

import time

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch
from conftest import ellipse
from matplotlib.colors import to_rgb

from carvana import files, models, rle
from carvana.data import competition as photos
from carvana.plots import browser
from carvana.plots import explore as figures

CARS = [f"{i + 1:012x}" for i in range(4)]


@pytest.fixture(scope="module")
def runs(shared_competition, tmp_path_factory):
    """A run with two untrained folds of which fold 1 has the cars 2 and 3, and Dice that rise with car and view."""
    folder = tmp_path_factory.mktemp("runs")
    for fold in (0, 1):
        torch.manual_seed(fold)
        network = models.Network("unet", "resnet18", "16,8,8,8,8", 96, 128)
        models.save_checkpoint(
            folder / "a" / f"fold{fold}" / "best.safetensors", models.Segmenter(network).state_dict(), network
        )
    pd.DataFrame({"car": CARS, "fold": [0, 0, 1, 1]}).to_csv(folder / "a" / "folds.csv", index=False)
    index = photos.index(shared_competition)
    scores = index[["img"]].assign(dice=0.9 + 0.004 * np.arange(16))
    scores.to_csv(folder / "a" / "scores.csv", index=False)
    return folder


@pytest.fixture
def shown(runs, shared_competition):
    return browser.browse(runs, shared_competition)


def pixels(shown):
    return simplejpeg.decode_jpeg(shown.image.value)


def test_it_opens_with_the_worst_picture_and_orders_by_score(shown):
    assert shown.picture["img"] == f"{CARS[0]}_01.jpg"
    assert (shown.car.value, shown.view.value, shown.rank.max) == (CARS[0], 1, 16)
    shown.order.value = "best first"
    assert shown.picture["img"] == f"{CARS[3]}_04.jpg"
    assert shown.car.options[0] == CARS[3]
    shown.rank.value = 2
    assert (shown.car.value, shown.view.value) == (CARS[3], 3)


def test_car_and_view_lead_to_the_picture(shown):
    shown.car.value = CARS[2]
    assert shown.picture["img"] == f"{CARS[2]}_01.jpg"
    shown.view.value = 3
    assert shown.picture["img"] == f"{CARS[2]}_03.jpg"
    assert shown.rank.value == 11
    assert "fold 1" in shown.caption.value and f"{CARS[2]}_03.jpg" in shown.caption.value
    assert "Dice 0.940000 in scores.csv" in shown.caption.value


def test_layers_are_painted_alone_and_together(shown):
    for layer in shown.layers.values():
        layer.value = False
    assert pixels(shown).shape == (640, 840, 3)  # 96 x 126, as large as fits
    assert pixels(shown).min() > 250
    shown.layers["photograph"].value = True
    photograph = pixels(shown)
    assert 180 < photograph[320, 420].mean() < 220  # the ellipse is bright, the wall dark
    assert photograph[5, 5].mean() < 100
    shown.layers["mask"].value = True
    edge = np.abs(pixels(shown).astype(int) - photograph).max(2) > 60
    assert 0 < edge.mean() < 0.02
    assert edge[320, 220:234].any() and not edge[320, 240:500].any()  # the ellipse begins at column 34 of 126


def test_differences_have_the_colours_of_every_figure():
    true, predicted = ellipse(0, 1), np.roll(ellipse(0, 1), 6, axis=1)
    black = np.zeros((*true.shape, 3), np.uint8)
    made = browser.painted(black, true, predicted.astype(np.float32), {"photograph", "difference"})
    colours = {tuple(colour) for colour in made.reshape(-1, 3)}
    missed, extra = (tuple(int(0.75 * 255 * part) for part in to_rgb(c)) for c in (figures.MISSED, figures.EXTRA))
    assert colours == {(0, 0, 0), missed, extra}
    assert (made[320, :420] == missed).all(-1).any() and (made[320, 420:] == extra).all(-1).any()
    assert not (made[320, :420] == extra).all(-1).any()


def test_a_single_wrong_pixel_of_a_large_picture_is_seen():
    true = np.zeros((1280, 1918), bool)
    predicted = true.astype(np.float32)
    predicted[640, 959] = 1
    made = browser.painted(np.zeros((1280, 1918, 3), np.uint8), true, predicted, {"photograph", "difference"})
    assert made.shape == (640, 959, 3)
    assert made.any(2).sum() >= 1


def test_the_probability_is_of_the_network_that_has_not_seen_the_car_and_is_kept(shown, runs, shared_competition):
    index = photos.index(shared_competition)
    shown.car.value = CARS[3]
    name = shown.picture["img"]
    kept = shown.probability("a", name, 1)
    misses = shown.probability.cache_info().misses
    own = browser.Ensemble([runs / "a" / "fold1" / "best.safetensors"], [1.0], ["none"])
    expected = next(browser.masks(own, photos.photographs(shared_competition, "train"), [name]))
    assert np.array_equal(kept, expected)
    shown.layers["probability"].value = True
    shown.layers["photograph"].value = False
    assert shown.probability.cache_info().misses == misses
    row = index.set_index("img").loc[name]
    dice = browser.metrics.dice(*browser.metrics.counts(kept > 0.5, rle.decode(row["rle"], 96, 126)))
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
    made = browser.painted(image, true, true.astype(np.float32) * 0.9, set(browser.LAYERS))
    simplejpeg.encode_jpeg(made)
    assert time.process_time() - began < 0.6  # seconds of all threads


def test_cars_of_a_fold_that_is_not_trained_are_left_out(runs, shared_competition, tmp_path):
    for name in ("a/folds.csv", "a/fold0/best.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((runs / name).read_bytes())
    shown = browser.browse(tmp_path, shared_competition)
    assert list(shown.car.options) == CARS[:2]
    assert "scores.csv" not in shown.caption.value


def test_a_folder_without_a_trained_run_and_an_unknown_run_are_refused(runs, shared_competition, tmp_path):
    with pytest.raises(files.UserError, match="holds no trained run"):
        browser.browse(tmp_path, shared_competition)
    with pytest.raises(files.UserError, match='run_name aa has no trained fold .* did you mean "a"'):
        browser.browse(runs, shared_competition, "aa")
