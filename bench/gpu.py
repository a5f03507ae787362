"""What a GPU makes of the suite: three parts of at most nine minutes each, with the package alone.

seed   the original write-up's recipe at 512x512: minutes until the unseen cars' IoU is 0.99
best   the h100 profile at 512x512 on all folds that fit into the time: each fold, then all, on cars held out
speed  pictures a second of training against the device's peak and against the loader

python bench/gpu.py seed best speed --data FOLDER [--encoder-weights FILE] [--minutes 8]
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import pandas as pd
import torch
from common import write
from torch.utils.flop_counter import FlopCounterMode

from carvana import metrics
from carvana.data import competition as photos
from carvana.data import dataset, folds
from carvana.evaluation import evaluate as evaluation
from carvana.pipeline import load_profile, parameters
from carvana.training import trainer as training
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe


def recipe(profile: str, **changes) -> Recipe:
    values = {name: parameter.default for name, parameter in parameters().items()}
    return Recipe.of(values | load_profile(profile) | changes)


def fold_of(chosen: Recipe, options: argparse.Namespace, name: str, fold: int, n_folds: int, holdout_cars: int):
    pictures, run_dir = photos.index(options.data), options.folder / name
    dealt = folds.folds_of_run(run_dir, pictures, n_folds, holdout_cars, 1)
    decoded = dataset.Decoded(photos.photographs(options.data, "train"), pictures, chosen.height, chosen.width)
    return training.Fold(chosen, pictures, dataset.cached(decoded, options.folder / "cache"), dealt, fold, run_dir)


def seed(options: argparse.Namespace) -> dict:
    chosen = recipe("profiles/seed.yaml", height=options.height, width=options.width)
    history = training.train(fold_of(chosen, options, "seed", 0, 5, 0), max_hours=options.minutes / 60)
    reached = history[history["iou"] >= 0.99]
    found = {"untrained_iou": history["iou"].iloc[0], "best_iou": history["iou"].max()}
    found |= {"minutes": history["seconds"].max() / 60, "pictures": int(history["pictures"].max())}
    return found | {"minutes_to_iou_0.99": reached["seconds"].iloc[0] / 60 if len(reached) else None}


def best(options: argparse.Namespace) -> dict:
    changes = {"height": options.height, "width": options.width, "encoder": options.encoder}
    chosen = recipe("profiles/h100.yaml", encoder_weights=options.encoder_weights, epochs=options.epochs, **changes)
    began, minutes, cars = time.monotonic(), [], photos.index(options.data)["car"].nunique()
    for number in range(5):
        left = options.minutes * 60 - (time.monotonic() - began)
        if minutes and left < 1.3 * 60 * minutes[-1]:
            break
        history = training.train(fold_of(chosen, options, "best", number, 5, cars // 5), max_hours=left / 3600)
        minutes.append(history["seconds"].max() / 60)
    photographs, pictures = photos.photographs(options.data, "train"), photos.index(options.data)
    scores = evaluation.evaluate([options.folder / "best"], pictures, photographs, ["none", "hflip"])
    unseen = scores[scores["fold"] == folds.HOLDOUT]
    singles = {name: unseen[name].mean() for name in unseen.columns if name.startswith("dice:fold")}
    found = {"minutes_a_fold": minutes, "ensemble": metrics.mean_over_cars(unseen["dice"], unseen["car"])}
    return found | {"single_models": singles, "unseen_cars": unseen["car"].nunique()}


def speed(options: argparse.Namespace) -> dict:
    peak, found = _peak(), {}
    for arch, encoder in (("classic_unet", ""), ("unet", "resnet34")):
        for height, width in ((512, 512), (640, 960)) if torch.cuda.is_available() else ((64, 96),):
            chosen = recipe("profiles/seed.yaml", arch=arch, encoder=encoder, height=height, width=width, batch_size=8)
            found[f"{arch} {height}x{width}"] = _step_speed(chosen, options, peak)
    for height, width in ((512, 512), (640, 960)):
        found[f"loader {height}x{width}"] = _loader_speed(options, height, width)
    return found | {"peak_tflops": peak / 1e12}


def _peak(n: int = 8192) -> float:
    """FLOP/s of one large matrix product, the best that the device does in half precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = n if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / min(_seconds(lambda: a @ a) for _ in range(5))


def _seconds(work, times: int = 10) -> float:
    work()
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else int
    synchronise()
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronise()
    return (time.perf_counter() - began) / times


class Noise:
    """Stands in the place of a cache where only the shapes matter."""

    key = "noise"


def _step_speed(chosen: Recipe, options: argparse.Namespace, peak: float) -> dict:
    pictures = pd.DataFrame({"img": ["a_01.jpg", "b_01.jpg"], "car": ["a", "b"]})
    dealt = pd.DataFrame({"car": ["a", "b"], "fold": [0, 1]})
    fold = training.Fold(chosen, pictures, Noise(), dealt, 0, options.folder / "speed")
    shape, device = (chosen.batch_size, chosen.height, chosen.width), fold.accelerator.device
    batch = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=device)
    targets, loss_of = batch[..., 0].contiguous(), loss_named(chosen.loss)
    with FlopCounterMode(display=False) as counter:
        training._step(fold, loss_of, batch, targets)
    seconds = min(_seconds(lambda: training._step(fold, loss_of, batch, targets)) for _ in range(3))
    return {
        "pictures_per_s": chosen.batch_size / seconds,
        "share_of_peak": counter.get_total_flops() / seconds / peak,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def _loader_speed(options: argparse.Namespace, height: int, width: int) -> float:
    chosen = recipe("profiles/h100.yaml", height=height, width=width, encoder=options.encoder, encoder_weights="")
    fold = fold_of(chosen, options, f"loader{height}", 0, 5, 0)
    began, seen = 0.0, 0
    for batch, _, _ in training._loader(fold, min(16, os.cpu_count())):
        began, seen = began or time.perf_counter(), seen + len(batch)  # the workers' start is not counted
        if time.perf_counter() - began > 10:
            break
    return (seen - chosen.batch_size) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("seed", "best", "speed"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_gpu"))
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0")
    parser.add_argument("--encoder-weights", default="")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    for part in options.parts:
        found = globals()[part](options)
        print(part, found, flush=True)
        write(f"gpu_{part}", found)


if __name__ == "__main__":
    main()
