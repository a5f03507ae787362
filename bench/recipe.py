"""Arms of the recipe at equal cost: what each change does to the Dice of unseen cars, with its paired interval.

Every arm trains fold 0 of 2 for the time that `--steps` steps of `base` take on a CPU. That time is counted in steps,
through the arms' costs of a step measured side by side, so a busy machine does not change a result. The costs are kept
in results/recipe/SIZE_STEPS/costs.json, so that the training itself can be done on any device. Seeds change weights,
order and augmentation; the folds are the same.

python bench/recipe.py --data ../carvana512 --encoder-weights lite0.safetensors base adamw
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from common import RESULTS, machine, recipe_of, tame_allocator, trainer_in
from torch import nn

from carvana.data import Competition
from carvana.device import precision
from carvana.files import write_text
from carvana.metrics import dice, error_shares, mean_over_cars
from carvana.models import ModelConfig, SegmentationModel, build_network
from carvana.run import Run
from carvana.training.launch import train
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe, size_at
from carvana.training.state import optimizer_of

# What all arms share, whatever the profile has learnt from them since.
SHARED = {
    "encoder": "tu-tf_efficientnet_lite0", "decoder_channels": "128,64,32,16,8", "start_size": 0.5, "batch_size": 4,
    "lr": 4e-3, "optimizer": "nmuon", "epochs": 100, "validate_every": 100,
}  # fmt: skip
SEEDS = 1, 2
WHERE = "## Where the lost Dice sits"
ARM_RESULTS = RESULTS / "recipe"  # a folder for every size and number of steps, in it a file for every arm and seed
# name: (what differs from base, the recipe's changes)
ARMS = {
    "base": ("Muon with lr 0.004, batch 4, from half the size growing, mirrored, brightness and contrast by 20 %", {}),
    "adamw": ("AdamW with lr 0.002 in the place of Muon", {"optimizer": "adamw", "lr": 2e-3}),
    "lr2": ("lr 0.002", {"lr": 2e-3}),
    "lr8": ("lr 0.008", {"lr": 8e-3}),
    "batch2": ("batch 2", {"batch_size": 2}),
    "batch8": ("batch 8", {"batch_size": 8}),
    "full": ("the whole size from the first step", {"start_size": 1.0}),
    "plain": ("no change of brightness and contrast", {"brightness": 0.0, "contrast": 0.0}),
    "colour": ("hue turned by 5 %, saturation by 20 %", {"hue": 0.05, "saturation": 0.2}),
    "affine": ("scaled by 10 %, shifted by 5 %", {"scale": 0.1, "shift": 0.05}),
    "boundary": ("pixels at the edge count 5 times", {"loss": "boundary"}),
    "wide": ("decoder twice as wide", {"decoder_channels": "256,128,64,32,16"}),
    "dilated": ("U-Net with a dilated bottleneck", {}),
    "unetplusplus": ("U-Net++, the same widths", {"arch": "unetplusplus"}),
    "fpn": ("FPN, its own widths", {"arch": "fpn", "decoder_channels": ""}),
    "segformer": ("the decoder of SegFormer, its own widths", {"arch": "segformer", "decoder_channels": ""}),
    "upernet": ("UPerNet, its own widths", {"arch": "upernet", "decoder_channels": ""}),
}


class DilatedBottleneck(nn.Module):
    """(B, C, h, w) -> the same: the features, and what convolutions dilated by 1, 2, 4 and 8 in a row add to them."""

    def __init__(self, channels: int):
        super().__init__()
        layers = (
            [nn.Conv2d(channels, channels, 3, padding=n, dilation=n), nn.ReLU(inplace=True)] for n in (1, 2, 4, 8)
        )
        self.layers = nn.ModuleList(nn.Sequential(*layer) for layer in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x
        for layer in self.layers:
            x = layer(x)
            total = total + x
        return total


def dilated(config: ModelConfig) -> nn.Module:
    """The network of a recipe with a dilated bottleneck."""
    network = build_network(config)
    network.decoder.center = DilatedBottleneck(network.encoder.out_channels[-1])
    return network


def network_of(arm: str):
    """Within it, networks are those of the arm."""
    return patch("carvana.models.build_network", dilated) if arm == "dilated" else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder-weights", required=True)
    parser.add_argument("--size", type=int, default=512, help="of the network, height and width")
    parser.add_argument("--steps", type=int, default=600, help="of base: default, 2400 images, a quarter of cpu's")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--scores", type=Path, help="scores.csv of a finished run, to say where its lost Dice sits")
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)}; none: write the table anew")
    options = parser.parse_args()
    tame_allocator()
    train_arms(options, ARM_RESULTS / f"{options.size}_{options.steps}")
    path = RESULTS / "recipe.md"
    loss = where(options.scores) if options.scores else "".join(path.read_text().partition(WHERE)[1:])
    write_text(path, page(loss))


def train_arms(options: argparse.Namespace, results: Path) -> None:
    """Train the arms that are not done yet, each into a file of `results`."""
    names = list(dict.fromkeys(["base", *options.arms]))
    recipes = {name: recipe_of_arm(name, options) for name in names}
    costs = kept_costs(results / "costs.json", recipes)
    for seed, name in product(options.seeds, options.arms):
        path, recipe = results / f"{name}_{seed}.json", replace(recipes[name], seed=seed)
        facts = asdict(recipe) | {"encoder_weights": Path(recipe.encoder_weights).name}
        cost = costs[name] / costs["base"]
        arm = {"machine": machine(), "cost": cost, "steps": round(options.steps / cost)}
        done = json.loads(path.read_text()) if path.exists() else {}
        if done and (done["recipe"], done["steps"]) == (facts, arm["steps"]):
            continue  # by an earlier call
        with network_of(name):
            folder = options.folder / f"{options.size}_{options.steps}_{name}_{seed}"
            arm |= train_for(recipe, options.data, folder, arm["steps"]) | {"recipe": facts}
        write_text(path, json.dumps(arm) + "\n")
        print(f"{name}, seed {seed}: {arm['steps']} steps, Dice {np.mean(arm['dice']):.6f}", flush=True)


def page(loss: str = "") -> str:
    """The tables of all arms that are done, and what was not measured; loss: the section WHERE."""
    folders = sorted(ARM_RESULTS.iterdir(), reverse=True)
    return f"""# What pays in a short training

Each arm trains fold 0 of 2 for the time that the steps of `base` take on a CPU, and is scored on 400 images of 50 cars
that its network has not seen, at the images' own 512x512, without tta. The difference is averaged over the seeds that
the arm and `base` both have on the same machine. The interval is paired over cars; it leaves out the variation between
seeds. The cost of a step is relative to `base`, measured side by side in one run.

Command: `.venv/bin/python bench/recipe.py --data FOLDER --encoder-weights FILE --size N --steps N ARM ...`.

{chr(10).join(map(section, folders))}
So short a training sees each of its 800 images one to six times. What only a long one can repay, such as more
augmentation, is at a disadvantage here.

Post-processing is left out because it does nothing here: on 240 images of 15 unseen cars at 1918x1280, with masks of
Dice 0.9940, dropping blobs changed it by +0.000001 to +0.000003, filling holes by -0.000002 to +0.000003, closing and
opening by 5 pixels by -0.000003 and -0.000002, as many images losing as gaining.

Version 0.2.0 compared Muon, AdamW, learning rates and batches at 384x384: [recipe_0.2.0.md](recipe_0.2.0.md).

Not measured: other encoders, label exclusion.

{loss}"""


def section(folder: Path) -> str:
    """The arms of one size and number of steps, one table for all machines."""
    size, steps = folder.name.split("_")
    costs = json.loads((folder / "costs.json").read_text())
    arms = {
        name: {seed: json.loads(path.read_text()) for seed in SEEDS for path in folder.glob(f"{name}_{seed}.json")}
        for name in ARMS
    }
    machines = sorted({arm["machine"] for of_arm in arms.values() for arm in of_arm.values()})
    return f"""## {size}x{size}, {steps} steps of base

Costs measured on: {costs["machine"]}. Trained on: {"; ".join(machines)}.

{chr(10).join(table(arms))}
{unfair(arms, costs["seconds"], int(steps))}"""


def unfair(arms: dict[str, dict[int, dict]], seconds: dict[str, float], steps: int) -> str:
    """Which arms were trained for an earlier measure of their costs, and the steps that today's would give them."""
    trained = [name for name, of_arm in arms.items() if of_arm and name in seconds]
    fair = {name: round(steps * seconds["base"] / seconds[name]) for name in trained}
    told = [f"{name} ({n})" for name, n in fair.items() if next(iter(arms[name].values()))["steps"] != n]
    return f"\nBy costs that were measured later, fair steps would be: {', '.join(told)}.\n" if told else ""


def table(arms: dict[str, dict[int, dict]]) -> list[str]:
    """A row an arm that is done, compared with base over the seeds that both have; `arms`: results by arm and seed."""
    seeds = " | ".join(f"Dice, seed {seed}" for seed in SEEDS)
    lines = [f"| arm | change | steps | a step costs | {seeds} | difference | 95 % interval |"]
    lines.append("|---" * (6 + len(SEEDS)) + "|")
    for name, of_arm in arms.items():
        if not of_arm:
            continue
        arm = next(iter(of_arm.values()))
        cells = [name, ARMS[name][0], f"{arm['steps']}", f"{arm['cost']:.2f}"]
        cells += [f"{np.mean(of_arm[seed]['dice']):.6f}" if seed in of_arm else "" for seed in SEEDS]
        pairs = [(of_arm[seed], base) for seed, base in arms["base"].items() if seed in of_arm and name != "base"]
        gains = [np.subtract(one["dice"], base["dice"]) for one, base in pairs if one["machine"] == base["machine"]]
        gain, low, high = mean_over_cars(np.mean(gains, 0), arm["cars"]) if gains else (0.0, 0.0, 0.0)
        cells += [f"{gain:+.6f}", f"{low:+.6f} to {high:+.6f}"] if gains else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [name for name, of_arm in arms.items() if not of_arm]
    return [*lines, "", f"Not measured: the arms {', '.join(missing)}."] if missing else lines


def where(path: Path) -> str:
    """Where the Dice that a finished run still loses sits."""
    scores = pd.read_csv(path, dtype={"car": str})
    parts = error_shares(scores)
    share = parts["share"]
    views = scores.groupby("view")["dice"].mean()
    worst = scores["dice"] <= scores["dice"].quantile(0.05)
    lost = (1 - scores.loc[worst, "dice"]).sum() / (1 - scores["dice"]).sum()
    return f"""{WHERE}

Of a finished run of profiles/cpu.yaml, Dice {scores["dice"].mean():.6f} out of fold on {len(scores)} images: of
{parts["pixels"].sum():.0f} wrong pixels an image {share["edge_1"]:.0%} touch the true edge, {share["edge_3"]:.0%} more
are within 3 pixels, {share["edge_10"]:.0%} within 10, {share["missed"]:.1%} are missed parts (antennas, spoilers) and
{share["extra"]:.1%} are background taken for car. The worst view is {views.idxmin()} ({views.min():.6f}), the best
{views.idxmax()} ({views.max():.6f}). The worst twentieth of the images holds {lost:.0%} of the loss.
"""


def recipe_of_arm(name: str, options: argparse.Namespace) -> Recipe:
    size = {"height": options.size, "width": options.size, "encoder_weights": options.encoder_weights}
    return recipe_of(**SHARED | size | ARMS[name][1])


def kept_costs(path: Path, recipes: dict[str, Recipe]) -> dict[str, float]:
    """The cost of a step of the arms on a CPU, in seconds: as `path` has it, or measured and written there."""
    kept = json.loads(path.read_text())["seconds"] if path.exists() else {}
    if set(recipes) <= set(kept):
        return kept
    seconds = step_costs(recipes)
    write_text(path, json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")
    print(pd.Series(seconds).round(3).to_string(), flush=True)
    return seconds


def step_costs(recipes: dict[str, Recipe], rounds: int = 8) -> dict[str, float]:
    """Seconds of an arm's mean step: steps at the whole and at half the size are timed, the arms taking turns.

    In between they go straight with the pixels; an optimiser's part stays. Arms that compute the same, whatever their
    learning rate and augmentation, share one measurement. A step goes untimed before each: so many networks in turn
    push each other's kernels out of oneDNN's cache, which training never does.
    """
    kinds = {
        name: (name == "dilated", r.model_config, r.optimizer, r.batch_size, r.loss) for name, r in recipes.items()
    }
    steps, seconds = {}, defaultdict(list)
    for name, kind in kinds.items():
        if kind not in steps:
            with network_of(name):
                steps[kind] = stepper(recipes[name])
    for _, (kind, step), part in product(range(rounds), steps.items(), (1, 2)):
        step(part)
        began = time.perf_counter()
        step(part)
        seconds[kind, part].append(time.perf_counter() - began)
    whole, small = ({kind: float(np.median(seconds[kind, part])) for kind in steps} for part in (1, 2))
    shares = {name: (pixels(recipe) - 1 / 4) / (3 / 4) for name, recipe in recipes.items()}
    return {name: small[kind] + (whole[kind] - small[kind]) * shares[name] for name, kind in kinds.items()}


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

    def step(part: int) -> None:
        height, width = recipe.height // part, recipe.width // part
        with torch.autocast("cpu", torch.bfloat16, enabled=precision("auto") == "bf16"):
            logits = model(images[:, :height, :width])
        loss_of(logits, targets[:, :height, :width]).backward()
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
