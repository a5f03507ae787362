import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carvana.data.folds import HOLDOUT, make_folds
from carvana.errors import UserError


def table(areas, views=4):
    rows = [
        (f"{car:04d}", area, f"{car:04d}_{view:02d}.jpg") for car, area in enumerate(areas) for view in range(views)
    ]
    return pd.DataFrame(rows, columns=["car", "area", "img"])


@settings(deadline=None)
@given(
    st.lists(st.floats(0.05, 0.4), min_size=6, max_size=40), st.integers(2, 4), st.integers(0, 2), st.integers(0, 99)
)
def test_every_car_has_one_fold_and_folds_hold_as_many_cars(areas, n_folds, holdout_cars, seed):
    folds = make_folds(table(areas), n_folds, holdout_cars, seed)
    assert folds["car"].is_unique
    assert set(folds["car"]) == set(table(areas)["car"])
    counts = folds["fold"].value_counts()
    assert counts.get(HOLDOUT, 0) == holdout_cars
    in_folds = counts.drop(HOLDOUT, errors="ignore")
    assert in_folds.max() - in_folds.min() <= 1


def test_folds_have_about_the_same_area():
    samples = table([0.1 + 0.01 * car for car in range(30)])
    merged = samples.merge(make_folds(samples, 3, 0, 1))
    means = merged.groupby("fold")["area"].mean()
    assert means.max() - means.min() < 0.02


def test_cars_with_many_views_are_spread():
    samples = pd.concat([table([0.1] * 6, views=16), table([0.2] * 2, views=2).replace("^0", "9", regex=True)])
    sizes = samples.merge(make_folds(samples, 2, 0, 1))["fold"].value_counts()
    assert sizes.max() - sizes.min() <= 2


def test_more_folds_than_cars_are_refused():
    with pytest.raises(UserError, match="n_folds is 5 .* only 4 cars"):
        make_folds(table([0.1] * 4), 5, 0, 1)


def test_same_seed_same_folds_and_another_seed_others():
    samples = table([0.1 + 0.01 * car for car in range(20)])
    assert make_folds(samples, 4, 2, 1).equals(make_folds(samples, 4, 2, 1))
    assert not make_folds(samples, 4, 2, 1).equals(make_folds(samples, 4, 2, 2))
