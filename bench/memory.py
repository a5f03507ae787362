"""Memory and time of a training step: network x size x batch, each in a process of its own; prints a Markdown table.

On a GPU the most that torch held there; on a CPU the most that the process held, the libraries' 0.6 GB included.

python bench/memory.py --most-gb 20 --sizes 320x480 640x960 --batches 4 8
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from common import machine, recipe_of, state_for_steps

NETWORKS = {
    "lite0, slim decoder": {"encoder": "tu-tf_efficientnet_lite0", "decoder_channels": "128,64,32,16,8"},
    "resnet34": {"encoder": "resnet34"},
    "classic_unet": {"arch": "classic_unet", "encoder": ""},
}
SIZES, BATCHES = ["320x480", "512x512", "640x960", "1280x1920"], (1, 4, 8, 16)


def measure(network: str, height: int, width: int, batch_size: int) -> None:
    size = {"height": height, "width": width, "batch_size": batch_size}
    state = state_for_steps(recipe_of(encoder_weights="", **size, **NETWORKS[network]))
    images = torch.zeros(batch_size, height, width, 3, dtype=torch.uint8)
    on_gpu, seconds = torch.cuda.is_available(), 0.0
    for _ in range(5 if on_gpu else 2):  # a GPU records the fourth
        began = time.perf_counter()
        state.train_step(images, images[..., 0].clone()).item()
        seconds = time.perf_counter() - began
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print((torch.cuda.max_memory_allocated() if on_gpu else held) / 1e9, seconds)


def cell(network: str, size: list[int], batch_size: int, expected: float, most: float) -> tuple[float, float] | None:
    """GB and seconds of the last step, or None for what `expected` says does not fit."""
    if expected > most:
        return None
    command = [sys.executable, __file__, "--measure", network, *map(str, size), str(batch_size)]
    gigabytes, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return float(gigabytes), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-gb", type=float, default=20.0, help="do not try what would take more")
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], *map(int, options.measure[1:]))
    print(f"{machine()}\n\n| network | size | " + " | ".join(f"batch {b}" for b in options.batches) + " |")
    print("|---|---|" + "---|" * len(options.batches))
    for network in NETWORKS:
        a_pixel = 0.0
        for size in (list(map(int, text.split("x"))) for text in options.sizes):
            cells = []
            for batch_size in options.batches:
                pixels = size[0] * size[1] * batch_size
                measured = cell(network, size, batch_size, 0.7 + a_pixel * pixels, options.most_gb)
                a_pixel = (measured[0] - 0.7) / pixels if measured else a_pixel
                text = f"{measured[0]:.1f} GB, {measured[1]:.2f} s" if measured else f"over {options.most_gb:.0f} GB"
                cells.append(text)
            print(f"| {network} | {size[0]}x{size[1]} | {' | '.join(cells)} |", flush=True)
    return None


if __name__ == "__main__":
    main()
