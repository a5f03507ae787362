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

from carvana import metrics
from carvana.data.folds import HOLDOUT
from carvana.files import UserError, project_root, read_json, write_text
from carvana.plots import explore as figures

BUDGET = 10_000_000  # bytes of pictures: base64 makes them 13.3 MB, and a page is to stay below 15 MB
AS_PNG = 200_000  # charts are smaller; larger files hold photographs, which JPEG halves or better
WORST = 10  # pictures in the table of the worst
SCORES = ("dice", "iou", "score", "public", "private")  # numbers whose names end so get six decimals
TICKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
CAPTIONS = {
    "dice_distribution": "Dice of all pictures",
    "dice_by_view": "Dice by view",
    "dice_by_car": "Dice by car",
    "error_parts": "What the wrong pixels are made of",
    "error_maps": "Where on the car the errors sit",
    "gains": "What the ensemble gains",
    "dice_by_threshold": "Dice against the threshold",
    "worst": "The worst pictures",
    "disputed": "Masks that every network contradicts",
    "test_samples": "Predictions on test pictures",
    "test_areas": "Predicted areas against training areas",
    "test_unsure": "Test pictures in which the networks hesitate",
}


def write(run_dir: Path, submissions_dir: Path | None = None) -> Path:
    """Write report.html into `run_dir` from whatever the run holds by now, and return its path.

    submissions_dir: where the ledger of submissions is, for the rows that belong to this run.
    """
    run_dir = Path(run_dir)
    write_text(run_dir / "report.html", _rendered("report", **_contents(run_dir, submissions_dir)))
    return run_dir / "report.html"


def gallery(run_dir: Path) -> str:
    """HTML for 04_evaluate: the zooms of overlays.save_errors, worst first, each a link to its picture at full size.

    Links start at the folder of the page: the run's notebooks, or where a notebook runs by hand.
    """
    by_hand = Path.cwd() != project_root()
    page = Path.cwd() if by_hand else run_dir / "notebooks"
    tiles = _tiles(run_dir / "figures" / "worst", _scores(run_dir))
    return _rendered("gallery", tiles=[tile | {"link": os.path.relpath(tile["path"], page)} for tile in tiles])


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(f"{template}.html.jinja").render(**values)


def _contents(run_dir: Path, submissions_dir: Path | None) -> dict[str, Any]:
    scores, histories = _scores(run_dir), _histories(run_dir)
    pictures, left_out, room = _pictures(run_dir / "figures")
    tiles = [] if scores is None else _tiles(run_dir / "figures" / "worst", scores)
    return {
        "name": run_dir.name,
        "data": [] if scores is None else list(_data(scores)),
        "headline": [] if scores is None else list(_headline(scores)),
        "folds": [_fold_row(fold, history, scores) for fold, history in histories.items()],
        "charts": [chart for name in ("dice", "loss") if (chart := _chart(histories, name))],
        "anatomy": [] if scores is None else _anatomy(scores),
        "worst": [] if scores is None else scores.nsmallest(WORST, "dice").to_dict("records"),
        "colours": {"missed": figures.MISSED, "extra": figures.EXTRA, "true": figures.TRUE},
        "tiles": _with_full_size(tiles, room),
        "pictures": pictures,
        "left_out": left_out,
        "results": list(_tables(run_dir, ("submission", "ensemble"))) + _ledger(run_dir, submissions_dir),
        "facts": list(_tables(run_dir, ("run",))) + _timings(run_dir),
    }


def _scores(run_dir: Path) -> pd.DataFrame | None:
    path = run_dir / "scores.csv"
    return _csv(path, dtype={"car": str}) if path.exists() else None


def _csv(path: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a table: {error}. Delete it and run the step that writes it again.") from error


def _histories(run_dir: Path) -> dict[str, pd.DataFrame]:
    """Histories by "0", "1", ...; where the run only blends others, those of its members, by "RUN/0", ..."""
    folders = sorted(run_dir.glob("fold*"))
    if not folders and (run_dir / "ensemble.json").exists():
        members = read_json(run_dir / "ensemble.json").get("members", [])
        folders = [(run_dir / member["path"]).resolve().parent for member in members]
    found = {}
    for path in (folder / "history.csv" for folder in folders):
        if path.exists() and len(history := _csv(path)):
            prefix = "" if path.parent.parent == run_dir else f"{path.parent.parent.name}/"
            found[prefix + path.parent.name.removeprefix("fold")] = history
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _headline(scores: pd.DataFrame) -> Iterator[dict]:
    """Mean Dice and IoU with their intervals, for unseen cars and for cars that folds were selected on."""
    unseen = scores["fold"] == HOLDOUT
    for label, rows in (("unseen cars", scores[unseen]), ("out of fold, selected on these folds", scores[~unseen])):
        if len(rows):
            means = {name: metrics.mean_over_cars(rows[name], rows["car"]) for name in ("dice", "iou")}
            yield {"label": label, "pictures": len(rows), "cars": rows["car"].nunique()} | means


def _data(scores: pd.DataFrame) -> Iterator[tuple[str, str]]:
    folds, unseen = scores.groupby("fold")["img"].size().drop(HOLDOUT, errors="ignore"), scores["fold"] == HOLDOUT
    yield "pictures scored", f"{len(scores)} of {scores['car'].nunique()} cars in {scores['view'].nunique()} views"
    yield "pictures a fold", ", ".join(map(str, folds)) or "none"
    yield "held out, seen by no fold", f"{unseen.sum()} pictures of {scores.loc[unseen, 'car'].nunique()} cars"
    yield (
        "car in the picture",
        f"{scores['area'].mean():.1%}, from {scores['area'].min():.1%} to {scores['area'].max():.1%}",
    )
    if "disputed" in scores:
        yield "masks that every network contradicts", f"{(scores['disputed'] > 0).sum()}, listed in quality.csv"


def _timings(run_dir: Path) -> list[dict]:
    path = run_dir / "steps.json"
    steps = read_json(path) if path.exists() else {}
    rows = [(name, f"{step['seconds'] / 60:.1f} minutes") for name, step in sorted(steps.items())]
    return [{"title": "timings", "rows": rows}] if rows else []


def _fold_row(fold: str, history: pd.DataFrame, scores: pd.DataFrame | None) -> dict:
    best = history.loc[history["dice"].idxmax()]
    row = {"fold": fold, "colour": _colour(fold), "untrained": history["dice"].iloc[0], "epoch": int(best["epoch"])}
    row |= {"epochs": int(history["epoch"].max()), "dice": best["dice"], "iou": best["iou"]}
    row |= {"minutes": history["seconds"].max() / 60, "ensemble": None}
    if scores is not None and (own := scores["fold"].astype(str) == fold.rpartition("/")[2]).any():
        row["ensemble"] = scores.loc[own, "dice"].mean()
    return row


def _colour(fold: str) -> str:
    return figures.fold_colour(int(number)) if (number := fold.rpartition("/")[2]).isdigit() else figures.DATA


def _chart(histories: dict[str, pd.DataFrame], name: str) -> dict | None:
    """Lines of all folds in a box of 300 x 160, and the ticks of its axes; None where there is nothing to draw."""
    known = {fold: history.dropna(subset=[name]) for fold, history in histories.items()}
    known = {fold: history for fold, history in known.items() if len(history)}
    if not known:
        return None
    bend = _logit if name == "dice" else np.asarray
    values = np.concatenate([history[name] for history in known.values()])
    low, high = bend(values).min(), bend(values).max()
    reach, last = max(high - low, 1e-9), max(1, *(history["epoch"].max() for history in known.values()))
    ticks = [tick for tick in TICKS if values.min() <= tick <= values.max()] if name == "dice" else []
    ticks = ticks if len(ticks) > 1 else sorted({values.min(), values.max()})
    lines = []
    for fold, history in known.items():
        across, up = 300 * history["epoch"] / last, 160 - 160 * (bend(history[name]) - low) / reach
        points = [f"{x:.1f} {y:.1f}" for x, y in zip(across, up, strict=True)]
        lines.append({"fold": fold, "colour": _colour(fold), "points": points})
    heights = []
    for tick in reversed(ticks):
        height = 160 - 160 * (bend([tick])[0] - low) / reach
        if not heights or height > heights[-1][0] + 13:  # lower than the one before by a line of text
            heights.append((height, f"{tick:.4g}"))
    label = "Dice on each fold's own cars" if name == "dice" else "training loss"
    return {"label": label, "lines": lines, "ticks": heights, "last": int(last)}


def _logit(values) -> np.ndarray:
    inside = np.clip(np.asarray(values, dtype=float), 1e-3, 1 - 1e-5)
    return np.log(inside / (1 - inside))


def _anatomy(scores: pd.DataFrame) -> list[dict]:
    pixels = scores[list(figures.PARTS)].mean()
    colours = [*figures.EDGES, figures.MISSED, figures.EXTRA]
    shares = pixels / max(pixels.sum(), 1e-12)
    return [
        {"text": text, "pixels": pixels[name], "share": shares[name], "colour": colour}
        for (name, text), colour in zip(figures.PARTS.items(), colours, strict=True)
    ]


def _pictures(folder: Path) -> tuple[list[dict], list[str], int]:
    """The saved figures as data addresses, as many as the budget holds, the names of the others, and the bytes left."""
    order = {name: number for number, name in enumerate(CAPTIONS)}
    shown, left_out, room = [], [], BUDGET
    for path in sorted(folder.glob("*.png"), key=lambda path: (order.get(path.stem, len(order)), path.stem)):
        kind, data = _compact(path)
        if len(data) > room:
            left_out.append(path.name)
            continue
        room -= len(data)
        shown.append({"caption": CAPTIONS.get(path.stem, path.stem.replace("_", " ")), "address": _address(kind, data)})
    return shown, left_out, room


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _tiles(folder: Path, scores: pd.DataFrame) -> list[dict]:
    """Pictures of overlays.save_errors, worst first: img, dice, zoom (a data address), path (of the full size)."""
    tiles = []
    for row in scores.sort_values("dice").itertuples():
        path = folder / f"{Path(row.img).stem}.jpg"
        if path.exists():
            zoom = _address("jpeg", path.with_name(f"{path.stem}_zoom.jpg").read_bytes())
            tiles.append({"img": row.img, "dice": row.dice, "zoom": zoom, "path": path})
    return tiles


def _with_full_size(tiles: list[dict], room: int) -> list[dict]:
    """Tiles that link to their own full size on the page, those that `room` bytes hold; the others to their file."""
    room -= sum(len(tile["zoom"]) * 3 // 4 for tile in tiles)
    found = []
    for number, tile in enumerate(tiles, 1):
        data = tile["path"].read_bytes()
        fits = len(data) <= room
        room -= len(data) if fits else 0
        link = f"#worst-{number}" if fits else f"figures/worst/{tile['path'].name}"
        found.append(tile | {"link": link, "full": _address("jpeg", data) if fits else None})
    return found


def _compact(path: Path) -> tuple[str, bytes]:
    data = path.read_bytes()
    if len(data) <= AS_PNG:
        return "png", data
    smaller = io.BytesIO()
    Image.open(path).convert("RGB").save(smaller, "jpeg", quality=88)
    return ("jpeg", smaller.getvalue()) if smaller.tell() < len(data) else ("png", data)


def _tables(run_dir: Path, names: tuple[str, ...]) -> Iterator[dict]:
    """Tables of names and texts from the run's JSON files: one for plain values, one for each group of values."""
    for name in names:
        path = run_dir / f"{name}.json"
        found = read_json(path) if path.exists() else {}
        plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
        groups = {name: plain} | {key: value for key, value in found.items() if isinstance(value, dict)}
        yield from ({"title": title, "rows": list(_rows(values))} for title, values in groups.items() if values)


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


def _ledger(run_dir: Path, submissions_dir: Path | None) -> list[dict]:
    """The ledger's rows that name this run or its file, one table each."""
    path = Path(submissions_dir) / "ledger.csv" if submissions_dir else None
    if not path or not path.exists():
        return []
    table = _csv(path, dtype=str, keep_default_na=False)
    own = {run_dir.name, f"{run_dir.name}.csv.gz"}
    rows = table[[bool(own & {Path(value).name for value in row}) for row in table.to_numpy()]]
    return [{"title": "ledger", "rows": list(row.items())} for row in rows.to_dict("records")]
