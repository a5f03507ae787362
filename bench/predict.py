"""Photograph -> run lengths without the network, stage by stage, against the usual ways and the floor; one thread.

Usual, one class: PIL and float64, logits interpolated to full size by torch, cut, the usual encoder. Usual, two
classes: the same with two logits a pixel and argmax. Ours: the package's own functions. Floor: a 1/8 decode and one
read of a mask. The network, the same in all, is measured beside it with --network.

python bench/predict.py [--quick] [--photos DIR] [--network]
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
import synthetic
import torch
from common import machine, recipe_of, tame_allocator, write
from PIL import Image
from rle import usual_encode
from torch.nn.functional import interpolate

from carvana import rle
from carvana.data import demo, images
from carvana.device import precision
from carvana.inference.logits import BlendedLogits
from carvana.models import SegmentationModel

SIZES = [(320, 480), (640, 960)]


def usual_in(data: bytes, height: int, width: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    array = (np.asarray(image) / 255.0 - 0.5) / 0.5
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float()


def usual_out_one_class(logits: torch.Tensor) -> str:
    probability = torch.sigmoid(interpolate(logits[None, None], (1280, 1918), mode="bilinear"))[0, 0]
    return usual_encode((probability > 0.5).numpy())


def usual_out_two_classes(logits: torch.Tensor) -> str:
    both = torch.stack([-logits, logits])[None] / 2
    return usual_encode(interpolate(both, (1280, 1918), mode="bilinear").argmax(1)[0].numpy())


def ours_in(archive: images.Archive, name: str, model: SegmentationModel) -> torch.Tensor:
    image = images.read_image(archive, name, model.config.height, model.config.width)[0]
    return model.normalised(torch.from_numpy(image)[None])


def ours_out(logits: torch.Tensor) -> str:
    return rle.from_edges(BlendedLogits([logits.numpy()]).edges((1280, 1918), 0.0))


def floor(data: bytes, mask: np.ndarray) -> None:
    simplejpeg.decode_jpeg(data, min_height=160, min_width=239)
    np.count_nonzero(mask)


def measure(archive: images.Archive, names: list[str], height: int, width: int, rounds: int) -> dict:
    files = [archive.read(name) for name in names]
    maps = [torch.from_numpy(car) for car in synthetic.logits(len(names), height, width)]
    mask, model = synthetic.masks(1)[0], lite0(height, width)
    stages = {
        "usual_in": lambda i: usual_in(files[i], height, width),
        "usual_out_one_class": lambda i: usual_out_one_class(maps[i]),
        "usual_out_two_class": lambda i: usual_out_two_classes(maps[i]),
        "ours_in": lambda i: ours_in(archive, names[i], model),
        "ours_out": lambda i: ours_out(maps[i]),
        "floor": lambda i: floor(files[i], mask),
    }
    seconds = {name: [] for name in stages}
    for _ in range(rounds + 1):
        for name, stage in stages.items():
            began = time.perf_counter()
            for i in range(len(names)):
                stage(i)
            seconds[name].append((time.perf_counter() - began) / len(names))
    t = {name: np.array(of_stage[1:]) for name, of_stage in seconds.items()}
    ours = t["ours_in"] + t["ours_out"]
    ratios = {f"ratio_{k}": (t["usual_in"] + t[f"usual_out_{k}"]) / ours for k in ("one_class", "two_class")}
    ratios["ratio_floor"] = ours / t["floor"]
    results = {f"{name}_ms": round(float(np.median(value)) * 1e3, 3) for name, value in t.items()}
    results |= {name: round(float(np.median(value)), 2) for name, value in ratios.items()}
    return results | {f"{name}_spread": [round(float(v), 2) for v in (r.min(), r.max())] for name, r in ratios.items()}


def lite0(height: int, width: int) -> SegmentationModel:
    return SegmentationModel(recipe_of("profiles/cpu.yaml", height=height, width=width).model_config).eval()


def network_ms(height: int, width: int) -> float:
    """The smallest network of the profiles on one thread, in the package's own precision."""
    model, batch = lite0(height, width), torch.zeros(4, height, width, 3, dtype=torch.uint8)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision("auto") == "bf16"):
            model(batch)
        times.append((time.perf_counter() - began) / 4)
    return round(min(times) * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--photos", type=Path, help="folder or zip of 1280x1918 JPEGs; default: the demo's")
    parser.add_argument("--network", action="store_true")
    options = parser.parse_args()
    tame_allocator()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not options.photos:
            demo.write_competition(Path(folder) / "demo", 1, 1, 1)
        archive = images.Archive(options.photos or Path(folder) / "demo" / "test", ".jpg")
        names = archive.names[: 6 if options.quick else 12]
        rounds = 3 if options.quick else 8
        results = {f"{h}x{w}": measure(archive, names, h, w, rounds) for h, w in SIZES}
    for height, width in SIZES if options.network else ():
        results[f"{height}x{width}"]["network_ms"] = network_ms(height, width)
    print(machine())
    for size, row in results.items():
        print(size)
        print("\n".join(f"  {name:28}{value}" for name, value in row.items()))
    write("predict", results | {"pictures": len(names), "rounds": rounds, "threads": 1})


if __name__ == "__main__":
    main()
