"""Bad input, as a user meets it: one line on standard error, exit code 1, no traceback, nothing half-written."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, run_here, trainer_of
from PIL import Image
from safetensors.torch import load_file

from carvana import cli, files, pipeline, profiles
from carvana.data import Competition
from carvana.errors import UserError
from carvana.inference import EnsembleSpec
from carvana.run import Run
from carvana.training.launch import train


def fails(capsys, *arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("carvana: ")
    assert "Traceback" not in error
    return error


def profile(folder, **changes):
    values = {name: str(folder / name.removesuffix("_dir")) for name in ("data_dir", "runs_dir", "submissions_dir")}
    values |= RECIPE | {"run_name": "x", "n_folds": 2} | changes
    path = folder / "x.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    return path


def test_an_unknown_parameter_stops_before_anything_runs(tmp_path, capsys):
    error = fails(capsys, "run", profile(tmp_path, epoch=3))
    assert '"epoch"' in error and 'did you mean "epochs"' in error
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_a_missing_mask_ends_the_run_with_the_images_name(competition, capsys):
    listed = competition / "train_masks.csv"
    listed.write_text("\n".join(listed.read_text().splitlines()[:-1]))
    error = fails(capsys, "run", profile(competition.parent))
    assert error.startswith("carvana: 1 of 16 images have no mask in train_masks.csv, first 000000000004_04.jpg")
    assert not (competition.parent / "runs" / "x" / "folds.csv").exists()


def execute(notebook, values):
    pipeline.execute(notebook, Path(values["runs_dir"]) / "out.ipynb", values)


@pytest.mark.parametrize(("run", "notebook", "changes", "message"), [
    (run_here, "03_train", {"n_folds": 5}, "n_folds is 5 and holdout_cars 0, but there are only 4 cars"),
    (run_here, "04_evaluate", {}, "folds.csv does not exist. Train with 03_train first"),
    (execute, "06_submit", {}, "x.csv.gz"),
])  # fmt: skip
def test_a_notebook_ends_with_one_line_that_names_the_parameter_or_file(competition, run, notebook, changes, message):
    values = profiles.load_profile(profile(competition.parent, **changes))
    step = next(step for step in pipeline.steps(values) if step.notebook == notebook)
    with pytest.raises(UserError) as error:
        run(notebook, step.values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(competition.parent.glob("submissions/*"))


def test_with_skip_broken_05_and_06_go_on_past_images_that_cannot_be_decoded_and_of_other_sizes(competition, members):
    place = competition.parent
    for name in ("000000000005_01.jpg", "000000000005_04.jpg"):  # the first one and the last one
        (competition / "test" / name).write_bytes(b"\xff\xd8 not an image")
    Image.new("RGB", (64, 32)).save(competition / "test" / "000000000005_03.jpg")
    (competition / "truth.csv").unlink()
    EnsembleSpec(members, [0.5, 0.5], ["none"], 0.3).write(place / "ensemble.json")
    values = {name: str(place / name.removesuffix("_dir")) for name in ("data_dir", "runs_dir", "submissions_dir")}
    values |= {"run_name": "x", "ensemble": str(place / "ensemble.json"), "skip_broken": True}
    run_here("05_predict", values)
    del values["ensemble"], values["skip_broken"]
    run_here("06_submit", values)
    assert files.read_json(Run(place / "runs", "x").submission_path)["rows"] == 4


def test_no_room_on_the_disk_is_said_and_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    files.write_text(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"scores.csv could not be written: No space left on device. Free space"):
        files.write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
    assert path.read_text() == "old"


def test_space_is_checked_before_it_is_used(tmp_path):
    with pytest.raises(UserError, match=r"99999999.0 GB are needed and"):
        files.need_space(tmp_path / "not" / "there", 99_999_999 * 10**9)


@pytest.mark.parametrize("command", [
    ["demo-data", "TARGET", "--cars", "1", "--test-cars", "1"],
    ["download", "--data-dir", "TARGET"],
    ["kernel", "build", "--profile", "PROFILE", "--user", "me", "--folder", "TARGET"],
])  # fmt: skip
def test_a_target_that_cannot_be_written_is_said_before_anything_is_asked_for(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "p.yaml").write_text('run_name: x\nencoder_weights: ""\n')
    places = {"TARGET": tmp_path / "file" / "folder", "PROFILE": tmp_path / "p.yaml"}
    assert "cannot be written into" in fails(capsys, *(places.get(word, word) for word in command))
    assert (tmp_path / "file").read_text() == "mine"


def test_output_that_nobody_reads_to_its_end_is_no_error():
    command = ["bash", "-o", "pipefail", "-c", '"$0" -m carvana params | head -1', sys.executable]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_home_of_nobody_and_a_folder_of_no_ledger_are_one_line(tmp_path, capsys):
    assert "~nosuch/x: there is no such user" in fails(capsys, "compare", "a", "--runs-dir", "~nosuch/x")
    (tmp_path / "file").touch()
    for name in ("gone", "file"):
        assert f"{name} is no folder" in fails(capsys, "ledger", "--offline", "--submissions-dir", tmp_path / name)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic(tmp_path / "part.csv") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed_and_a_folder_or_device_is_never_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "scores.csv"
    link.symlink_to(tmp_path / "there" / "real.csv")
    for text in ("old", "new"):
        files.write_text(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "real.csv").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "there", "/dev/null"):
        before = Path(path).stat().st_mode
        with pytest.raises(UserError, match="could not be written: it is a folder or a device"):
            files.write_text(path, "new")
        assert Path(path).stat().st_mode == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["pipe", "real.csv", "scores.csv", "there"]


KILLED = """
    import os, signal, sys
    from carvana import files
    with files.atomic(sys.argv[1]) as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_leaves_is_swept_and_what_is_being_written_is_not(tmp_path):
    path = tmp_path / "fold0" / "best.safetensors"
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(path)], check=False)
    left = list(path.parent.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".best.safetensors.")
    (path.parent / ".mine.csv").touch()
    with files.atomic(path) as file:
        file.write(b"whole")
        files.sweep(tmp_path.rglob(".*"))
    assert path.read_bytes() == b"whole"
    assert sorted(file.name for file in path.parent.iterdir()) == [".mine.csv", "best.safetensors"]


def test_a_fold_whose_best_weights_are_lost_keeps_what_its_state_holds(competition, tmp_path):
    run_dir = tmp_path / "runs" / "x"
    trained = trainer_of(competition, run_dir, epochs=1)
    train(trained)
    assert trainer_of(competition, run_dir, epochs=1).finished
    best = run_dir / "fold0" / "best.safetensors"
    last = load_file(best.with_name("last.safetensors"))
    best.unlink()
    history = train(trainer_of(competition, run_dir, epochs=1))
    assert history["epoch"].tolist() == [0, 1, 1]
    after = load_file(best)
    assert all(torch.equal(after[name], tensor) for name, tensor in last.items())


def test_an_unexpected_error_is_one_line_and_debug_shows_its_place(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_params", lambda options: 1 / 0)
    assert fails(capsys, "params") == "carvana: ZeroDivisionError: division by zero (--debug shows where)"
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "params"])


def test_validate_prints_every_problem_and_exits_with_one(competition, capsys):
    bad = competition / "bad.csv"
    bad.write_text("img,rle_mask\n000000000005_01.jpg,1 2 3\n000000000005_02.jpg,0 5\nextra.jpg,1 1\n")
    assert cli.main(["validate", str(bad), "--sample", str(competition / "sample_submission.csv")]) == 1
    told = capsys.readouterr().out
    for word in ("000000000005_01.jpg", "000000000005_02.jpg", "000000000005_03.jpg", "extra.jpg"):
        assert word in told


def test_what_a_terminal_cannot_show_is_shown_as_a_question_mark(tmp_path, capsys):
    assert str(UserError("image a\nb\x1b[31m_01.jpg is bad")) == "image a?b?[31m_01.jpg is bad"
    sample, bad = tmp_path / "sample.csv", tmp_path / "bad.csv"
    sample.write_text("img,rle_mask\na_01.jpg,1 1\n")
    bad.write_bytes(b"img,rle_mask\n\x1b[31m\x00,1 1\n")
    assert cli.main(["validate", str(bad), "--sample", str(sample)]) == 1
    assert "\x1b" not in (told := capsys.readouterr().out) and "?[31m?" in told
    assert "gone.csv does not exist" in fails(capsys, "validate", tmp_path / "gone.csv", "--sample", sample)


def test_a_worker_process_hands_on_our_line_alone():
    error = UserError("Caught UserError in DataLoader worker.\nTraceback\ncarvana.errors.UserError: image x is bad.\n")
    assert str(error) == "image x is bad."


def test_folds_need_their_cars_before_anything_is_written(competition):
    with pytest.raises(UserError, match="n_folds is 9"):
        Run(competition.parent, "run").split(Competition(competition).samples, 9, 0, 1)
    assert not (competition.parent / "run").exists()


@pytest.mark.slow
def test_a_run_killed_at_many_moments_ends_in_the_same_weights_folds_and_submission(competition):
    place = competition.parent
    options = {"epochs": 30, "batch_size": 2, "validate_every": 10, "ema": 0.9}
    whole, cut = (profile(place, run_name=name, **options).rename(place / f"{name}.yaml") for name in ("whole", "cut"))
    assert cli.main(["run", str(whole)]) == 0
    for seconds in (12, 15, 18, 21, 24, 27):
        process = subprocess.Popen([sys.executable, "-m", "carvana", "run", str(cut)], start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert cli.main(["run", str(cut)]) == 0
    runs = place / "runs"
    for name in ("folds.csv", "scores.csv", "parts/part-00000.csv"):
        assert (runs / "cut" / name).read_bytes() == (runs / "whole" / name).read_bytes(), name
    for name in ("fold0/best", "fold0/last", "fold1/best", "fold1/last"):
        actual, expected = (load_file(runs / run / f"{name}.safetensors") for run in ("cut", "whole"))
        assert all(torch.equal(actual[key], expected[key]) for key in expected), name
    assert (place / "submissions" / "cut.csv.gz").read_bytes() == (place / "submissions" / "whole.csv.gz").read_bytes()
