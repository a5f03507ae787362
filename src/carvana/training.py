"""Training of one fold: one readable loop on Accelerate, for a CPU or GPUs, that resumes exactly after a kill."""

import io
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from carvana import dataset, metrics, rle
from carvana.files import UserError, atomic, fingerprint, overlapped, progress, write_text
from carvana.grid import Grid
from carvana.losses import loss_named
from carvana.models import Segmenter, load_encoder, save_checkpoint
from carvana.recipe import Recipe, learning_rate, precision

READ_EVERY = 20  # steps between two looks at the losses: a look makes the device wait
SAVE_MINUTES = 5  # what a kill can cost


class Fold:
    """One fold in training: networks, optimiser, position and history; everything that state.pt holds."""

    def __init__(self, recipe: Recipe, pictures: pd.DataFrame, source, folds: pd.DataFrame, fold: int, run_dir: Path):
        """pictures: table of photos.index; source: its pictures and targets, row for row; folds: car, fold."""
        self.recipe, self.pictures, self.source, self.folder = recipe, pictures, source, run_dir / f"fold{fold}"
        if not 0 <= fold <= folds["fold"].max():
            raise UserError(f"fold is {fold}, but the run has the folds 0 to {folds['fold'].max()}.")
        fold_of = pictures["car"].map(folds.set_index("car")["fold"])
        self.train_rows = np.flatnonzero((fold_of != fold) & (fold_of >= 0))
        self.valid_rows = np.flatnonzero(fold_of == fold)
        self.keys = dataset.batches(
            len(self.train_rows), recipe.batch_size, recipe.accumulate, recipe.epochs, recipe.seed
        )
        self.steps_per_epoch = len(self.keys) // recipe.epochs
        self.data = fingerprint(source.key, folds.to_numpy().tolist(), fold)
        if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:  # folds in parallel, one on each GPU
            os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{fold % torch.cuda.device_count()}"
        AcceleratorState._reset_state(reset_partial_state=True)  # a notebook may train again with another precision
        self.accelerator = Accelerator(
            mixed_precision=precision(recipe.amp), gradient_accumulation_steps=recipe.accumulate
        )
        torch.manual_seed(recipe.seed * 1000 + fold)
        model = Segmenter(recipe.network)
        resumes = (self.folder / "state.pt").exists()
        self.weights_note = "Weights: state.pt." if resumes else load_encoder(model, recipe.encoder_weights)
        self.ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        fused = {"fused": True} if recipe.optimizer in ("adam", "adamw", "sgd") else {}
        optimizer = create_optimizer_v2(model, recipe.optimizer, recipe.lr, recipe.weight_decay, **fused)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.ema:
            self.ema.to(self.accelerator.device)
        self.step, self.seconds, self.losses, self.history = 0, 0.0, [], []
        if resumes:
            self._resume()

    @property
    def finished(self) -> bool:
        """Whether every step has been done."""
        return self.step == len(self.keys)

    def lr(self) -> float:
        """Learning rate of the next step; a plateau of two validations halves it."""
        share = learning_rate(self.recipe.schedule, self.step / len(self.keys), self.recipe.warmup)
        if self.recipe.schedule == "plateau":
            share *= 0.5 ** _stalls([row["dice"] for row in self.history])
        return self.recipe.lr * share

    def network(self) -> torch.nn.Module:
        """The network that is scored and saved: the moving average where there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    def validate(self) -> tuple[float, float]:
        """Mean Dice and mean IoU of the fold's own cars at full size."""
        both, predicted, true = np.array(list(overlapped(self._count, self._predict()))).T
        return float(metrics.dice(both, predicted, true).mean()), float(metrics.iou(both, predicted, true).mean())

    def _predict(self):
        network = self.network().eval()
        for first in progress(range(0, len(self.valid_rows), self.recipe.batch_size), "validating", "batches"):
            rows = self.valid_rows[first : first + self.recipe.batch_size]
            batch = torch.from_numpy(np.stack([self.source[row][0] for row in rows])).to(self.accelerator.device)
            with torch.inference_mode(), self.accelerator.autocast():
                logits = network(batch).float().cpu().numpy()
            yield from zip(rows, logits, strict=True)

    def _count(self, row: int, logits: np.ndarray) -> tuple[int, int, int]:
        picture = self.pictures.iloc[row]
        grid = Grid(picture["height"], picture["width"], *logits.shape)
        return metrics.counts(grid.enlarge(logits) > 0, rle.decode(picture["rle"], picture["height"], picture["width"]))

    def record(self) -> None:
        """Validate, add a row to the history, and save: weights, history, then the state that makes them count."""
        started = time.monotonic()
        dice, iou = self.validate()
        self.seconds += time.monotonic() - started
        best = max((row["dice"] for row in self.history), default=-1.0)
        row = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
        row |= {"pictures": self.step * self.recipe.batch_size, "seconds": round(self.seconds, 1), "lr": self.lr()}
        row |= {"loss": float(np.mean(self.losses)) if self.losses else math.nan, "dice": dice, "iou": iou}
        self.history, self.losses = [*self.history, row], []
        state = {name: tensor.cpu() for name, tensor in self.network().state_dict().items()}
        for name in ("last", "best") if dice > best else ("last",):
            save_checkpoint(self.folder / f"{name}.safetensors", state, self.recipe.network, amp=self.recipe.amp, **row)
        write_text(self.folder / "history.csv", pd.DataFrame(self.history).to_csv(index=False))
        self.save()

    def save(self) -> None:
        """Write state.pt, from which alone training goes on."""
        state = {name: getattr(self, name) for name in ("step", "seconds", "losses", "history", "data")}
        state |= {"recipe": asdict(self.recipe), "optimizer": self.optimizer.state_dict()}
        state |= {"model": self.accelerator.unwrap_model(self.model).state_dict(), "random": torch.get_rng_state()}
        if self.ema:
            state |= {"ema": self.ema.module.state_dict()}
        if self.accelerator.scaler:
            state |= {"scaler": self.accelerator.scaler.state_dict()}
        if self.accelerator.device.type == "cuda":
            state |= {"cuda_random": torch.cuda.get_rng_state(self.accelerator.device)}
        buffer = io.BytesIO()  # torch hides the reason of a write that fails
        torch.save(state, buffer)
        with atomic(self.folder / "state.pt") as file:
            file.write(buffer.getbuffer())

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        try:
            state = torch.load(path, self.accelerator.device, weights_only=True)
        except Exception as error:  # a broken file raises one of many
            raise UserError(f"{path} cannot be read. Delete {self.folder} to train this fold anew.") from error
        self._check_same(path, state)
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.device.type == "cuda" and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.accelerator.device)
        for name in ("step", "seconds", "losses", "history"):
            setattr(self, name, state[name])

    def _check_same(self, path: Path, state: dict) -> None:
        wanted = asdict(self.recipe)
        had = state["recipe"]
        changed = [f"{name} ({had.get(name)})" for name in wanted if had.get(name) != wanted[name]]
        changed += ["the pictures, masks or folds"] if state["data"] != self.data else []
        if changed:
            raise UserError(
                f"{path} was trained with another {', '.join(changed)}. "
                f"Choose another run_name, or delete {self.folder} to train this fold anew."
            )


def _stalls(dices: list[float], patience: int = 2) -> int:
    """How often the best Dice was not beaten for `patience` validations in a row."""
    best, waited, stalls = -1.0, 0, 0
    for dice in dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited == patience:
            waited, stalls = 0, stalls + 1
    return stalls


def train(fold: Fold, max_hours: float = 0, workers: int = -1) -> pd.DataFrame:
    """Train `fold` to its end, or until `max_hours` are over; returns the history, a row per validation.

    workers: processes that prepare pictures; -1 takes what suits the device.
    """
    try:
        _train(fold, max_hours, workers)
    except torch.OutOfMemoryError as error:
        advice = "Lower batch_size and raise accumulate by as much, or lower height and width."
        raise UserError(f"The device is out of memory. {advice}") from error
    return pd.DataFrame(fold.history)


def _train(fold: Fold, max_hours: float, workers: int) -> None:
    recipe, accelerator, device = fold.recipe, fold.accelerator, fold.accelerator.device
    loss_of, pending, began = loss_named(recipe.loss), [], time.monotonic()
    if not fold.history:
        fold.record()  # the untrained network
    saved = clock = time.monotonic()
    for pictures, targets, rows in _bar(fold, _loader(fold, workers)):
        fold.model.train()
        for group in fold.optimizer.param_groups:
            group["lr"] = fold.lr()
        with accelerator.accumulate(fold.model):
            pictures, targets = pictures.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if fold.step < recipe.half_size * len(fold.keys):
                pictures, targets = dataset.halved(pictures, targets)
            loss = loss_of(fold.model(pictures), targets.float() / 255)
            accelerator.backward(loss)
            if recipe.clip_norm and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(fold.model.parameters(), recipe.clip_norm)
            fold.optimizer.step()
            fold.optimizer.zero_grad()
        fold.step += 1
        if fold.ema and accelerator.sync_gradients:
            fold.ema.update(accelerator.unwrap_model(fold.model), step=fold.step)
        pending.append((loss.detach(), rows))
        time_is_up = 0 < max_hours * 3600 < time.monotonic() - began
        save_is_due = time_is_up or time.monotonic() - saved > SAVE_MINUTES * 60
        save_is_due &= accelerator.sync_gradients  # gradients under way are not saved
        epoch_ends = fold.step % fold.steps_per_epoch == 0
        if len(pending) == READ_EVERY or save_is_due or epoch_ends:
            _read_losses(fold, pending)
            pending = []
            fold.seconds, clock = fold.seconds + time.monotonic() - clock, time.monotonic()
        epoch = fold.step // fold.steps_per_epoch
        if epoch_ends and (epoch % recipe.validate_every == 0 or fold.finished):
            fold.record()
            saved = clock = time.monotonic()
        elif save_is_due:
            fold.save()
            saved = time.monotonic()
        if time_is_up and save_is_due and not fold.finished:
            return


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
    size = fold.recipe.batch_size
    with progress(None, f"training {fold.folder.name}", total=len(fold.keys) * size, initial=fold.step * size) as bar:
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
