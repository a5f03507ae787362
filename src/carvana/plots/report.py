"""The page of a run: one self-contained HTML file, made of the run's files that are there."""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from carvana.data.folds import HOLDOUT
from carvana.files import project_root, write_text
from carvana.kaggle.submit import ledger_rows
from carvana.metrics import error_shares, mean_over_cars
from carvana.plots import style
from carvana.run import Run

BUDGET = 10_000_000  # bytes of figures: base64 makes them 13.3 MB, and a page is to stay below 15 MB
AS_PNG = 200_000  # charts are smaller; larger files hold images, which JPEG halves or better
WORST = 10  # images in the table of the worst
SCORES = ("dice", "iou", "score", "public", "private")  # numbers whose names end so get six decimals
TICKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
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
    page = Path.cwd() if by_hand else run.notebook("04_evaluate").parent
    tiles = _tiles(run.worst_dir, run.scores())
    return _rendered("gallery", tiles=[tile | {"link": os.path.relpath(tile["path"], page)} for tile in tiles])


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(f"{template}.html.jinja").render(**values)


def _contents(run: Run, submissions_dir: Path | None) -> dict[str, Any]:
    scores, histories = run.scores() if run.has_scores else None, run.histories()
    figures, left_out, room = _figures(run.worst_dir.parent)
    return _of_scores(run, scores, room) | {
        "name": run.name,
        "folds": [_fold_row(fold, history, scores) for fold, history in histories.items()],
        "charts": [chart for name in ("dice", "loss") if (chart := _chart(histories, name))],
        "colours": dict(zip(("missed", "extra", "true"), style.ERROR_LEGEND, strict=True)),
        "figures": figures,
        "left_out": left_out,
        "results": [*_tables(run, "submission"), *_tables(run, "ensemble"), *_ledger(run, submissions_dir)],
        "facts": [*_tables(run, "run"), *_timings(run)],
    }


def _of_scores(run: Run, scores: pd.DataFrame | None, room: int) -> dict[str, Any]:
    """What the page says of scores, nothing where there are none; room: bytes that full-size images may take."""
    if scores is None:
        return {name: [] for name in ("data", "headline", "anatomy", "worst", "tiles")}
    return {
        "data": list(_data(scores)),
        "headline": list(_headline(scores)),
        "anatomy": _anatomy(scores),
        "worst": scores.nsmallest(WORST, "dice").to_dict("records"),
        "tiles": _with_full_size(_tiles(run.worst_dir, scores), room),
    }


def _headline(scores: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Mean Dice and IoU with their intervals, for unseen cars and for cars that folds were selected on."""
    unseen = scores["fold"] == HOLDOUT
    for label, rows in (("unseen cars", scores[unseen]), ("out of fold, selected on these folds", scores[~unseen])):
        if len(rows):
            means = {name: mean_over_cars(rows[name], rows["car"]) for name in ("dice", "iou")}
            yield {"label": label, "images": len(rows), "cars": rows["car"].nunique()} | means


def _data(scores: pd.DataFrame) -> Iterator[tuple[str, str]]:
    folds, unseen = scores.groupby("fold")["img"].size().drop(HOLDOUT, errors="ignore"), scores["fold"] == HOLDOUT
    yield "images scored", f"{len(scores)} of {scores['car'].nunique()} cars in {scores['view'].nunique()} views"
    yield "images a fold", ", ".join(map(str, folds)) or "none"
    yield "held out, seen by no fold", f"{unseen.sum()} images of {scores.loc[unseen, 'car'].nunique()} cars"
    yield (
        "car in the image",
        f"{scores['area'].mean():.1%}, from {scores['area'].min():.1%} to {scores['area'].max():.1%}",
    )
    yield "masks that every network contradicts", f"{(scores['disputed'] > 0).sum()}, listed in quality.csv"


def _timings(run: Run) -> list[dict[str, Any]]:
    rows = [(name, f"{step['seconds'] / 60:.1f} minutes") for name, step in sorted(run.note("steps").items())]
    return [{"title": "timings", "rows": rows}] if rows else []


def _fold_row(fold: str, history: pd.DataFrame, scores: pd.DataFrame | None) -> dict[str, Any]:
    best = history.loc[history["dice"].idxmax()]
    row = {"fold": fold, "colour": _colour(fold), "untrained": history["dice"].iloc[0], "epoch": int(best["epoch"])}
    row |= {"epochs": int(history["epoch"].max()), "dice": best["dice"], "iou": best["iou"]}
    row |= {"minutes": history["seconds"].max() / 60, "ensemble": None}
    if scores is not None and (of_fold := scores["fold"].astype(str) == fold.rpartition("/")[2]).any():
        row["ensemble"] = scores.loc[of_fold, "dice"].mean()
    return row


def _colour(fold: str) -> str:
    number = fold.rpartition("/")[2]
    return style.fold_colour(int(number)) if number.isdigit() else style.SERIES_COLOUR


def _chart(histories: dict[str, pd.DataFrame], name: str) -> dict[str, Any] | None:
    """Lines of all folds in a box of 300 x 160, and the ticks of its axes; None where there is nothing to draw."""
    measured = {fold: history.dropna(subset=[name]) for fold, history in histories.items()}
    measured = {fold: history for fold, history in measured.items() if len(history)}
    if not measured:
        return None
    bend = style.logit if name == "dice" else np.asarray
    numbers = np.concatenate([history[name] for history in measured.values()])
    low, high = bend(numbers).min(), bend(numbers).max()
    reach, last = max(high - low, 1e-9), max(1, *(history["epoch"].max() for history in measured.values()))
    lines = []
    for fold, history in measured.items():
        across, up = 300 * history["epoch"] / last, 160 - 160 * (bend(history[name]) - low) / reach
        points = [f"{x:.1f} {y:.1f}" for x, y in zip(across, up, strict=True)]
        lines.append({"fold": fold, "colour": _colour(fold), "points": points})
    ticks = [tick for tick in TICKS if numbers.min() <= tick <= numbers.max()] if name == "dice" else []
    ticks = ticks if len(ticks) > 1 else sorted({numbers.min(), numbers.max()})
    heights: list[tuple[float, str]] = []
    for tick in reversed(ticks):
        height = 160 - 160 * (bend([tick])[0] - low) / reach
        if not heights or height > heights[-1][0] + 13:  # lower than the one before by a line of text
            heights.append((height, f"{tick:.4g}"))
    label = "Dice on each fold's own cars" if name == "dice" else "training loss"
    return {"label": label, "lines": lines, "ticks": heights, "last": int(last)}


def _anatomy(scores: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"text": text, "pixels": part.pixels, "share": part.share, "colour": style.PART_COLOURS[part.Index]}
        for part, text in zip(error_shares(scores).itertuples(), style.PART_TEXTS.values(), strict=True)
    ]


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


def _tiles(folder: Path, scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Images of overlays.save_errors, worst first: img, dice, zoom (a data address), path (of the full size)."""
    tiles = []
    for row in scores.sort_values("dice").itertuples():
        path = folder / f"{Path(row.img).stem}.jpg"
        if path.exists():
            zoom = _address("jpeg", path.with_name(f"{path.stem}_zoom.jpg").read_bytes())
            tiles.append({"img": row.img, "dice": row.dice, "zoom": zoom, "path": path})
    return tiles


def _with_full_size(tiles: list[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """Tiles that link to their own full size on the page, those that `room` bytes hold; the others to their file."""
    room -= sum(len(tile["zoom"]) * 3 // 4 for tile in tiles)
    linked = []
    for number, tile in enumerate(tiles, 1):
        data = tile["path"].read_bytes()
        fits = len(data) <= room
        room -= len(data) if fits else 0
        link = f"#worst-{number}" if fits else f"figures/worst/{tile['path'].name}"
        linked.append(tile | {"link": link, "full": _address("jpeg", data) if fits else None})
    return linked


def compact(path: Path) -> tuple[str, bytes]:
    """Kind ("png" or "jpeg") and bytes of a saved figure, as small as it stays good."""
    data = path.read_bytes()
    if len(data) <= AS_PNG:
        return "png", data
    smaller = io.BytesIO()
    Image.open(path).convert("RGB").save(smaller, "jpeg", quality=88)
    return ("jpeg", smaller.getvalue()) if smaller.tell() < len(data) else ("png", data)


def _tables(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Tables of names and texts from a JSON file of the run: one for plain values, one for each group of values."""
    note = run.note(name)
    plain = {key: value for key, value in note.items() if not isinstance(value, dict)}
    groups = {name: plain} | {key: value for key, value in note.items() if isinstance(value, dict)}
    yield from ({"title": title, "rows": list(_rows(group))} for title, group in groups.items() if group)


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as lines: `a.b` and a text; lists of plain values in one line."""
    items = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else ()
    if not items or (isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)):
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else _text(name, value)
        return
    for key, item in items:
        yield from _rows(item, f"{name}.{key}" if name else str(key))


def _text(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if name.lower().endswith(SCORES) else f"{value:.6g}"
    return "" if value is None else str(value)


def _ledger(run: Run, submissions_dir: Path | None) -> list[dict[str, Any]]:
    """The ledger's rows that name this run or its file, one table each."""
    names = {run.name, f"{run.name}.csv.gz"}
    rows = ledger_rows(submissions_dir / "ledger.csv") if submissions_dir else []
    rows = [row for row in rows if names & {Path(cell).name for cell in row.values() if isinstance(cell, str)}]
    return [{"title": "ledger", "rows": list(row.items())} for row in rows]
