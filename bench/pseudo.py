"""What soft masks of test images add: fold 0 of 2 trained without them, then with them, in equally many steps.

The first network is the teacher of the second: neither has seen the cars of the fold that both are scored on.

python bench/pseudo.py --data ../carvana512 --full ../carvana --encoder-weights lite0.safetensors
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from common import RESULTS, machine, recipe_of, tame_allocator, trainer_in

from carvana.data import Competition
from carvana.data.dataset import DecodedSamples, cached
from carvana.files import write_text
from carvana.inference import Ensemble, EnsembleSpec, Options, predict_run_lengths
from carvana.inference.predict import keep_soft_masks, surest
from carvana.metrics import dice, mean_over_cars
from carvana.run import Run
from carvana.training import Trainer
from carvana.training.launch import train
from carvana.training.validation import Validator

SHARE = 0.5  # of the test images, those with the surest edges
FOLD, OTHER = "unseen cars of the fold", "cars at full size"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="competition to train on")
    parser.add_argument("--full", type=Path, required=True, help="competition with test images, and others to score on")
    parser.add_argument("--encoder-weights", required=True)
    parser.add_argument("--size", type=int, default=256, help="of the network, height and width")
    parser.add_argument("--epochs", type=int, default=4, help="without soft masks; half as many with them")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_pseudo"))
    options = parser.parse_args()
    tame_allocator()
    scores = {seed: measure(seed, options) for seed in options.seeds}
    write_text(RESULTS / "pseudo.md", page(scores, options))


def measure(seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """A row an image: where, car, and the Dice without and with soft masks."""
    changes = {"height": options.size, "width": options.size, "encoder_weights": options.encoder_weights, "seed": seed}
    teacher, student = f"without{seed}", f"with{seed}"
    competition, tables = Competition(options.data), {}
    for name, epochs, labels in ((teacher, options.epochs, ""), (student, options.epochs // 2, teacher)):
        recipe = recipe_of("profiles/cpu.yaml", **changes, epochs=epochs, validate_every=epochs, pseudo_labels=labels)
        trainer = trainer_in(Run(options.folder, name), competition, recipe)
        train(trainer)
        if not labels:
            keep(trainer.run, options)
        tables[name] = dices(trainer, options)
        print(name, tables[name].groupby("where")["dice"].mean().round(6).to_dict(), flush=True)
    return tables[teacher].rename(columns={"dice": "without"}).assign(**{"with": tables[student]["dice"]})


def keep(run: Run, options: argparse.Namespace) -> None:
    """The surest soft masks of the test images, by the network of the run's fold 0."""
    test = Competition(options.full).test(options.full / "test")
    ensemble = Ensemble(EnsembleSpec.equal([run.checkpoint(0)], ["none", "hflip"]))
    labels = surest(predict_run_lengths(ensemble, test, run.shards_dir), SHARE)
    labels = labels.assign(test_dir=str((options.full / "test").resolve()))
    keep_soft_masks(ensemble, test.images, labels, run.pseudo_path, Options())


def dices(trainer: Trainer, options: argparse.Namespace) -> pd.DataFrame:
    """Dice of the network on its fold's cars and on those of the other competition."""
    other, recipe, tables = Competition(options.full), trainer.recipe, []
    decoded = DecodedSamples(other.train_images, other.samples, recipe.height, recipe.width)
    source = cached(decoded, trainer.run.cache_dir)
    at_full_size = Validator(other.samples, source, recipe.batch_size, trainer.state.accelerator)
    everything = np.arange(len(other.samples))
    for where, validator, rows in ((FOLD, trainer.validator, trainer.valid_rows), (OTHER, at_full_size, everything)):
        scores = dice(validator.pixel_counts(trainer.state.network, rows))
        cars = validator.samples["car"].iloc[rows].to_numpy()
        tables.append(pd.DataFrame({"where": where, "car": cars, "dice": scores}))
    return pd.concat(tables, ignore_index=True)


def page(scores: dict[int, pd.DataFrame], options: argparse.Namespace) -> str:
    lines = ["| scored on | seed | without | with | difference | 95 % interval |", "|---|---|---|---|---|---|"]
    for where in (FOLD, OTHER):
        tables = {seed: table[table["where"] == where] for seed, table in scores.items()}
        rows = {str(seed): (table["without"], table["with"], table["car"]) for seed, table in tables.items()}
        without, with_ = (np.mean([table[name] for table in tables.values()], axis=0) for name in ("without", "with"))
        rows |= {"mean": (without, with_, next(iter(tables.values()))["car"])} if len(tables) > 1 else {}
        for seed, (before, after, cars) in rows.items():
            gain, low, high = mean_over_cars(after - before, cars)
            shown = f"{before.mean():.6f} | {after.mean():.6f} | {gain:+.6f} | {low:+.6f} to {high:+.6f}"
            lines.append(f"| {where} | {seed} | {shown} |")
    sizes = f"--size {options.size} --epochs {options.epochs} --seeds {' '.join(map(str, scores))}"
    return f"""# What soft masks of test images add

Fold 0 of 2 at {options.size}x{options.size} by the recipe of `profiles/cpu.yaml` in {options.epochs} epochs, then
anew in as many steps, in which half of each batch are soft masks of test images that the first network has predicted:
the {SHARE:.0%} with the surest edges. Neither network has seen the cars that they are scored on. Intervals are paired,
over cars; they do not hold the spread between seeds.

Machine: {machine()}.
Command: `.venv/bin/python bench/pseudo.py --data FOLDER --full FOLDER --encoder-weights FILE {sizes}`.

{chr(10).join(lines)}
"""


if __name__ == "__main__":
    main()
