"""What torch's device can do; nobody else asks for its capabilities."""

import os

import torch

from carvana.errors import UserError

PRECISIONS = ("no", "fp16", "bf16", "auto")


def precision(amp: str) -> str:
    """The mixed precision that `amp` means on this machine: "no", "fp16" or "bf16"."""
    if amp not in PRECISIONS:
        raise UserError(f'amp is "{amp}". Choose from: {", ".join(PRECISIONS)}.')
    if amp == "fp16" and not torch.cuda.is_available():
        raise UserError("amp is fp16, which needs a GPU. Choose auto.")
    if amp != "auto":
        return amp
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def best() -> torch.device:
    """A GPU of any make where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_processes(processes: int) -> None:
    """UserError where several processes would train on one GPU."""
    if processes > 1 and 0 < gpu_count() < processes:
        raise UserError(f"processes is {processes}, but there are {gpu_count()} GPUs. Let each have one of its own.")


def gpu_count() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count()


def use_gpu(number: int) -> None:
    """Make GPU `number`, counted round, the one of this process; launched processes have theirs from Accelerate."""
    if gpu_count() > 1 and not connected():
        torch.cuda.set_device(number % gpu_count())


def connected() -> bool:
    """Whether this is one of the processes that `parallel.launch` has started together."""
    return "LOCAL_RANK" in os.environ


def process_count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))
