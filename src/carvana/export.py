"""A trained network for other programs: a folder of segmentation_models_pytorch or an ONNX file, each with its card."""

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import nn

from carvana.data.competition import Competition, car_and_view
from carvana.data.images import read_image
from carvana.errors import UserError
from carvana.files import atomic, need_space, sha256, write_text
from carvana.inference.ensemble import EnsembleSpec, tta_logits
from carvana.metrics import score_over_cars
from carvana.models import load_checkpoint, pretrained_config
from carvana.run import Run

Predict: TypeAlias = Callable[[np.ndarray], np.ndarray]  # (B, h, w, 3) uint8 -> probabilities (B, h, w) float32
CARD = """---
license: other
---
# Car masks: run {run}
- Network: {arch} with encoder {encoder}, for whole images of {height}x{width} (height x width); {checkpoints}.
- Use: {use}
  Car where the probability is above {threshold:g}. For a mask at full size enlarge logits, not probabilities.
- Data: {images}.
- Dice at full size: {dice}.
- Check: {check}.
- Versions: {versions}.
- Licence: the code that made this is MIT. The weights come from the images above, whose terms bind their use (those of
  Kaggle: https://www.kaggle.com/c/carvana-image-masking-challenge/rules), and from the encoder
  weights they started from: {encoder_weights}{licence}.
"""


class Blend(nn.Module):
    """An ensemble in float32 as one network: (B, h, w, 3) uint8 -> probabilities of car and logits, (B, h, w) each."""

    def __init__(self, spec: EnsembleSpec):
        super().__init__()
        self.spec = spec
        models, facts = zip(*map(load_checkpoint, spec.checkpoints), strict=True)
        self.facts, self.config = facts[0], models[0].config
        self.models: Any = nn.ModuleList(models)
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted mean over checkpoints of their mean over tta."""
        logits = torch.zeros(())
        for weight, model in zip(self.spec.weights, self.models, strict=True):
            logits = logits + weight * torch.stack([tta_logits(model, images, tta) for tta in self.spec.tta]).mean(0)
        return logits.sigmoid(), logits


def export(source: Path, out: Path, kind: str, fold: int | None = None) -> list[str]:
    """Write the network of a run's folder, a checkpoint or an ensemble.json for other programs, and its card.

    kind: "smp", `out` is a folder for `segmentation_models_pytorch.from_pretrained`, its card README.md; or "onnx",
    `out` is a file, its card of the same name with .md. fold: takes one checkpoint of a run. Returns lines that say
    what was written, and how far it is from torch. UserError for what a format cannot hold.
    """
    spec, run = _source(source, fold)
    card = out / "README.md" if kind == "smp" else out.with_suffix(".md")
    if card == out or (card.exists() and not card.read_bytes().startswith(CARD[: CARD.index("{")].encode())):
        raise UserError(f"{card}, where the card goes, is another file, and stays. Give another place.")
    blend = Blend(replace(spec, tta=("none",)) if kind == "smp" else spec)
    facts = _facts(run, blend)  # all is read before anything is written
    predict, use = (_write_smp if kind == "smp" else _write_onnx)(blend, out)
    check = _compare(blend, predict, *_images(run, blend))
    write_text(card, CARD.format(**facts, use=use, check=check))
    left = [f"tta {', '.join(spec.tta)} is left out: one network has none"] if blend.spec.tta != tuple(spec.tta) else []
    return [f"{out} is written, its card is {card}", *left, check]


def _source(source: Path, fold: int | None) -> tuple[EnsembleSpec, Run]:
    """What is to be exported, and the run that it belongs to."""
    path = source.absolute()
    if not path.exists():
        raise UserError(f"{source} does not exist. Give a run's folder, a checkpoint or an ensemble.json.")
    folder = path if path.is_dir() else path.parent.parent if path.suffix == ".safetensors" else path.parent
    run = Run(folder.parent, folder.name)
    if path.suffix == ".safetensors":
        return EnsembleSpec.equal([path], ["none"]), run
    if fold is None and path.is_file():
        try:
            return EnsembleSpec.read(path), run
        except UserError as error:
            kinds = "no run's folder, no checkpoint (.safetensors) and no ensemble.json that can be read"
            raise UserError(f"{source} is {kinds}. Give one of these.") from error
    if fold is None and run.ensemble_path.exists():
        return EnsembleSpec.read(run.ensemble_path), run
    checkpoints = run.checkpoints()
    number = next(iter(checkpoints)) if fold is None and len(checkpoints) == 1 else fold
    if number not in checkpoints:
        folds = ", ".join(map(str, checkpoints))
        raise UserError(f"fold {fold}: {run.folder} has the trained folds {folds}. Give --fold with one of them.")
    return EnsembleSpec.equal([checkpoints[number]], ["none"]), run


def _write_smp(blend: Blend, out: Path) -> tuple[Predict, str]:
    if blend.config.arch == "classic_unet" or len(blend.models) > 1:
        has = f"this is {len(blend.models)} of {blend.config.arch}"
        raise UserError(f"format smp holds one network that smp knows, but {has}. Give --fold or --format onnx.")
    model = blend.models[0]
    need_space(out, 4 * sum(tensor.numel() for tensor in model.state_dict().values()) + 1_000_000)
    model.net.save_pretrained(out)
    loaded, mean, std = smp.from_pretrained(str(out)), model.mean / 255, 1 / model.scale / 255
    numbers = " and ".join(str(tuple(round(value, 6) for value in of.flatten().tolist())) for of in (mean, std))
    use = f"`smp.from_pretrained(FOLDER)` takes (RGB / 255 - mean) / std as (B, 3, h, w), mean and std {numbers}, and "

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            scaled = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
            return loaded(scaled).sigmoid()[:, 0].numpy()

    return predict, f"{use}gives logits (B, 1, h, w), whose sigmoid is the probability."


def _write_onnx(blend: Blend, out: Path) -> tuple[Predict | None, str]:
    if missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]:
        raise UserError(f"format onnx needs {missing[0]}: pip install onnx onnxscript onnxruntime")
    sizes = {(model.config.height, model.config.width) for model in blend.models}
    if len(sizes) > 1 or any(name.startswith("scale") for name in blend.spec.tta):
        has = f"this ensemble has {len(sizes)} and tta {', '.join(blend.spec.tta)}"
        raise UserError(f"format onnx holds one size and tta none and hflip, but {has}. Export its folds one by one.")
    batch = torch.zeros(2, *sizes.pop(), 3, dtype=torch.uint8)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probability", "logits"]}
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program: Any = torch.onnx.export(blend, (batch,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    with atomic(out) as file:
        file.write(program.model_proto.SerializeToString())
    use = "`images` are (B, h, w, 3) uint8 RGB, `probability` and `logits` (B, h, w); normalisation and tta are inside."
    if not find_spec("onnxruntime"):
        return None, use
    import onnxruntime  # an extra that only this needs

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probability"], {"images": images})[0], use


def _images(run: Run, blend: Blend) -> tuple[str, np.ndarray]:
    """Ten validation images at network size, (10, h, w, 3) uint8, where the run's data is there, else noise."""
    size = blend.config.height, blend.config.width
    try:
        opened, folds = run.parameters(), run.folds()
        images = Competition(opened["data_dir"], opened["hq"]).train_images
        unseen = set(folds.loc[("fold" + folds["fold"].astype(str)) == blend.spec.checkpoints[0].parent.name, "car"])
        names = [name for name in images.names if car_and_view(name)[0] in unseen]
        spread = names[:: len(names) // 10 or 1][:10]
        return "validation images", np.stack([read_image(images, name, *size)[0] for name in spread])
    except (UserError, KeyError, ValueError, TypeError):  # it was trained elsewhere
        return "images of noise", np.random.default_rng(0).integers(0, 256, (10, *size, 3), np.uint8)


def _compare(blend: Blend, predict: Predict | None, kind: str, images: np.ndarray) -> str:
    if not predict:
        return "not compared with torch, since onnxruntime is not installed"
    with torch.inference_mode():
        expected = np.concatenate([blend(torch.from_numpy(image[None]))[0].numpy() for image in images])
    given, threshold = np.concatenate([predict(image[None]) for image in images]), blend.spec.threshold
    sides = np.count_nonzero((given > threshold) != (expected > threshold))
    distance = f"probabilities differ from torch in float32 by {np.abs(given - expected).max():.1e} at most"
    return f"on {len(images)} {kind} {distance}; {sides} of {given.size} pixels change side"


def _facts(run: Run, blend: Blend) -> dict[str, Any]:
    """What the card says of the run; a checkpoint that has left its run says less."""
    spec, note, dice = blend.spec, run.note("run"), "not scored by 04_evaluate"
    parameters = note.get("parameters", {})
    if run.scores_path.exists():
        scores = run.scores()
        mean, low, high = score_over_cars(scores["dice"], scores["car"])
        counts = f"{len(scores)} images of {scores['car'].nunique()} cars, each by networks that have not seen the car"
        dice = f"{mean:.6f} (95 % {low:.6f} to {high:.6f}) of the run, {counts}"
    if len(blend.models) == 1 and "dice" in blend.facts:
        dice += f"; {blend.facts['dice']:.6f} of this checkpoint when it was chosen on its fold"
    weights = zip(spec.weights, spec.checkpoints, strict=True)
    listed = ", ".join(f"{path.parent.name} ({weight:.3g}, sha256 {sha256(path)[:12]})" for weight, path in weights)
    versions = note.get("versions", {}) | {name: metadata.version(name) for name in ("carvana", "torch")}
    first = pretrained_config(blend.config.encoder) if parameters.get("encoder_weights") else None
    return {
        "run": run.name, "threshold": spec.threshold, "dice": dice, **vars(blend.config),
        "checkpoints": f"{listed}; tta {', '.join(spec.tta)}",
        "images": f"{Path(str(parameters.get('data_dir', 'unknown'))).name}, fingerprint {note.get('data', 'unknown')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "encoder_weights": parameters.get("encoder_weights", "unknown") or "none",
        "licence": f", licence {first.license or 'unknown'}" if first else "",
    }  # fmt: skip
