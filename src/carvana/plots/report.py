"""The page of a run: one self-contained HTML file, made of the run's files that are there."""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from carvana.data.folds import HOLDOUT
from carvana.files import project_root, write_text
from carvana.kaggle.submit import ledger_rows
from carvana.metrics import error_shares, score_over_cars
from carvana.plots import style
from carvana.run import Run

BUDGET = 10_000_000  # bytes of figures and full sizes: base64 makes them 13.3 MB, and a page stays below 15 MB
AS_PNG = 200_000  # charts are smaller; larger files hold images, which JPEG halves or better
WORST = 10  # images in the table of the worst
SCORES = ("dice", "iou", "score", "public", "private")  # numbers whose names end so get six decimals
CHARTS = {"dice": ("Dice on each fold's own cars", "logit"), "loss": ("Training loss", "log")}  # caption and scale
CAPTIONS = {
    "dice_distribution": "Dice of all images",
    "dice_by_view": "Dice by view",
    "dice_by_car": "Dice by car",
    "error_parts": "What the wrong pixels are made of",
    "error_maps": "Where on the car the errors sit",
    "gains": "What the ensemble gains",
    "dice_by_threshold": "Dice against the threshold",
    "worst": "The worst images",
    "disputed": "Masks that every network contradicts",
    "test_samples": "Predictions on test images",
    "test_areas": "Predicted areas against training areas",
    "test_unsure": "Test images in which the networks hesitate",
}


def write_report(run: Run, submissions_dir: Path | None = None) -> Path:
    """Write report.html of a run from whatever it holds by now, and return its path.

    submissions_dir: where the ledger of submissions is, for the rows that belong to this run.
    """
    write_text(run.report_path, _rendered("report", **_contents(run, submissions_dir)))
    return run.report_path


def gallery(run: Run) -> str:
    """HTML for 04_evaluate: the zooms of overlays.save_errors, worst first, each a link to its image at full size.

    Links start at the folder of the page: the run's notebooks, or where a notebook runs by hand.
    """
    by_hand = Path.cwd() != project_root()
    return _rendered("gallery", tiles=_tiles(run, Path.cwd() if by_hand else run.notebook("04_evaluate").parent))


def _rendered(template: str, **values: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(f"{template}.html.jinja").render(**values)


def _contents(run: Run, submissions_dir: Path | None) -> dict[str, Any]:
    scores, histories = run.scores() if run.scores_path.exists() else None, run.histories()
    figures, left_out, room = _figures(run.worst_dir.parent)
    colours = {fold: style.fold_colour(int(fold) if fold.isdigit() else i) for i, fold in enumerate(histories)}
    timings = {name: f"{step['seconds'] / 60:.1f} minutes" for name, step in sorted(run.note("steps").items())}
    return {
        "name": run.name,
        "data": {} if scores is None else _data(scores),
        "headline": [] if scores is None else list(_headline(scores)),
        "folds": [_fold_row(fold, history, scores) | {"colour": colours[fold]} for fold, history in histories.items()],
        "charts": list(_charts(histories, colours)),
        "anatomy": [] if scores is None else error_shares(scores).join(style.PARTS).to_dict("records"),
        "worst": [] if scores is None else scores.nsmallest(WORST, "dice").to_dict("records"),
        "tiles": [] if scores is None else list(_tiles(run, run.folder, room)),
        "legend": style.ERROR_LEGEND,
        "figures": figures,
        "left_out": left_out,
        "results": [*_tables(run, "submission"), *_tables(run, "ensemble"), *_ledger(run, submissions_dir)],
        "facts": [*_tables(run, "run"), *([("timings", timings)] if timings else [])],
    }


def _headline(scores: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Mean Dice and IoU with their intervals, for unseen cars and for cars that folds were selected on."""
    unseen = scores["fold"] == HOLDOUT
    for label, rows in (("unseen cars", scores[unseen]), ("out of fold, selected on these folds", scores[~unseen])):
        if len(rows):
            means = {name: score_over_cars(rows[name], rows["car"]) for name in ("dice", "iou")}
            yield {"label": label, "images": len(rows), "cars": rows["car"].nunique()} | means


def _data(scores: pd.DataFrame) -> dict[str, str]:
    folds, unseen = scores["fold"].value_counts().sort_index(), scores[scores["fold"] == HOLDOUT]
    mean, least, most = (f"{scores['area'].agg(kind):.1%}" for kind in ("mean", "min", "max"))
    return {
        "images scored": f"{len(scores)} of {scores['car'].nunique()} cars in {scores['view'].nunique()} views",
        "images a fold": ", ".join(map(str, folds.drop(HOLDOUT, errors="ignore"))) or "none",
        "held out, seen by no fold": f"{len(unseen)} images of {unseen['car'].nunique()} cars",
        "car in the image": f"{mean}, from {least} to {most}",
        "masks that every network contradicts": f"{(scores['disputed'] > 0).sum()}, listed in quality.csv",
    }


def _fold_row(fold: str, history: pd.DataFrame, scores: pd.DataFrame | None) -> dict[str, Any]:
    best, ensemble = history.nlargest(1, "dice").iloc[0], None
    if scores is not None and (of_fold := scores["fold"].astype(str) == fold.rpartition("/")[2]).any():
        ensemble = scores.loc[of_fold, "dice"].mean()
    row = {"fold": fold, "best": best, "first": history["dice"].iloc[0]}
    return row | {"epochs": history["epoch"].max(), "minutes": history["seconds"].max() / 60, "ensemble": ensemble}


def _charts(histories: dict[str, pd.DataFrame], colours: dict[str, str]) -> Iterator[dict[str, str]]:
    """The columns CHARTS of all histories against epochs, a line a fold; columns without numbers are left out."""
    for column, (caption, scale) in CHARTS.items():
        (ax,) = style.charts(2.7)
        for fold, history in histories.items():
            rows = history.dropna(subset=[column])
            ax.plot(rows["epoch"], style.inside(rows[column], scale), "o-", color=colours[fold], markersize=4)
        if np.isfinite(ax.dataLim.intervaly).all():
            style.scale(ax, "y", scale)
            figure, buffer = style.label(ax, "", "epoch", count="x"), io.BytesIO()
            figure.set_figwidth(style.PAGE_WIDTH / 2)
            figure.savefig(buffer, format="svg")
            yield {"caption": caption, "address": _address("svg+xml", buffer.getvalue())}


def _figures(folder: Path) -> tuple[list[dict[str, str]], list[str], int]:
    """The saved figures as data addresses, as many as the budget holds, the names of the others, and the bytes left."""
    order = {name: number for number, name in enumerate(CAPTIONS)}
    shown, left_out, room = [], [], BUDGET
    for path in sorted(folder.glob("*.png"), key=lambda path: (order.get(path.stem, len(order)), path.stem)):
        kind, data = compact(path)
        if len(data) > room:
            left_out.append(path.name)
            continue
        room -= len(data)
        shown.append({"caption": CAPTIONS.get(path.stem, path.stem.replace("_", " ")), "address": _address(kind, data)})
    return shown, left_out, room


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _tiles(run: Run, page: Path, room: int = 0) -> Iterator[dict[str, Any]]:
    """Images of overlays.save_errors, worst first: img, dice, zoom and full (data addresses), and link to the file.

    full is None for those that `room` bytes do not hold. page: folder that links start from.
    """
    for img, dice in run.scores().sort_values("dice")[["img", "dice"]].to_numpy():
        path = run.worst_dir / f"{Path(img).stem}.jpg"
        if path.exists():
            zoom, fits = path.with_name(f"{path.stem}_zoom.jpg"), path.stat().st_size <= room
            room -= path.stat().st_size if fits else 0
            full = _address("jpeg", path.read_bytes()) if fits else None
            link = quote(Path(os.path.relpath(path, page)).as_posix())
            yield {"img": img, "dice": dice, "zoom": _address("jpeg", zoom.read_bytes()), "full": full, "link": link}


def compact(path: Path) -> tuple[str, bytes]:
    """Kind ("png" or "jpeg") and bytes of a saved figure, as small as it stays good."""
    if path.stat().st_size <= AS_PNG:
        return "png", path.read_bytes()
    smaller = io.BytesIO()
    Image.open(path).convert("RGB").save(smaller, "jpeg", quality=88)
    return "jpeg", smaller.getvalue()


def _tables(run: Run, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Titles and rows of tables from a JSON file of the run: one for plain values, one for each group of values."""
    note = run.note(name)
    groups = {key: value for key, value in note.items() if isinstance(value, dict)}
    for title, group in ({name: {key: note[key] for key in note if key not in groups}} | groups).items():
        if group:
            yield title, {key: _text(key, value) for key, value in group.items()}


def _text(name: str, value: Any) -> str:
    """A value in one line, scores with six decimals."""
    if isinstance(value, list):
        return ", ".join(_text(name, item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{key} {_text(key, item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.6f}" if name.lower().endswith(SCORES) else f"{value:.6g}"
    return "" if value is None else str(value)


def _ledger(run: Run, submissions_dir: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ledger's rows that name this run or its file, one table each."""
    for row in ledger_rows(submissions_dir / "ledger.csv") if submissions_dir else []:
        if run.name in (row.get("run"), Path(str(row.get("file"))).name.removesuffix(".csv.gz")):
            yield "ledger", row
