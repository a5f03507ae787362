import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carvana import metrics, rle
from carvana.grid import Grid


def test_natural_sizes_cover_1920_columns_and_others_the_image_itself():
    assert Grid(1280, 1918, 640, 960).padded == (1280, 1920)
    assert Grid(1280, 1918, 320, 480).padded == (1280, 1920)
    assert Grid(1280, 1918, 1280, 1920).factor == 1
    assert Grid(1280, 1918, 512, 512).padded == (1280, 1918)
    assert Grid(512, 512, 256, 256).factor == 2


def test_soft_target_is_the_share_of_car_in_each_network_pixel():
    mask = np.zeros((64, 64), bool)
    mask[0, 0] = mask[:2, 2:4] = True
    target = Grid(64, 64, 32, 32).soft_target(mask)
    assert target[0, 0] == 64  # a quarter of 255
    assert target[0, 1] == 255
    assert target[1:].max() == 0


def test_the_padded_columns_repeat_the_last_one():
    mask = np.zeros((64, 62), bool)
    mask[:, -1] = True
    assert (Grid(64, 62, 32, 32).soft_target(mask)[:, -2:] == [128, 255]).all()


@given(st.integers(0, 1000), st.sampled_from([(64, 62, 32, 32), (96, 126, 96, 128), (100, 90, 64, 64)]))
def test_enlarging_equals_torch_interpolate_on_the_padded_size(seed, sizes):
    grid = Grid(*sizes)
    logits = np.random.default_rng(seed).normal(size=sizes[2:]).astype("f4")
    large = torch.nn.functional.interpolate(torch.from_numpy(logits)[None, None], grid.padded, mode="bilinear")
    expected = large[0, 0, : grid.full_height, : grid.full_width].numpy()
    assert np.allclose(grid.enlarge(logits), expected, atol=1e-5)


def torch_runs(logits, grid, cut):
    large = torch.nn.functional.interpolate(torch.from_numpy(logits)[None, None], grid.padded, mode="bilinear")
    return rle.encode(large[0, 0, : grid.full_height, : grid.full_width].numpy() > cut)


SIZES = [(64, 62, 32, 32), (96, 126, 96, 128), (128, 254, 32, 64), (100, 90, 64, 64), (250, 500, 32, 64)]


@given(st.integers(0, 10**6), st.sampled_from(SIZES), st.sampled_from([0, 1, 3, 9]), st.sampled_from([0.0, 0.25]))
def test_runs_from_sign_changes_are_those_of_the_enlarged_logits(seed, sizes, smooth, cut):
    logits = np.random.default_rng(seed).normal(size=sizes[2:]).astype("f4")
    logits = cv2.blur(logits, (smooth, smooth)) if smooth else np.round(logits) + np.float32(0.1)
    grid = Grid(*sizes)
    assert rle.from_edges(grid.edges(logits, cut)) == torch_runs(logits, grid, cut)


@pytest.mark.parametrize("value", [-1.0, 1.0])
@pytest.mark.parametrize(
    "where", [np.s_[0, 0], np.s_[-1, -1], np.s_[0, -1], np.s_[5, 7], np.s_[:, -1], np.s_[-1], np.s_[:]]
)
def test_runs_of_lone_pixels_corners_and_borders_equal_those_of_the_enlarged_logits(where, value):
    for sizes in SIZES:
        logits = np.full(sizes[2:], -value, "f4")
        logits[where] = value
        assert rle.from_edges(Grid(*sizes).edges(logits)) == torch_runs(logits, Grid(*sizes), 0.0)


@pytest.mark.parametrize(("height", "width", "least"), [(320, 480, 0.9993), (640, 960, 0.9998)])
def test_a_perfect_soft_target_of_a_real_mask_comes_back(real_data, height, width, least):
    texts = pd.read_csv(real_data / "carvana" / "train_masks.csv")["rle_mask"].iloc[::8]
    grid, dices = Grid(1280, 1918, height, width), []
    for text in texts:
        mask = rle.decode(text)
        logits = grid.soft_target(mask).astype("f4") - 127.5
        dices.append(metrics.dice(metrics.pixel_counts(grid.enlarge(logits) > 0, mask)))
    assert np.mean(dices) >= least
