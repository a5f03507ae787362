"""Seconds of a training step against the usual one, at equal network, size and batch, in one run.

Two processes take turns, so that both meet the same machine. Usual: NCHW, float32 without AMP, torch's default Adam and
allocator, the loss read at every step. Ours: `TrainState.train_step`, EMA included, as `carvana run` starts it.

python bench/train.py [--encoder tu-tf_efficientnet_lite0] [--height 320] [--width 480] [--batch-size 8]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import machine, recipe_of, state_for_steps, write

from carvana.models import SegmentationModel
from carvana.parallel import tame_allocator
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe

ROUNDS, STEPS, WARM = 5, 3, 2
TrainStep = Callable[[torch.Tensor, torch.Tensor], Any]  # of images (B, h, w, 3) and targets (B, h, w), both uint8


def usual(recipe: Recipe) -> TrainStep:
    """The step that most notebooks for this competition take, on the same network and loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = SegmentationModel(recipe.model_config).net.to(memory_format=torch.contiguous_format).to(device).train()
    for layer in network.modules():
        layer.__dict__.pop("forward", None)  # without the package's own depthwise convolutions
    optimizer, loss_of = torch.optim.Adam(network.parameters(), lr=1e-3), loss_named(recipe.loss)

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        floats = ((images.permute(0, 3, 1, 2).contiguous().float() / 255) - 0.5) / 0.5
        optimizer.zero_grad()
        loss = loss_of(network(floats.to(device))[:, 0], targets.to(device) / 255)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def recipe_from(options: argparse.Namespace) -> Recipe:
    names = ("encoder", "decoder_channels", "height", "width", "batch_size")
    return recipe_of(encoder_weights="", **{name: getattr(options, name) for name in names})


def work(kind: str, recipe: Recipe) -> None:
    """A process that takes STEPS steps for every line that it reads and answers with seconds a step."""
    shape = recipe.batch_size, recipe.height, recipe.width
    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    targets = torch.randint(0, 256, shape, dtype=torch.uint8)
    step = state_for_steps(recipe).train_step if kind == "ours" else usual(recipe)
    for _ in range(WARM):
        step(images, targets)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(STEPS):
            step(images, targets)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print((time.perf_counter() - began) / STEPS, flush=True)


def start(kind: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if kind == "ours":
        tame_allocator()
        environment |= {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    command = [sys.executable, __file__, *sys.argv[1:], "--as", kind]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def take_turns() -> dict[str, list[float]]:
    """Seconds a step of both, a number a round."""
    processes = {kind: start(kind) for kind in ("usual", "ours")}
    times: dict[str, list[float]] = {kind: [] for kind in processes}
    for _ in range(ROUNDS):
        for kind, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            times[kind].append(float(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0")
    parser.add_argument("--decoder-channels", default="")
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--as", dest="kind", choices=("ours", "usual"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe = recipe_from(options)
    if options.kind:
        return work(options.kind, recipe)
    times = take_turns()
    ratios = np.array(times["usual"]) / np.array(times["ours"])
    results = {"ratio_step": round(float(np.median(ratios)), 2), "ratio_spread": [ratios.min(), ratios.max()]}
    results |= {f"{kind}_seconds": round(float(np.median(t)), 3) for kind, t in times.items()}
    results |= {"network": vars(recipe.model_config)}
    results |= {"batch_size": recipe.batch_size, "rounds": ROUNDS, "steps": STEPS}
    print(machine())
    print(results)
    write("train", results)
    return None


if __name__ == "__main__":
    main()
