"""Arms of the recipe at equal cost: what each change does to the Dice of unseen cars, with its paired interval.

Every arm trains fold 0 of 2 for the time that `--steps` steps of the first arm take. That time is counted in steps,
through the arms' costs of a step measured side by side in the same run, so a busy machine does not change a result.
Seeds change weights, order and augmentation; the folds are the same.

python bench/recipe.py --data ../carvana512 --encoder-weights lite0.safetensors --steps 300 base adamw
"""

import argparse
import json
import shutil
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, machine, recipe_of, tame_allocator, trainer_in

from carvana.data import Competition
from carvana.device import precision
from carvana.files import write_text
from carvana.metrics import dice, error_shares, mean_over_cars
from carvana.models import SegmentationModel
from carvana.run import Run
from carvana.training.launch import train
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe, size_at
from carvana.training.state import optimizer_of

# What all arms share, whatever the profile has learnt from them since: profiles/cpu.yaml at half its size.
SHARED = {
    "encoder": "tu-tf_efficientnet_lite0", "decoder_channels": "128,64,32,16,8", "height": 256, "width": 256,
    "batch_size": 4, "lr": 4e-3, "optimizer": "nmuon", "epochs": 100, "validate_every": 100,
}  # fmt: skip
SEEDS = 1, 2
ARM_RESULTS = RESULTS / "recipe"  # a file for every arm and seed
# name: (what differs from base, the recipe's changes)
ARMS = {
    "base": ("Muon with lr 0.004, batch 4, 256x256, mirrored, brightness and contrast by 20 %", {}),
    "adamw": ("AdamW with lr 0.002 in the place of Muon", {"optimizer": "adamw", "lr": 2e-3}),
    "lr2": ("lr 0.002", {"lr": 2e-3}),
    "batch8": ("batch 8", {"batch_size": 8}),
    "growing": ("128x128 growing to 256x256", {"start_size": 0.5}),
    "plain": ("no change of brightness and contrast", {"brightness": 0.0, "contrast": 0.0}),
    "colour": ("hue turned by 5 %, saturation by 20 %", {"hue": 0.05, "saturation": 0.2}),
    "affine": ("scaled by 10 %, shifted by 5 %", {"scale": 0.1, "shift": 0.05}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder-weights", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--scores", type=Path, help="scores.csv of a finished run, to say where its lost Dice sits")
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)}; none: write the table anew")
    options = parser.parse_args()
    tame_allocator()
    train_arms(options)
    write_text(RESULTS / "recipe.md", page(options))


def train_arms(options: argparse.Namespace) -> None:
    """Train the arms that are not done yet."""
    recipes = {name: recipe_of_arm(name, options.encoder_weights) for name in options.arms}
    costs = step_costs(recipes)
    print(pd.Series(costs).round(3).to_string(), flush=True)
    for seed, (name, arm_recipe) in product(SEEDS, recipes.items()):
        path, recipe = ARM_RESULTS / f"{name}_{seed}.json", replace(arm_recipe, seed=seed)
        facts = asdict(recipe) | {"encoder_weights": Path(recipe.encoder_weights).name}
        if path.exists() and json.loads(path.read_text())["recipe"] == facts:
            continue  # done by an earlier call
        cost = costs[name] / costs[options.arms[0]]
        arm = {"machine": machine(), "cost": cost, "steps": round(options.steps / cost)}
        arm |= train_for(recipe, options.data, options.folder / name, arm["steps"]) | {"recipe": facts}
        write_text(path, json.dumps(arm) + "\n")
        print(f"{name}, seed {seed}: {arm['steps']} steps, Dice {np.mean(arm['dice']):.6f}", flush=True)


def page(options: argparse.Namespace) -> str:
    """The table of all arms that are done, and what was not measured."""
    return f"""# What pays in a short training

Each arm trains fold 0 of 2 for what {options.steps} steps of `base` cost, and is scored on 400 images of 50 cars that
it has not seen, at 512x512, without tta. Difference and interval are of the mean over seeds, paired over
cars. The cost of a step is relative to `base`, measured side by side in one run.

Machine: {machine()}.
Command: `python bench/recipe.py --data FOLDER --encoder-weights FILE --steps {options.steps} ARM ...`.

{chr(10).join(table())}

So short a training sees each of its images once or twice. What only a long one can repay, such as more augmentation,
is at a disadvantage here.

Post-processing is left out because it does nothing here: on 240 images of 15 unseen cars at 1918x1280, with masks of
Dice 0.9940, dropping blobs changed it by +0.000001 to +0.000003, filling holes by -0.000002 to +0.000003, closing and
opening by 5 pixels by -0.000003 and -0.000002, as many images losing as gaining.

Not measured: other encoders and 640x960 (a GPU is needed), the decoder's width, label exclusion.
{where(options.scores) if options.scores else ""}"""


def table() -> list[str]:
    """A row an arm of which every seed is done, compared with base."""
    seeds = " | ".join(f"Dice, seed {seed}" for seed in SEEDS)
    lines = [f"| arm | change | steps | a step costs | {seeds} | difference | 95 % interval |"]
    lines.append("|---" * (6 + len(SEEDS)) + "|")
    paths = {name: [ARM_RESULTS / f"{name}_{seed}.json" for seed in SEEDS] for name in ARMS}
    done = {
        name: [json.loads(p.read_text()) for p in of_arm]
        for name, of_arm in paths.items()
        if all(map(Path.exists, of_arm))
    }
    dices = {name: np.array([arm["dice"] for arm in arms]) for name, arms in done.items()}
    for name, (arm, *_) in done.items():
        cells = [name, ARMS[name][0], f"{arm['steps']}", f"{arm['cost']:.2f}"]
        cells += [f"{dice:.6f}" for dice in dices[name].mean(1)]
        if name != "base" and "base" in done:
            gain, low, high = mean_over_cars((dices[name] - dices["base"]).mean(0), arm["cars"])
            cells += [f"{gain:+.6f}", f"{low:+.6f} to {high:+.6f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def where(path: Path) -> str:
    """Where the Dice that a finished run still loses sits."""
    scores = pd.read_csv(path, dtype={"car": str})
    parts = error_shares(scores)
    share = parts["share"]
    views = scores.groupby("view")["dice"].mean()
    worst = scores["dice"] <= scores["dice"].quantile(0.05)
    lost = (1 - scores.loc[worst, "dice"]).sum() / (1 - scores["dice"]).sum()
    return f"""
## Where the lost Dice sits

Of a finished run of profiles/cpu.yaml, Dice {scores["dice"].mean():.6f} out of fold on {len(scores)} images: of
{parts["pixels"].sum():.0f} wrong pixels an image {share["edge_1"]:.0%} touch the true edge, {share["edge_3"]:.0%} more
are within 3 pixels, {share["edge_10"]:.0%} within 10, {share["missed"]:.1%} are missed parts (antennas, spoilers) and
{share["extra"]:.1%} are background taken for car. The worst view is {views.idxmin()} ({views.min():.6f}), the best
{views.idxmax()} ({views.max():.6f}). The worst twentieth of the images holds {lost:.0%} of the loss.
"""


def recipe_of_arm(name: str, weights: str) -> Recipe:
    return recipe_of(**SHARED | {"encoder_weights": weights} | ARMS[name][1])


def step_costs(recipes: dict[str, Recipe], rounds: int = 4) -> dict[str, float]:
    """Seconds of an arm's middle step, smaller ones counted by their pixels; the arms take turns."""
    steps = {name: stepper(recipe) for name, recipe in recipes.items()}
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds[name][1:])) * pixels(recipe) for name, recipe in recipes.items()}


def pixels(recipe: Recipe) -> float:
    """Mean share of the full size's pixels in a step."""
    full = recipe.height, recipe.width
    sizes = [size_at(full, recipe.start_size, done) for done in np.linspace(0, 1, 200, endpoint=False)]
    return float(np.mean([height * width for height, width in sizes])) / (full[0] * full[1])


def stepper(recipe: Recipe):
    model, loss_of = SegmentationModel(recipe.model_config).train(), loss_named(recipe.loss)
    optimizer = optimizer_of(model, recipe)
    images = torch.zeros(recipe.batch_size, recipe.height, recipe.width, 3, dtype=torch.uint8)
    targets = torch.rand(images.shape[:3])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision("auto") == "bf16"):
            logits = model(images)
        loss_of(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_for(recipe: Recipe, data: Path, folder: Path, steps: int) -> dict:
    """Train fold 0 for `steps` steps; score half the views of its unseen cars."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer = trainer_in(Run(folder.parent, folder.name), Competition(data), recipe)
    state, rows = trainer.state, trainer.valid_rows[::2]
    trainer.batch_keys, state.total_steps, trainer.valid_rows = trainer.batch_keys[:steps], steps, rows
    state.history, trainer.best_exists = [{"dice": 0.0}], True  # else the untrained network is scored, half a minute
    began = time.monotonic()
    train(trainer)
    seconds = time.monotonic() - began
    dices = dice(trainer.validator.pixel_counts(state.network, rows)).round(6).tolist()
    cars = trainer.samples["car"].iloc[rows].tolist()
    return {"seconds": seconds, "cars": cars, "dice": dices}


if __name__ == "__main__":
    main()
