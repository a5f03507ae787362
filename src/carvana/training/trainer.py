"""Training of one fold: one readable loop on Accelerate, for a CPU or GPUs, that goes on exactly after a kill.

`python -m carvana.training.trainer` is one of the processes that share a fold; `train` starts them.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader

from carvana.data import competition as photos
from carvana.data import dataset
from carvana.data.folds import read_folds
from carvana.files import UserError, given, progress, read_json, resolve
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe, size_at
from carvana.training.state import Fold

READ_EVERY = 20  # steps between two looks at the losses: a look makes the device wait
SAVE_MINUTES = 5  # what a kill can cost


def train(
    fold: Fold, max_hours: float = 0, workers: int = -1, watch: Callable[[], None] = lambda: None
) -> pd.DataFrame:  # fmt: skip
    """Train `fold` to its end, or until `max_hours` are over; returns the history, a row per validation.

    workers: processes that prepare pictures; -1 takes what suits the device. watch: called whenever the fold's folder
    may hold more to look at; what it takes, the training waits.
    """
    try:
        if fold.processes > 1 and "LOCAL_RANK" not in os.environ:  # which those that are launched have
            _launch(fold, max_hours, workers, watch)
        else:
            _train(fold, max_hours, workers, watch)
    except torch.OutOfMemoryError as error:
        advice = "Lower batch_size and raise accumulate by as much, or lower height and width."
        raise UserError(f"The device is out of memory. {advice}") from error
    return pd.DataFrame(fold.history)


def _train(fold: Fold, max_hours: float, workers: int, watch: Callable[[], None]) -> None:
    loss_of, pending, began = loss_named(fold.recipe.loss), [], time.monotonic()
    if not fold.history:  # the untrained network
        fold.look()
        fold.record()
    saved = clock = time.monotonic()
    for pictures, targets, rows in _bar(fold, _loader(fold, workers)):
        pending.append((_step(fold, loss_of, pictures, targets), rows))
        epoch, within_epoch = divmod(fold.step, fold.steps_per_epoch)
        time_is_up = save_is_due = False
        if fold.accelerator.sync_gradients and (fold.processes == 1 or fold.step % READ_EVERY == 0):
            now = time.monotonic()
            time_is_up, save_is_due = fold.agree(0 < max_hours * 3600 < now - began, now - saved > SAVE_MINUTES * 60)
        if len(pending) == READ_EVERY or time_is_up or save_is_due or not within_epoch:
            _read_losses(fold, pending)
            pending = []
            fold.seconds, clock = fold.seconds + time.monotonic() - clock, time.monotonic()
        if not within_epoch:
            fold.look()
        if not within_epoch and (epoch % fold.recipe.validate_every == 0 or fold.finished):
            fold.record()
            saved = clock = time.monotonic()
        elif time_is_up or save_is_due:
            fold.save()
            saved = time.monotonic()
        if not within_epoch:
            watch()
        if time_is_up:
            return


def _step(fold: Fold, loss_of: Callable, pictures: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Learn from a batch; returns its loss, which stays on the device so that nothing waits for it."""
    recipe, accelerator, device = fold.recipe, fold.accelerator, fold.accelerator.device
    fold.model.train()
    for group in fold.optimizer.param_groups:
        group["lr"] = fold.lr()
    with accelerator.accumulate(fold.model):
        pictures, targets = pictures.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        size = size_at(pictures.shape[1:3], recipe.start_size, fold.step / len(fold.keys))
        if size != pictures.shape[1:3]:
            pictures, targets = dataset.resized(pictures, targets, size)
        loss = loss_of(fold.model(pictures), targets.float() / 255)
        accelerator.backward(loss)
        if recipe.clip_norm and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(fold.model.parameters(), recipe.clip_norm)
        fold.optimizer.step()
        fold.optimizer.zero_grad()
    fold.step += 1
    if fold.ema and accelerator.sync_gradients:
        fold.ema.update(accelerator.unwrap_model(fold.model), step=fold.step)
    return loss.detach()


def _loader(fold: Fold, workers: int) -> DataLoader:
    """All batches that are left, in one loader, so that its workers run on while the fold is validated."""
    recipe, on_gpu = fold.recipe, fold.accelerator.device.type == "cuda"
    if workers < 0:
        workers = min(8, os.cpu_count()) if on_gpu else 0  # on a CPU the network needs every core
    augment = dataset.augmentation(
        recipe.hflip, recipe.crop_height, recipe.crop_width, recipe.brightness, recipe.contrast,
        recipe.scale, recipe.shift, recipe.rotate,
    )  # fmt: skip
    return DataLoader(
        dataset.TrainingPictures(fold.source, fold.train_rows, augment, recipe.seed),
        batch_sampler=fold.keys[fold.step :],
        num_workers=workers,
        pin_memory=on_gpu,
        generator=torch.Generator().manual_seed(recipe.seed),  # so that the global random state is left alone
    )


def _bar(fold: Fold, loader: DataLoader):
    """The loader under a progress bar that counts pictures."""
    size = fold.recipe.batch_size * fold.processes
    options = {"total": len(fold.keys) * size, "initial": fold.step * size, "disable": fold.rank > 0}
    with progress(None, f"training {fold.folder.name}", **options) as bar:
        for batch in loader:
            yield batch
            bar.set_postfix_str(f"loss {fold.losses[-1]:.4f}" if fold.losses else "", refresh=False)
            bar.update(size)


def _read_losses(fold: Fold, pending: list) -> None:
    """Move losses from the device to the fold; one that is not finite ends the training with its pictures' names."""
    values = torch.stack([loss for loss, _ in pending]).tolist()
    for i, (value, (_, rows)) in enumerate(zip(values, pending, strict=True)):
        if not math.isfinite(value):
            step = fold.step - len(pending) + i + 1
            names = ", ".join(fold.pictures["img"].iloc[rows.tolist()])
            raise UserError(f"The loss of step {step} is {value}, in the batch {names}. Lower lr, or set amp to no.")
    fold.losses += values


def _launch(fold: Fold, max_hours: float, workers: int, watch: Callable[[], None]) -> None:
    """Train with `accelerate launch`, whose processes read the recipe in run.json, then take up their state."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(fold.processes), "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "carvana.training.trainer", str(fold.run_dir), str(fold.number)]
    command += ["--max-hours", str(max_hours), "--workers", str(workers)]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_TORCH_DEVICE"}
    reason = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stderr:
                reason = reason or line.startswith("carvana: ") and line.removeprefix("carvana: ").strip()
                if not reason:  # what follows is the launcher's own traceback
                    print(line, end="", file=sys.stderr)
                watch()
        finally:
            process.terminate()
    if process.returncode:
        raise UserError(reason or f"The processes of {fold.folder} were killed. Lower batch_size, then workers.")
    fold.resume()


def main(arguments: list[str] | None = None) -> int:
    """Train a fold of a run that 03_train began, as one of the processes that share it; 0 when done."""
    parser = argparse.ArgumentParser("carvana.training.trainer", description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("fold", type=int)
    parser.add_argument("--max-hours", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=-1)
    options = parser.parse_args(arguments)
    known = read_json(options.run_dir / "run.json")["parameters"]
    try:
        recipe, data, hq = Recipe.of(known), resolve(known["data_dir"]), known["hq"]
        pictures = photos.index(data, hq, given(known["exclude"]))
        decoded = dataset.Decoded(photos.photographs(data, "train", hq), pictures, recipe.height, recipe.width)
        source = dataset.cached(decoded, options.run_dir.parent / "cache")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        dealt = read_folds(options.run_dir)
        fold = Fold(recipe, pictures, source, dealt, options.fold, options.run_dir, processes)
        train(fold, options.max_hours, options.workers)
    except UserError as error:
        print(f"carvana: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
