"""The page of a run in a real browser: it fits wide and narrow screens, and asks no network for anything."""

import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carvana import files
from carvana.plots import report
from carvana.run import Run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FRAME = """<iframe src="{name}" width="{width}" height="900" style="border: 0"></iframe><pre id="found"></pre>
<script>addEventListener("message", event => document.getElementById("found").textContent = event.data)</script>"""
LISTENER = """<script>
  const faults = [];
  addEventListener("error", event => faults.push(event.message || "not loaded: " + event.target.outerHTML), true);
  for (const name of ["error", "warn"]) console[name] = (...words) => faults.push(words.join(" "));
</script>"""
FINDER = """<script>
  addEventListener("load", () => {
    const images = [...document.images], page = document.scrollingElement;
    const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
    parent.postMessage(JSON.stringify({
      faults, width: innerWidth, needed: page.scrollWidth, height: page.scrollHeight, images: images.length,
      broken: images.filter(image => !image.naturalWidth).map(image => image.alt),
      fetched: fetched.filter(name => !name.startsWith("data:")),
    }), "*");
  });
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run with everything that a report can show."""
    run, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    dice = random.uniform(0.9, 0.999, 64)
    scores = pd.DataFrame({"img": [f"{i:012x}_{i % 16 + 1:02d}.jpg" for i in range(64)], "dice": dice})
    scores = scores.assign(car=scores["img"].str[:12], view=np.arange(64) % 16 + 1, fold=[0, -1] * 32)
    scores = scores.assign(iou=dice / (2 - dice), area=0.2, predicted_area=0.21)
    scores = scores.assign(edge_1=60, edge_3=20, edge_10=10, missed=10, extra=0, disputed=0)
    scores.to_csv(run / "scores.csv", index=False)
    history = {"epoch": [0, 1, 2], "dice": [0.1, 0.9, 0.99], "iou": [0.05, 0.8, 0.98], "loss": [np.nan, 0.5, 0.1]}
    (run / "fold0").mkdir()
    pd.DataFrame(history).assign(seconds=90.0, lr=0.1).to_csv(run / "fold0" / "history.csv", index=False)
    files.write_json(
        run / "run.json", {"parameters": {"encoder_weights": "/a/very/long/path" * 12}, "commit": "0" * 40}
    )
    (run / "figures").mkdir()
    for name in ("worst", "test_areas", "fold0"):
        Image.fromarray(random.integers(0, 255, (300, 1045, 3), dtype=np.uint8)).save(run / "figures" / f"{name}.png")
    return report.write_report(Run(run.parent, run.name))


def opened(path, width: int, folder) -> dict:
    """What a page finds about itself in a frame of `width` pixels: chromium has no window below 500."""
    text = path.read_text()
    text = text.replace("<head>", "<head>" + LISTENER, 1).replace("</body>", FINDER + "</body>", 1)
    (folder / "page.html").write_text(text)
    (folder / "frame.html").write_text(FRAME.format(name="page.html", width=width))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    command += [(folder / "frame.html").as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'<pre id="found">(.+?)</pre>', ended.stdout, re.DOTALL)
    assert found, ended.stdout[-500:] + ended.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen_and_loads_nothing_from_elsewhere(page, width, tmp_path):
    found = opened(page, width, tmp_path)
    assert found["width"] == width
    assert found["needed"] <= width  # no scrolling sideways
    assert found["images"] == 5 and found["broken"] == []
    assert found["fetched"] == [] and found["faults"] == []


def test_faults_of_a_page_are_found(tmp_path):
    body = '<p style="width: 500px">wide</p><img alt="lost" src="http://127.0.0.1:9/lost.png"><script>gone()</script>'
    (tmp_path / "bad.html").write_text(f"<!doctype html><html><head></head><body>{body}</body></html>")
    found = opened(tmp_path / "bad.html", 390, tmp_path)
    assert found["needed"] > 390
    assert found["broken"] == ["lost"] and found["fetched"] == ["http://127.0.0.1:9/lost.png"]
    assert len(found["faults"]) == 2
