"""A tiny competition in the real layout, a recipe that trains on it in seconds, and where real images are.

What imports torch is imported late: it takes ten seconds, and the process that deals out the tests needs none of it.
"""

import base64
import json
import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers must not share cores

import numpy as np
import pandas as pd
import pytest
from fake_kaggle import KEY, NAMES, USER, guarded, zipped
from PIL import Image

from carvana import rle
from carvana.data.competition import Competition
from carvana.data.images import Archive
from carvana.profiles import notebook_path
from carvana.run import Run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours

HEIGHT, WIDTH, VIEWS = 96, 126, 4  # the width is no multiple of 4, like 1918
SMALL = 40, 60  # height and width of masks made by hand

MEMBER_SIZES = (96, 128), (64, 96)
ENCODER = "tu-test_resnet"  # that timm has for tests: 0.4 M parameters, and it learns

RECIPE = {
    "arch": "unet", "encoder": ENCODER, "encoder_weights": "", "init_from": "", "decoder_channels": "16,8,8,8,8",
    "height": 96, "width": 128, "epochs": 3, "start_size": 1.0, "batch_size": 4, "accumulate": 1, "lr": 3e-3,
    "optimizer": "adamw",
    "weight_decay": 0.01, "schedule": "cosine", "warmup": 0.1, "clip_norm": 1.0, "loss": "bce_dice", "ema": 0.9,
    "amp": "no", "hflip": 0.5, "crop_height": 0, "crop_width": 0, "brightness": 0.2, "contrast": 0.2,
    "hue": 0.1, "saturation": 0.2, "scale": 0.1, "shift": 0.05, "rotate": 3.0, "pseudo_labels": "",
    "pseudo_batch": 0.5, "validate_every": 1, "seed": 1,
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no worker is left alone with one of them at the end."""
    longest = ["test_notebooks.py", "test_training.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def recipe(**changes):
    from carvana.training import Recipe

    return Recipe.from_parameters(RECIPE | changes)


def trainer_of(data, run_dir, fold=0, holdout_cars=0, **changes):
    """The trainer of a fold of a run of two folds, with the recipe's changes."""
    from carvana.training import Trainer

    competition, run = Competition(data), Run(run_dir.parent, run_dir.name)
    run.split(competition.samples, 2, holdout_cars, 1)
    return Trainer(run, competition, recipe(**changes), fold)


def begun(data, run_dir, **changes) -> Run:
    """A run as it is before its first step."""
    chosen = recipe(optimizer="sgd", loss="bce", ema=0.0, epochs=2, clip_norm=0.0, weight_decay=0.0, **changes)
    competition, run = Competition(data), Run(run_dir.parent, run_dir.name)
    run.split(competition.samples, 2, 0, 1)
    run.write_start(vars(chosen) | competition.parameters, "key")
    return run


def run_here(notebook, values):
    """Run a notebook's code in this process, which has imported all that a kernel would first have to import."""
    namespace = {}
    for cell in json.loads(notebook_path(notebook).read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with patch.dict(os.environ):  # `device` is noted there
                exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace |= values


def ellipse(car: int, view: int) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wide, high = 25 + 5 * view, 18 + 2 * car
    return ((x - WIDTH / 2 - car) / wide) ** 2 + ((y - HEIGHT / 2) / high) ** 2 < 1


def square(top: int, left: int, size: int) -> np.ndarray:
    """A mask of the table of `samples_of`."""
    mask = np.zeros(SMALL, dtype=bool)
    mask[top : top + size, left : left + size] = True
    return mask


def samples_of(masks: dict[tuple[str, int], np.ndarray]) -> pd.DataFrame:
    """Samples as a competition gives them, from {(car, view): mask}."""
    rows = [(f"{car}_{view:02d}.jpg", car, view, rle.encode(mask), mask.mean()) for (car, view), mask in masks.items()]
    table = pd.DataFrame(rows, columns=["img", "car", "view", "rle", "area"])
    return table.assign(height=SMALL[0], width=SMALL[1])


def write_competition(folder: Path, cars: int = 4, test_cars: int = 1, gifs: bool = True) -> Path:
    """Bright noisy ellipses on a dark background; car i is named by i + 1 in twelve hex digits."""
    random = np.random.default_rng(0)
    rows = {"train": [], "test": []}
    for i in range(cars + test_cars):
        split = "train" if i < cars else "test"
        (folder / split).mkdir(parents=True, exist_ok=True)
        for view in range(1, VIEWS + 1):
            name, mask = f"{i + 1:012x}_{view:02d}", ellipse(i, view)
            image = np.where(mask[..., None], 200, 60) + random.integers(-30, 30, (HEIGHT, WIDTH, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / split / f"{name}.jpg", quality=95, subsampling=0)
            rows[split].append((f"{name}.jpg", rle.encode(mask)))
            if gifs and split == "train":
                (folder / "train_masks").mkdir(exist_ok=True)
                gif = Image.fromarray(mask.astype(np.uint8)).convert("P")
                gif.putpalette([0, 0, 0, 255, 255, 255])
                gif.save(folder / "train_masks" / f"{name}_mask.gif")
    for split, file in (("train", "train_masks"), ("test", "truth")):
        pd.DataFrame(rows[split], columns=["img", "rle_mask"]).to_csv(folder / f"{file}.csv", index=False)
    sample = pd.DataFrame({"img": [name for name, _ in rows["test"]], "rle_mask": "1 1"})
    sample.to_csv(folder / "sample_submission.csv", index=False)
    return folder


@pytest.fixture
def competition(tmp_path) -> Path:
    return write_competition(tmp_path / "data")


@pytest.fixture(scope="session")
def shared_competition(tmp_path_factory) -> Path:
    return write_competition(tmp_path_factory.mktemp("competition"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("CARVANA_REAL_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CARVANA_REAL_DATA names no folder of real images")
    return Path(folder)


@pytest.fixture(scope="session")
def members(tmp_path_factory) -> list[Path]:
    """Two untrained networks of different encoders and sizes."""
    import torch

    from carvana import models

    folder, paths = tmp_path_factory.mktemp("members"), []
    for i, (encoder, size) in enumerate(zip((ENCODER, "tu-test_efficientnet"), MEMBER_SIZES, strict=True)):
        torch.manual_seed(i)
        config = models.ModelConfig("unet", encoder, "16,8,8,8,8", *size)
        path = folder / f"fold{i}" / "best.safetensors"
        models.save_checkpoint(path, models.SegmentationModel(config).state_dict(), config)
        paths.append(path)
    return paths


@pytest.fixture
def tests(shared_competition) -> Archive:
    """Images to predict."""
    return Competition(shared_competition).train_images


@pytest.fixture
def fake(monkeypatch, tmp_path, capfd):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with guarded(monkeypatch, tmp_path) as fake:
        fake.naps = naps
        fake.files |= {name: zipped() for name in NAMES}
        yield fake
    basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
    for request in fake.requests:
        wanted = (None,) if request.name in ("storage", "upload") else (basic, f"Bearer {KEY}")
        assert request.headers.get("Authorization") in wanted  # the key goes to the service alone
    shown, written = capfd.readouterr(), [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (KEY, basic.removeprefix("Basic "), base64.b64encode(KEY.encode()).decode(), "signature="):
        assert secret not in shown.out + shown.err
        noted = [path for path in written if secret.encode() in path.read_bytes()]
        assert all(
            secret == "signature=" and path.suffix == ".upload" for path in noted
        )  # which only the owner can read
