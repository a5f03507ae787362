"""A fold in training: networks, optimiser, position and history, scored at full size, saved and resumed exactly."""

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
from accelerate.utils import broadcast_object_list
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from carvana import metrics, rle
from carvana.data import dataset
from carvana.files import UserError, atomic, fingerprint, overlapped, progress, write_text
from carvana.grid import Grid
from carvana.models import Segmenter, load_encoder, save_checkpoint
from carvana.training.recipe import Recipe, learning_rate, precision

WATCHED = 4  # pictures whose logits are kept after every epoch, so that one sees their edges get sharp
LOGIT_STEPS = 16  # kept logits are whole sixteenths: (n, height, width) int8, about 20 KB a picture


class Fold:
    """One fold in training: networks, optimiser, position and history; everything that state.pt holds."""

    def __init__(
        self, recipe: Recipe, pictures: pd.DataFrame, source, folds: pd.DataFrame, fold: int, run_dir: Path,
        processes: int = 1,
    ):  # fmt: skip
        """pictures: table of photos.index; source: its pictures and targets, row for row; folds: car, fold.

        processes: how many share the fold, each with a device of its own and `recipe.batch_size` pictures a step.
        """
        self.recipe, self.pictures, self.source = recipe, pictures, source
        self.run_dir, self.number, self.folder = run_dir, fold, run_dir / f"fold{fold}"
        self.processes = processes
        if not 0 <= fold <= folds["fold"].max():
            raise UserError(f"fold is {fold}, but the run has the folds 0 to {folds['fold'].max()}.")
        fold_of = pictures["car"].map(folds.set_index("car")["fold"])
        self.train_rows = np.flatnonzero((fold_of != fold) & (fold_of >= 0))
        self.valid_rows = np.flatnonzero(fold_of == fold)
        self.watched = self.valid_rows[np.unique(np.linspace(0, len(self.valid_rows) - 1, WATCHED).astype(int))]
        self.data = fingerprint(source.key, folds.to_numpy().tolist(), fold, processes)
        self.accelerator = _accelerator(recipe, fold)
        self.rank = self.accelerator.process_index
        keys = dataset.batches(
            len(self.train_rows), recipe.batch_size, recipe.accumulate * processes, recipe.epochs, recipe.seed
        )
        self.keys = keys[self.rank :: processes]
        self.steps_per_epoch = len(self.keys) // recipe.epochs
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
            self.resume()
        self.speed, self.since = math.nan, (self.step, self.seconds)  # pictures/s, and from where on it is measured

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

    def validate(self, rows: np.ndarray) -> tuple[float, float]:
        """Mean Dice and mean IoU of the pictures `rows` at full size."""
        own = rows[self.rank :: self.processes]
        predicted = progress(self._predict(own), "validating", total=len(own), disable=self.rank > 0)
        counted = np.array(list(overlapped(self._count, predicted))).reshape(-1, 3).T
        sums = [metrics.dice(*counted).sum(), metrics.iou(*counted).sum(), counted.shape[1]]
        dice, iou, n = self.accelerator.reduce(torch.tensor(sums, device=self.accelerator.device)).tolist()
        return dice / n, iou / n

    def agree(self, *answers: bool) -> list[bool]:
        """The first process's answers, for all that share the fold: their clocks differ."""
        return broadcast_object_list(list(answers))

    def _predict(self, rows: np.ndarray):
        network = self.network().eval()
        for first in range(0, len(rows), self.recipe.batch_size):
            some = rows[first : first + self.recipe.batch_size]
            batch = torch.from_numpy(np.stack([self.source[row][0] for row in some])).to(self.accelerator.device)
            with torch.inference_mode(), self.accelerator.autocast():
                logits = network(batch).float().cpu().numpy()
            yield from zip(some, logits, strict=True)

    def _count(self, row: int, logits: np.ndarray) -> tuple[int, int, int]:
        picture = self.pictures.iloc[row]
        grid = Grid(picture["height"], picture["width"], *logits.shape)
        return metrics.counts(grid.enlarge(logits) > 0, rle.decode(picture["rle"], picture["height"], picture["width"]))

    def look(self) -> None:
        """Write watch/EPOCH.npz, what one wants to see of an epoch that has just ended, before anything is validated.

        losses: (steps,); lr: of the next step; speed: pictures/s of the training alone; logits: of the pictures
        `watched`, (n, height, width) int8 in sixteenths.
        """
        steps, seconds = self.step - self.since[0], self.seconds - self.since[1]
        self.speed = steps * self.recipe.batch_size * self.processes / seconds if steps else math.nan
        self.since = self.step, self.seconds
        if self.rank:
            return
        logits = np.stack([logits for _, logits in self._predict(self.watched)]) * LOGIT_STEPS
        facts = {"losses": self.losses[-self.steps_per_epoch :], "lr": self.lr(), "speed": self.speed}
        with atomic(self.folder / "watch" / f"{self.step // self.steps_per_epoch:04d}.npz") as file:
            np.savez_compressed(file, logits=logits.clip(-127, 127).round().astype(np.int8), **facts)

    def record(self) -> None:
        """Validate, add a row to the history, and save: weights, history, then the state that makes them count."""
        started = time.monotonic()
        rows = self.valid_rows if self.step else self.valid_rows[::8]  # nobody chooses by the untrained network
        dice, iou = self.validate(rows)
        self.seconds += time.monotonic() - started
        self.since = self.step, self.seconds
        best = max((row["dice"] for row in self.history), default=-1.0)
        row = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
        row |= {"pictures": self.step * self.recipe.batch_size * self.processes}
        row |= {"seconds": round(self.seconds, 1), "speed": round(self.speed, 2), "lr": self.lr()}
        row |= {"loss": float(np.mean(self.losses)) if self.losses else math.nan, "dice": dice, "iou": iou}
        self.history, self.losses = [*self.history, row], []
        if self.rank:
            return
        state = {name: tensor.cpu() for name, tensor in self.network().state_dict().items()}
        for name in ("last", "best") if dice > best else ("last",):
            save_checkpoint(self.folder / f"{name}.safetensors", state, self.recipe.network, amp=self.recipe.amp, **row)
        write_text(self.folder / "history.csv", pd.DataFrame(self.history).to_csv(index=False))
        self.save()

    def save(self) -> None:
        """Write state.pt, from which alone training goes on."""
        if self.rank:
            return
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

    def resume(self) -> None:
        """Take up what state.pt holds; UserError where it belongs to another recipe or other data."""
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
        changed += ["the pictures, masks, folds or processes"] if state["data"] != self.data else []
        if changed:
            raise UserError(
                f"{path} was trained with another {', '.join(changed)}. "
                f"Choose another run_name, or delete {self.folder} to train this fold anew."
            )


def _accelerator(recipe: Recipe, fold: int) -> Accelerator:
    launched = "LOCAL_RANK" in os.environ
    if torch.cuda.device_count() > 1 and not launched:  # folds in parallel, one on each GPU
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{fold % torch.cuda.device_count()}"
    AcceleratorState._reset_state(reset_partial_state=True)  # a notebook may train again with another precision
    return Accelerator(
        cpu=launched and not torch.cuda.is_available(),  # without it Accelerate leaves processes on a CPU unconnected
        mixed_precision=precision(recipe.amp),
        gradient_accumulation_steps=recipe.accumulate,
    )


def _stalls(dices: list[float], patience: int = 2) -> int:
    """How often the best Dice was not beaten for `patience` validations in a row."""
    best, waited, stalls = -1.0, 0, 0
    for dice in dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited == patience:
            waited, stalls = 0, stalls + 1
    return stalls
