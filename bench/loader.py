"""Images a second of the training loader against the usual one, in one run, one process each.

Usual: PIL decodes the whole JPEG and resizes it, PIL reads the GIF, both become float64 arrays in NCHW, a random flip.
Ours: the package's loader with the same flip, from the cache and without it, up to the same normalised float batch.
The allocator is that of a run for both.

python bench/loader.py [--data FOLDER]        (default: a demo competition of full-size images, made on the fly)
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine, recipe_of, tame_allocator, write
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from carvana.data import Competition, dataset, demo
from carvana.models import SegmentationModel

SIZES = [(320, 480), (640, 960)]
BATCH_SIZE, ROUNDS = 8, 6


class Usual(Dataset):
    def __init__(self, folder: Path, names: list[str], height: int, width: int):
        self.folder, self.names, self.size = folder, names, (width, height)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.names[i]
        image = Image.open(self.folder / "train" / name).convert("RGB").resize(self.size, Image.Resampling.BICUBIC)
        mask = Image.open(self.folder / "train_masks" / f"{name[:-4]}_mask.gif").resize(
            self.size, Image.Resampling.NEAREST
        )
        image = (np.asarray(image) / 255.0 - 0.5) / 0.5
        mask = (np.asarray(mask) > 0).astype(float)
        if np.random.rand() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return np.ascontiguousarray(image.transpose(2, 0, 1)), np.ascontiguousarray(mask)[None]

    def __len__(self) -> int:
        return len(self.names)


def ours(source, n: int) -> DataLoader:
    flip = dataset.Augmentation(hflip=0.5).compose()
    samples = dataset.TrainDataset(source, np.arange(n), flip, seed=1)
    return DataLoader(samples, batch_sampler=dataset.batches(n, BATCH_SIZE, 1, 1, 1))


def normalised(model: SegmentationModel, images: torch.Tensor, targets: torch.Tensor):
    """What the network and the loss do with a batch of bytes, on the device."""
    return model.normalised(images), targets.float() / 255


def usual_floats(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.float(), targets.float()


def seconds(loader: DataLoader, finish) -> float:
    began, seen = time.perf_counter(), 0
    for images, targets, *_ in loader:
        finish(images, targets)
        seen += len(images)
    return (time.perf_counter() - began) / seen


def measure(data: Path, height: int, width: int, cache: Path) -> dict:
    competition = Competition(data)
    samples = competition.samples.head(8 * BATCH_SIZE)
    decoded = dataset.DecodedSamples(competition.train_images, samples, height, width)
    n, network = len(samples), recipe_of("profiles/cpu.yaml", height=height, width=width).model_config
    finish = partial(normalised, SegmentationModel(network))
    loaders = {
        "usual": (DataLoader(Usual(data, samples["img"].tolist(), height, width), BATCH_SIZE), usual_floats),
        "uncached": (ours(decoded, n), finish),
        "cached": (ours(dataset.cached(decoded, cache), n), finish),
    }
    times = {name: [] for name in loaders}
    for _ in range(ROUNDS + 1):
        for name, (loader, finish) in loaders.items():
            times[name].append(seconds(loader, finish))
    times = {name: np.array(rounds[1:]) for name, rounds in times.items()}  # the first round fills the page cache
    results = {f"{name}_per_s": round(float(np.median(1 / t)), 1) for name, t in times.items()}
    for name in ("cached", "uncached"):
        ratios = times["usual"] / times[name]
        results[f"ratio_{name}"] = round(float(np.median(ratios)), 2)
        results[f"ratio_{name}_spread"] = [round(float(value), 2) for value in (ratios.min(), ratios.max())]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    data = parser.parse_args().data
    tame_allocator()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder) / "demo"
            demo.write_competition(data, 4, 1, 1)
        results = {f"{h}x{w}": measure(data, h, w, Path(folder)) for h, w in SIZES}
    for size, row in results.items():
        print(size, row)
    worst = {name: min(row[name] for row in results.values()) for name in ("ratio_cached", "ratio_uncached")}
    print(machine(), worst)
    write("loader", worst | {"sizes": results, "rounds": ROUNDS, "threads": 1})


if __name__ == "__main__":
    main()
