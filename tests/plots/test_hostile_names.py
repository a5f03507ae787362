"""Names come from files that anybody may have made: they are shown as they are written, as no markup and no formula."""

import json
import os
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import simplejpeg
from conftest import SMALL, samples_of, square
from matplotlib.text import Text
from PIL import Image

from carvana import files, plots
from carvana.data.images import Archive
from carvana.data.statistics import BACKGROUND_RGB, CAR_RGB
from carvana.plots import browser
from carvana.plots import scores as score_figures
from carvana.run import Run

NAMES = ["<img src=x onerror=alert(1)>", r"$\frac{", 'a&b"c', "<script>alert(1)", "$x$", "100%|"]
IMAGES = [name for name in NAMES if "<" not in name]  # those that are file names on every system


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def is_harmless(page):
    return "script" not in page.tags and not [name for name in page.attributes if name.startswith("on")]


@pytest.mark.parametrize("name", NAMES)
def test_the_browsers_caption_shows_a_name_as_it_is_written(name):
    sample = pd.Series({"img": name, "fold": 0, "dice": 0.5})
    page = Page(browser.caption(sample, np.zeros((2, 2), bool), None))
    assert set(page.tags) == {"b", "code", "br", "span"}
    assert name in page.text and is_harmless(page)


def scores(names):
    table = pd.DataFrame({"img": names, "car": names, "view": 1, "fold": 0, "dice": 0.9, "iou": 0.8, "disputed": 0})
    return table.assign(area=0.2, predicted_area=0.2, edge_1=1, edge_3=1, edge_10=1, missed=1, extra=1)


def add_worst(run, names):
    run.worst_dir.mkdir(parents=True)
    for name in names:
        for part in ("", "_zoom"):
            Image.new("RGB", (40, 30)).save(run.worst_dir / f"{name}{part}.jpg")


def hostile_run(folder):
    """A run that says each of the names wherever a report shows a name."""
    run = Run(folder, "run (1) = +")
    run.folder.mkdir(parents=True)
    add_worst(run, ["a&b'c#?", "$y$"])
    scores([*NAMES, "a&b'c#?.jpg", "$y$.jpg"]).to_csv(run.scores_path, index=False)
    for note in ("run", "ensemble", "submission"):
        plain, nested = dict(zip(NAMES, NAMES, strict=True)), [{name: name} for name in NAMES]
        files.write_json(run.folder / f"{note}.json", plain | {NAMES[0] * 2: plain | {"members": nested}})
    files.write_json(run.folder / "steps.json", {NAMES[0]: {"seconds": 1.0}})
    (run.folder / "fold0").mkdir()
    history = pd.DataFrame({"epoch": [0, 1], "dice": [0.1, 0.2], "iou": 0.1, "loss": [np.nan, 1], "seconds": 1.0})
    history.to_csv(run.folder / "fold0" / "history.csv", index=False)
    Image.new("RGB", (4, 3)).save(run.figure("'onload=alert(1) x="))
    rows = dict.fromkeys(("time", "message", "status"), NAMES)
    rest = {"run": run.name, "file": "x", "sha256": "0" * 64, "ref": "", "public_score": "", "private_score": ""}
    pd.DataFrame(rows | rest).to_csv(folder / "ledger.csv", index=False)
    return run


@pytest.fixture
def run(tmp_path):
    try:
        return hostile_run(tmp_path)
    except OSError as error:  # Windows
        pytest.skip(f"no such file names here: {error}")


def test_the_report_holds_no_tag_that_a_name_brought(run, tmp_path):
    page = Page(plots.write_report(run, tmp_path).read_text(encoding="utf-8"))
    assert is_harmless(page)
    foreign = {"b", "script"} & {*page.tags}
    assert not foreign
    assert page.tags.count("img") == 2 + 2 * 2 + 1  # charts; zooms and full sizes; a figure
    for name in NAMES:
        assert page.text.count(name) >= 8  # tables of scores, notes and ledger


def test_the_gallery_shows_names_as_code_and_links_to_files_of_any_name(run):
    text = plots.gallery(run)
    page = Page(text)
    assert {*page.tags} == {"div", "figure", "a", "img", "figcaption", "code", "br"}
    assert "figures/worst/a%26b%27c%23%3F.jpg" in text and "a&b'c#?.jpg" in page.text


def executed(folder, outputs):
    """A notebook with HTML outputs as Jupyter would show it, as a page."""
    from nbconvert import HTMLExporter

    cells = [nbformat.v4.new_output("display_data", {"text/html": html}) for html in outputs]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=cells)])
    path = folder / "executed.html"
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return path


def test_chromium_runs_no_script_that_a_name_brought(run, tmp_path):
    pytest.importorskip("PyQt6.QtWebEngineCore", reason="needs the extra `browser`", exc_type=ImportError)
    samples = [pd.Series({"img": name, "fold": 0, "dice": 0.5}) for name in NAMES]
    captions = [browser.caption(sample, np.zeros((2, 2), bool), None) for sample in samples]
    pages = [executed(tmp_path, [plots.gallery(run), *captions]), plots.write_report(run, tmp_path)]
    open_name = tmp_path / "unescaped.html"
    open_name.write_text(f"<p>{NAMES[0]}</p>")  # what the others would be without care
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    command = [sys.executable, Path(__file__).with_name("chromium.py"), *pages, open_name]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(told.stdout.splitlines()[-1]) == [False, False, True]


@pytest.fixture
def archive(tmp_path):
    for car in IMAGES:
        image = np.random.default_rng(0).integers(0, 255, (*SMALL, 3), dtype=np.uint8)
        try:
            (tmp_path / f"{car}_01.jpg").write_bytes(simplejpeg.encode_jpeg(image))
        except OSError as error:
            pytest.skip(f"no such file names here: {error}")
    return Archive(tmp_path, ".jpg")


def figures(archive):
    """One of every function that draws a name."""
    samples = samples_of({(car, 1): square(10, 20, 5 + at) for at, car in enumerate(IMAGES)})
    masks = {img: square(11, 20, 9) for img in samples["img"]}
    soft = [mask.astype(np.float32) for mask in masks.values()]
    titles = {img: f"{img}\nDice" for img in masks}
    competition = SimpleNamespace(train_images=archive, samples=samples)
    colours = pd.DataFrame(0.5, IMAGES, ["contrast", *CAR_RGB, *BACKGROUND_RGB])
    gains = pd.DataFrame({"variant": IMAGES, "gain": 0.1, "low": 0.0, "high": 0.2})
    odd = pd.DataFrame({"img": samples["img"], "ratio": 2.0, "fragment": 0, "hole": 0})
    yield from (plots.turntable(archive, samples, car) for car in IMAGES if "$" in car)
    yield plots.areas_by_make(samples, pd.Series(IMAGES, IMAGES))
    yield plots.contrasts(colours)
    yield plots.odd_masks(archive, samples, odd)
    yield plots.error_overlays(competition, masks, titles)
    yield plots.predicted_outlines(archive, masks, soft)
    yield plots.hesitations(archive, titles, soft)
    yield plots.dice_by_car(scores(IMAGES))
    yield score_figures.gains(gains)


def test_figures_draw_names_and_not_formulas(archive, tmp_path):
    for figure in figures(archive):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plots.save(figure, tmp_path / "figure.png")
        texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert texts and not any(text.get_parse_math() for text in texts)
