"""Seconds of a training step against the usual one, at equal network, size and batch, in one run.

Two processes take turns, so that both meet the same machine. Usual: NCHW, float32 without AMP, torch's default Adam and
allocator, the loss read at every step. Ours: `carvana.training`'s own step, EMA included, as `carvana run` starts it.

python bench/train.py [--encoder tu-tf_efficientnet_lite0] [--height 320] [--width 480] [--batch-size 8]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import machine, write

from carvana.models import Network, Segmenter
from carvana.pipeline import parameters, tame_allocator
from carvana.training import trainer as training
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe

ROUNDS, STEPS, WARM = 5, 3, 2


class Random:
    """Pictures of noise in the place of a cache."""

    key = "noise"

    def __getitem__(self, row: int) -> None:
        raise NotImplementedError


def ours(chosen: Recipe, folder: Path):
    """The step of 03_train, on a fold of nothing."""
    pictures = pd.DataFrame({"img": ["a_01.jpg", "b_01.jpg"], "car": ["a", "b"]})
    dealt = pd.DataFrame({"car": ["a", "b"], "fold": [0, 1]})
    fold = training.Fold(chosen, pictures, Random(), dealt, 0, folder)
    loss_of, device = loss_named(chosen.loss), fold.accelerator.device

    def step(batch: torch.Tensor, targets: torch.Tensor) -> None:
        training._step(fold, loss_of, batch.to(device), targets.to(device))

    return step


def usual(chosen: Recipe):
    """The step that most notebooks for this competition take, on the same network and loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Segmenter(chosen.network).net.to(memory_format=torch.contiguous_format).to(device).train()
    for layer in network.modules():
        layer.__dict__.pop("forward", None)  # without the package's own depthwise convolutions
    optimizer, loss_of = torch.optim.Adam(network.parameters(), lr=1e-3), loss_named(chosen.loss)

    def step(batch: torch.Tensor, targets: torch.Tensor) -> None:
        images = ((batch.permute(0, 3, 1, 2).contiguous().float() / 255) - 0.5) / 0.5
        optimizer.zero_grad()
        loss = loss_of(network(images.to(device))[:, 0], targets.to(device) / 255)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def work(kind: str, options: argparse.Namespace) -> None:
    """A process that takes STEPS steps for every line that it reads and answers with seconds a step."""
    values = {name: parameter.default for name, parameter in parameters().items()}
    size = {"height": options.height, "width": options.width, "batch_size": options.batch_size, "encoder_weights": ""}
    network = {"encoder": options.encoder, "decoder_channels": options.decoder_channels}
    chosen = Recipe.of(values | size | network)
    shape = options.batch_size, options.height, options.width
    batch = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    targets = torch.randint(0, 256, shape, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        step = ours(chosen, Path(folder)) if kind == "ours" else usual(chosen)
        for _ in range(WARM):
            step(batch, targets)
        for _ in sys.stdin:
            began = time.perf_counter()
            for _ in range(STEPS):
                step(batch, targets)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print((time.perf_counter() - began) / STEPS, flush=True)


def start(kind: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if kind == "ours":
        tame_allocator()
        environment |= {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    command = [sys.executable, __file__, *sys.argv[1:], "--as", kind]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0")
    parser.add_argument("--decoder-channels", default="")
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--as", dest="kind", choices=("ours", "usual"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        return work(options.kind, options)
    processes = {kind: start(kind) for kind in ("usual", "ours")}
    times = {kind: [] for kind in processes}
    for _ in range(ROUNDS):
        for kind, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            times[kind].append(float(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    ratios = np.array(times["usual"]) / np.array(times["ours"])
    network = Network("unet", options.encoder, options.decoder_channels, options.height, options.width)
    found = {"ratio_step": round(float(np.median(ratios)), 2), "ratio_spread": [ratios.min(), ratios.max()]}
    found |= {f"{kind}_seconds": round(float(np.median(t)), 3) for kind, t in times.items()}
    found |= {"network": vars(network), "batch_size": options.batch_size, "rounds": ROUNDS, "steps": STEPS}
    print(machine())
    print(found)
    write("train", found)
    return None


if __name__ == "__main__":
    main()
