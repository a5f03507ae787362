"""Work that a GPU records and replays: the bookkeeping anywhere, and on a CUDA device that nothing else changes."""

import contextlib
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import recipe

from carvana import device
from carvana.inference import Ensemble, EnsembleSpec
from carvana.models import SegmentationModel, save_checkpoint
from carvana.training.state import TrainState

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs as a CPU can play them: a replay does the recorded work again on the kept inputs."""
    made = SimpleNamespace(pools=[], modes=[], works={})

    class Graph:
        def replay(self):
            records = self.recorder.records.items()
            name, inputs, result = next((key[0], *record[1:]) for key, record in records if record[0] is self)
            result.copy_(made.works[name](*inputs))

    @contextlib.contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        made.pools.append(pool)
        made.modes.append(capture_error_mode)
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    call = device.Recorder.__call__

    def noting(self, name, work, *tensors):
        Graph.recorder, made.works[name] = self, work
        return call(self, name, work, *tensors)

    monkeypatch.setattr(device.Recorder, "__call__", noting)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return made


CUDA = torch.device("cuda")


def test_recorded_work_gives_for_every_shape_what_the_work_gives(graphs):
    recorder = device.Recorder(CUDA)
    given = [(torch.rand(n, 3), torch.rand(n, 3)) for n in (2, 2, 5, 2, 2, 5, 5, 2, 1, 5, 5, 2, 5)]
    results = [recorder("sum", lambda a, b: (a * b).sum(0), *pair) for pair in given]
    for (a, b), result in zip(given, results, strict=True):
        assert torch.equal(result, (a * b).sum(0))  # each is kept: later calls do not write into it
    assert [first[0] for _, first, _ in recorder.records] == [2, 5]  # of a lone batch of 1 nothing was recorded
    assert graphs.modes == ["thread_local"] * 2  # the loader's thread copies to the device meanwhile


def test_all_works_of_a_recorder_share_one_memory_until_they_are_forgotten(graphs):
    recorder, one = device.Recorder(CUDA), torch.ones(1)
    for _ in range(5):
        assert [recorder(n, lambda a, n=n: a + n, one).item() for n in range(3)] == [1, 2, 3]
    assert len(graphs.pools) == 3 and len({*graphs.pools}) == 1
    recorder.forget()
    assert not recorder.records
    for _ in range(5):
        assert recorder(0, lambda a: a + 7, one).item() == 8
    assert len({*graphs.pools}) == 2  # what was given back is never recorded into


def test_threads_do_not_get_the_result_of_each_other(graphs):
    recorder = device.Recorder(CUDA)

    def work(a):
        time.sleep(0.001)  # here another thread may come
        return a + 1

    def many(start):
        return all(recorder("add", work, torch.tensor(float(n))).item() == n + 1 for n in range(start, start + 30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, (0, 100, 200, 300)))


def fail(monkeypatch):
    @contextlib.contextmanager
    def failing(*_, **__):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "graph", failing)


def test_work_that_cannot_be_recorded_is_done_as_it_is_and_said_once(graphs, capsys, monkeypatch):
    recorder = device.Recorder(CUDA)
    fail(monkeypatch)
    for n in range(12):
        assert recorder("add", lambda a: a + 1, torch.tensor([float(n)])).item() == n + 1
        if n == 5:  # a validation
            recorder.forget()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "carvana: work is not recorded (operation not permitted when stream is capturing), so it is slower."
    ]


def test_a_step_that_fails_leaves_no_gradients_for_the_next_one(tmp_path, monkeypatch):
    state = TrainState(recipe(height=32, width=32), 0, 4, "data", tmp_path / "state.pt")
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(type(state.optimizer), "step", full)
        state.train_step(images, images[..., 0].contiguous())
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_on_other_devices_work_is_only_done():
    recorder = device.Recorder(torch.device("cpu"))
    assert [recorder("sum", torch.sum, torch.ones(3)).item() for _ in range(5)] == [3] * 5
    assert not recorder.calls


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nmuon", "sgd"])
def test_the_average_is_what_its_definition_says(optimizer, tmp_path):
    """The average of step n is the last one and weight 1 - d of the network; d = 1 - n ** (-2 / 3), at most ema."""
    state = TrainState(recipe(optimizer=optimizer, height=32, width=32), 0, 9, "data", tmp_path / "state.pt")
    average = {name: value.clone() for name, value in state.network.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for n in range(1, 5):
        images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=generator)
        state.train_step(images, images[..., 0].contiguous())
        decay = min(1 - n ** (-2 / 3), 0.9)
        for name, value in state.model.state_dict().items():
            average[name] = average[name].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    for name, value in state.network.state_dict().items():
        torch.testing.assert_close(value, average[name], msg=name)


def gone_without_collecting(things):
    """Whether the only thing in a list is freed with it, without a search for cycles."""
    alive = weakref.ref(things[0])
    gc.disable()
    things.clear()
    freed = alive() is None
    gc.enable()
    return freed


def test_an_ensemble_that_nobody_needs_gives_its_memory_back_at_once(tmp_path):
    config = recipe(height=32, width=32).model_config
    save_checkpoint(tmp_path / "best.safetensors", SegmentationModel(config).state_dict(), config, amp="no")
    ensemble = [Ensemble(EnsembleSpec.equal([tmp_path / "best.safetensors"], ["none"]))]
    ensemble[0].forward({(32, 32): torch.zeros(1, 32, 32, 3, dtype=torch.uint8)})
    assert gone_without_collecting(ensemble)


def test_a_training_that_nobody_needs_gives_its_records_back_at_once(tmp_path):
    state = [TrainState(recipe(height=32, width=32), 0, 4, "data", tmp_path / "state.pt")]
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    state[0].train_step(images, images[..., 0].contiguous())
    assert gone_without_collecting(state)


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel wraps a network, and does not see that the network inside was set to evaluation."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def test_after_a_validation_the_whole_network_learns_again(tmp_path, monkeypatch):
    state = TrainState(recipe(height=32, width=32, ema=0.0), 0, 4, "data", tmp_path / "state.pt")
    network, images = state.model, torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    state.model = Wrapper(network)
    monkeypatch.setattr(state.accelerator, "unwrap_model", lambda model: getattr(model, "module", model))
    for _ in range(2):
        state.network.eval()
        state.train_step(images, images[..., 0].contiguous())
        assert all(layer.training for layer in network.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "nmuon"])
def test_a_training_that_a_gpu_recorded_goes_on_on_a_cpu(optimizer, tmp_path):
    """Its learning rate and its counters of steps lie on the GPU; so says the file."""
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)

    def state(name):
        return TrainState(recipe(optimizer=optimizer, height=32, width=32), 0, 4, "data", tmp_path / name)

    begun = state("state.pt")
    begun.train_step(images, images[..., 0].contiguous())
    begun.save()
    contents = torch.load(tmp_path / "state.pt", weights_only=True)
    for group in contents["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "capturable": True}
    torch.save(contents, tmp_path / "recorded.pt")
    losses = []
    for resumed in (begun, state("recorded.pt")):
        losses.append([resumed.train_step(images, images[..., 0].contiguous()).item() for _ in range(2)])
    assert losses[0] == losses[1]


@on_a_gpu
@pytest.mark.parametrize("changes", [
    {"optimizer": "nmuon"}, {"optimizer": "adamw"}, {"optimizer": "adam", "ema": 0.0},
    {"optimizer": "nmuon", "start_size": 0.5}, {"optimizer": "adamw", "amp": "no"},
])  # fmt: skip
def test_a_recorded_training_learns_what_an_unrecorded_one_learns(changes, tmp_path, monkeypatch):
    monkeypatch.setenv(device.CHOICE, "cuda")
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 256, (4, 4, 96, 128, 3), dtype=torch.uint8, generator=generator)
    losses, recorders = [], []
    for record in (True, False):
        state = TrainState(recipe(**changes), 0, 24, "data", tmp_path / f"{len(losses)}")
        recorders.append(state.recorder if record else device.Recorder(state.device, record=False))
        state.recorder = recorders[-1]
        steps = [state.train_step(batches[i % 4], batches[i % 4, ..., 0]) for i in range(24)]
        losses.append(torch.stack(steps).cpu())
    assert recorders[0].records and not recorders[1].records
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


@on_a_gpu
def test_recorded_predictions_are_those_of_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv(device.CHOICE, "cuda")
    config, logits = recipe().model_config, []
    save_checkpoint(tmp_path / "best.safetensors", SegmentationModel(config).state_dict(), config, amp="bf16")
    batches = torch.randint(0, 256, (8, 4, config.height, config.width, 3), dtype=torch.uint8)
    for record in (True, False):
        ensemble = Ensemble(EnsembleSpec.equal([tmp_path / "best.safetensors"], ["none", "hflip"]))
        ensemble.recorder = ensemble.recorder if record else device.Recorder(ensemble.device, record=False)
        logits.append([ensemble.forward({(config.height, config.width): batch})[0].cpu() for batch in batches])
    torch.testing.assert_close(*logits)
