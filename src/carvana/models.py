"""Networks by name, their encoder weights, and checkpoints."""

import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from carvana.files import UserError, atomic, nearest, resolve
from carvana.grid import STRIDE

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """All that is needed to build a network again, and to prepare its pictures; stored in every checkpoint.

    `height`, `width`: size of the whole picture at the network. `decoder_channels`: widths from deep to fine such as
    "128,64,32,16,8", or "" for the architecture's own.
    """

    arch: str
    encoder: str
    decoder_channels: str
    height: int
    width: int

    def __post_init__(self):
        """Refuse sizes that the network cannot halve five times."""
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < STRIDE or value % STRIDE:
                near = max(STRIDE, round(value / STRIDE) * STRIDE)
                raise UserError(f"{name} is {value}, but must be a multiple of {STRIDE}; the nearest is {near}.")


class Segmenter(nn.Module):
    """A network with its normalisation: pictures in, logits out.

    forward: (B, h, w, 3) uint8 RGB -> (B, h, w) logits. The pictures stay bytes until they are on the device, and
    permuting them makes the batch channels_last, the layout in which convolutions are fastest.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        self.net = _build(network).to(memory_format=torch.channels_last)
        for layer in self.net.modules():
            depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
            if depthwise and (layer.stride != (1, 1) or layer.kernel_size != (3, 3)):
                layer.forward = partial(_depthwise, layer.forward)
        mean, std = _mean_and_std(network.encoder)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(1, 3, 1, 1)), persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, h, w, 3) uint8 -> (B, h, w) logits."""
        return self.net(pictures.permute(0, 3, 1, 2).float().sub_(self.mean).mul_(self.scale)).squeeze(1)


def _depthwise(convolve: Callable, x: torch.Tensor) -> torch.Tensor:
    """A depthwise convolution that learns in float32 on a CPU: (B, C, H, W) -> (B, C, h, w) of the same type.

    oneDNN has no bf16 gradients of depthwise convolutions with strides or 5 x 5 windows and falls back to loops up to
    50 times slower: without this a training step of an EfficientNet takes 1.6 times as long.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return convolve(x)
    with torch.autocast("cpu", enabled=False):
        return convolve(x.float()).to(x.dtype)


def _build(network: Network) -> nn.Module:
    check_names(network)
    if network.arch == "classic_unet":
        return ClassicUNet()
    options = {"decoder_channels": _channels(network.decoder_channels)} if network.decoder_channels else {}
    try:
        return smp.create_model(network.arch, network.encoder, encoder_weights=None, classes=1, **options)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"arch {network.arch} with encoder {network.encoder} cannot be built: {error}") from error


def check_names(network: Network) -> None:
    """UserError, with the nearest name, for an architecture, encoder or widths that nobody knows."""
    archs = ["classic_unet", *smp.MODEL_ARCHITECTURES_MAPPING]
    if network.arch.lower() not in archs:
        hint = nearest(network.arch, archs)
        raise UserError(f'arch "{network.arch}" is unknown{hint} Choose from: {", ".join(archs)}.')
    if network.arch == "classic_unet":
        return
    _channels(network.decoder_channels or "1")
    encoders = [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]
    if network.encoder not in encoders:
        hint = nearest(network.encoder, encoders)
        raise UserError(f'encoder "{network.encoder}" is unknown{hint} Any of smp, or tu-NAME for any of timm.')


def _channels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in text.split(","))
    except ValueError as error:
        raise UserError(f'decoder_channels is "{text}"; give widths such as "128,64,32,16,8", or "".') from error


def _mean_and_std(encoder: str) -> tuple[tuple, tuple]:
    """The input scaling that the encoder's ImageNet weights were trained with, as timm knows it (no network needed)."""
    name = encoder.removeprefix("timm-").removeprefix("tu-")
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return (known.mean, known.std) if known else IMAGENET


def load_encoder(model: Segmenter, weights: str | Path | None) -> str:
    """Load encoder weights into `model`: "imagenet" (from the hub), a .safetensors or .pth path, or "" for none.

    Names may be those of smp or of timm. Returns a sentence with how many tensors matched; none is an error.
    """
    if not weights:
        return "Encoder weights: random."
    encoder = model.net.encoder
    state = encoder.state_dict()
    found = _hub_weights(model.network.encoder) if weights == "imagenet" else _read_weights(resolve(weights))
    matched = {own: found[name] for own in state if (name := _counterpart(own, state[own], found))}
    learnt = [name for name in state if not name.endswith("num_batches_tracked")]
    n_matched = sum(name in matched for name in learnt)
    if not n_matched:
        raise UserError(f"encoder_weights {weights}: none of its {len(found)} tensors fits {model.network.encoder}.")
    encoder.load_state_dict(state | matched)
    return f"Encoder weights: {n_matched} of {len(learnt)} tensors matched in {weights}."


def check_weights(network: Network, weights: str) -> None:
    """UserError where `weights` cannot be meant: a file that is not there, or any for a network without an encoder."""
    if weights and network.arch == "classic_unet":
        raise UserError(f'encoder_weights is "{weights}", but classic_unet has no encoder to load. Set it to "".')
    if weights not in ("", "imagenet") and not resolve(weights).is_file():
        kinds = 'Give a .safetensors or .pth file, "imagenet" or "".'
        raise UserError(f"encoder_weights {resolve(weights)} does not exist. {kinds}")


def _counterpart(own: str, tensor: torch.Tensor, found: dict[str, torch.Tensor]) -> str | None:
    """The name in a file for the encoder's tensor `own`: smp's timm encoders put "model." before timm's names."""
    names = (own, own.removeprefix("model."), f"encoder.{own}", f"net.encoder.{own}")
    return next((name for name in names if name in found and found[name].shape == tensor.shape), None)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"encoder_weights {path} cannot be read: {str(error).splitlines()[0]}") from error
    return found.get("state_dict", found)


def _hub_weights(encoder: str) -> dict[str, torch.Tensor]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return smp.encoders.get_encoder(encoder, weights="imagenet").state_dict()
    except Exception as error:  # each hub client has its own family of network errors
        page = f"https://huggingface.co/{_repository(encoder)}/tree/main"
        reason = f'encoder_weights "imagenet" of {encoder} could not be fetched ({type(error).__name__})'
        raise UserError(f"{reason}. Save model.safetensors from {page} elsewhere and give its path.") from error


def _repository(encoder: str) -> str:
    """Where the hub keeps an encoder's ImageNet weights."""
    if encoder.startswith("tu-"):
        return timm.get_pretrained_cfg(encoder.removeprefix("tu-")).hf_hub_id
    return smp.encoders.encoders[encoder]["pretrained_settings"]["imagenet"]["repo_id"]


def save_checkpoint(path: Path, state: dict[str, torch.Tensor], network: Network, **facts) -> None:
    """Write weights as safetensors, with the network's description and `facts` (JSON-like) in the metadata."""
    metadata = {"network": json.dumps(asdict(network)), "facts": json.dumps(facts)}
    with atomic(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in state.items()}, metadata))


def load_checkpoint(path: Path) -> tuple[Segmenter, dict]:
    """The network of a checkpoint, on the CPU in evaluation mode, and the facts stored with it."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        model = Segmenter(Network(**json.loads(metadata["network"])))
        model.load_state_dict(load_file(path))
        return model.eval(), json.loads(metadata["facts"])
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path} cannot be read: {reason}. Train its fold with 03_train.") from error


class ClassicUNet(nn.Module):
    """The original U-Net with about 31.0 M parameters: (B, 3, H, W) -> (B, 1, H, W) logits.

    Source: Ronneberger, Fischer, Brox 2015 (arXiv 1505.04597); padded convolutions keep the size, and batch
    normalisation after each lets it train at a useful learning rate.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.down = nn.ModuleList([_double(3, widths[0]), *(_double(fine, deep) for fine, deep in pairs)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, 2) for fine, deep in reversed(pairs))
        self.merge = nn.ModuleList(_double(deep, fine) for fine, deep in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Down with the finer maps kept, then up with each of them joined again."""
        kept = [self.down[0](x)]
        for block in self.down[1:]:
            kept.append(block(nn.functional.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for enlarge, block in zip(self.up, self.merge, strict=True):
            x = block(torch.cat([kept.pop(), enlarge(x)], 1))
        return self.head(x)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)
