"""What a GPU makes of the suite: three parts of at most nine minutes each, with the package alone.

seed   the original write-up's recipe at 512x512: minutes until the unseen cars' IoU is 0.99
best   the h100 profile at 512x512 on all folds that fit into the time: each fold, then all, on cars held out
speed  images a second of training against the device's peak and against the loader, and where a step's time goes

python bench/gpu.py seed best speed --data FOLDER [--encoder-weights FILE] [--minutes 8]
"""

import argparse
import gc
import os
import shutil
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from common import recipe_of, state_for_steps, trainer_in, write
from torch.utils.flop_counter import FlopCounterMode

from carvana import metrics
from carvana.data import HOLDOUT, Competition
from carvana.device import Recorder
from carvana.evaluation import evaluate
from carvana.run import Run
from carvana.training import Recipe
from carvana.training.launch import train
from carvana.training.state import TrainState


def seed(options: argparse.Namespace) -> dict:
    recipe = recipe_of("profiles/seed.yaml", height=options.height, width=options.width)
    trainer = trainer_in(Run(options.folder, "seed"), Competition(options.data), recipe, n_folds=5)
    history = train(trainer, max_hours=options.minutes / 60)
    reached = history[history["iou"] >= 0.99]
    results = {"untrained_iou": history["iou"].iloc[0], "best_iou": history["iou"].max()}
    results |= {"minutes": history["seconds"].max() / 60, "images_seen": int(history["images_seen"].max())}
    return results | {"minutes_to_iou_0.99": reached["seconds"].iloc[0] / 60 if len(reached) else None}


def best(options: argparse.Namespace) -> dict:
    changes = {"height": options.height, "width": options.width, "encoder": options.encoder}
    changes |= {"encoder_weights": options.encoder_weights, "epochs": options.epochs}
    recipe, run = recipe_of("profiles/h100.yaml", **changes), Run(options.folder, "best")
    competition = Competition(options.data)
    began, minutes, cars = time.monotonic(), [], competition.samples["car"].nunique()
    for fold in range(5):
        left = options.minutes * 60 - (time.monotonic() - began)
        if minutes and left < 1.3 * 60 * minutes[-1]:
            break
        trainer = trainer_in(run, competition, recipe, fold, 5, cars // 5)
        history = train(trainer, max_hours=left / 3600)
        minutes.append(history["seconds"].max() / 60)
        print(f"fold {fold}: {minutes[-1]:.2f} minutes, Dice {history['dice'].max():.6f}", flush=True)
    scores = evaluate([run], competition, ["none", "hflip"]).scores
    unseen = scores[scores["fold"] == HOLDOUT]
    singles = {name: unseen[name].mean() for name in unseen.columns if name.startswith("dice:fold")}
    results = {"minutes_a_fold": minutes, "epochs_of_the_last_fold": trainer.state.step / trainer.steps_per_epoch}
    results |= {"ensemble": metrics.score_over_cars(unseen["dice"], unseen["car"])}
    return results | {"single_models": singles, "unseen_cars": unseen["car"].nunique()}


def speed(options: argparse.Namespace) -> dict:
    peak, ends = _peak(), time.monotonic() + options.minutes * 60
    results = {"peak_tflops": peak / 1e12}
    sizes = ((512, 512), (640, 960)) if torch.cuda.is_available() else ((64, 96),)
    rows = [(profile, *size, True) for profile, size in product(("h100", "t4x2", "seed"), sizes)]
    rows += [("h100", *size, False) for size in sizes]
    for profile, height, width, record in rows:
        if time.monotonic() < ends:
            recipe = recipe_of(f"profiles/{profile}.yaml", height=height, width=width, encoder_weights="")
            name = f"{profile} {height}x{width}{'' if record else ' not recorded'}"
            results[name] = step_speed(recipe, peak, record)
            print(name, results[name], flush=True)
            write("gpu_speed", results)
    for height, width in ((512, 512), (640, 960)):
        if time.monotonic() < ends:
            results[f"loader {height}x{width}"] = _loader_speed(options, height, width)
    return results


def _peak(n: int = 8192) -> float:
    """FLOP/s of one large matrix product, the best that the device does in half precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = n if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / min(_seconds(lambda: a @ a) for _ in range(5))


def _finish() -> None:
    """Wait for what the device has been told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(work, times: int = 10) -> float:
    work()
    _finish()
    began = time.perf_counter()
    for _ in range(times):
        work()
    _finish()
    return (time.perf_counter() - began) / times


def as_it_is(_recorder: Recorder, _name: str, work, *tensors: torch.Tensor) -> torch.Tensor:
    """In the place of a recorder's call: nothing is recorded."""
    return work(*tensors)


def step_speed(recipe: Recipe, peak: float, record: bool = True) -> dict:
    """What a training step does, as the median of five rounds of ten steps.

    images_per_s with its spread; share_of_peak: of the device's `peak` FLOP/s; memory_gb: the most that torch held;
    host_ms: until the host has told the device all of a step, which sets the pace where it is as long as ms; parts_ms:
    of the step's parts, each waited for, where nothing is recorded.
    """
    with nullcontext() if record else patch.object(Recorder, "__call__", as_it_is):
        state = state_for_steps(recipe)
        if state.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # of the row before
            torch.cuda.reset_peak_memory_stats()
        shape = recipe.batch_size, recipe.height, recipe.width
        images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=state.device)
        targets = images[..., 0].contiguous()
        with FlopCounterMode(display=False) as counter:
            state.train_step(images, targets)
        rounds = sorted(_seconds(lambda: state.train_step(images, targets)) for _ in range(5))
        began = time.perf_counter()
        state.train_step(images, targets)
        host = time.perf_counter() - began
        parts = {} if record else {"parts_ms": _parts(state, images, targets)}
    return parts | {
        "images_per_s": recipe.batch_size / rounds[2],
        "spread": [recipe.batch_size / rounds[-1], recipe.batch_size / rounds[0]],
        "share_of_peak": counter.get_total_flops() / rounds[2] / peak,
        "memory_gb": torch.cuda.max_memory_reserved() / 1e9 if state.device.type == "cuda" else None,
        "ms": 1000 * rounds[2],
        "host_ms": 1000 * host,
    }


def _parts(state: TrainState, images: torch.Tensor, targets: torch.Tensor, steps: int = 5) -> dict[str, float]:
    """Mean milliseconds of the parts of a step, each begun when the device is idle and waited for."""
    places = {"forward": (state.model, "forward"), "backward": (state.accelerator, "backward")}
    places |= {"clip": (state.accelerator, "clip_grad_norm_"), "optimizer": (state.optimizer, "step")}
    spent: Counter[str] = Counter()

    def timed(part: str, work):
        def call(*args, **kwargs):
            _finish()
            began = time.perf_counter()
            result = work(*args, **kwargs)
            _finish()
            spent[part] += 1000 * (time.perf_counter() - began) / steps
            return result

        return call

    with ExitStack() as patches:
        for part, (owner, method) in places.items():
            patches.enter_context(patch.object(owner, method, timed(part, getattr(owner, method))))
        for _ in range(steps):
            state.train_step(images, targets)
    return {part: round(milliseconds, 2) for part, milliseconds in spent.items()}


def _loader_speed(options: argparse.Namespace, height: int, width: int) -> float:
    changes = {"height": height, "width": width, "encoder": options.encoder, "encoder_weights": ""}
    recipe, run = recipe_of("profiles/h100.yaml", **changes), Run(options.folder, f"loader{height}")
    trainer = trainer_in(run, Competition(options.data), recipe, n_folds=5)
    began, seen, workers = 0.0, 0, min(16, os.cpu_count())
    for number, (images, _, _) in enumerate(trainer.loader(workers)):
        if number < 2 * workers:  # prepared while the workers started
            began = time.perf_counter()
            continue
        seen += len(images)
        if time.perf_counter() - began > 10:
            break
    return seen / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("seed", "best", "speed"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_gpu"))
    parser.add_argument("--encoder", default="tu-tf_efficientnetv2_s", help="default: that of the h100 profile")
    parser.add_argument("--encoder-weights", default="")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    for part in options.parts:
        results = globals()[part](options)
        print(part, results, flush=True)
        write(f"gpu_{part}", results)


if __name__ == "__main__":
    main()
