"""Memory of a training step: network x size x batch, each measured in a process of its own; prints a Markdown table.

On a GPU the most that torch held there; on a CPU the most that the process held, the libraries' 0.6 GB included.

python bench/memory.py --most-gb 20
"""

import argparse
import resource
import subprocess
import sys

import torch
from common import machine, recipe_of, state_for_steps

NETWORKS = {
    "lite0, slim decoder": {"encoder": "tu-tf_efficientnet_lite0", "decoder_channels": "128,64,32,16,8"},
    "resnet34": {"encoder": "resnet34"},
    "classic_unet": {"arch": "classic_unet", "encoder": ""},
}
SIZES, BATCHES = [(320, 480), (512, 512), (640, 960)], (4, 8, 16)


def measure(network: str, height: int, width: int, batch_size: int) -> None:
    size = {"height": height, "width": width, "batch_size": batch_size}
    state = state_for_steps(recipe_of(encoder_weights="", **size, **NETWORKS[network]))
    images = torch.zeros(batch_size, height, width, 3, dtype=torch.uint8)
    for _ in range(2):
        state.train_step(images, images[..., 0].clone())
    on_gpu = torch.cuda.is_available()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print((torch.cuda.max_memory_allocated() if on_gpu else held) / 1e9)


def cell(network: str, size: tuple[int, int], batch_size: int, expected: float, most: float) -> float | None:
    """GB, or None for what `expected` says does not fit."""
    if expected > most:
        return None
    command = [sys.executable, __file__, "--measure", network, *map(str, size), str(batch_size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-gb", type=float, default=20.0, help="do not try what would take more")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], *map(int, options.measure[1:]))
    print(f"{machine()}\n\n| network | size | " + " | ".join(f"batch {b}" for b in BATCHES) + " |")
    print("|---|---|" + "---|" * len(BATCHES))
    for network in NETWORKS:
        a_pixel = 0.0
        for height, width in SIZES:
            cells = []
            for batch_size in BATCHES:
                pixels = height * width * batch_size
                gigabytes = cell(network, (height, width), batch_size, 0.7 + a_pixel * pixels, options.most_gb)
                a_pixel = (gigabytes - 0.7) / pixels if gigabytes else a_pixel
                cells.append(f"{gigabytes:.1f} GB" if gigabytes else f"over {options.most_gb:.0f} GB, not tried")
            print(f"| {network} | {height}x{width} | {' | '.join(cells)} |", flush=True)
    return None


if __name__ == "__main__":
    main()
