"""What is disputed, and where errors are, on masks made by hand."""

import numpy as np
import pytest
import torch

from carvana.evaluation import scoring

SIZE = 64, 96


def certain(mask, logit=4.0):
    """Logits of a network that is sure of a mask."""
    return np.where(mask, logit, -logit).astype(np.float32)


def block(top, left, height, width):
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_a_patch_that_every_network_sees_and_the_mask_has_not_is_disputed():
    true, seen = block(10, 10, 40, 40), block(10, 10, 40, 40) | block(20, 70, 8, 10)
    found = scoring.disputed([certain(seen)], [certain(seen, 5.0)], true)
    assert found["disputed"] == 80
    assert found["sure"] == pytest.approx(1 / (1 + np.exp(-4)))  # the least sure of them


def test_a_part_of_the_mask_that_no_network_sees_is_disputed():
    true, seen = block(10, 10, 40, 40), block(10, 10, 40, 30)
    found = scoring.disputed([certain(seen, 9.0)], [certain(seen)], true)
    assert found["disputed"] == 400


@pytest.mark.parametrize("extra", [block(10, 50, 40, 4), block(30, 70, 4, 20)])
def test_strips_narrower_than_five_pixels_are_what_soft_edges_look_like(extra):
    true = block(10, 10, 40, 40)
    seen = certain(true | extra)
    assert scoring.disputed([seen], [seen], true) == {"disputed": 0, "sure": 0.0}


def test_nothing_is_disputed_where_one_network_agrees_with_the_mask_or_is_unsure():
    true, seen = block(10, 10, 40, 40), block(10, 10, 50, 60)
    assert scoring.disputed([certain(true)], [certain(seen)], true)["disputed"] == 0
    assert scoring.disputed([certain(seen, 2.0)], [certain(seen, 2.0)], true)["disputed"] == 0  # 0.88


def test_networks_of_two_sizes_must_agree():
    true, seen = block(0, 0, 32, 32), block(0, 0, 64, 64)
    large, small = certain(seen), np.full((32, 64), 4.0, np.float32)
    assert scoring.disputed([large, small], [large, small], true)["disputed"] == 64 * 64 - 32 * 32
    assert scoring.disputed([large, -small], [large, -small], true)["disputed"] == 0


def test_least_and_most_logits_are_those_over_all_members_and_views_of_a_size():
    each = [torch.tensor([[1.0, 5.0], [3.0, -2.0]])[..., None, None], torch.tensor([[0.0, 9.0]])[..., None, None]]
    (least,), (most,) = scoring._agreed(each)
    assert (least.ravel().tolist(), most.ravel().tolist()) == ([0, -2], [3, 9])


def test_error_maps_keep_the_share_of_missed_extra_and_true_pixels():
    true, predicted = np.zeros((256, 384), bool), np.zeros((256, 384), bool)
    true[:128], predicted[:, :192] = True, True
    missed, extra, car = scoring.error_map(predicted, true)
    assert missed.shape == scoring.MAP
    assert (missed[:64, 96:] == 1).all() and missed.mean() == 0.25
    assert (extra[64:, :96] == 1).all() and extra.mean() == 0.25
    assert car.mean() == 0.5
