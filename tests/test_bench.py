"""The measuring scripts fit the package: each runs on something tiny."""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import recipe

from carvana.data import Competition
from carvana.models import SegmentationModel

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a script as it imports its neighbours."""
    monkeypatch.syspath_prepend(BENCH)
    yield lambda name: __import__(name)
    for name in (path.stem for path in BENCH.glob("*.py")):
        sys.modules.pop(name, None)


def test_the_loader_script_compares_three_loaders(bench, shared_competition, tmp_path):
    results = bench("loader").measure(shared_competition, 96, 128, tmp_path)
    assert results["usual_per_s"] > 0
    low, high = results["ratio_cached_spread"]
    assert low <= results["ratio_cached"] <= high


def test_the_step_script_takes_the_packages_own_step_and_the_usual_one(bench):
    script, common, chosen = bench("train"), bench("common"), recipe()
    images = torch.zeros(4, 96, 128, 3, dtype=torch.uint8)
    for step in (common.state_for_steps(chosen).train_step, script.usual(chosen)):
        step(images, images[..., 0].clone())


def test_the_recipe_script_trains_an_arm_and_writes_its_row(bench, shared_competition, tmp_path, monkeypatch):
    script = bench("recipe")
    options = argparse.Namespace(size=64, encoder_weights="")
    assert {script.recipe_of_arm(name, options).height for name in script.ARMS} == {64}
    costs = script.step_costs({"base": recipe(height=64, width=64), "dilated": recipe(height=64, width=64)}, rounds=2)
    arm = script.train_for(recipe(epochs=4), shared_competition, tmp_path / "base", 2)
    assert min(costs["base"], costs["dilated"]) > 0
    with script.network_of("dilated"):
        assert isinstance(SegmentationModel(recipe().model_config).net.decoder.center, script.DilatedBottleneck)
    assert len(arm["dice"]) == len(arm["cars"]) == 4
    monkeypatch.setattr(script, "ARM_RESULTS", tmp_path / "results")
    better = {"dice": [dice + 0.01 for dice in arm["dice"]]}
    (folder := tmp_path / "results/64_2").mkdir(parents=True)
    (folder / "costs.json").write_text(json.dumps({"machine": "a CPU", "seconds": costs}))
    arms = {name: arm | {"cost": 1.0, "steps": 2, "machine": "a GPU"} for name in ("base_1", "base_2", "adamw_2")}
    arms |= {
        "lr2_1": arms["base_1"],
        "adamw_1": arms["base_1"] | better,
        "lr8_1": arms["base_1"] | {"machine": "other"},
    }
    for name, result in arms.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    page = script.page()
    assert "| base | Muon" in page
    assert "| +0.005000 | +0.005000 to +0.005000 |" in page  # half of what one of two seeds gains
    assert "|  | +0.000000 | +0.000000 to +0.000000 |" in page  # lr2, whose second seed is not done
    compared = [line for line in page.splitlines() if line.startswith("| lr8")]
    assert compared[0].endswith("|  |  |  |")  # not with a base of another machine
    assert "Not measured: the arms batch2" in page


def test_the_seed_script_changes_what_an_arm_names(bench, shared_competition):
    script = bench("seed")
    options = argparse.Namespace(height=96, width=96, epochs=1, data=shared_competition, cars=3)
    arms = {name: script.recipe_of_arm(changes, options) for name, changes in script.arms(96, 96).items()}
    assert arms["as written"].arch == "classic_unet"
    assert script.arms(512, 512)["crops of 512x1024"].items() >= {"height": 1280, "width": 1920}.items()
    crops = arms["crops of 96x192"]
    assert (crops.height, crops.width, crops.crop_height, crops.crop_width) == (256, 352, 96, 192)
    assert arms["SGD"].optimizer == "sgd"
    assert script.competition_of(options).samples["car"].nunique() == 3


def test_the_gpu_script_measures_steps_on_any_device(bench):
    speed = bench("gpu").step_speed(recipe(ema=0.0, height=32, width=32), peak=1e12, record=False)
    low, high = speed["spread"]
    assert 0 < low <= speed["images_per_s"] <= high
    assert speed["share_of_peak"] > 0
    assert set(speed["parts_ms"]) == {"forward", "backward", "clip", "optimizer"}


def test_the_prediction_script_measures_every_stage(bench, shared_competition):
    images = Competition(shared_competition).train_images
    results = bench("predict").measure(images, images.names[:1], 320, 480, 1)
    assert results["ratio_one_class"] > 0 and results["ours_in_ms"] > 0


def test_the_pseudo_script_compares_the_same_images(bench, shared_competition, tmp_path, monkeypatch):
    script = bench("pseudo")
    monkeypatch.setattr(script, "recipe_of", lambda _, **changes: recipe(**changes))
    options = {"data": shared_competition, "full": shared_competition, "folder": tmp_path, "encoder_weights": ""}
    options = argparse.Namespace(**options, size=32, epochs=2, seeds=[1])
    scores = script.measure(1, options)
    assert scores["where"].value_counts().to_dict() == {script.OTHER: 16, script.FOLD: 8}
    assert len(pd.read_csv(tmp_path / "without1" / "pseudo" / "labels.csv")) == 2  # of four test images
    assert (tmp_path / "with1" / "fold0" / "best.safetensors").exists()
    table = scores.assign(without=0.9).assign(**{"with": 0.92})
    assert f"| {script.FOLD} | mean | 0.900000 | 0.920000 | +0.020000 | " in script.page({1: table, 2: table}, options)
