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


def test_interval_is_that_of_cars_not_images():
    cars = np.repeat(["a", "b", "c"], [1, 5, 9])
    mean, low, high = metrics.mean_over_cars(np.repeat([1.0, 2.0, 3.0], [1, 5, 9]), cars)
    assert mean == pytest.approx((1 + 10 + 27) / 15)
    one_each = metrics.mean_over_cars(np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "c"]))
    assert one_each == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))  # Student's t, 2 degrees
    assert low < mean < high


def test_one_car_says_nothing_of_others():
    for interval in (metrics.mean_over_cars, metrics.score_over_cars):
        mean, low, high = interval(np.array([0.2, 0.4]), np.array(["a", "a"]))
        assert mean == pytest.approx(0.3)
        assert np.isnan([low, high]).all()


def test_a_score_has_its_interval_between_zero_and_one():
    mean, low, high = metrics.score_over_cars(np.array([0.9999, 0.99, 0.6]), np.array(["a", "b", "c"]))
    assert 0 < low < mean < high < 1
    assert metrics.score_over_cars(np.ones(4), np.array(list("abcd"))) == (1, 1, 1)


def coverage(interval, values, truth):
    """Share of trials, rows of values, whose interval holds the truth."""
    cars = np.arange(values.shape[1])
    return np.mean([low <= truth <= high for _, low, high in (interval(trial, cars) for trial in values)])


@pytest.mark.parametrize("n_cars", [6, 12, 50])
def test_intervals_cover_the_truth_as_often_as_they_say(n_cars):
    random = np.random.default_rng(1)
    errors = 0.006 * np.exp(0.4 * random.normal(size=(3000, n_cars)))  # cars differ as they do in real runs
    assert 0.92 < coverage(metrics.score_over_cars, 1 - errors, 1 - 0.006 * np.exp(0.08)) < 0.97
    gains = 0.0003 * random.standard_t(5, size=(3000, n_cars))
    assert 0.935 < coverage(metrics.mean_over_cars, gains, 0.0) < 0.975


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


def test_distances_from_the_edge_are_exact():
    true = np.zeros((41, 41), bool)
    true[20, 20] = True
    y, x = np.mgrid[:41, :41] - 20
    distance = metrics.boundary_distance(true)
    assert np.allclose(distance[~true], np.hypot(y, x)[~true], atol=1e-4)  # also along no axis and no diagonal
    assert distance[20, 20] == 1


@given(arrays(bool, (20, 20)), arrays(bool, (20, 20)), st.booleans())
def test_parts_of_the_error_sum_to_all_wrong_pixels(predicted, true, empty):
    true = true & (not empty)
    assert sum(metrics.error_anatomy(predicted, true).values()) == np.count_nonzero(predicted != true)
