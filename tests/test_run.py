"""The folder of a run: folds that stay, checkpoints by fold, and runs side by side."""

import copy
import json
import math

import pandas as pd
import pytest

from carvana.errors import UserError
from carvana.inference import EnsembleSpec
from carvana.members import shared_checkpoints, shared_folds
from carvana.run import Run, compare


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


def test_a_checkpoint_of_an_untrained_network_is_refused_and_a_fold_that_was_stopped_is_told(tmp_path):
    run = Run(tmp_path, "a")
    for fold, epochs in ((0, (0, 1, 3)), (1, (0,)), (2, ())):
        touched(run.checkpoint(fold))
        rows = "".join(f"{epoch},0.5,60\n" for epoch in epochs)
        if rows:
            (run.fold_dir(fold) / "history.csv").write_text(f"epoch,dice,seconds\n{rows}")
    assert run.epochs_done() == {0: 3, 1: 0}
    with pytest.raises(UserError, match="fold1 has not ended an epoch. Train or delete it"):
        run.checkpoints()
    run.checkpoint(1).unlink()
    assert [*run.checkpoints()] == [0, 2]


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
    scored = {"img": list("xyz"), "car": ["00", "NA", "nan"], "fold": [0, 1, -1], "dice": [0.5, 0.7, 0.1]}
    pd.DataFrame(scored).to_csv(run.scores_path, index=False)
    assert run.out_of_fold_dice() == pytest.approx(0.6)
    assert run.scores()["car"].tolist() == ["00", "NA", "nan"]  # text, neither the number 0 nor a missing value


def test_a_table_that_is_none_is_one_line_with_its_name(tmp_path):
    run = Run(tmp_path, "a")
    touched(run.scores_path)
    with pytest.raises(UserError, match=r"scores.csv is not a table") as error:
        compare([run])
    assert "\n" not in str(error.value)


TABLES = {
    "folds.csv": {"car": "00", "fold": 0},
    "fold0/history.csv": {"epoch": 1, "seconds": 2.5, "dice": 0.5, "iou": 0.4, "loss": 0.1},
    "quality.csv": {"img": "00_01.jpg", "car": "00", "fold": 0, "exclude": ""},
    "scores.csv": {"img": "00_01.jpg", "car": "00", "view": 1, "fold": 0, "dice": 0.5, "area": 0.2, "edge_1": 7},
}


def whole(tmp_path):
    """A run in which every file that is read back is there and whole."""
    run = Run(tmp_path, "a")
    touched(run.checkpoint(0))
    for name, row in TABLES.items():
        pd.DataFrame([row]).to_csv(run.folder / name, index=False)
    members = [{"path": "fold0/best.safetensors", "weight": 1.0}]
    run.write_note("ensemble", {"members": members, "views": ["none"], "threshold": 0.5})
    run.write_note("run", {"parameters": {"lr": 0.1}, "data": "key"})
    run.write_note("submission", {"path": "x.csv.gz", "rows": 4, "true_dice": 0.9})
    run.write_note("steps", {"01_download": {"key": "k", "seconds": 1.5}})
    return run


READERS = {
    "folds.csv": [Run.folds, Run.checkpoints, lambda run: shared_folds([run])],
    "fold0/history.csv": [Run.histories, Run.training_minutes],
    "scores.csv": [Run.scores, Run.out_of_fold_dice, lambda run: compare([run])],
    "quality.csv": [Run.quality],
    "ensemble.json": [lambda run: run.note("ensemble"), lambda run: EnsembleSpec.read(run.ensemble_path)],
    "run.json": [lambda run: run.note("run"), Run.parameters],
    "submission.json": [lambda run: run.note("submission"), lambda run: list(run.result_lines())],
    "steps.json": [],
}
DAMAGES = {
    "empty": lambda path, data: path.write_bytes(b""),
    "truncated": lambda path, data: path.write_bytes(data[: len(data) // 3]),
    "binary": lambda path, data: path.write_bytes(bytes(range(256))),
    "zeros": lambda path, data: path.write_bytes(bytes(len(data))),
    "semicolons": lambda path, data: path.write_bytes(data.replace(b",", b";")),
    "utf-16": lambda path, data: path.write_bytes(data.decode().encode("utf-16")),
    "another table": lambda path, data: path.write_bytes(b"a,b\n1,2\n"),
    "other values": lambda path, data: path.write_bytes(data.replace(b"1", b"x").replace(b"0", b"x")),
    "longer rows": lambda path, data: path.write_bytes(data.replace(b"\n", b",\n").replace(b",\n", b"\n", 1)),
    "a list": lambda path, data: path.write_bytes(b"[1, 2]"),
    "null": lambda path, data: path.write_bytes(b"null"),
    "deep": lambda path, data: path.write_bytes(b"[" * 10**5),
    "a folder": lambda path, data: (path.unlink(), path.mkdir()),
}
HARMLESS = "quality.csv", "other values"  # all of it is text


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_of_a_run_is_one_line_with_its_name(tmp_path, name, damage):
    run = whole(tmp_path)
    for readers in READERS.values():
        for read in readers:
            read(run)
    DAMAGES[damage](run.folder / name, (run.folder / name).read_bytes())
    for read in READERS[name] if (name, damage) != HARMLESS else ():
        with pytest.raises(UserError, match=name) as error:
            read(run)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if name == "steps.json":
        assert run.note("steps") == {}  # found anew


WRONG = {
    "run": [{"parameters": [1]}, {"parameters": "x"}, {"parameters": None}],
    "submission": [{"path": "x", "rows": 4, "true_dice": "high"}, {"path": 3, "rows": 4}, {"path": "x", "rows": "4"}],
}


@pytest.mark.parametrize(("name", "facts"), [(name, facts) for name in WRONG for facts in WRONG[name]])
def test_a_note_whose_values_are_of_another_type_is_one_line(tmp_path, name, facts):
    run = whole(tmp_path)
    run.write_note(name, facts)
    for read in READERS[f"{name}.json"]:
        with pytest.raises(UserError, match=f"{name}.json cannot be read as JSON: ") as error:
            read(run)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("step", [{}, {"key": "k"}, {"key": 1, "seconds": 1.0}, {"key": "k", "seconds": "1"}])
def test_steps_that_say_no_time_are_found_anew(tmp_path, step):
    run = whole(tmp_path)
    run.write_note("steps", {"01_download": step})
    assert run.note("steps") == {}


CELLS = [(name, column) for name, row in TABLES.items() for column in row]
QUALITY = [("quality.csv", name) for name in ("exclude", "car", "fold")]  # where a person marks, and may add rows
FREE = *QUALITY, ("fold0/history.csv", "loss")  # which may be nan


@pytest.mark.parametrize(("name", "column"), [cell for cell in CELLS if cell not in FREE])
@pytest.mark.parametrize("value", ["", "x", "1,2"])
def test_a_cell_that_is_empty_or_of_another_type_is_one_line(tmp_path, name, column, value):
    run = whole(tmp_path)
    row = [value if key == column else str(cell) for key, cell in TABLES[name].items()]
    (run.folder / name).write_text(f"{','.join(TABLES[name])}\n{','.join(row)}\n")
    if value == "x" and isinstance(TABLES[name][column], str):
        return
    for read in READERS[name]:
        with pytest.raises(UserError, match=name) as error:
            read(run)
        assert "\n" not in str(error.value)


def test_a_table_that_a_spreadsheet_has_saved_is_read(tmp_path):
    run = whole(tmp_path)
    run.quality_path.write_bytes(b"\xef\xbb\xbfimg,car,exclude\r\n00_01.jpg,NA,x\r\nNA_02.jpg,00,\r\n")
    assert run.quality().to_numpy().tolist() == [["00_01.jpg", "NA", "x"], ["NA_02.jpg", "00", ""]]


ENSEMBLE = {
    "members": [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5}],
    "views": ["none"],
    "threshold": 0.5,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("threshold", value) for value in (0, 1, 2, -0.1, "0.5", True, None, math.nan, math.inf, [0.5])],
        *[("views", value) for value in ([], [1], ["flip"], "none", ["none\n"], ["scale9"], None, [["none"]])],
        *[("members", value) for value in ([], {}, None, ["a"], [{"path": "a"}], [{"weight": 1.0}])],
        *[("weight", value) for value in (-1, 2, math.inf, math.nan, True, "1", None, 0.75)],
        *[("path", value) for value in (1, None, ["a"])],
    ],
)
def test_an_ensemble_that_cannot_be_meant_is_refused_by_what_it_says(tmp_path, key, value):
    note, path = copy.deepcopy(ENSEMBLE), tmp_path / "ensemble.json"
    (note if key in note else note["members"][0])[key] = value
    path.write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"ensemble.json") as error:
        EnsembleSpec.read(path)
    assert "\n" not in str(error.value)


def test_a_person_may_write_whole_numbers_and_notes_into_an_ensemble(tmp_path):
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps(ENSEMBLE | {"members": [{"path": "a", "weight": 1, "why": "the best"}], "note": "mine"}))
    assert EnsembleSpec.read(path) == EnsembleSpec((tmp_path / "a",), (1.0,), ("none",), 0.5)


def test_copies_of_a_fold_are_left_alone_and_a_fold_of_other_cars_is_refused(tmp_path):
    run = whole(tmp_path)
    for name in ("foldX", "fold0 copy", "fold", "fold00", "fold-1", "fold\u0663", "folds"):
        touched(run.folder / name / "best.safetensors")
        touched(run.folder / name / "history.csv")
    assert list(run.checkpoints()) == [0] and list(run.histories()) == ["0"]
    touched(run.folder / "fold7" / "best.safetensors")
    for read in (Run.checkpoints, Run.histories, Run.training_minutes):
        with pytest.raises(UserError, match=r"fold7 is no fold of folds.csv. Rename or delete it"):
            read(run)


@pytest.mark.parametrize("name", ["exp/one", "../../escaped", "..", "", "a\0b", "cache"])
def test_a_run_whose_name_is_no_folder_is_refused_before_work(tmp_path, name):
    with pytest.raises(UserError, match="is no name of a run"):
        Run(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rows", "message"), [
    ("img,dice\na.jpg,0.9\n", "no column car"),
    ("img,car,fold,dice\na.jpg,a,0,0.9\na.jpg,a,0,0.9\n", "names an image twice"),
    ("img,car,fold,dice\na.jpg,a,0,-7.5\n", "a Dice outside 0 to 1"),
])  # fmt: skip
def test_scores_that_cannot_be_are_one_line(tmp_path, rows, message):
    run = Run(tmp_path, "run")
    run.folder.mkdir()
    run.scores_path.write_text(rows)
    with pytest.raises(UserError, match=rf"scores.csv .*{message}"):
        run.scores()
