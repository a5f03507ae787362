"""What is said of the samples before training, on masks made by hand."""

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, samples_of, square

from carvana.data.statistics import downscaling_ceilings, mask_oddities, share_explained, touching_sides


def test_oddities_find_patch_gap_and_area_and_where_they_are():
    odd_one = square(0, 0, 20)
    odd_one[30:32, 50:55] = True  # a patch of 10 pixels
    odd_one[5:8, 5:8] = False  # a gap of 9 pixels
    masks = {(car, view): square(0, 0, 20) for car in "abc" for view in (1, 2, 3)} | {("b", 2): odd_one}
    masks[("c", 3)] = square(0, 0, 10)
    table = mask_oddities(samples_of(masks)).set_index("img")
    odd = table.loc["b_02.jpg"]
    assert (odd["fragment"], odd["fragment_at"]) == (10, (52, 30.5))
    assert (odd["hole"], odd["hole_at"]) == (9, (6, 6))
    assert table.loc["c_03.jpg", "ratio"] == pytest.approx(1 / 4)
    assert table["ratio"].drop("c_03.jpg").between(0.99, 1.01).all()
    assert (table.drop("b_02.jpg")[["fragment", "hole"]] == 0).all(axis=None)


def test_a_gap_that_opens_to_the_border_and_an_empty_mask_are_no_holes():
    open_gap = square(0, 0, 40)
    open_gap[0:30, 10:20] = False
    table = mask_oddities(samples_of({("a", 1): open_gap, ("b", 1): square(0, 0, 0), ("c", 1): square(0, 0, 40)}))
    assert (table[["fragment", "hole"]] == 0).all(axis=None)


def test_a_car_at_a_side_is_counted_and_one_at_the_top_is_not():
    masks = {("a", 1): square(10, 0, 5), ("a", 2): square(0, 10, 5), ("b", 1): square(9, 55, 5)}
    assert touching_sides(samples_of(masks)) == 2


def test_groups_explain_all_or_nothing_of_the_spread():
    sizes = pd.Series([1.0, 1.0, 3.0, 3.0], index=list("abcd"))
    assert share_explained(sizes, pd.Series(list("xxyy"), index=list("abcd"))) == 1
    assert share_explained(sizes, pd.Series(list("xyxy"), index=list("abcd"))) == 0


def test_coarser_networks_cannot_draw_finer_edges():
    y, x = np.mgrid[: SMALL[0], : SMALL[1]]
    table = samples_of({("a", 1): (x - 30) ** 2 + (y - 20) ** 2 < 15**2})
    ceilings = downscaling_ceilings(table, seed=1)
    assert ceilings["fraction"].tolist() == ["1/2", "1/4", "1/8"]
    assert ceilings["dice"].is_monotonic_decreasing and ceilings["dice"].between(0.9, 1).all()
