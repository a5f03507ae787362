"""Networks and optimisers by name, encoder weights, and checkpoints."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.optim import list_optimizers
from torch import nn

from carvana.classic_unet import ClassicUNet
from carvana.errors import UserError, did_you_mean
from carvana.files import atomic, resolve
from carvana.grid import STRIDE

HUB = "https://huggingface.co/"
TIMM_NAMES = {"inceptionv4": "inception_v4", "inceptionresnetv2": "inception_resnet_v2", "xception": "legacy_xception"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a network again, and to prepare its images; stored in every checkpoint.

    `height`, `width`: size of the whole image at the network. `decoder_channels`: widths from deep to fine such as
    "128,64,32,16,8", or "" for the architecture's own.
    """

    arch: str
    encoder: str
    decoder_channels: str
    height: int
    width: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> "ModelConfig":
        """From the parameters of a notebook, others among them."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        """Refuse sizes that the network cannot halve five times."""
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < STRIDE or value % STRIDE:
                near = max(STRIDE, round(value / STRIDE) * STRIDE)
                raise UserError(f"{name} is {value}, but must be a multiple of {STRIDE}; the nearest is {near}.")


class SegmentationModel(nn.Module):
    """A network with its normalisation: images in, logits out. Images stay bytes until they are on the device."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.net = build_network(config).to(memory_format=torch.channels_last)
        for layer in self.net.modules():
            depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
            if depthwise and (layer.stride != (1, 1) or layer.kernel_size != (3, 3)):
                layer.forward = partial(_depthwise, layer.forward)
        known = pretrained_config(config.encoder)  # the scaling that the encoder's ImageNet weights were trained with
        mean, std = (known.mean, known.std) if known else IMAGENET
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(1, 3, 1, 1)), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, h, w, 3) uint8 RGB -> (B, h, w) logits."""
        return self.net(self.normalised(images)).squeeze(1)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """(B, h, w, 3) uint8 -> (B, 3, h, w) float32 in channels_last, the layout in which convolutions are fastest."""
        rows, width = images.flatten(2).float(), images.shape[2]  # by rows: loops over three colours are slow
        rows = rows.sub_(self.mean.flatten().repeat(width)).mul_(self.scale.flatten().repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)


def _depthwise(convolve: Callable, x: torch.Tensor) -> torch.Tensor:
    """A depthwise convolution that learns in float32 on a CPU: (B, C, H, W) -> (B, C, h, w) of the same type.

    oneDNN has no bf16 gradients of depthwise convolutions with strides or 5 x 5 windows and falls back to loops up to
    50 times slower: without this a training step of an EfficientNet takes 1.6 times as long.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return convolve(x)
    with torch.autocast("cpu", enabled=False):
        return convolve(x.float()).to(x.dtype)


def build_network(config: ModelConfig) -> nn.Module:
    """The network alone, with random weights: (B, 3, H, W) -> (B, 1, H, W) logits."""
    check_names(config)
    if config.arch == "classic_unet":
        return ClassicUNet()
    options = {"decoder_channels": _channels(config.decoder_channels)} if config.decoder_channels else {}
    try:
        return smp.create_model(config.arch, config.encoder, encoder_weights=None, classes=1, **options)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"arch {config.arch} with encoder {config.encoder} cannot be built: {error}") from error


def check_names(config: ModelConfig) -> None:
    """UserError, with the nearest name, for an architecture, encoder or widths that nobody knows."""
    archs = ["classic_unet", *smp.MODEL_ARCHITECTURES_MAPPING]
    if config.arch not in archs and config.arch.lower() not in archs[1:]:
        hint = did_you_mean(config.arch, archs)
        raise UserError(f'arch "{config.arch}" is unknown{hint} Choose from: {", ".join(archs)}.')
    if config.arch == "classic_unet":
        return
    _channels(config.decoder_channels or "1")
    encoders = [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]
    if config.encoder not in encoders:
        hint = did_you_mean(config.encoder, encoders)
        raise UserError(f'encoder "{config.encoder}" is unknown{hint} Take one of smp, or tu-NAME of timm.')


def check_optimizer(name: str) -> None:
    """UserError, with the nearest name, for an optimiser that timm does not have, or that needs more than gradients."""
    known = list_optimizers(exclude_filters=["adahessian", "fused*", "bnb*"])
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f'optimizer "{name}" is unknown{hint} Take one of timm that needs gradients alone.')


def _channels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in text.split(","))
    except ValueError as error:
        raise UserError(f'decoder_channels is "{text}"; give widths such as "128,64,32,16,8", or "".') from error


def pretrained_config(encoder: str) -> Any:
    """What timm knows of an encoder's ImageNet weights (no network needed); None where it does not know the encoder."""
    name = encoder.removeprefix("timm-").removeprefix("tu-")
    name = TIMM_NAMES.get(name, name)
    return timm.get_pretrained_cfg(name) if timm.is_model(name) else None


def load_encoder(model: SegmentationModel, weights: str | Path | None) -> str:
    """Load encoder weights into `model`: "imagenet" (from the hub), a .safetensors or .pth path, or "" for none.

    Names may be those of smp or of timm. Returns a sentence with how many tensors matched; none is an error.
    """
    if not weights:
        return "Encoder weights: random."
    check_weights(model.config, str(weights))
    encoder, name = model.net.get_submodule("encoder"), model.config.encoder
    state = encoder.state_dict()
    given = _hub_weights(name) if weights == "imagenet" else _read_weights(resolve(weights))
    matched = {key: given[source] for key in state if (source := _counterpart(key, state[key], given))}
    learnt = [key for key in state if not key.endswith("num_batches_tracked")]
    n_matched = sum(key in matched for key in learnt)
    if not n_matched:
        raise UserError(f"encoder_weights {weights}: none of its {len(given)} tensors fits {name}.")
    encoder.load_state_dict(state | matched)
    return f"Encoder weights: {n_matched} of {len(learnt)} tensors matched in {weights}."


def check_weights(config: ModelConfig, weights: str) -> None:
    """UserError where `weights` cannot be meant: a file that is not there, or any for a network without an encoder."""
    if weights and config.arch == "classic_unet":
        raise UserError(f'encoder_weights is "{weights}", but classic_unet has no encoder to load. Set it to "".')
    if weights == "imagenet" and not _address(config.encoder):
        raise UserError(f'encoder_weights is "imagenet", but nobody offers these of {config.encoder}. Set it to "".')
    if weights not in ("", "imagenet") and not resolve(weights).is_file():
        raise UserError(f'encoder_weights {resolve(weights)} does not exist. Give a file, "imagenet" or "".')


def _counterpart(key: str, tensor: torch.Tensor, given: dict[str, torch.Tensor]) -> str | None:
    """The name in a file for the encoder's tensor `key`: smp's timm encoders put "model." before timm's names."""
    names = (key, key.removeprefix("model."), f"encoder.{key}", f"net.encoder.{key}")
    return next((name for name in names if name in given and given[name].shape == tensor.shape), None)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # what holds no tensors, or more than tensors, raises one of many
        advice = "Give a .safetensors or .pth file of tensors alone."
        raise UserError(f"encoder_weights {path} cannot be read ({type(error).__name__}). {advice}") from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)
    named = weights.items() if isinstance(weights, dict) else ()
    tensors = {name: tensor for name, tensor in named if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise UserError(f"encoder_weights {path} holds no tensors by name. Give the state_dict of an encoder.")
    return tensors


def in_cache(encoder: str) -> bool:
    """Whether an encoder's ImageNet weights are on this machine."""
    from huggingface_hub import constants

    repository = _address(encoder).removeprefix(HUB).replace("/", "--")
    folder = Path(constants.HF_HUB_CACHE, f"models--{repository}", "snapshots")
    return any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*/*"))


def fetch_encoder(encoder: str, path: Path) -> Path:
    """Write an encoder's ImageNet weights from the hub (or its cache) to a .safetensors file; returns its path."""
    with atomic(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in _hub_weights(encoder).items()}))
    return path


def _hub_weights(encoder: str) -> dict[str, torch.Tensor]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return smp.encoders.get_encoder(encoder, weights="imagenet").state_dict()
    except Exception as error:  # each hub client has its own family of network errors
        reason = f"imagenet of {encoder} could not be fetched ({type(error).__name__})"
        raise UserError(f"encoder_weights {reason}. Save the file at {_address(encoder)}, give its path.") from error


def _address(encoder: str) -> str:
    """Where an encoder's ImageNet weights can be had, mostly on the hub; "" where nobody offers them."""
    if encoder.startswith("tu-"):
        config = timm.get_pretrained_cfg(encoder.removeprefix("tu-"))
        repository, elsewhere = (config.hf_hub_id, config.url) if config else ("", "")
    else:
        settings = smp.encoders.encoders[encoder]["pretrained_settings"]
        repository, elsewhere = settings.get("imagenet", {}).get("repo_id"), ""
    return f"{HUB}{repository}" if repository else elsewhere or ""


def save_checkpoint(path: Path, state: dict[str, torch.Tensor], config: ModelConfig, **facts: Any) -> None:
    """Write weights as safetensors, with the network's configuration and `facts` (JSON-like) in the metadata."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    metadata = {"network": json.dumps(asdict(config)), "facts": json.dumps(facts)}
    with atomic(path) as file:
        file.write(save(tensors, metadata | {"sha256": _checksum(tensors, metadata)}))


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(f"{metadata['network']} {metadata['facts']}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path) -> tuple[SegmentationModel, dict[str, Any]]:
    """The network of a checkpoint, on the CPU in evaluation mode, and the facts stored with it.

    UserError where a bit of it has changed since it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors, written = load_file(path), metadata.pop("sha256", None)  # version 0.1 wrote none
        if set(metadata) != {"network", "facts"} or written not in (None, _checksum(tensors, metadata)):
            raise ValueError("its contents have changed since it was written")
        model = SegmentationModel(ModelConfig(**json.loads(metadata["network"])))
        model.load_state_dict(tensors)
        return model.eval(), json.loads(metadata["facts"])
    except Exception as error:  # damaged files raise one of many
        reason = str(error).partition("\n")[0]
        raise UserError(f"checkpoint {path} cannot be read: {reason}. Delete it and train its fold again.") from error
