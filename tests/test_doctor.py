import socket
from importlib import metadata

import pytest
import torch
from conftest import write_competition
from fake_kaggle import KEY, USER, hide_credentials

from carvana import cli, device, doctor, models


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A home without credentials, a profile of an own folder, and no network at all."""

    def connected(*_):
        pytest.fail("the doctor contacts nobody")

    hide_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv(device.CHOICE, "auto")
    monkeypatch.setattr(doctor, "cores", lambda: 7)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, connected)
    profile = tmp_path / "p.yaml"
    values = {"run_name": "tiny", "data_dir": tmp_path / "data", "runs_dir": tmp_path / "new" / "runs"}
    profile.write_text("".join(f"{name}: {value}\n" for name, value in values.items()) + 'encoder_weights: ""\n')
    return profile


def lines(profile):
    return {name: (state, seen) for state, name, seen in doctor.examine(profile)}


def test_a_machine_that_can_train(machine, tmp_path, capsys):
    write_competition(tmp_path / "data")
    found = lines(machine)
    assert [*found] == [
        "profile", "Python", "packages", "device", "cores", "memory", "disk", "/dev/shm", "credentials", "data",
        "weights",
    ]  # fmt: skip
    assert found["data"] == ("ok", f"16 images to train on in {tmp_path / 'data'}")
    assert found["weights"] == ("ok", "none needed")
    assert found["cores"][1] == "7"
    assert found["credentials"][0] == "note"
    assert not (tmp_path / "new").exists()
    assert cli.main(["doctor", str(machine)]) == 0
    assert "ok   data        16 images" in capsys.readouterr().out


def test_no_data_and_no_credentials_stop_a_run_and_a_key_is_never_shown(machine, monkeypatch, capsys):
    assert cli.main(["doctor", str(machine)]) == 1
    assert "STOP data        none in" in capsys.readouterr().out
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert cli.main(["doctor", str(machine)]) == 0
    shown = capsys.readouterr().out
    assert "credentials from the environment variables KAGGLE_USERNAME and KAGGLE_KEY" in shown
    assert "note data        none in" in shown and "01_download fetches" in shown
    assert KEY not in shown


def test_what_stops_a_run_or_is_worth_a_note_says_what_to_do(machine, monkeypatch):
    space = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: space)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 30}))
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1")
    monkeypatch.setattr(doctor.metadata, "distributions", lambda name: [name])
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy>=2", 'ruff>=9; extra == "test"'])
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": ">=9"})
    machine.write_text(machine.read_text().replace('""', "lost.pth"))
    found = lines(machine)
    assert {name for name, (state, _) in found.items() if state == "STOP"} == {
        "Python", "packages", "disk", "data", "weights",
    }  # fmt: skip
    assert "make clean setup PYTHON=" in found["Python"][1]
    assert found["packages"][1].startswith("numpy>=2 (0.0.1). Install")
    assert "lost.pth does not exist. Give a" in found["weights"][1]
    assert found["memory"] == ("note", "1.0 GB free. End other programs, or lower batch_size and workers")


def test_a_profile_that_cannot_be_read_is_one_line_and_the_machine_is_looked_at_all_the_same(machine):
    machine.write_text("encodr: resnet18")
    found = lines(machine)
    assert found["profile"][0] == "STOP" and 'did you mean "encoder"' in found["profile"][1]
    assert "cores" in found and "data" not in found


def test_encoder_weights_of_the_hub_are_found_in_its_cache(machine, monkeypatch, tmp_path):
    from huggingface_hub import constants

    machine.write_text(machine.read_text().replace('""', "imagenet"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert lines(machine)["weights"][0] == "note"
    repository = models.smp.encoders.encoders["resnet34"]["pretrained_settings"]["imagenet"]["repo_id"]
    file = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / "1a" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert lines(machine)["weights"] == ("ok", "imagenet of resnet34, cached")


def test_the_requirements_that_are_compared_are_the_packages_own(machine):
    assert lines(machine)["packages"][0] == "ok"
    assert any(need.startswith("torch") for need in metadata.requires("carvana"))


def test_a_gpu_that_the_profile_wants_and_that_is_not_there_is_a_stop(machine, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    machine.write_text(machine.read_text() + "device: cuda\n")
    state, seen = lines(machine)["device"]
    assert state == "STOP"
    assert "device is cuda, but" in seen and "-p device cpu" in seen


def test_the_device_is_the_one_that_the_profile_wants(machine, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    machine.write_text(machine.read_text() + "device: cpu\n")
    state, seen = lines(machine)["device"]
    assert state == "note" and seen.startswith("cpu, precision")


def test_disk_is_counted_for_what_the_profile_caches_and_parameters_may_be_given(machine, monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 26_000_000_000}))
    assert lines(machine)["disk"][0] == "note"  # 5088 x 640 x 960 x 4 bytes twice are 25 GB, and a run takes more
    assert "The cache of 5088 images takes 13 GB, and is written where twice as much" in lines(machine)["disk"][1]
    cli.main(["doctor", str(machine), "-p", "height", "320", "-p", "width", "480"])
    assert "ok   disk" in capsys.readouterr().out
    cli.main(["doctor", str(machine), "-p", "demo_cars", "12"])
    assert "ok   disk" in capsys.readouterr().out


def test_outside_the_project_the_machine_is_looked_at_all_the_same(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "note profile     no notebooks here" in shown and "cores" in shown
    assert "STOP" not in shown and "data  " not in shown


@pytest.mark.parametrize(("line", "message"), [
    ("encoder: nosuch", 'encoder "nosuch" is unknown'), ("arch: foo", 'arch "foo" is unknown'),
    ('decoder_channels: "a"', 'decoder_channels is "a"'), ("optimizer: foo", 'optimizer "foo" is unknown'),
    ("crop_height: 256", "crop_height and crop_width are (256, 0)"), ("device: cpu\namp: fp16", "amp is fp16, which"),
])  # fmt: skip
def test_what_03_would_refuse_of_a_profile_is_a_stop(machine, line, message):
    machine.write_text(f"{machine.read_text()}{line}\n")
    state, seen = lines(machine)["weights"]
    assert state == "STOP" and message in seen
