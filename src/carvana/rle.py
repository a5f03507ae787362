"""Run lengths <-> masks, as the competition writes them.

Text of `start length` pairs; pixels are numbered from 1, row by row, runs go on over row ends, sorted, no overlap.
"""

import numpy as np


def encode(mask: np.ndarray) -> str:
    """Run lengths of a mask.

    mask: (H, W) bool or any numbers, car where not zero. Returns "" for an empty mask.
    """
    return from_edges(edges(np.asarray(mask, dtype=bool)))


def edges(mask: np.ndarray) -> np.ndarray:
    """Sorted flat positions (from 0) where a run of a mask (H, W) bool starts or has ended; an even number of them."""
    flat = mask.reshape(-1)
    inner = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first, last = np.flatnonzero(flat[:1]), np.flatnonzero(flat[-1:]) + flat.size
    return np.concatenate([first, inner, last])


def from_edges(positions: np.ndarray) -> str:
    """Run lengths from what `edges` returns."""
    pairs = positions.reshape(-1, 2)
    values = np.stack([pairs[:, 0] + 1, pairs[:, 1] - pairs[:, 0]], axis=1).reshape(-1).tolist()
    return ("%d " * len(values) % tuple(values))[:-1]


def parse(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Starts (from 1) and lengths, (n,) int64 each. ValueError where the text is not pairs of whole numbers."""
    try:
        values = np.fromstring(text, dtype=np.int64, sep=" ")  # 4 times as fast as splitting
        if values.size != text.count(" ") + bool(text):  # further white space, or what an old numpy leaves unread
            values = np.array(text.split(), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError("run lengths must be whole numbers") from error
    if values.size % 2:
        raise ValueError(f"run lengths must be pairs, found {values.size} numbers")
    return values[::2], values[1::2]


def decode(text: str, height: int = 1280, width: int = 1918) -> np.ndarray:
    """Mask of a run-length text, (height, width) bool.

    ValueError where runs are not pairs of whole numbers above 0, sorted, without overlap and inside the picture.
    """
    starts, lengths = parse(text)
    edges = np.stack([starts - 1, starts - 1 + lengths], axis=1).reshape(-1)
    gaps = np.diff(edges, prepend=0, append=height * width)
    if (lengths < 1).any() or (gaps < 0).any():
        raise ValueError(f"runs must be sorted, without overlap and inside {height}x{width} pixels")
    return np.repeat(np.arange(gaps.size) % 2 == 1, gaps).reshape(height, width)


def area(text: str) -> int:
    """Number of masked pixels of a run-length text."""
    return int(parse(text)[1].sum())
