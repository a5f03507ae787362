"""The page of a run stands alone, shows scores at six decimals, and bears a run that holds little."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carvana import files
from carvana.errors import UserError
from carvana.kaggle import submit
from carvana.plots import report, style
from carvana.run import Run


@pytest.fixture
def run(tmp_path):
    """A run that holds only the history of one fold."""
    folder = tmp_path / "runs" / "first"
    add_history(folder / "fold0", [0.1, 0.9876543, 0.98])
    return folder


def add_history(folder, dice):
    folder.mkdir(parents=True)
    history = pd.DataFrame({"epoch": range(len(dice)), "dice": dice, "iou": [d / (2 - d) for d in dice]})
    history["loss"] = [np.nan] + [0.5] * (len(dice) - 1)
    history.assign(step=0, images_seen=0, images_scored=9, seconds=90.0, lr=0.1).to_csv(
        folder / "history.csv", index=False
    )


def add_scores(folder):
    rows = {"img": ["a_01.jpg", "b_01.jpg", "c_01.jpg"], "car": ["a", "b", "c"], "view": 1, "fold": [0, 0, -1]}
    rows |= {"dice": [0.99, 0.98, 0.9123456], "iou": [0.98, 0.96, 0.85], "area": 0.2, "predicted_area": 0.21}
    rows |= {"edge_1": 60, "edge_3": 20, "edge_10": 10, "missed": 10, "extra": 0, "disputed": [0, 7, 0]}
    pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False)


def add_figure(folder, name, size=(40, 30)):
    (folder / "figures").mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "figures" / name)


def add_worst(folder, names=("c_01", "b_01")):
    (folder / "figures" / "worst").mkdir(parents=True)
    for name in names:
        for part in ("", "_zoom"):
            noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "figures" / "worst" / f"{name}{part}.jpg")


def opened(folder):
    return Run(folder.parent, folder.name)


def page(run, submissions_dir=None):
    path = report.write_report(opened(run), submissions_dir)
    assert path == run / "report.html"
    return path.read_text()


def test_a_run_with_only_a_history_gets_a_page(run):
    text = page(run)
    assert "<h1>Run first</h1>" in text
    assert "0.987654" in text and "0.100000" in text  # best and untrained Dice
    assert "1 of 2" in text  # best epoch
    assert text.count("data:image/svg+xml") == 2  # Dice and loss
    assert "Worst images" not in text and "Not scored yet" in text


def test_a_run_without_anything_gets_a_page(tmp_path):
    assert "Not scored yet" in page(tmp_path)


def test_a_history_of_the_untrained_network_alone_is_shown(tmp_path):
    add_history(tmp_path / "run" / "fold0", [0.25])
    assert page(tmp_path / "run").count("data:image/svg+xml") == 1


def test_scores_have_six_decimals_and_say_what_they_were_selected_on(run):
    add_scores(run)
    text = page(run)
    assert "mean Dice, unseen cars" in text and "<strong>0.912346</strong>" in text
    assert "mean Dice, out of fold, selected on these folds" in text and "<strong>0.985000</strong>" in text
    assert re.search(r"0\.\d{6} to 0\.\d{6}", text)  # the interval
    assert text.index("c_01.jpg") < text.index("b_01.jpg") < text.index("a_01.jpg")  # worst first
    assert "60.0 %, 60 pixels" in text


def test_the_page_loads_nothing_from_elsewhere(run):
    add_scores(run)
    add_figure(run, "worst.png")
    add_figure(run, "fold0.png")
    add_worst(run)
    text = page(run)
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert len(addresses) == 12 and all(address.startswith(("data:image/", "#worst")) for address in addresses)
    assert "<script" not in text and "@import" not in text
    assert 'name="viewport"' in text
    assert text.index("The worst images") < text.index("fold0")


def test_a_click_on_one_of_the_worst_shows_its_full_size(run):
    add_scores(run)
    add_worst(run)
    text = page(run)
    assert text.index("c_01.jpg: where most") < text.index("b_01.jpg: where most")  # worst first
    assert 'href="#worst-1"' in text and 'id="worst-1"' in text and 'href="#worst-3"' not in text
    assert text.count("data:image/jpeg") == 4


def test_full_sizes_beyond_the_budget_are_linked(run, monkeypatch):
    add_scores(run)
    add_worst(run)
    size = (run / "figures" / "worst" / "c_01.jpg").stat().st_size
    monkeypatch.setattr(report, "BUDGET", size + 100)  # one image
    text = page(run)
    assert 'href="#worst-1"' in text and 'href="figures/worst/b_01.jpg"' in text
    assert text.count("data:image/jpeg") == 3


def test_the_gallery_of_a_notebook_links_to_the_files_of_the_run(run, monkeypatch):
    add_scores(run)
    add_worst(run)
    root = run.parent.parent
    (root / "notebooks").mkdir()
    monkeypatch.chdir(root)  # as papermill runs it: the page lies in the run
    assert 'href="../figures/worst/c_01.jpg" target="_blank"' in report.gallery(opened(run))
    monkeypatch.chdir(root / "notebooks")  # by hand
    assert 'href="../runs/first/figures/worst/c_01.jpg"' in report.gallery(opened(run))


def test_data_and_timings_are_told(run):
    add_scores(run)
    files.write_json(run / "steps.json", {"04_evaluate": {"key": "secret", "seconds": 90.0}})
    text = page(run)
    assert "3 of 3 cars in 1 views" in text and "1 images of 1 cars" in text
    assert "1.5 minutes" in text and "secret" not in text
    assert "1, listed in quality.csv" in text


def test_the_page_stays_below_15_megabytes_and_names_what_it_leaves_out(run, monkeypatch):
    for name in "abc":
        add_figure(run, f"{name}.png", (600, 400))
    kind, data = report.compact(run / "figures" / "a.png")
    assert kind == "jpeg" and len(data) < 600 * 400  # the PNG has 720 KB
    assert report.BUDGET * 4 / 3 < 14e6
    monkeypatch.setattr(report, "BUDGET", 2 * len(data))
    text = page(run)
    assert text.count("data:image/jpeg") == 2
    assert "figures folder: c.png." in text


def test_facts_of_run_ensemble_and_submission_are_shown_and_escaped(run):
    parameters = {"lr": 0.001, "loss": "<b>dice</b>"}
    files.write_json(run / "run.json", {"parameters": parameters, "versions": {"torch": "2.11"}, "commit": None})
    members = [{"path": "fold0/best.safetensors", "weight": 1.0}]
    files.write_json(run / "ensemble.json", {"members": members, "views": ["none", "hflip"]})
    files.write_json(run / "submission.json", {"rows": 64, "true_dice": 0.99654321, "kaggle": {"public": 0.99}})
    text = page(run)
    assert "0.996543" in text and "0.990000" in text and "0.001" in text
    assert "none, hflip" in text and "path fold0/best.safetensors weight 1" in text
    assert "&lt;b&gt;dice" in text and "<b>dice" not in text


def test_only_the_ledger_rows_of_the_run_are_shown(run, tmp_path):
    rows = {"run": ["first", "other"], "file": ["first.csv.gz", "other.csv.gz"], "public_score": [0.9951, 0.1234]}
    table = pd.DataFrame(rows, columns=submit.COLUMNS).assign(sha256="0" * 64, status="complete")
    table.to_csv(tmp_path / "ledger.csv", index=False)
    text = page(run, tmp_path)
    assert "0.9951" in text and "0.1234" not in text


def test_a_blend_shows_the_folds_of_its_members(run):
    blend = run.parent / "blend"
    members = [{"path": "../first/fold0/best.safetensors", "weight": 1.0}]
    files.write_json(blend / "ensemble.json", {"members": members, "views": ["none"], "threshold": 0.5})
    assert "first/0" in page(blend) and "0.987654" in page(blend)


def test_the_curves_of_two_members_can_be_told_apart(run):
    blend = run.parent / "both"
    shutil.copytree(run / "fold0", run.parent / "second" / "fold0")
    members = [{"path": f"../{name}/fold0/best.safetensors", "weight": 0.5} for name in ("first", "second")]
    files.write_json(blend / "ensemble.json", {"members": members, "views": ["none"], "threshold": 0.5})
    text = page(blend)
    assert all(style.fold_colour(i) in text for i in (0, 1))


def test_a_broken_file_is_an_error_with_its_name(run):
    (run / "scores.csv").write_text("")
    with pytest.raises(UserError, match="scores.csv"):
        report.write_report(opened(run))
    (run / "scores.csv").unlink()
    (run / "ensemble.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match="ensemble.json"):
        report.write_report(opened(run))
