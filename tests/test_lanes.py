"""Folds that are trained at the same time: what ends one of them, and what becomes of the others."""

import os
import shutil
import signal
import sys
import threading
import time

import nbformat
import psutil
import pytest

from carvana import device, parallel, pipeline
from carvana.errors import OutOfTimeError, UserError
from carvana.files import project_root
from carvana.run import Run

BOTH_LANES = """
import os, pathlib, time
from carvana.errors import OutOfTimeError, UserError
here = pathlib.Path(runs_dir)
(here / f"pid{fold}").write_text(f"{os.getpid()} {os.environ['LOCAL_WORLD_SIZE']}")
while len(list(here.glob("pid*"))) < 2:
    time.sleep(0.02)
"""
FAILS = "if fold == 0: raise UserError('wheels are square')\ntime.sleep(120)"
WAITS = "time.sleep(120)"
ENDS = "time.sleep(2 * fold)\nif fold == 0: raise OutOfTimeError('fold 0 stopped')\n(here / 'saved').touch()"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose runs are 03 alone, whose code is given; returns what runs it in two lanes."""
    shutil.copytree(project_root() / "notebooks", tmp_path / "notebooks")
    (tmp_path / "runs").mkdir()
    folders = "".join(f"{name}_dir: {tmp_path / name}\n" for name in ("data", "runs", "submissions"))
    (tmp_path / "two.yaml").write_text(f"{folders}run_name: two\nn_folds: 2")
    monkeypatch.chdir(tmp_path)
    every = pipeline.steps
    monkeypatch.setattr(pipeline, "steps", lambda values: [s for s in every(values) if s.notebook == "03_train"])
    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    monkeypatch.setenv(parallel.SHARING, "1")

    def run(code):
        path = tmp_path / "notebooks" / "03_train.ipynb"
        notebook = nbformat.read(path, 4)
        notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        notebook.cells += [nbformat.v4.new_code_cell(BOTH_LANES + code)]
        nbformat.write(notebook, path)
        pipeline.run(tmp_path / "two.yaml")

    return run


def pids(folder):
    return [int(path.read_text().split()[0]) for path in sorted(folder.glob("pid*")) if path.read_text()]


def test_a_fold_that_fails_is_reported_at_once_and_ends_the_others(project, tmp_path):
    with pytest.raises(UserError, match="wheels are square"):
        project(FAILS)
    began = max((tmp_path / "runs" / f"pid{fold}").stat().st_mtime for fold in (0, 1))
    assert time.time() - began < 30
    assert [(tmp_path / "runs" / f"pid{fold}").read_text().split()[1] for fold in (0, 1)] == ["2", "2"]
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path / "runs"))


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C cannot be sent to one process")
def test_an_interruption_ends_all_folds_at_once(project, tmp_path):
    def interrupt():
        while len(pids(tmp_path / "runs")) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        project(WAITS)
    began = max((tmp_path / "runs" / f"pid{fold}").stat().st_mtime for fold in (0, 1))
    assert time.time() - began < 30
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path / "runs"))


def test_a_fold_whose_time_is_over_leaves_the_others_to_save_what_they_did(project, tmp_path):
    with pytest.raises(OutOfTimeError, match="fold 0 stopped"):
        project(ENDS)
    assert (tmp_path / "runs" / "saved").exists()
    assert "03_train_fold1" in Run(tmp_path / "runs", "two").note("steps")
