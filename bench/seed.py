"""The original write-up reproduced: its recipe, then each of its options alone, in bench/results/seed.md.

With a GPU at the write-up's own 512x512 on all images; on a CPU scaled down by --height, --width and --cars.

python bench/seed.py --data FOLDER --height 96 --width 96 --cars 20
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
from common import RESULTS, machine, recipe_of, tame_allocator, trainer_in

from carvana.data import Competition
from carvana.evaluation import evaluate
from carvana.files import write_text
from carvana.run import Run
from carvana.training import Recipe
from carvana.training.launch import train


def arms(h: int, w: int) -> dict[str, dict]:
    """What each option changes at the size h x w; crops are of whole images, 1280x1920 where h x w is 512x512."""
    whole = {"height": round(h * 1280 / 512 / 32) * 32, "width": round(w * 1920 / 512 / 32) * 32}
    return {
        "as written": {},
        "flips": {"hflip": 0.5},
        "random crops": {"crop_height": h * 3 // 4 // 32 * 32, "crop_width": w * 3 // 4 // 32 * 32},
        "brightness": {"brightness": 0.2, "contrast": 0.2},
        "scaling": {"scale": 0.1},
        "AdamW": {"optimizer": "adamw", "weight_decay": 0.01},
        "SGD": {"optimizer": "sgd", "lr": 0.01},
        "cosine": {"schedule": "cosine"},
        "plateau": {"schedule": "plateau"},
        "float32": {"amp": "no"},
        f"crops of {h}x{2 * w}": whole | {"crop_height": h, "crop_width": 2 * w},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--cars", type=int, default=0, help="use so many cars; 0 for all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_seed"))
    options = parser.parse_args()
    options.folder /= f"{options.height}x{options.width}_{options.cars}_{options.epochs}"
    tame_allocator()
    rows = [row_of(name, changes, options) for name, changes in arms(options.height, options.width).items()]
    rows += ensemble_rows(options)
    write_text(RESULTS / "seed.md", page(rows, options))


def recipe_of_arm(changes: dict, options: argparse.Namespace, seed: int = 1) -> Recipe:
    """The seed profile at the size given, with an arm's changes."""
    size = {"epochs": options.epochs, "height": options.height, "width": options.width, "seed": seed}
    return recipe_of("profiles/seed.yaml", **size | changes)


def competition_of(options: argparse.Namespace) -> Competition:
    competition = Competition(options.data)
    cars = competition.samples["car"].unique()[: options.cars or None]
    competition.samples = competition.samples[competition.samples["car"].isin(cars)].reset_index(drop=True)
    return competition


def row_of(name: str, changes: dict, options: argparse.Namespace) -> tuple:
    done = options.folder / f"{name}.json"
    if not done.exists():
        folder, began = options.folder / name, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        run, recipe = Run(options.folder, name), recipe_of_arm(changes, options)
        history = train(trainer_in(run, competition_of(options), recipe))
        best = history.loc[history["dice"].idxmax()]  # the checkpoint that the last two rows blend
        ious = history["iou"].iloc[0], best["iou"], best["dice"]
        done.write_text(json.dumps((name, *ious, (time.monotonic() - began) / 60)))
    print(done.read_text(), flush=True)
    return tuple(json.loads(done.read_text()))


def ensemble_rows(options: argparse.Namespace) -> list[tuple]:
    """Test-time augmentation, and two seeds blended, from the recipe as written."""
    began, competition, tta = time.monotonic(), competition_of(options), ["none", "hflip"]
    runs = [Run(options.folder, name) for name in ("as written", "second seed")]
    train(trainer_in(runs[1], competition, recipe_of_arm({}, options, seed=2)))
    minutes = (time.monotonic() - began) / 60
    both, single = (evaluate(some, competition, tta).scores for some in (runs, runs[:1]))
    rows = [("as written, mirrored TTA", np.nan, single["iou"].mean(), single["dice"].mean(), 0.0)]
    return [*rows, ("ensemble of two seeds, TTA", np.nan, both["iou"].mean(), both["dice"].mean(), minutes)]


def page(rows: list[tuple], options: argparse.Namespace) -> str:
    columns = ["recipe", "IoU untrained", "IoU trained", "Dice trained", "minutes"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, untrained, iou, dice, minutes in rows:
        cells = [name, "" if np.isnan(untrained) else f"{untrained:.6f}", f"{iou:.6f}", f"{dice:.6f}", f"{minutes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    cars = options.cars or "all"
    return f"""# The original write-up, and its options

Classic U-Net, Adam 1e-4, Dice loss, batch 4, {options.epochs} epochs at {options.height}x{options.width},
{cars} cars in two folds, the first trained; scored on its unseen cars at the images' own size. The write-up: mean
IoU 0.20 untrained, 0.99 trained, 25 hours on an RTX 4090 with 512x512 and all images. Each further row changes what
it names.

Machine: {machine()}. Command: `.venv/bin/python bench/seed.py --data FOLDER --height {options.height}
--width {options.width} --cars {options.cars} --epochs {options.epochs}`. One run each, so small
differences say nothing. Without bf16 the row float32 equals `as written`; so does plateau, as long as the Dice never
stalls.

{chr(10).join(lines)}
"""


if __name__ == "__main__":
    main()
