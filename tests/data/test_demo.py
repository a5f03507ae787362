import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carvana import rle
from carvana.data import demo
from carvana.data.folds import make_folds
from carvana.errors import UserError
from carvana.files import read_json, write_json

FEW = 3  # views a car where the files count and not the angles: 16 take seconds


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One training car and one test car of a few views, with the seconds of a core that writing took."""
    folder = tmp_path_factory.mktemp("demo") / "small"
    start = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "VIEWS", FEW)
        demo.write_competition(folder, cars=1, test_cars=1, seed=3)
    return folder, time.process_time() - start


@pytest.fixture
def few_views(monkeypatch):
    monkeypatch.setattr(demo, "VIEWS", FEW)


@pytest.fixture(scope="module")
def cars():
    return [demo.Car(np.random.default_rng((5, 0, number)), number) for number in (0, 2)]


@pytest.fixture(scope="module")
def sides(cars):
    """Image and mask of each car from its side."""
    return [demo.render(car, 5, np.random.default_rng(1)) for car in cars]


def names(folder, suffix):
    return sorted(path.name for path in folder.glob(f"*{suffix}"))


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def test_layout_is_the_competitions(small):
    folder, _ = small
    train, test = names(folder / "train", ".jpg"), names(folder / "test", ".jpg")
    masks = pd.read_csv(folder / "train_masks.csv")
    metadata = pd.read_csv(folder / "metadata.csv")
    assert demo.VIEWS == 16 and len(train) == len(test) == FEW
    assert [name[12:] for name in train] == [f"_{view:02d}.jpg" for view in range(1, FEW + 1)]
    assert all(set(name[:12]) <= set("0123456789abcdef") for name in train + test)
    assert names(folder / "train_masks", ".gif") == [name.replace(".jpg", "_mask.gif") for name in train]
    assert list(masks.columns) == ["img", "rle_mask"] and masks["img"].tolist() == train
    assert list(metadata.columns) == ["id", "year", "make", "model", "trim1", "trim2"]
    assert set(metadata["id"]) == {name[:12] for name in train + test}
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_sample_and_truth_name_every_test_image(small):
    folder, _ = small
    sample, truth = pd.read_csv(folder / "sample_submission.csv"), pd.read_csv(folder / "truth.csv")
    assert sample["img"].tolist() == truth["img"].tolist() == names(folder / "test", ".jpg")
    assert set(sample["rle_mask"]) == {"1 1"}
    assert all(0.05 < rle.decode(text).mean() < 0.45 for text in truth["rle_mask"])


def test_masks_of_the_table_equal_the_gifs(small):
    folder, _ = small
    for name, text in pd.read_csv(folder / "train_masks.csv").itertuples(index=False):
        image = Image.open(folder / "train_masks" / name.replace(".jpg", "_mask.gif"))
        assert image.mode == "P" and image.getpalette()[:6] == [0, 0, 0, 255, 255, 255]
        assert np.array_equal(np.array(image), rle.decode(text).astype(np.uint8))


def test_images_have_the_real_size(small):
    folder, _ = small
    paths = [*folder.glob("*/*.jpg"), *folder.glob("*/*.gif")]
    assert {Image.open(path).size for path in paths} == {(1918, 1280)}


@pytest.mark.slow
def test_both_folds_of_the_demo_learn_from_every_paint():
    cars = [demo.Car(np.random.default_rng((1, 0, number)), number) for number in range(12)]
    views = [demo.Scene(car, view * 2 * np.pi / 16 + car.turn) for car in cars for view in (1, 8)]
    for view in views:
        view.draw()
    rows = [(view.car.id, view.car.id, (view.canvas[..., 3] > 0).mean()) for view in views]
    for seed in (1, 2, 3):
        folds = make_folds(pd.DataFrame(rows, columns=["car", "img", "area"]), 2, 0, seed).set_index("car")["fold"]
        for fold in (0, 1):
            assert len({car.paint for car in cars if folds[car.id] == fold}) == len(demo.PAINTS)


def test_an_image_takes_little_time(small):
    assert small[1] / (2 * FEW) < 1.5  # 0.2 on an idle core


def test_second_call_draws_and_rewrites_nothing(small, few_views, monkeypatch):
    folder, _ = small
    before = snapshot(folder)
    monkeypatch.setattr(demo, "Car", None)
    demo.write_competition(folder, cars=1, test_cars=1, seed=3)
    assert snapshot(folder) == before


def test_other_parameters_in_the_same_folder_are_an_error(small):
    folder, _ = small
    with pytest.raises(UserError, match=str(folder)):
        demo.write_competition(folder, cars=1, test_cars=1, seed=4)


@pytest.mark.parametrize("text", ["[1, 2]", "null", "{", ""])
def test_a_damaged_note_of_a_demo_is_one_line_with_its_name(tmp_path, text):
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(UserError, match=r"demo.json cannot be read as JSON"):
        demo.write_competition(tmp_path, cars=1, test_cars=1)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"real")
    with pytest.raises(UserError, match=str(tmp_path)):
        demo.write_competition(tmp_path, cars=1, test_cars=1)
    assert [path.name for path in tmp_path.iterdir()] == ["train.zip"]


@pytest.mark.parametrize("complete", [True, False])
def test_a_demo_that_lacks_files_is_finished_with_the_same_bytes(small, few_views, tmp_path, complete):
    folder = Path(shutil.copytree(small[0], tmp_path / "copy"))
    lost = [sorted(folder.glob("train/*"))[1], sorted(folder.glob("train_masks/*"))[2], folder / "truth.csv"]
    expected = [path.read_bytes() for path in lost]
    kept = sorted(folder.glob("train/*"))[0]
    time_of_kept = kept.stat().st_mtime_ns
    for path in lost:
        path.unlink()
    write_json(folder / "demo.json", read_json(folder / "demo.json") | {"complete": complete})
    demo.write_competition(folder, cars=1, test_cars=1, seed=3)
    assert [path.read_bytes() for path in lost] == expected
    assert kept.stat().st_mtime_ns == time_of_kept
    assert read_json(folder / "demo.json")["complete"]


def test_same_seed_gives_the_same_image_and_another_seed_another(cars):
    again, other = (demo.Car(np.random.default_rng((seed, 0, 0)), 0) for seed in (5, 6))
    images = [demo.render(car, 4, np.random.default_rng(1))[0] for car in (cars[0], again, other)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert cars[0].id == again.id != other.id


def test_low_and_tall_shapes_both_occur(cars, sides):
    low, tall = cars
    assert (low.shape, tall.shape) == ("saloon", "suv")
    heights = [np.ptp(np.flatnonzero(mask.any(axis=1))) for _, mask in sides]
    assert tall.size[2] > low.size[2] + 0.15 and heights[1] > heights[0]


def test_views_of_a_car_differ_and_keep_a_plausible_size(cars):
    masks = [demo.render(cars[1], view, np.random.default_rng(1))[1] for view in (1, 3, 9, 13)]
    assert all(0.05 < mask.mean() < 0.45 for mask in masks)
    assert all(np.mean(one != two) > 0.002 for one, two in zip(masks[:-1], masks[1:], strict=True))


def test_mask_is_exactly_what_hides_the_studio(cars, sides):
    for car, (image, mask) in zip(cars, sides, strict=True):
        shade = demo.Scene(car, np.pi / 2 + car.turn).shade()[..., None] / np.float32(255)
        strange = np.abs(image - cv2.GaussianBlur(car.studio * shade, (5, 5), 0.8)).max(axis=2) > 10
        near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0
        assert not strange[~near].any()
        assert strange[mask].mean() > 0.7


def test_the_floor_shows_between_the_spokes(sides):
    for _, mask in sides:
        low = ~mask[np.flatnonzero(mask.any(axis=1)).mean().astype(int) :]
        assert cv2.connectedComponents(low.astype(np.uint8), connectivity=4)[0] - 2 >= 2
