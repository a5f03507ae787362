"""Which pixels are label issues, and where errors are, on masks made by hand."""

import numpy as np
import pytest
import torch

from carvana.evaluation import scoring
from carvana.evaluation.label_issues import label_issue_pixels
from carvana.inference.logits import BlendedLogits

SIZE = 64, 96


def certain(mask, logit=4.0):
    """Logits of a network that is sure of a mask."""
    return np.where(mask, logit, -logit).astype(np.float32)


def issue(least, most, true):
    """Of the lowest and highest logits for each size."""
    return label_issue_pixels(BlendedLogits(least), BlendedLogits(most), true)


def block(top, left, height, width):
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_a_patch_that_every_network_sees_and_the_mask_has_not_is_disputed():
    true, seen = block(10, 10, 40, 40), block(10, 10, 40, 40) | block(20, 70, 8, 10)
    pixels = issue([certain(seen)], [certain(seen, 5.0)], true)
    assert pixels["disputed"] == 80
    assert pixels["sure"] == pytest.approx(1 / (1 + np.exp(-4)))  # the least sure of them


def test_a_part_of_the_mask_that_no_network_sees_is_disputed():
    true, seen = block(10, 10, 40, 40), block(10, 10, 40, 30)
    pixels = issue([certain(seen, 9.0)], [certain(seen)], true)
    assert pixels["disputed"] == 400


@pytest.mark.parametrize("extra", [block(10, 50, 40, 2), block(30, 70, 2, 20)])
def test_strips_narrower_than_three_network_pixels_are_what_soft_edges_look_like(extra):
    true = block(10, 10, 40, 40)
    seen = certain(true | extra)
    assert issue([seen], [seen], true) == {"disputed": 0, "sure": 0.0}


def test_an_edge_that_a_coarse_network_cannot_draw_is_not_disputed():
    true = block(16, 16, 32, 48)
    coarse = certain(true[::8, ::8], 9.0)
    coarse[2:6, 8] = 9.0  # one network pixel too far
    assert issue([coarse], [coarse], true)["disputed"] == 0
    coarse[2:6, 8:11] = 9.0
    assert issue([coarse], [coarse], true)["disputed"] > 300


def test_sureness_is_the_mean_probability():
    true, seen = block(0, 0, 64, 96), np.full(SIZE, -9.0, np.float32)
    seen[:32] = -3.0
    expected = (1 / (1 + np.exp(-3)) + 1 / (1 + np.exp(-9))) / 2
    assert issue([seen], [seen], true)["sure"] == pytest.approx(expected)


def test_nothing_is_disputed_where_one_network_agrees_with_the_mask_or_is_unsure():
    true, seen = block(10, 10, 40, 40), block(10, 10, 50, 60)
    assert issue([certain(true)], [certain(seen)], true)["disputed"] == 0
    assert issue([certain(seen, 2.0)], [certain(seen, 2.0)], true)["disputed"] == 0  # 0.88


def test_networks_of_two_sizes_must_agree():
    true, seen = block(0, 0, 32, 32), block(0, 0, 64, 64)
    large, small = certain(seen), np.full((32, 64), 4.0, np.float32)
    assert issue([large, small], [large, small], true)["disputed"] == 64 * 64 - 32 * 32
    assert issue([large, -small], [large, -small], true)["disputed"] == 0


def test_least_and_most_logits_are_those_over_all_networks_and_tta_of_a_size():
    logits = [torch.tensor([[1.0, 5.0], [3.0, -2.0]])[..., None, None], torch.tensor([[0.0, 9.0]])[..., None, None]]
    least, most = ([float(of_image.by_size[0][0, 0]) for of_image in part] for part in scoring.extremes(logits))
    assert (least, most) == ([0, -2], [3, 9])


def test_error_maps_keep_the_share_of_wrong_and_true_pixels():
    true, predicted = np.zeros((256, 384), bool), np.zeros((256, 384), bool)
    true[:128], predicted[:, :192] = True, True
    false_negative, false_positive, car = scoring.error_map(predicted, true)
    assert false_negative.shape == scoring.MAP
    assert (false_negative[:64, 96:] == 1).all() and false_negative.mean() == 0.25
    assert (false_positive[64:, :96] == 1).all() and false_positive.mean() == 0.25
    assert car.mean() == 0.5
