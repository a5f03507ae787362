"""The folder of a run: folds that stay, checkpoints by fold, and runs side by side."""

import pandas as pd
import pytest

from carvana.errors import UserError
from carvana.run import Run, compare, shared_checkpoints, shared_folds


@pytest.fixture
def samples():
    rows = [(f"{car:04d}", 0.1 + 0.01 * car, f"{car:04d}_{view:02d}.jpg") for car in range(8) for view in range(4)]
    return pd.DataFrame(rows, columns=["car", "area", "img"])


def touched(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_run_keeps_its_folds_and_refuses_others(tmp_path, samples):
    run = Run(tmp_path, "a")
    first = run.split(samples, 2, 0, 1)
    assert run.split(samples, 2, 0, 1).equals(first)
    assert run.folds().equals(first)
    with pytest.raises(UserError, match=r"folds.csv was made with other"):
        run.split(samples, 4, 0, 1)


def test_checkpoints_are_found_by_fold_and_only_those_that_all_runs_have_are_shared(tmp_path):
    a, b = Run(tmp_path, "a"), Run(tmp_path, "b")
    for run, folds in ((a, (0, 1, 10)), (b, (10, 0))):
        for fold in folds:
            touched(run.checkpoint(fold))
    touched(a.checkpoint(2, "last"))
    assert sorted(a.checkpoints()) == [0, 1, 10]
    shared = {fold: [a.checkpoint(fold), b.checkpoint(fold)] for fold in (0, 10)}
    assert shared_checkpoints([a, b]) == shared
    assert Run.trained(tmp_path) == ["a", "b"]


def test_a_run_without_folds_checkpoints_or_scores_is_named(tmp_path):
    run = Run(tmp_path, "a")
    for read, name in ((run.folds, "folds.csv"), (run.checkpoints, "trained fold"), (run.scores, "scores.csv")):
        with pytest.raises(UserError, match=name):
            read()
    assert run.out_of_fold_dice() is None
    assert run.quality() is None
    assert run.histories() == run.note("steps") == {}


def test_runs_with_other_folds_are_not_blended(tmp_path, samples):
    a, b = Run(tmp_path, "a"), Run(tmp_path, "b")
    a.split(samples, 2, 0, 1)
    b.split(samples, 2, 0, 2)
    with pytest.raises(UserError, match="b has other folds than"):
        shared_folds([a, b])


def test_the_out_of_fold_dice_leaves_held_out_cars_out(tmp_path):
    run = Run(tmp_path, "a")
    run.folder.mkdir()
    pd.DataFrame({"img": list("xyz"), "car": "00", "fold": [0, 1, -1], "dice": [0.5, 0.7, 0.1]}).to_csv(
        run.scores_path, index=False
    )
    assert run.out_of_fold_dice() == pytest.approx(0.6)
    assert run.scores()["car"].tolist() == ["00"] * 3  # text, not the number 0


def test_a_table_that_is_none_is_one_line_with_its_name(tmp_path):
    run = Run(tmp_path, "a")
    touched(run.scores_path)
    with pytest.raises(UserError, match=r"scores.csv is not a table") as error:
        compare([run])
    assert "\n" not in str(error.value)
