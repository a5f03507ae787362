"""The measuring scripts fit the package: each runs on something tiny."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, recipe

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a script as it imports its neighbours."""
    monkeypatch.syspath_prepend(BENCH)
    yield lambda name: __import__(name)
    for name in (path.stem for path in BENCH.glob("*.py")):
        sys.modules.pop(name, None)


def test_the_loader_script_compares_three_loaders(bench, shared_competition, tmp_path):
    found = bench("loader").measure(shared_competition, 96, 128, tmp_path)
    assert found["usual_per_s"] > 0
    low, high = found["ratio_cached_spread"]
    assert low <= found["ratio_cached"] <= high


def test_the_step_script_takes_the_packages_own_step_and_the_usual_one(bench, tmp_path):
    script, chosen = bench("train"), recipe()
    batch = torch.zeros(4, 96, 128, 3, dtype=torch.uint8)
    for step in (script.ours(chosen, tmp_path), script.usual(chosen)):
        step(batch, batch[..., 0].clone())


def test_the_recipe_script_trains_an_arm_and_writes_its_row(bench, shared_competition, tmp_path, monkeypatch):
    script = bench("recipe")
    assert all(Path("notebooks").exists() and script.recipe("", changes) for _, _, changes in script.ARMS.values())
    costs = script.step_costs({"base": recipe(epochs=4)}, rounds=2)
    found = script.train(recipe(epochs=4), shared_competition, tmp_path / "base", 2)
    assert costs["base"] > 0
    assert len(found["dice"]) == len(found["cars"]) == 4
    monkeypatch.setattr(script, "ARM_RESULTS", tmp_path)
    (tmp_path / "base.json").write_text(json.dumps(found | {"cost": 1.0, "steps": 2}))
    assert "| base | AdamW" in script.page(argparse.Namespace(steps=2, scores=None))


def test_the_seed_script_changes_what_an_arm_names(bench):
    script = bench("seed")
    options = argparse.Namespace(height=96, width=96, epochs=1)
    made = {name: script.recipe(changes, options) for name, changes in script.arms(96, 96).items()}
    assert made["as written"].arch == "classic_unet"
    assert (made["crops of 96x192"].height, made["crops of 96x192"].crop_height) == (192, 96)
    assert made["SGD"].optimizer == "sgd"


def test_the_gpu_script_measures_steps_on_any_device(bench, tmp_path):
    script = bench("gpu")
    chosen = script.Recipe.of(RECIPE | {"ema": 0.0})
    found = script._step_speed(chosen, argparse.Namespace(folder=tmp_path), peak=1e12)
    assert found["pictures_per_s"] > 0
    assert found["share_of_peak"] > 0
