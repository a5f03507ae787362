"""What a GPU would be given, on a machine without one: fake tensors have a device and a shape, and no contents.

Whatever needs contents of a tensor on the device would make the host wait for it, and is an error here.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ENCODER, recipe
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from carvana import device
from carvana.inference import Ensemble, EnsembleSpec
from carvana.inference.logits import blend
from carvana.models import ModelConfig, SegmentationModel
from carvana.training.state import TrainState

SIZE = 64, 96


class Watch(TorchDispatchMode):
    """Refuses whatever brings a tensor from the device to the host; notes the dtypes that the device saw."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cpu":
            return 1.0  # a step counter of the optimiser, which is read on the host
        result = func(*args, **(kwargs or {}))
        came, went = ([part for part in tree_leaves(tree) if isinstance(part, torch.Tensor)] for tree in (args, result))
        if any(tensor.device.type != "cpu" for tensor in came):
            assert all(tensor.device.type != "cpu" for tensor in went), f"{func} waits for the device"
        self.dtypes |= {tensor.dtype for tensor in went if tensor.device.type != "cpu"}
        return result


@pytest.fixture
def gpu(monkeypatch):
    """Gives the machine a GPU of a compute capability, whose tensors are fake; modules are built on it."""
    made, cpu_generator = [], torch.Generator

    def build(config):
        with torch.device("cuda"):
            made.append(SegmentationModel(config))
        return made[-1]

    def backward(loss, *args, **kwargs):  # autograd does not start without a driver
        assert loss.device.type == "cuda"
        for parameter in made[0].parameters():
            parameter.grad = torch.empty_like(parameter)

    def properties(capability):
        return SimpleNamespace(major=capability[0], minor=capability[1])

    def give(capability):
        monkeypatch.setenv(device.CHOICE, "cuda")
        answers = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None}
        answers |= {"is_current_stream_capturing": False}
        answers |= {"get_device_capability": capability, "get_device_properties": properties(capability)}
        for name, answer in {**answers, "get_arch_list": []}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)
        monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # fake parameters cannot be moved
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(torch, "Generator", lambda device=None: cpu_generator())
        monkeypatch.setattr("carvana.training.state.SegmentationModel", build)
        without = functools.partial(device.Recorder, record=False)  # fake work cannot be recorded
        monkeypatch.setattr(device, "Recorder", without)
        monkeypatch.setattr("carvana.training.state.Recorder", lambda on, record: without(on))
        monkeypatch.setattr("carvana.training.state.RECORDABLE", ["nmuon"])  # fused Adam has no fake for such an lr
        monkeypatch.setattr("timm.utils.model_ema.deepcopy", lambda model: build(model.config))
        return build

    return give


def batch():
    return torch.zeros(2, *SIZE, 3, dtype=torch.uint8), torch.zeros(2, *SIZE, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("capability", "optimizer", "half"), [
    ((7, 5), "adamw", torch.float16),  # a T4; Muon would wait for the scaler once a step
    ((9, 0), "nmuon", torch.bfloat16),  # of the h100 profile
    ((9, 0), "adam", torch.bfloat16),  # of the seed profile
])  # fmt: skip
def test_a_training_step_stays_on_the_gpu_and_waits_for_nothing(gpu, tmp_path, capability, optimizer, half):
    gpu(capability)
    chosen = recipe(optimizer=optimizer, amp="auto", start_size=0.5, height=SIZE[0], width=SIZE[1])
    with FakeTensorMode(), Watch() as watch:
        state = TrainState(chosen, 0, 4, "data", tmp_path / "state.pt")
        for _ in range(2):
            loss = state.train_step(*batch())
            assert loss.device.type == "cuda"
        weights = [*state.model.parameters(), *state.network.parameters(), *state.network.buffers()]
        assert {tensor.device.type for tensor in weights} == {"cuda"}
        assert {tensor.dtype for tensor in state.network.parameters()} == {torch.float32}
    assert (state.accelerator.scaler is not None) == (half == torch.float16)
    assert half in watch.dtypes


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_multiplies_in_what_the_device_is_fast_at(monkeypatch, tmp_path, has_bf16, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
                products.append(args[1].dtype)
            return func(*args, **(kwargs or {}))

    small = recipe(optimizer="nmuon", height=32, width=32)
    state = TrainState(small, 0, 4, "data", tmp_path / "state.pt")
    with Products():
        state.train_step(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8))
    assert len(products) > 100
    assert set(products) == {dtype}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("capability", "half"), [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_an_ensemble_stays_on_the_gpu_until_its_logits_are_blended(gpu, monkeypatch, capability, half):
    build, sizes = gpu(capability), (SIZE, (32, 64))
    networks = {f"{i}": ModelConfig("unet", ENCODER, "16,8,8,8,8", *size) for i, size in enumerate(sizes)}
    monkeypatch.setattr(
        "carvana.inference.ensemble.load_checkpoint", lambda path: (build(networks[path.name]), {"amp": "bf16"})
    )
    with FakeTensorMode():
        ensemble = Ensemble(EnsembleSpec.equal([Path("0"), Path("1")], ["none", "hflip", "scale1.25"]))
        images = {size: torch.zeros(2, *size, 3, dtype=torch.uint8) for size in sizes}
        with Watch() as watch:
            logits = ensemble.forward(images)
        assert [(tensor.device.type, tensor.dtype, *tensor.shape[2:]) for tensor in logits] == [
            ("cuda", torch.float32, *size) for size in sizes
        ]
        moved = []
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape) or torch.zeros(self.shape))
        monkeypatch.setattr(torch.Tensor, "numpy", lambda self: [None, None])
        blend(logits, [0.5, 0.5])
    assert moved == [(2, *size) for size in sizes]  # once a size: without tta and checkpoints
    assert half in watch.dtypes


class OnDevice(Accelerator):
    """Like one of Apple's GPUs: beside the host, and not CUDA."""

    device = torch.device("meta")

    def prepare(self, model, optimizer):
        """Give the optimiser the parameters that were moved: other than on true devices they are new ones."""
        given = list(model.parameters())
        model, optimizer = super().prepare(model, optimizer)
        moved = dict(zip(given, model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [moved[parameter] for parameter in group["params"]]
        return model, optimizer


@pytest.mark.parametrize("optimizer", ["nmuon", "sgd", "lamb"])
def test_all_of_a_training_is_moved_to_a_device_that_has_no_double_precision(monkeypatch, tmp_path, optimizer):
    monkeypatch.setattr("carvana.training.state.Accelerator", OnDevice)
    move, waits = torch.Tensor.to, []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *to, **how: waits.append(how.get("non_blocking")) or move(self, *to, **how)
    )
    state = TrainState(recipe(optimizer=optimizer, height=SIZE[0], width=SIZE[1]), 0, 4, "data", tmp_path / "state.pt")
    for _ in range(3):
        with Watch() as watch:
            assert state.train_step(*batch()).device.type == "meta"
        assert torch.float64 not in watch.dtypes
    assert True not in waits  # which on Apple's GPUs would read a batch that is freed already
    moments = [part for of_weight in state.optimizer.state.values() for part in of_weight.values()]
    tensors = [*state.model.state_dict().values(), *state.network.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {part.device.type for part in moments if isinstance(part, torch.Tensor) and part.ndim} == {"meta"}


@pytest.mark.filterwarnings("ignore")
def test_step_counters_of_a_resumed_training_are_read_on_the_host(monkeypatch, tmp_path):
    def state():
        return TrainState(
            recipe(height=32, width=32, optimizer="nmuon"),
            0,
            4,
            "data",
            tmp_path / "state.pt",
        )

    begun = state()
    begun.train_step(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8))
    begun.save()
    monkeypatch.setattr("carvana.training.state.Accelerator", OnDevice)
    resumed = state()
    assert resumed.step == 1
    parts = {(key, part.device.type) for kept in resumed.optimizer.state.values() for key, part in kept.items()
             if isinstance(part, torch.Tensor)}  # fmt: skip
    assert ("step", "cpu") in parts
    assert {place for key, place in parts if key != "step"} == {"meta"}
