import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carvana import metrics


def test_dice_and_iou_of_masks_counted_by_hand():
    predicted, true = np.array([[1, 1, 0]], bool), np.array([[0, 1, 1]], bool)
    counts = metrics.pixel_counts(predicted, true)
    assert counts == (1, 2, 2)
    assert metrics.dice(counts) == 0.5
    assert metrics.iou(counts) == pytest.approx(1 / 3)


def test_two_empty_masks_score_one_and_one_empty_mask_scores_zero():
    both_empty, one_empty = metrics.PixelCounts(0, 0, 0), metrics.PixelCounts(0, 5, 0)
    assert metrics.dice(both_empty) == metrics.iou(both_empty) == 1
    assert metrics.dice(one_empty) == metrics.iou(one_empty) == 0


def test_interval_is_drawn_over_cars_not_images():
    values, cars = np.repeat([0.0, 1.0], 16), np.repeat(["a", "b"], 16)
    mean, low, high = metrics.mean_over_cars(values, cars)
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_mean_of_one_car_has_no_width():
    assert metrics.mean_over_cars(np.array([0.2, 0.4]), np.array(["a", "a"])) == pytest.approx((0.3, 0.3, 0.3))


def test_error_bands_are_counted_from_the_true_edge():
    true = np.zeros((40, 40), bool)
    true[:, :20] = True
    predicted = true.copy()
    predicted[5, 20] = True  # beside the edge
    predicted[6, 22] = True  # third pixel
    predicted[7, 35] = True  # far outside
    predicted[8, 2] = False  # far inside
    expected = {"edge_1": 1, "edge_3": 1, "edge_10": 0, "missed": 1, "extra": 1}
    assert metrics.error_anatomy(predicted, true) == expected


@given(arrays(bool, (20, 20)), arrays(bool, (20, 20)), st.booleans())
def test_parts_of_the_error_sum_to_all_wrong_pixels(predicted, true, empty):
    true = true & ~empty
    assert sum(metrics.error_anatomy(predicted, true).values()) == np.count_nonzero(predicted != true)
