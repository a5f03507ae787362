"""The notebooks as they are run: by a profile, by papermill alone, and by hand from their own folder."""

import ast
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import RECIPE, run_here, write_competition
from fake_kaggle import KEY, guarded, serve
from nbclient import NotebookClient

from carvana import cli, pipeline, submission
from carvana.files import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
FOLDERS = ("data_dir", "runs_dir", "submissions_dir")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny competition on Kaggle, and a profile that downloads it, runs everything and submits."""
    folder = tmp_path_factory.mktemp("place")
    write_competition(folder / "made", cars=5)
    (folder / "made" / "metadata.csv").write_text("id,year,make\n")
    (folder / "data").mkdir()
    shutil.copy(folder / "made" / "truth.csv", folder / "data")
    values = dict(zip(FOLDERS, (str(folder / name) for name in ("data", "runs", "submissions")), strict=True))
    values |= RECIPE | {"run_name": "tiny", "n_folds": 2, "holdout_cars": 1, "epochs": 4, "batch_size": 2}
    values |= {"validate_every": 2, "submit": True}
    (folder / "tiny.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    with pytest.MonkeyPatch.context() as patch, guarded(patch, folder) as fake:
        serve(fake, folder / "made")
        yield folder


@pytest.fixture(scope="module")
def lines(place):
    return pipeline.run(place / "tiny.yaml")


def outputs(path):
    cells = nbformat.read(path, 4).cells
    return "".join(out.get("text", "") for cell in cells if cell.cell_type == "code" for out in cell.outputs)


def test_a_profile_runs_all_six_and_ends_with_the_true_dice(place, lines):
    scores = submission.score(place / "submissions" / "tiny.csv.gz", place / "data" / "truth.csv")
    assert lines[-1] == f"true Dice {scores['dice'].mean():.6f}"
    assert scores["dice"].mean() > 0.7
    made = {path.name for path in (place / "runs" / "tiny" / "notebooks").iterdir()}
    assert made == {
        "01_download.ipynb", "02_explore.ipynb", "03_train_fold0.ipynb", "03_train_fold1.ipynb",
        "04_evaluate.ipynb", "05_predict.ipynb", "06_submit.ipynb",
    }  # fmt: skip


def test_from_the_download_to_the_score_in_the_ledger_one_command_is_enough(place, lines):
    with (place / "submissions" / "ledger.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    scores = submission.score(place / "submissions" / "tiny.csv.gz", place / "made" / "truth.csv")
    assert row["public_score"] == f"{scores['dice'].mean():.6f}"
    assert (row["run"], row["status"]) == ("tiny", "complete")
    assert (place / "data" / "train.zip").exists()


def test_nothing_that_a_run_writes_holds_the_key(place, lines):
    written = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 50
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_the_run_folder_holds_what_the_design_promises(place, lines):
    run = place / "runs" / "tiny"
    for name in ("run.json", "folds.csv", "scores.csv", "quality.csv", "ensemble.json", "report.html",
                 "submission.json", "fold0/best.safetensors", "fold1/last.safetensors", "fold0/history.csv",
                 "fold0/state.pt", "parts/part-00000.csv", "parts/part-00000.json"):  # fmt: skip
        assert (run / name).exists(), name
    assert len(pd.read_csv(run / "scores.csv")) == 20
    assert set(json.loads((run / "run.json").read_text())) == {"parameters", "data", "versions", "commit", "machine"}


def test_scores_of_the_notebooks_are_those_in_the_files(place, lines):
    run = place / "runs" / "tiny"
    scores = pd.read_csv(run / "scores.csv")
    text = outputs(run / "notebooks" / "04_evaluate.ipynb")
    assert f"{scores[scores['fold'] >= 0]['dice'].mean():.6f}" in text
    assert f"{scores[scores['fold'] == -1]['dice'].mean():.6f}" in text
    history = pd.read_csv(run / "fold0" / "history.csv")
    assert f"{history['iou'].iloc[0]:.6f} before training" in outputs(run / "notebooks" / "03_train_fold0.ipynb")


def test_a_second_run_skips_every_step(place, lines, capsys):
    assert pipeline.run(place / "tiny.yaml") == lines
    told = capsys.readouterr().out
    assert told.count("nothing has changed, skipped") == 7
    assert "running" not in told


def test_validate_and_score_agree_from_the_command_line(place, lines, capsys):
    data, file = place / "data", str(place / "submissions" / "tiny.csv.gz")
    size = ["--height", "96", "--width", "126"]
    assert cli.main(["validate", file, "--sample", str(data / "sample_submission.csv.zip"), *size]) == 0
    capsys.readouterr()
    assert cli.main(["score", file, "--truth", str(data / "truth.csv"), "--csv", str(place / "each.csv")]) == 0
    assert lines[-1].removeprefix("true ") in capsys.readouterr().out
    assert len(list(csv.DictReader((place / "each.csv").open()))) == 4


def test_any_folder_is_predicted_by_another_run_and_its_soft_masks_are_learnt_from(place, lines, capsys):
    values = {name: str(place / folder) for name, folder in zip(FOLDERS, ("data", "runs", "submissions"), strict=True)}
    values |= {"run_name": "soft", "ensemble": str(place / "runs" / "tiny" / "ensemble.json"), "pseudo_share": 0.5}
    truth = pd.read_csv(place / "made" / "truth.csv").iloc[1:]
    (place / "three").mkdir()
    truth.to_csv(place / "three.csv", index=False)
    for name in truth["img"]:
        shutil.copy(place / "made" / "test" / name, place / "three")
    run_here("05_predict", values | {"test_dir": str(place / "three")})
    assert len(submission.score(place / "submissions" / "soft.csv.gz", place / "three.csv")) == 3
    part = json.loads((place / "runs" / "soft" / "parts" / "part-00000.json").read_text())
    surest = pd.DataFrame({"img": part["names"], "unsure": part["unsure"]}).nsmallest(2, "unsure")
    assert pd.read_csv(place / "runs" / "soft" / "pseudo" / "labels.csv")["img"].tolist() == surest["img"].tolist()
    assert f"2 soft masks are kept, the widest band is {surest['unsure'].max():.2f}" in capsys.readouterr().out
    values |= RECIPE | {"run_name": "student", "n_folds": 2, "holdout_cars": 1, "epochs": 1, "pseudo_labels": "soft"}
    run_here("03_train", values)
    assert "2 soft masks of soft on top: 2 of the 4 images in a batch." in capsys.readouterr().out
    assert (place / "runs" / "student" / "fold0" / "best.safetensors").exists()


@pytest.mark.slow
def test_papermill_alone_trains_a_fold_with_a_profile_from_anywhere(place, lines, tmp_path):
    options = {"data_dir": place / "data", "runs_dir": tmp_path / "runs", "encoder_weights": "", "fold": 1}
    options |= {"height": 32, "width": 64, "epochs": 1, "n_folds": 2}
    command = [Path(sys.executable).parent / "papermill", NOTEBOOKS[2], tmp_path / "out.ipynb"]
    command += ["-f", project_root() / "profiles" / "cpu.yaml"]
    for name, value in options.items():
        command += ["-p", name, str(value)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "runs" / "cpu" / "fold1" / "best.safetensors").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("epohcs", 'UserError: parameter "epohcs" of papermill is in no notebook, did you mean "epochs"? See: carvana'),
    # Of 03: a whole profile may be handed on, and what ends it is that there are no images.
    pytest.param("epochs", "UserError: ", marks=pytest.mark.slow),
])  # fmt: skip
def test_papermill_alone_refuses_what_no_notebook_has_in_one_line(tmp_path, name, message):
    options = ["-f", project_root() / "profiles" / "cpu.yaml", "-p", "data_dir", tmp_path / "nowhere", "-p", name, "3"]
    command = [Path(sys.executable).parent / "papermill", NOTEBOOKS[1], tmp_path / "out.ipynb", *options]
    ended = subprocess.run(list(map(str, command)), cwd=project_root(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if line.startswith("UserError: ")]
    assert len(told) == 1 and told[0].startswith(message)
    assert ("nowhere" in told[0]) == (name == "epochs")


def test_a_notebook_runs_by_hand_from_its_own_folder(place, lines):
    notebook = nbformat.read(NOTEBOOKS[1], 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = cell.source.replace('"data/carvana"', repr(str(place / "data"))).replace("n_folds = 5", "n_folds = 2")
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS[1].parent}}).execute()
    images = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(images) >= 4


@pytest.mark.slow
def test_a_changed_parameter_runs_only_what_depends_on_it(place, lines, capsys):
    pipeline.run(place / "tiny.yaml", {"tta": "none"})
    running = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("running")]
    assert running == ["04_evaluate", "05_predict", "06_submit"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_cells_without_functions_outputs_or_shell(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].source.startswith("# ")
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    sources = [cell.source for cell in code if "parameters" not in cell.metadata.get("tags", [])]
    sizes = sorted(len(source.splitlines()) for source in sources)
    assert sizes[len(sizes) // 2] <= 5
    assert sizes[-1] <= 12
    for source in sources:
        tree = ast.parse(source)  # no magic, no shell
        assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef))]
