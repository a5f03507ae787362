"""Run lengths of full-size masks: ours against the usual numpy encoder, pycocotools where installed, and the floor.

All on one thread, in one process with the allocator tamed, interleaved. The floor is one copy of the mask.

python bench/rle.py [--quick]
"""

import argparse
import time

import numpy as np
import synthetic
from common import machine, tame_allocator, write

from carvana import rle


def usual_encode(mask: np.ndarray) -> str:
    """What most notebooks do: padded copy, differences, numbers joined one by one."""
    pixels = np.concatenate([[0], mask.astype(np.uint8).flatten(), [0]])
    changes = np.where(pixels[1:] != pixels[:-1])[0] + 1
    changes[1::2] -= changes[::2]
    return " ".join(str(value) for value in changes)


def usual_decode(text: str) -> np.ndarray:
    """Likewise: the text split, a slice filled for every run."""
    numbers = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (numbers[::2], numbers[1::2]))
    flat = np.zeros(1280 * 1918, dtype=np.uint8)
    for start, length in zip(starts - 1, lengths, strict=True):
        flat[start : start + length] = 1
    return flat.reshape(1280, 1918)


def contestants(masks: list[np.ndarray], texts: list[str]) -> dict[str, tuple]:
    found = {
        "usual_encode": (usual_encode, masks),
        "ours_encode": (rle.encode, masks),
        "usual_decode": (usual_decode, texts),
        "ours_decode": (rle.decode, texts),
        "floor": (np.copy, masks),
    }
    try:
        from pycocotools import mask as coco
    except ImportError:
        return found
    return found | {"pycocotools_encode": (lambda mask: coco.encode(np.asfortranarray(mask.astype(np.uint8))), masks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    rounds = 8 if parser.parse_args().quick else 30
    tame_allocator()
    masks = synthetic.masks(12)
    texts = [rle.encode(mask) for mask in masks]
    for mask, text in zip(masks, texts, strict=True):
        assert usual_encode(mask) == text
        assert np.array_equal(usual_decode(text), mask)
        assert np.array_equal(rle.decode(text), mask)
    times: dict[str, list] = {}
    for _ in range(rounds + 1):
        for name, (function, inputs) in contestants(masks, texts).items():
            began = time.perf_counter()
            for each in inputs:
                function(each)
            times.setdefault(name, []).append((time.perf_counter() - began) / len(inputs))
    seconds = {name: np.array(found[1:]) for name, found in times.items()}
    found = {f"{name}_ms": round(float(np.median(t)) * 1e3, 3) for name, t in seconds.items()}
    for kind in ("encode", "decode"):
        ratios = seconds[f"usual_{kind}"] / seconds[f"ours_{kind}"]
        found |= {f"ratio_{kind}": round(float(np.median(ratios)), 2)}
        found |= {f"ratio_{kind}_spread": [round(float(value), 2) for value in np.quantile(ratios, [0.05, 0.95])]}
    found |= {"runs": float(np.median([synthetic.runs(mask) for mask in masks])), "rounds": rounds}
    print(machine())
    print("\n".join(f"{name:24}{value}" for name, value in found.items()))
    write("rle", found)


if __name__ == "__main__":
    main()
