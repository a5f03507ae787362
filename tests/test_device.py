"""What a machine is taken for: its GPU, its cores and its shared memory, as other machines would state theirs."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import recipe

from carvana import device, parallel, preflight
from carvana.errors import UserError
from carvana.files import project_root
from carvana.profiles import load_profile, with_defaults
from carvana.training.state import TrainState

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # a current wheel's list


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without any GPU, whose choice of a device ends with the test."""
    monkeypatch.setenv(device.CHOICE, "auto")
    monkeypatch.setattr(device, "DRIVERS", tmp_path)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    for part in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(part, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """Gives the machine a GPU of a compute capability, which this torch is built for or not."""

    def give(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEEL)

    return give


@pytest.mark.parametrize("name", ["seed", "t4x2", "h100"])
def test_a_profile_for_a_gpu_runs_on_a_cpu_only_when_told_so(name):
    path = project_root() / "profiles" / f"{name}.yaml"
    with pytest.raises(UserError, match=r"device is cuda, but this machine has no such GPU\. Give `-p device cpu`"):
        preflight.check_inputs(with_defaults(load_profile(path)))
    preflight.check_inputs(with_defaults(load_profile(path, {"device": "cpu"})))
    assert device.use_device("cpu") == torch.device("cpu")


def test_the_other_profiles_take_what_there_is():
    for name in ("demo", "cpu"):
        preflight.check_inputs(with_defaults(load_profile(project_root() / "profiles" / f"{name}.yaml")))


@pytest.mark.parametrize(("cuda", "message"), [
    ("12.8", "its driver is too old for CUDA 12.8"),
    (None, "it is built without CUDA"),
])  # fmt: skip
def test_a_gpu_that_torch_does_not_see_is_one_line(monkeypatch, capsys, tmp_path, cuda, message):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError, match=message) as error:
        device.use_device("cuda")
    assert "-p device cpu" in str(error.value) and "\n" not in str(error.value)
    assert device.use_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert message in said and said.endswith("It works on the CPU.\n") and said.count("\n") == 1


def test_a_gpu_that_is_older_than_the_build_is_one_line_and_never_used(gpu, capsys):
    gpu(6, 0)
    with pytest.raises(UserError, match=r"has compute capability 6.0, and torch .* needs 7.5 or more"):
        device.use_device("cuda")
    assert device.use_device("auto") == torch.device("cpu")
    assert "capability 6.0" in capsys.readouterr().err
    assert device.precision("auto") != "fp16"


@pytest.mark.parametrize(("capability", "amp"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 1), "bf16")])
def test_a_gpu_decides_the_precision_unless_the_cpu_is_asked_for(gpu, capsys, capability, amp):
    gpu(*capability)
    assert device.use_device("cuda") == device.use_device("auto") == torch.device("cuda")
    assert device.precision("auto") == amp
    assert not capsys.readouterr().err
    device.use_device("cpu")
    assert device.precision("auto") != "fp16"
    with pytest.raises(UserError, match="amp is fp16, which needs a GPU. Choose auto"):
        device.precision("fp16")


def test_a_lane_takes_its_gpu_before_anything_asks_for_a_capability(gpu, monkeypatch):
    gpu(9, 0)
    asked = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: asked.append("capability") or (9, 0))
    device.use_device("cuda", 3)
    assert asked[:2] == [1, "capability"]


@pytest.mark.parametrize("name", ["gpu", "mps"])
def test_a_device_that_is_unknown_or_elsewhere_is_one_line(name):
    with pytest.raises(
        UserError, match=r"device \"gpu\" is unknown, did you mean \"cpu\"\? Choose from: auto, cuda|device is mps, but"
    ):
        device.use_device(name)


def test_training_takes_the_device_that_was_chosen(gpu, tmp_path):
    gpu(9, 0)
    device.use_device("cpu")
    assert TrainState(recipe(), 0, 4, "data", tmp_path / "state.pt").device == torch.device("cpu")


def test_cores_are_those_that_affinity_and_container_allow_shared_among_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(parallel, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.delenv(parallel.SHARING, raising=False)
    assert parallel.cores() == 8
    for limit, cores in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)):
        parallel.CPU_MAX.write_text(f"{limit}\n")
        assert parallel.cores() == cores
    with parallel.sharing(2):
        assert parallel.cores() == 4
        with parallel.sharing(4):
            assert parallel.cores() == 1
        assert parallel.cores() == 4
    assert parallel.cores() == 8


def test_workers_are_as_many_as_cores_and_shared_memory_allow(gpu, monkeypatch, capsys):
    disk, free = namedtuple("disk", "free"), 64 << 30
    monkeypatch.setattr(device.shutil, "disk_usage", lambda path: disk(free))
    monkeypatch.setattr(device, "SHARED_MEMORY", str(Path(__file__).parent))  # a path that every system has
    monkeypatch.setattr(device, "cores", lambda: 12)
    batch = 16 * 640 * 960 * 4  # of the h100 profile: 39 MB
    assert device.worker_count(-1, 8, 0, batch) == 0
    gpu(9, 0)
    assert (device.worker_count(-1, 8, 0, batch), device.worker_count(-1, 16, 1, batch)) == (8, 12)
    assert not capsys.readouterr().err
    free = 64 << 20  # what Docker gives
    assert device.worker_count(-1, 8, 0, batch) == 0
    assert "0 of 8 workers, as" in (said := capsys.readouterr().err) and "has 64 MB" in said and "--shm-size" in said
    free = 10 * batch
    assert device.worker_count(6, 8, 0, batch) == 4
