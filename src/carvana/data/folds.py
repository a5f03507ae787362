"""Cars into folds: the 16 views of a car never stand in two folds."""

import numpy as np
import pandas as pd

from carvana.errors import UserError

HOLDOUT = -1  # the fold of cars that no fold trains or selects on


def make_folds(samples: pd.DataFrame, n_folds: int, holdout_cars: int, seed: int) -> pd.DataFrame:
    """Table car, fold (0 .. n_folds - 1, -1 = held out), balanced by mask area and number of views.

    Cars in order of area are cut into groups of `n_folds`, and each group is dealt out by chance, the car with most
    views to the fold with fewest images. Held-out cars are spread over the areas in the same way.
    """
    cars = samples.groupby("car").agg(area=("area", "mean"), views=("img", "size")).sort_values(["area", "views"])
    _check(len(cars), n_folds, holdout_cars)
    random = np.random.default_rng(seed)
    bounds = np.linspace(0, len(cars), holdout_cars + 1).astype(int)
    held_out = cars.index[random.integers(bounds[:-1], bounds[1:])]  # one by chance in each slice of equal length
    fold_of = dict.fromkeys(held_out, HOLDOUT)
    sizes = np.zeros(n_folds, dtype=int)
    dealt = cars.drop(held_out)
    for first in range(0, len(dealt), n_folds):
        group = dealt.iloc[first : first + n_folds]
        folds = random.permutation(n_folds)
        folds = folds[np.argsort(sizes[folds], kind="stable")]
        ranked = group["views"].sort_values(ascending=False, kind="stable")
        for fold, (car, views) in zip(folds, ranked.items(), strict=False):
            fold_of[car] = int(fold)
            sizes[fold] += views
    return pd.DataFrame(sorted(fold_of.items()), columns=["car", "fold"])


def _check(n_cars: int, n_folds: int, holdout_cars: int) -> None:
    if n_folds < 2:
        raise UserError(f"n_folds is {n_folds}: at least 2 are needed, so that every car is scored by a model unseen.")
    if holdout_cars < 0 or n_folds > n_cars - holdout_cars:
        raise UserError(
            f"n_folds is {n_folds} and holdout_cars {holdout_cars}, but there are only {n_cars} cars. "
            "Lower them, each fold needs a car."
        )
