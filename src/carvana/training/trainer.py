"""Training of one fold: one readable loop on Accelerate, for a CPU or GPUs, that goes on exactly after a kill."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch.utils.data import ConcatDataset, DataLoader

from carvana.data.competition import Competition
from carvana.data.dataset import CachedSamples, DecodedSamples, PseudoSamples, TrainDataset, add_pseudo, batches, cached
from carvana.data.folds import HOLDOUT
from carvana.device import use_gpu, worker_count
from carvana.errors import UserError
from carvana.files import fingerprint, sha256, write_text
from carvana.models import check_weights, save_checkpoint
from carvana.parallel import ALONE, Processes, progress
from carvana.run import Run, read_csv
from carvana.training.recipe import Recipe
from carvana.training.state import Snapshot, TrainState, write_snapshot
from carvana.training.validation import Validator

READ_EVERY = 20  # steps between two looks at the losses: a look makes the device wait
SAVE_MINUTES = 5  # what a kill can cost
PREVIEWS = 4  # images whose logits are kept after every epoch, so that one sees their edges get sharp
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images, targets, rows of the samples


class Trainer:
    """Trains one fold of a run on the cars of all other folds, and scores it on its own.

    processes: how many share the fold, each with a device of its own and `recipe.batch_size` images a step.
    """

    def __init__(self, run: Run, competition: Competition, recipe: Recipe, fold: int, processes: Processes = ALONE):
        self.run, self.competition, self.recipe, self.fold, self.processes = run, competition, recipe, fold, processes
        self.folder, self.samples, self.folds = run.fold_dir(fold), competition.samples, run.folds()
        if not 0 <= fold <= self.folds["fold"].max():
            raise UserError(f"fold is {fold}, but the run has the folds 0 to {self.folds['fold'].max()}.")
        recipe.check_memory()
        if not (self.folder / "state.pt").exists():
            check_weights(recipe.model_config, recipe.encoder_weights)
        fold_of = self.samples["car"].map(self.folds.set_index("car")["fold"])
        self.train_rows = np.flatnonzero((fold_of != fold) & (fold_of >= 0))
        self.valid_rows = np.flatnonzero(fold_of == fold)
        self.preview_rows = self.valid_rows[np.unique(np.linspace(0, len(self.valid_rows) - 1, PREVIEWS).astype(int))]
        self.pseudo_names, pseudo = self._pseudo()
        decoded = DecodedSamples(competition.train_images, self.samples, recipe.height, recipe.width)
        self.source = cached(decoded, run.cache_dir)
        self.learnt: ConcatDataset = ConcatDataset([self.source, *pseudo])
        n, count, group_size = len(self.train_rows), recipe.pseudo_count, recipe.accumulate * processes.count
        keys = batches(n, recipe.batch_size - count, group_size, recipe.epochs, recipe.seed)
        keys = add_pseudo(keys, n, len(self.pseudo_names), count, recipe.seed)
        start = self._start()
        hashes = ([sha256(start)] if start else []) + [samples.key for samples in pseudo]
        data = fingerprint(self.source.key, self.folds.to_numpy().tolist(), fold, processes.count, *hashes)
        self.best_exists = run.checkpoint(fold).exists()  # as all processes see it before one of them writes
        use_gpu(fold)
        self.state = TrainState(recipe, fold, len(keys) // processes.count, data, self.folder / "state.pt")
        self.best_exists &= bool(self.state.history)  # else a kill or a full disk came before the state that counts
        if start and not self.state.step:
            self.state.start_from(start)
        self.rank = self.state.accelerator.process_index
        self.batch_keys = keys[self.rank :: processes.count]
        self.steps_per_epoch = self.state.total_steps // recipe.epochs
        self.validator = Validator(self.samples, self.source, recipe.batch_size, self.state.accelerator)
        self.measured_from, self.speed = (self.state.step, self.state.seconds), math.nan  # images/s

    def _start(self) -> Path | None:
        """The checkpoint of this very fold in the run `init_from`; UserError where it has seen cars of this fold."""
        if not self.recipe.init_from:
            return None
        earlier = Run(self.run.runs_dir, self.recipe.init_from)
        if not earlier.folds().equals(self.folds):
            advice = "Give both runs the same n_folds, holdout_cars and seed."
            raise UserError(f"init_from: {earlier.folder} has other folds, and has seen cars of this one. {advice}")
        if not earlier.checkpoint(self.fold).exists() or not earlier.epochs_done().get(self.fold):
            raise UserError(f"init_from: {earlier.fold_dir(self.fold)} has no trained network. Train that fold first.")
        return earlier.checkpoint(self.fold)

    def _pseudo(self) -> tuple[list[str], list[DecodedSamples | CachedSamples]]:
        """Names and samples of the test images whose soft masks the run `pseudo_labels` keeps; none for "".

        Its networks have seen this fold's cars, so the Dice of the fold may be flattered very slightly; that of
        holdout_cars is not, if that run held out the same. UserError for images of cars that have a true mask.
        """
        if not self.recipe.pseudo_labels:
            return [], []
        teacher = Run(self.run.runs_dir, self.recipe.pseudo_labels)
        index, held = teacher.pseudo_path, set(self.folds.loc[self.folds["fold"] == HOLDOUT, "car"])
        if held and held & teacher.cars_behind_soft_masks():
            advice = "Give both runs the same holdout_cars and seed."
            raise UserError(f"pseudo_labels: {teacher.folder} has learnt from cars that this run holds out. {advice}")
        if not index.exists():
            raise UserError(f"pseudo_labels: {index} does not exist. Run 05_predict there with a pseudo_share above 0.")
        labels = read_csv(index, "img", "test_dir", "crc32")
        cars = labels["img"].str.extract("^([^.]*)_")[0]
        if known := sorted(cars[cars.isin(self.samples["car"])]):
            raise UserError(f"pseudo_labels: {index} holds car {known[0]}, which has true masks. Keep those of others.")
        images = self.competition.test(labels["test_dir"].iloc[0]).images
        samples = PseudoSamples(images, labels, index.parent, self.recipe.height, self.recipe.width)
        return labels["img"].tolist(), [cached(samples, self.run.cache_dir)]

    @property
    def finished(self) -> bool:
        """Whether every step has been done."""
        return self.state.step == self.state.total_steps

    @property
    def history(self) -> pd.DataFrame:
        """A row a validation."""
        return pd.DataFrame(self.state.history)

    def fit(self, max_hours: float, workers: int, on_epoch: Callable[[], None]) -> None:
        """Train to the end, or until `max_hours` (0: no limit) are over; on_epoch: called after each epoch.

        workers: processes that prepare images; -1 takes what suits the device.
        """
        state, pending, began = self.state, [], time.monotonic()
        state.accelerator.gradient_accumulation_steps = self.recipe.accumulate  # one for all of a process's trainers
        if not state.history:  # the network before its first step
            self.save_snapshot()
        if not self.best_exists:  # yet, or any more: what state.pt holds is the best that is left
            self.validate_and_checkpoint()
        saved = clock = time.monotonic()
        for images, targets, rows in self._progress(self.loader(workers)):
            pending.append((state.train_step(images, targets), rows))
            epoch, within_epoch = divmod(state.step, self.steps_per_epoch)
            time_is_up, save_is_due = self._due(0 < max_hours * 3600 < time.monotonic() - began, saved)
            if len(pending) == READ_EVERY or time_is_up or save_is_due or not within_epoch:
                self._read_losses(pending)
                pending = []
                state.seconds, clock = state.seconds + time.monotonic() - clock, time.monotonic()
            if not within_epoch:
                self.save_snapshot()
            if not within_epoch and (epoch % self.recipe.validate_every == 0 or self.finished):
                self.validate_and_checkpoint()
                saved = clock = time.monotonic()
            elif time_is_up or save_is_due:
                state.save()
                saved = time.monotonic()
            if not within_epoch:
                on_epoch()
            if time_is_up:
                return

    def save_snapshot(self) -> None:
        """Keep what one wants to see of an epoch that has just ended, before anything is validated."""
        state, (step, seconds) = self.state, self.measured_from
        trained = (state.step - step) * self.recipe.batch_size * self.processes.count
        self.speed = trained / (state.seconds - seconds) if trained else math.nan
        self.measured_from = state.step, state.seconds
        if self.rank:
            return
        logits = np.stack([logits for _, logits in self.validator.predict(state.network, self.preview_rows)])
        losses = np.array(state.losses[-self.steps_per_epoch :])
        snapshot = Snapshot(losses, state.lr, self.speed, logits)
        write_snapshot(self.folder, state.step // self.steps_per_epoch, snapshot)

    def validate_and_checkpoint(self) -> None:
        """Validate, add a row to the history, and save: weights, history, then the state that makes them count."""
        state, started = self.state, time.monotonic()
        state.recorder.forget()  # its memory is needed here
        untrained = not (state.step or self.recipe.init_from)  # a few images of every view do
        rows = self.valid_rows[::7] if untrained else self.valid_rows
        broadcast(list(state.network.buffers()))  # of the process that saves: each has batch statistics of its own
        scores = self.validator.scores(state.network, rows)
        state.seconds += time.monotonic() - started
        self.measured_from = state.step, state.seconds
        best = max(row["dice"] for row in state.history) if self.best_exists else -1.0
        self.best_exists = True
        row: dict[str, float] = {"epoch": state.step // self.steps_per_epoch, "step": state.step}
        row |= {"images_seen": state.step * self.recipe.batch_size * self.processes.count, "images_scored": len(rows)}
        row |= {"seconds": round(state.seconds, 1), "speed": round(self.speed, 2), "lr": state.lr}
        row |= {"loss": float(np.mean(state.losses)) if state.losses else math.nan} | scores._asdict()
        state.history, state.losses = [*state.history, row], []
        if self.rank:
            return
        weights = {name: tensor.cpu() for name, tensor in state.network.state_dict().items()}
        for kind in ("last", "best") if scores.dice > best else ("last",):
            facts = {"amp": self.recipe.amp, **row}
            save_checkpoint(self.run.checkpoint(self.fold, kind), weights, self.recipe.model_config, **facts)
        write_text(self.folder / "history.csv", self.history.to_csv(index=False))
        state.save()

    def loader(self, workers: int) -> DataLoader[Batch]:
        """All batches that are left, in one loader, so that its workers run on while the fold is validated."""
        recipe = self.recipe
        rows = np.append(self.train_rows, np.arange(len(self.source), len(self.learnt)))
        batch_bytes = 4 * recipe.batch_size * recipe.height * recipe.width  # on a CPU the network needs every core
        return DataLoader(
            TrainDataset(self.learnt, rows, recipe.augmentation.compose(), recipe.seed),
            batch_sampler=self.batch_keys[self.state.step :],
            num_workers=worker_count(workers, 8, 0, batch_bytes),
            pin_memory=self.state.device.type == "cuda",
            generator=torch.Generator().manual_seed(recipe.seed),  # so that the global random state is left alone
        )

    def _progress(self, loader: DataLoader[Batch]) -> Iterator[Batch]:
        """The loader under a progress bar that counts images."""
        state, size = self.state, self.recipe.batch_size * self.processes.count
        options = {"total": state.total_steps * size, "initial": state.step * size, "disable": self.rank > 0}
        with progress(None, f"training {self.folder.name}", **options) as bar:
            for batch in loader:
                yield batch
                bar.set_postfix_str(f"loss {state.losses[-1]:.4f}" if state.losses else "", refresh=False)
                bar.update(size)

    def _due(self, time_is_up: bool, saved: float) -> list[bool]:
        """Whether to stop, and whether to save: the first process decides for all, since their clocks differ."""
        state = self.state
        if not state.accelerator.sync_gradients or (self.processes.count > 1 and state.step % READ_EVERY):
            return [False, False]
        return broadcast_object_list([time_is_up, time.monotonic() - saved > SAVE_MINUTES * 60])

    def _read_losses(self, pending: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Move this process's losses to the state; one that is not finite is a UserError with its images' names."""
        state = self.state
        losses = torch.stack([loss for loss, _ in pending]).tolist()
        for i, (loss, (_, rows)) in enumerate(zip(losses, pending, strict=True)):
            if not math.isfinite(loss):
                step = state.step - len(pending) + i + 1
                batch = ", ".join([*self.samples["img"], *self.pseudo_names][row] for row in rows.tolist())
                raise UserError(f"The loss of step {step} is {loss}, in the batch {batch}. Lower lr, or set amp to no.")
        state.losses += losses
