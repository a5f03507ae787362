"""What a training consists of: network, optimiser and position, saved and resumed exactly; and snapshots to look at."""

import io
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2, muon
from timm.utils import ModelEmaV3

from carvana.data.dataset import resized
from carvana.device import Recorder, best, moved, precision
from carvana.errors import UserError
from carvana.files import atomic
from carvana.models import SegmentationModel, load_checkpoint, load_encoder
from carvana.training.losses import loss_named
from carvana.training.recipe import Recipe, learning_rate, plateaus, size_at

FUSED = ("adam", "adamw")  # run in one kernel; so would sgd, but an overflow in its first step breaks its momentum
RECORDABLE = (*FUSED, "nmuon")  # can take a learning rate that lies on the device
NEWTON_SCHULZ = muon.zeropower_via_newtonschulz  # of timm: five steps, all products in bf16
Pair = tuple[list[torch.Tensor], list[torch.Tensor]]
LOGIT_STEPS = 16  # kept logits are whole sixteenths: (n, height, width) int8, about 20 KB an image


class TrainState:
    """Network, its moving average, optimiser, position and history of a training of `total_steps` steps.

    fold: decides the initial weights with the recipe's seed. data: fingerprint of what is learnt from. path: state.pt,
    which is taken up where it exists; UserError where it belongs to another recipe or other data, unless nothing has
    been learnt yet: who had no memory for the first step may lower batch_size.
    """

    def __init__(self, recipe: Recipe, fold: int, total_steps: int, data: str, path: Path):
        self.recipe, self.total_steps, self.data, self.path = recipe, total_steps, data, path
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # since the last validation
        self.history: list[dict[str, Any]] = []  # a row a validation
        self.accelerator = _accelerator(recipe)
        self.device = self.accelerator.device
        torch.manual_seed(recipe.seed * 1000 + fold)
        model, weights = SegmentationModel(recipe.model_config), "" if recipe.init_from else recipe.encoder_weights
        saved = self._saved()
        self.weights_note = "Weights: state.pt." if saved else load_encoder(model, weights)
        self.ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model, recipe))
        if self.ema:
            self.ema.to(self.device)
        self._averaged: list[Pair] = []  # floats of the average and of the network, and their counters
        self._loss = loss_named(recipe.loss)
        self._size: tuple[int, ...] = ()  # of the images of the last step
        self.recorder = Recorder(self.device, self._recordable)
        self._lr_on_device = torch.zeros((), device=self.device) if self._recordable else None
        if saved:
            self._take_up(saved)

    def start_from(self, path: Path) -> None:
        """Take the weights of a checkpoint in the place of random ones; UserError where the network is another."""
        weights = load_checkpoint(path)[0].state_dict()
        try:
            for model in (self.accelerator.unwrap_model(self.model), self.network):
                model.load_state_dict(weights)
        except RuntimeError as error:
            advice = "Give the same arch, encoder and decoder_channels."
            raise UserError(f"init_from: {path} is of another network. {advice}") from error
        self.weights_note = f"Weights: {path}."

    @property
    def network(self) -> torch.nn.Module:
        """The network that is scored and saved: the moving average where there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    @property
    def lr(self) -> float:
        """Learning rate of the next step; a plateau of two validations halves it."""
        share = learning_rate(self.recipe.schedule, self.step / self.total_steps, self.recipe.warmup)
        if self.recipe.schedule == "plateau":
            share *= 0.5 ** plateaus([row["dice"] for row in self.history])
        return self.recipe.lr * share

    def train_step(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Learn from a batch, (B, h, w, 3) and (B, h, w) uint8, 255 = car.

        Returns its loss, which stays on the device so that nothing waits for it.
        """
        if not self.accelerator.unwrap_model(self.model).training:  # to say so again takes as long as some layers do
            self.model.train()
        self._set_lr()
        images, targets = (moved(part, self.device) for part in (images, targets))
        size = size_at(images.shape[1:3], self.recipe.start_size, self.step / self.total_steps)
        if size != images.shape[1:3]:
            images, targets = resized(images, targets, size)
        if size != self._size:
            self.recorder.forget()
        self._size = size
        with self.accelerator.accumulate(self.model):
            loss = self.recorder("step", self._update, images, targets)
        self.step += 1
        if self.ema and self.accelerator.sync_gradients:
            self._average(self.ema)
        return loss

    def _update(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Change the weights by what a batch on the device teaches; returns its loss."""
        try:
            loss = self._loss(self.model(images), targets.float() / 255)
            self.accelerator.backward(loss)
            if self.recipe.clip_norm and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
        except RuntimeError:  # in a recording nothing is computed: gradients would hold what was in memory before
            self.model.zero_grad()  # other than the optimiser's, also between steps that are accumulated
            raise
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def _recordable(self) -> bool:
        """Whether a step can be recorded whole: alone on a CUDA device, and all of it computed there."""
        alone = self.accelerator.num_processes == self.recipe.accumulate == 1 and not self.accelerator.scaler
        knows = all("capturable" in group for group in self.optimizer.param_groups)  # Muon of timm 1.0.26 does not
        return self.device.type == "cuda" and alone and knows and self.recipe.optimizer in RECORDABLE

    def _set_lr(self) -> None:
        """Tell the optimiser the learning rate of this step, where a step is recorded through memory on the device."""
        on_device = self._lr_on_device
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr if on_device is None else on_device.fill_(self.lr)
            if "capturable" in group:
                group["capturable"] = on_device is not None

    def _average(self, ema: ModelEmaV3) -> None:
        """Move the average towards the network; it warms up with the steps that change the weights."""
        if not self._averaged:  # listed once: to list them takes the host longer than the rest
            both = ema.module.state_dict(), self.accelerator.unwrap_model(self.model).state_dict()
            for wanted in (True, False):
                old, new = ([part for part in state.values() if part.is_floating_point() == wanted] for state in both)
                self._averaged.append((old, new))
        (floats, new_floats), (counters, new_counters) = self._averaged
        torch._foreach_lerp_(floats, new_floats, 1 - ema.get_decay(self.step // self.recipe.accumulate))
        if counters:
            torch._foreach_copy_(counters, new_counters)

    def save(self) -> None:
        """Write state.pt, from which alone training goes on."""
        if not self.accelerator.is_main_process:
            return
        contents = {name: getattr(self, name) for name in ("step", "seconds", "losses", "history", "data")}
        contents |= {"recipe": asdict(self.recipe), "random": torch.get_rng_state()}
        contents |= {name: part.state_dict() for name, part in self._parts().items()}
        if self.device.type != "cpu":
            contents |= {f"{self.device.type}_random": torch.get_device_module(self.device).get_rng_state()}
        buffer = io.BytesIO()  # torch hides the reason of a write that fails
        torch.save(contents, buffer)
        with atomic(self.path) as file:
            file.write(buffer.getbuffer())

    def resume(self) -> None:
        """Take up what other processes have written into state.pt."""
        if saved := self._saved():
            self._take_up(saved)

    def _saved(self) -> dict[str, Any] | None:
        """What state.pt holds of this training, None where that is nothing; UserError where it is of another one."""
        if not self.path.exists():
            return None
        try:
            contents = torch.load(self.path, "cpu", weights_only=True)  # a step counter on a GPU would be waited for
        except Exception as error:  # a broken file raises one of many
            advice = f"Delete {self.path.parent} to train this fold again."
            raise UserError(f"{self.path} cannot be read. {advice}") from error
        changed = self._changes(contents)
        if changed and contents["step"]:
            raise UserError(
                f"{self.path} was trained with another {', '.join(changed)}. "
                f"Choose another run_name, or delete {self.path.parent} to train this fold again."
            )
        return None if changed else contents

    def _take_up(self, contents: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            if name in contents:  # no scaler is, where the steps before were taken in another precision
                part.load_state_dict(contents[name])
        counted_there = self._recordable or self.recipe.optimizer in FUSED  # else a step waits for its counter
        for kept in self.optimizer.state.values():
            if isinstance(kept.get("step"), torch.Tensor):
                kept["step"] = kept["step"].to(self.device if counted_there else "cpu")
        torch.set_rng_state(contents["random"].cpu())
        if (kept_there := contents.get(f"{self.device.type}_random")) is not None:  # another make has its own form
            torch.get_device_module(self.device).set_rng_state(kept_there.cpu())
        for name in ("step", "seconds", "losses", "history"):
            setattr(self, name, contents[name])

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in state.pt."""
        parts = {"model": self.accelerator.unwrap_model(self.model), "optimizer": self.optimizer}
        parts |= {"ema": self.ema.module} if self.ema else {}
        return parts | ({"scaler": self.accelerator.scaler} if self.accelerator.scaler else {})

    def _changes(self, contents: dict[str, Any]) -> list[str]:
        """In what another training than this one differs."""
        wanted, saved = asdict(self.recipe), contents["recipe"]
        for names in (wanted, saved):  # a file may lie elsewhere on another machine
            names["encoder_weights"] = Path(names["encoder_weights"]).name
        changed = [f"{name} ({saved.get(name)})" for name in wanted if saved.get(name) != wanted[name]]
        same = contents["data"] == self.data
        return changed + ([] if same else ["the images, masks, folds, processes or weights of init_from"])


def optimizer_of(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, of timm.

    Muon's products are taken in float32 where the device has to imitate bf16: a step of `cpu` on a CPU with AVX2 alone
    takes 0.8 instead of 4.1 s at 256x256.
    """
    dtype = torch.bfloat16 if precision("auto") == "bf16" else torch.float32
    muon.zeropower_via_newtonschulz = partial(NEWTON_SCHULZ, dtype=dtype)  # no parameter of timm's leads there
    fused = {"fused": True} if recipe.optimizer in FUSED else {}
    return create_optimizer_v2(model, recipe.optimizer, recipe.lr, recipe.weight_decay, **fused)


def _accelerator(recipe: Recipe) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # a notebook may train again with another precision
    return Accelerator(
        cpu=best().type == "cpu",  # else Accelerate leaves processes on a CPU unconnected
        mixed_precision=precision(recipe.amp),
        gradient_accumulation_steps=recipe.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # some encoders have them
    )


class Snapshot(NamedTuple):
    """What one wants to see of an epoch: losses (steps,) of its steps, the learning rate, images a second, and logits.

    logits: (n, height, width) of a few validation images, exact to a sixteenth, in [-8, 8].
    """

    losses: np.ndarray
    lr: float
    speed: float
    logits: np.ndarray


def write_snapshot(folder: Path, epoch: int, snapshot: Snapshot) -> None:
    """Keep the snapshot of an epoch below the fold's folder; 0 is the untrained network."""
    logits = (snapshot.logits * LOGIT_STEPS).clip(-127, 127).round().astype(np.int8)
    with atomic(_snapshot_path(folder, epoch)) as file:
        np.savez_compressed(file, **snapshot._replace(logits=logits)._asdict())


def read_snapshot(folder: Path, epoch: int, with_logits: bool = True) -> Snapshot:
    """The snapshot of an epoch that `snapshot_epochs` names; without logits, which take most of the time, if wanted."""
    with np.load(_snapshot_path(folder, epoch)) as kept:
        logits = kept["logits"] / LOGIT_STEPS if with_logits else np.empty(0)
        return Snapshot(kept["losses"], float(kept["lr"]), float(kept["speed"]), logits)


def snapshot_epochs(folder: Path) -> list[int]:
    """Epochs of a fold's folder that have a snapshot."""
    return sorted(int(path.stem) for path in (folder / "watch").glob("*.npz"))


def _snapshot_path(folder: Path, epoch: int) -> Path:
    return folder / "watch" / f"{epoch:04d}.npz"
