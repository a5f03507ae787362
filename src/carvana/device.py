"""The device that a process computes on and what it can do; nobody else asks torch for devices."""

import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeAlias

import torch
import yaml

from carvana.errors import UserError
from carvana.files import resolve
from carvana.parallel import SHARED_MEMORY, Processes, cores
from carvana.profiles import check

CHOICE = "CARVANA_DEVICE"  # environment variable with the parameter `device`: started processes inherit it
DRIVERS = Path("/dev")
Work: TypeAlias = Callable[..., torch.Tensor]
WARM_UP = 3  # calls before work is recorded, in which libraries choose their kernels and optimisers make their moments


def use_device(name: str, number: int = 0) -> torch.device:
    """Compute on `name` (auto, cuda, mps, cpu) from now on, here and in processes that are started; returns the device.

    Among several GPUs it is GPU `number`, counted round. UserError where `name` cannot be used; where only "auto"
    passes over a GPU, a line says why.
    """
    check({"device": name})
    os.environ[CHOICE] = name
    use_gpu(number)
    check_device(name)
    if name == "auto" and (reason := _unusable()):
        print(f"carvana: {reason}. It works on the {best().type.upper()}.", file=sys.stderr)
    return best()


def check_device(name: str) -> None:
    """UserError where a GPU that is asked for cannot be used."""
    lacks_cuda = name == "cuda" and (_unusable() or not torch.cuda.is_available())
    if lacks_cuda or (name == "mps" and not torch.backends.mps.is_available()):
        reason = (name == "cuda" and _unusable()) or "this machine has no such GPU"
        raise UserError(f"device is {name}, but {reason}. Give `-p device cpu` to work on the CPU all the same.")


def best() -> torch.device:
    """The device that `use_device` chose, or for "auto" a GPU of any make where one can be used, else the CPU."""
    name = os.environ.get(CHOICE, "auto")
    device = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else torch.device(name)
    return torch.device("cpu") if device is None or (name == "auto" and _unusable()) else device


def _unusable() -> str:
    """Why torch cannot compute on the NVIDIA GPU that is there; "" where it can, and where there is none."""
    if not torch.cuda.is_available():
        reason = f"its driver is too old for CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides it"
        reason = reason if torch.version.cuda else "it is built without CUDA"
        return f"torch {torch.__version__} cannot use the GPU: {reason}" if any(DRIVERS.glob("nvidia[0-9]*")) else ""
    major, minor = torch.cuda.get_device_capability()
    built_for = [int(arch) for arch in re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    if 10 * major + minor >= min(built_for, default=0):
        return ""
    oldest = f"{min(built_for) // 10}.{min(built_for) % 10}"
    return f"the GPU has compute capability {major}.{minor}, and torch {torch.__version__} needs {oldest} or more"


class Recorder:
    """Does work on tensors; on a CUDA device it is recorded for each of its shapes, and handed over whole from then on.

    A training step of a network with 500 layers is 6000 calls, which take the host longer than the GPU. Work must not
    look at contents and must return one tensor; what it changes must keep its place in memory. Its first `WARM_UP`
    calls of a shape, and all of those that cannot be recorded, run as they are. All records share one piece of memory,
    since they run one after the other. Source: "CUDA Graphs" in PyTorch's notes on CUDA semantics.
    """

    def __init__(self, on: torch.device, record: bool = True):
        self.stream = torch.cuda.Stream() if record and on.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.lock, self.told = threading.Lock(), False  # told: that something is not recorded
        self.forget()

    def forget(self) -> None:
        """Give the memory of all records back."""
        self.calls: Counter[tuple] = Counter()
        self.records: dict[tuple, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.stream else None  # an empty one cannot be used again

    def __call__(self, name: Hashable, work: Work, *tensors: torch.Tensor) -> torch.Tensor:
        """The result of the work called `name`, a tensor of its own."""
        if not (stream := self.stream):
            return work(*tensors)
        with self.lock:  # two threads would write into the same inputs
            key = name, *(tensor.shape for tensor in tensors)
            self.calls[key] += 1
            if self.calls[key] == WARM_UP + 1:
                self._record(key, work, tensors)
            if key not in self.records:
                return _on(stream, work, tensors)
            graph, inputs, result = self.records[key]
            for kept, new in zip(inputs, tensors, strict=True):
                kept.copy_(new)
            graph.replay()
            return result.clone()

    def _record(self, key: tuple, work: Work, tensors: tuple[torch.Tensor, ...]) -> None:
        graph, inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in tensors]
        try:  # other threads copy batches meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = work(*inputs)
            self.records[key] = graph, inputs, result
        except RuntimeError as error:  # memory for it is short, or an operation waits for the device
            if not self.told:
                reason = str(error).splitlines()[0]
                print(f"carvana: work is not recorded ({reason}), so it is slower.", file=sys.stderr)
            self.told = True
            if not self.records:
                self.pool = torch.cuda.graph_pool_handle()


def _on(stream: torch.cuda.Stream, work: Work, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Work as it is on the stream that will record it, where its gradients must have been before."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    return result


def moved(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The batch on a device; on CUDA nothing waits for it: one of Apple's GPUs would read memory that is freed."""
    return batch.to(device, non_blocking=device.type == "cuda")


def precision(amp: str) -> str:
    """The mixed precision that `amp` means on the device: "no", "fp16" or "bf16"."""
    check({"amp": amp})
    on_gpu = best().type == "cuda"
    if amp == "fp16" and not on_gpu:
        raise UserError("amp is fp16, which needs a GPU. Choose auto.")
    if amp != "auto":
        return amp
    if on_gpu:
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def worker_count(wanted: int, on_gpu: int, on_cpu: int, batch_bytes: int) -> int:
    """Processes that prepare batches: `wanted`, or for -1 `on_cpu`, and with a GPU `on_gpu` or as many as cores.

    Fewer, and a line says so, where shared memory does not hold two batches of each and two more.
    """
    if wanted < 0:
        wanted = min(on_gpu, cores()) if best().type == "cuda" else on_cpu
    if not Path(SHARED_MEMORY).exists():  # other systems have no limit of their own for it
        return wanted
    free = shutil.disk_usage(SHARED_MEMORY).free
    fits = max(0, (free // batch_bytes - 2) // 2)
    if fits < wanted:
        reason = f"{SHARED_MEMORY} has {free >> 20} MB. `docker run --shm-size 8g` gives more"
        print(f"carvana: {fits} of {wanted} workers, as {reason}.", file=sys.stderr)
    return min(wanted, fits)


def shared_among(processes: int, accelerate_config: str = "") -> Processes:
    """The processes that share the work: so many, or those that a file of `accelerate config` names.

    UserError where several of them would work on one GPU, or the file says no number.
    """
    if accelerate_config:
        try:
            path = resolve(accelerate_config)
            return Processes(int(yaml.safe_load(path.read_text())["num_processes"]), str(path))
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            reason = f"accelerate_config {accelerate_config} gives no num_processes ({type(error).__name__})"
            raise UserError(f"{reason}. Make it with `accelerate config --config_file FILE`.") from error
    if processes > 1 and 0 < gpu_count() < processes:
        raise UserError(f"processes is {processes}, but there are {gpu_count()} GPUs. Let each have one of its own.")
    return Processes(processes)


def gpu_count() -> int:
    """GPUs of this machine that may be used."""
    return 0 if os.environ.get(CHOICE) == "cpu" else torch.cuda.device_count()


def use_gpu(number: int) -> None:
    """Make GPU `number`, counted round, the one of this process; of a launched process the one of its own number."""
    if gpu_count() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", number)) % gpu_count())


def connected() -> bool:
    """Whether this is one of the processes that `parallel.launch` has started together."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    """The number of this process among those that work together; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))
