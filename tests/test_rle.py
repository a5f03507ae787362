import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from carvana import rle
from carvana.data import images


def test_pixels_are_numbered_from_one_row_by_row_and_runs_go_on_over_row_ends():
    mask = np.array([[0, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    assert rle.encode(mask) == "3 3 8 1"


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_decoding_an_encoded_mask_gives_the_mask(mask):
    text = rle.encode(mask)
    assert np.array_equal(rle.decode(text, *mask.shape), mask)
    assert rle.area(text, *mask.shape) == mask.sum()


@pytest.mark.parametrize("where", ["empty", "full", "first", "last", "column", "border"])
def test_borders_and_corners_survive_at_full_size(where):
    mask = np.zeros((1280, 1918), bool)
    if where == "border":
        mask[[0, -1]] = mask[:, [0, -1]] = True
    part = {"full": np.s_[:], "first": np.s_[0, 0], "last": np.s_[-1, -1], "column": np.s_[:, -1]}.get(where)
    if part:
        mask[part] = True
    assert np.array_equal(rle.decode(rle.encode(mask)), mask)


def test_empty_and_full_masks_are_no_run_and_one_run():
    assert rle.encode(np.zeros((3, 4), bool)) == ""
    assert rle.encode(np.ones((3, 4), bool)) == "1 12"


def test_numbers_other_than_zero_count_as_car():
    assert rle.encode(np.array([[0, 255, 1]], np.uint8)) == "2 2"


@pytest.mark.parametrize("text", ["1", "1 2 3", "1 x", "0 1", "1 0", "1 -1", "3 2 1 1", "1 3 2 1", "10 5", "1.5 2"])
def test_runs_that_are_no_mask_are_refused(text):
    for read in (rle.decode, rle.area):
        with pytest.raises(ValueError, match="runs|run lengths|is not a whole number|starts and lengths"):
            read(text, 3, 4)


@pytest.mark.parametrize(
    ("folder", "count"), [("carvana", 256), pytest.param("carvana512", 1600, marks=pytest.mark.slow)]
)
def test_encoding_the_real_gif_masks_reproduces_train_masks_byte_for_byte(real_data, folder, count):
    data = real_data / folder
    listed = pd.read_csv(data / "train_masks.csv", keep_default_na=False)
    gifs = images.Archive(data / "train_masks", ".gif")
    assert len(listed) == count
    lines = ["img,rle_mask", *(f"{name},{rle.encode(images.gif_mask(gifs, name))}" for name in listed["img"])]
    assert "\n".join(lines).encode() == (data / "train_masks.csv").read_bytes().strip()
