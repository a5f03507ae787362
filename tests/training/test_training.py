import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import RECIPE, begun, recipe, trainer_of
from safetensors.torch import load_file, save_file

from carvana import models
from carvana.data.competition import Competition
from carvana.device import shared_among
from carvana.errors import UserError
from carvana.files import project_root
from carvana.metrics import PixelCounts
from carvana.parallel import Processes, launch
from carvana.profiles import load_profile, with_defaults
from carvana.run import Run
from carvana.training.launch import train
from carvana.training.recipe import Recipe, learning_rate, plateaus, size_at
from carvana.training.state import TrainState
from carvana.training.trainer import Trainer
from carvana.training.validation import Scores, Validator

LEARNS = {"epochs": 16, "batch_size": 2, "validate_every": 4}


@pytest.fixture(scope="module")
def trained(shared_competition, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    trainer = trainer_of(shared_competition, run_dir, **LEARNS)
    return trainer, train(trainer), run_dir


def test_training_learns_the_ellipses(trained):
    _, history, _ = trained
    assert history["dice"].iloc[-1] > 0.9
    assert history["dice"].iloc[-1] > history["dice"].iloc[0] + 0.2


def test_history_opens_with_the_untrained_network_and_counts_images_and_seconds(trained):
    _, history, run_dir = trained
    assert history["epoch"].tolist() == [0, 4, 8, 12, 16]
    assert history["images_seen"].tolist() == [0, 32, 64, 96, 128]
    assert math.isnan(history["loss"].iloc[0])
    assert history["seconds"].is_monotonic_increasing
    assert pd.read_csv(run_dir / "fold0" / "history.csv").shape == history.shape


def test_best_weights_are_those_of_the_highest_dice(trained):
    trainer, history, run_dir = trained
    network = trainer.state.network
    network.load_state_dict(load_file(run_dir / "fold0" / "best.safetensors"))
    dice = trainer.validator.scores(network, trainer.valid_rows).dice
    assert dice == pytest.approx(history["dice"].max(), abs=1e-9)


def test_no_car_is_trained_on_and_scored(trained):
    trainer, _, _ = trained
    cars = trainer.samples["car"]
    assert not set(cars.iloc[trainer.train_rows]) & set(cars.iloc[trainer.valid_rows])


def test_a_finished_fold_is_not_trained_again(trained, shared_competition):
    _, history, run_dir = trained
    again = trainer_of(shared_competition, run_dir, **LEARNS)
    assert again.finished
    pd.testing.assert_frame_equal(train(again), history)


def test_held_out_cars_are_in_no_part(shared_competition, tmp_path):
    trainer = trainer_of(shared_competition, tmp_path / "run", holdout_cars=1)
    used = set(trainer.samples["car"].iloc[[*trainer.train_rows, *trainer.valid_rows]])
    assert used == set(trainer.folds.loc[trainer.folds["fold"] >= 0, "car"])


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from conftest import trainer_of
    from carvana.training import trainer as training
    from carvana.training.launch import train
    if __name__ == "__main__":
        training.SAVE_MINUTES = 0  # a state after every step
        trainer = trainer_of(Path({data!r}), Path({run!r}), epochs=4, **{changes!r})
        save = trainer.state.save
        def counted():
            save()
            if trainer.state.step == {step}:
                os.kill(os.getpid(), signal.SIGKILL)
        trainer.state.save = counted
        train(trainer, workers={workers})
"""


def test_training_killed_at_two_points_ends_in_the_same_weights(shared_competition, tmp_path, workers=2):
    whole = trainer_of(shared_competition, tmp_path / "whole", epochs=4, optimizer="nmuon")
    expected = train(whole, workers=workers)
    for step in (1, 7):
        facts = {"tests": str(Path(__file__).parents[1]), "data": str(shared_competition), "run": str(tmp_path / "cut")}
        code = textwrap.dedent(KILLED).format(**facts, step=step, workers=workers, changes={"optimizer": "nmuon"})
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    history = train(trainer_of(shared_competition, tmp_path / "cut", epochs=4, optimizer="nmuon"), workers=workers)
    measured = ["seconds", "speed"]
    pd.testing.assert_frame_equal(history.drop(columns=measured), expected.drop(columns=measured))
    for name in ("best", "last"):
        actual, expected = (load_file(tmp_path / run / "fold0" / f"{name}.safetensors") for run in ("cut", "whole"))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_max_hours_ends_after_a_whole_step_and_the_next_call_goes_on(shared_competition, tmp_path):
    trainer = trainer_of(shared_competition, tmp_path)
    train(trainer, max_hours=1e-9)
    assert trainer.state.step == 1
    again = trainer_of(shared_competition, tmp_path)
    assert again.state.step == 1
    train(again)
    assert again.finished


@pytest.mark.parametrize("init_from", ["", "first"])
def test_a_disk_that_is_full_at_the_first_state_costs_nothing_but_that(
    trained, shared_competition, tmp_path, monkeypatch, init_from
):
    shutil.copytree(trained[2], tmp_path / "first")
    changes = {"epochs": 1, "init_from": init_from}
    expected = train(trainer_of(shared_competition, tmp_path / "whole", **changes))

    def full(_):
        raise UserError("state.pt could not be written: No space left on device.")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space"):
        patch.setattr(TrainState, "save", full)
        train(trainer_of(shared_competition, tmp_path / "cut", **changes))
    assert (tmp_path / "cut" / "fold0" / "best.safetensors").exists()
    history = train(trainer_of(shared_competition, tmp_path / "cut", **changes))
    pd.testing.assert_series_equal(history["dice"], expected["dice"])


def test_another_recipe_in_the_same_folder_is_refused_and_named(trained, shared_competition):
    _, _, run_dir = trained
    with pytest.raises(UserError, match=r"state.pt was trained with another lr \(0.003\)"):
        trainer_of(shared_competition, run_dir, **LEARNS, lr=1e-3)


def test_who_had_no_memory_for_the_first_step_may_take_smaller_batches(shared_competition, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    expected = train(trainer_of(shared_competition, tmp_path / "whole", epochs=1, batch_size=2, accumulate=2))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Halve batch_size and double accumulate"):
        patch.setattr(TrainState, "train_step", full)
        train(trainer_of(shared_competition, tmp_path / "run", epochs=1, batch_size=4, encoder_weights=""))
    assert (tmp_path / "run" / "fold0" / "state.pt").exists()
    trainer = trainer_of(shared_competition, tmp_path / "run", epochs=1, batch_size=2, accumulate=2)
    pd.testing.assert_series_equal(train(trainer)["dice"], expected["dice"])
    assert trainer.run.parameters()["accumulate"] == 2


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_images(shared_competition, tmp_path):
    trainer = trainer_of(shared_competition, tmp_path)
    next(trainer.state.model.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match=r"loss of step 1 is nan, in the batch 0000.*_0\d.jpg"):
        train(trainer)


@pytest.mark.parametrize("changes", [
    {"optimizer": "sgd", "schedule": "onecycle", "loss": "dice"},
    {"optimizer": "lamb", "schedule": "plateau", "loss": "lovasz", "ema": 0.0},
    {"optimizer": "adam", "schedule": "constant", "loss": "focal", "accumulate": 2, "clip_norm": 0.0},
    {"amp": "bf16", "loss": "bce", "crop_height": 64, "crop_width": 96},
    {"start_size": 0.5, "loss": "boundary", "ema": 0.0},
    {"arch": "classic_unet", "encoder": "", "decoder_channels": "", "height": 32, "width": 32},
])  # fmt: skip
def test_options_of_the_recipe_train(shared_competition, tmp_path, monkeypatch, changes):
    narrow = partial(models.ClassicUNet, (4, 8, 16, 32, 64))  # 31 M parameters take seconds to write
    monkeypatch.setattr(models, "ClassicUNet", narrow)
    history = train(trainer_of(shared_competition, tmp_path, **{"epochs": 1} | changes))
    assert np.isfinite(history["loss"].iloc[-1])


@pytest.mark.parametrize(("name", "value", "message"), [
    ("loss", "dise", 'loss "dise" is unknown, did you mean "dice"'),
    ("schedule", "cosin", 'schedule "cosin" is unknown, did you mean "cosine"'),
    ("optimizer", "adamm", 'optimizer "adamm" is unknown, did you mean "adam'),
    ("optimizer", "adahessian", 'optimizer "adahessian" is unknown'),  # needs second derivatives
    ("optimizer", "fusedadam", 'optimizer "fusedadam" is unknown'),  # needs APEX
    ("amp", "fp8", r'amp "fp8" is unknown, did you mean "fp16"\? Choose from: no, fp16, bf16, auto'),
    ("epochs", 0, "epochs is 0, but must be a whole number from 1"),
    ("encoder", "resnt18", 'encoder "resnt18" is unknown, did you mean "resnet18"'),
    ("height", 100, "height is 100, but must be a multiple of 32"),
    ("start_size", 1.5, "start_size is 1.5, but must be a number from 0.25 to 1"),
    ("crop_height", 64, r"crop_height and crop_width are \(64, 0\)"),
    ("lr", "fast", "lr is 'fast', but must be a number from 1e-09 to 10"),
])  # fmt: skip
def test_a_wrong_recipe_is_refused_before_work(name, value, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_parameters(RECIPE | {name: value})


def test_accumulated_steps_leave_the_same_moving_average_as_whole_ones(monkeypatch, tmp_path):
    def without_batch_statistics(config):
        return torch.nn.Conv2d(3, 1, 3, padding=1)

    monkeypatch.setattr(models, "build_network", without_batch_statistics)
    images = torch.randint(0, 256, (6, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    averages = []
    for accumulate in (1, 4):
        steady = {"schedule": "constant", "warmup": 0.0, "optimizer": "sgd", "loss": "bce", "ema": 0.99}
        chosen = recipe(height=32, width=32, accumulate=accumulate, **steady)
        state = TrainState(chosen, 0, 6 * accumulate, "data", tmp_path / f"{accumulate}.pt")
        for image in images:
            for _ in range(accumulate):  # the mean gradient of four equal images is that of one
                state.train_step(image, image[..., 0])
        averages.append(state.network.state_dict())
    for name, tensor in averages[0].items():
        torch.testing.assert_close(averages[1][name], tensor, rtol=1e-5, atol=1e-7)


def test_a_fold_goes_on_on_a_device_of_another_make_and_precision(tmp_path, monkeypatch):
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    small = recipe(height=32, width=32, optimizer="nmuon", clip_norm=0.0)  # which unscales with a real fp16 alone
    begun = TrainState(small, 0, 4, "data", tmp_path / "state.pt")
    begun.train_step(images, images[..., 0])
    begun.save()
    contents = torch.load(begun.path, weights_only=True)
    torch.save(contents | {"cuda_random": torch.zeros(16, dtype=torch.uint8)}, begun.path)  # another make's has 44

    class Scaled(Accelerator):  # as with fp16, which the device that began did not need
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    monkeypatch.setattr("carvana.training.state.Accelerator", Scaled)
    resumed = TrainState(small, 0, 4, "data", tmp_path / "state.pt")
    assert (resumed.step, resumed.accelerator.scaler.get_scale()) == (1, 8.0)
    for state in (begun, resumed):
        state.train_step(images, images[..., 0])
    for plain, scaled in zip(begun.network.parameters(), resumed.network.parameters(), strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-5)


def test_the_random_state_of_a_gpu_is_kept_by_its_make(tmp_path, monkeypatch):
    taken = []
    random = SimpleNamespace(get_rng_state=lambda: torch.ones(44, dtype=torch.uint8), set_rng_state=taken.append)
    begun = TrainState(recipe(height=32, width=32), 0, 4, "data", tmp_path / "state.pt")
    monkeypatch.setattr(torch, "get_device_module", lambda device: random)
    monkeypatch.setattr(begun, "device", SimpleNamespace(type="mps"))
    begun.save()
    for make, count in (("mps", 1), ("cuda", 1)):  # what one make has left is nothing to the other
        monkeypatch.setattr(begun, "device", SimpleNamespace(type=make))
        begun.resume()
        assert len(taken) == count


def test_weights_for_a_network_without_an_encoder_are_one_line_at_step_0_too(tmp_path, monkeypatch):
    narrow = partial(models.ClassicUNet, (4, 8, 16, 32, 64))
    monkeypatch.setattr(models, "ClassicUNet", narrow)
    classic = {"arch": "classic_unet", "encoder": "", "decoder_channels": "", "height": 32, "width": 32}
    TrainState(recipe(**classic), 0, 4, "data", tmp_path / "state.pt").save()
    with pytest.raises(UserError, match="classic_unet has no encoder to load"):
        TrainState(recipe(**classic, encoder_weights="imagenet"), 0, 4, "data", tmp_path / "state.pt")


def test_the_untrained_network_is_scored_on_every_view(shared_competition, tmp_path):
    trainer = trainer_of(shared_competition, tmp_path / "run")
    trainer.samples = pd.DataFrame({"view": list(range(1, 17)) * 7})
    trainer.valid_rows, scored = np.arange(7 * 16), []
    trainer.validator = SimpleNamespace(scores=lambda _, rows: scored.append(rows) or Scores(0.1, 0.05))
    trainer.validate_and_checkpoint()
    assert sorted(trainer.samples["view"].iloc[scored[0]]) == list(range(1, 17))
    assert trainer.history["images_scored"].tolist() == [16]


def test_learning_rates_rise_and_fall_as_their_schedules_say():
    assert learning_rate("cosine", 0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate("cosine", 0.1, 0.1) == pytest.approx(1)
    assert learning_rate("cosine", 0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate("cosine", 1.0, 0.1) == pytest.approx(0)
    assert learning_rate("onecycle", 0.0, 0.0) == pytest.approx(0.04)
    assert learning_rate("onecycle", 0.3, 0.0) == pytest.approx(1)
    assert learning_rate("constant", 0.9, 0.1) == learning_rate("plateau", 0.9, 0.1) == 1


def test_sizes_grow_from_their_start_and_are_whole_for_the_last_third():
    assert size_at((640, 960), 0.5, 0.0) == (320, 480)
    assert size_at((640, 960), 0.5, 0.35) == (480, 704)
    assert size_at((640, 960), 0.5, 0.7) == size_at((640, 960), 1.0, 0.0) == (640, 960)
    assert size_at((32, 64), 0.5, 0.0) == (32, 32)


def test_a_plateau_of_two_validations_halves_the_rate():
    assert plateaus([0.1, 0.2, 0.3]) == 0
    assert plateaus([0.3, 0.2, 0.1]) == 1
    assert plateaus([0.3, 0.2, 0.1, 0.2, 0.1, 0.4]) == 2


SHARED = """
    import sys
    import torch
    from carvana import models
    from carvana.training import launch
    def without_batch_statistics(config):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 1))
    models.build_network = without_batch_statistics
    launch.main(*sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_learn_as_one_with_the_doubled_batch(shared_competition, tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(textwrap.dedent(SHARED))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    for name, batch_size, options in (("one", 4, []), ("two", 2, ["-m", *launch])):
        begun(shared_competition, tmp_path / name, batch_size=batch_size)
        values = json.dumps(Run(tmp_path, name).parameters())
        command = [sys.executable, *options, str(script), str(tmp_path / name), "0", values, "0", "-1"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    one, two = (load_file(tmp_path / run / "fold0" / "last.safetensors") for run in ("one", "two"))
    start = torch.load(tmp_path / "one" / "fold0" / "state.pt", weights_only=True)
    assert start["step"] == 4
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
    histories = [pd.read_csv(tmp_path / run / "fold0" / "history.csv") for run in ("one", "two")]
    for column in ("step", "images_seen", "dice", "iou"):
        np.testing.assert_allclose(histories[0][column], histories[1][column], atol=1e-6)


def test_a_fold_that_several_devices_share_is_trained_by_processes_of_its_own(shared_competition, tmp_path):
    run = begun(shared_competition, tmp_path / "run", batch_size=2)
    parameters = run.parameters()
    run.write_start(parameters | {"data_dir": str(tmp_path / "nowhere"), "lr": 1e-9, "epochs": 1}, "key")
    run.write_start = lambda *_: None  # as of one that goes on, while run.json is of another fold and another place
    chosen = Recipe.from_parameters(parameters)
    trainer = Trainer(run, Competition(shared_competition), chosen, 0, processes=Processes(2))
    history = train(trainer)
    assert trainer.finished
    assert history["images_seen"].tolist() == [0, 8, 16]
    network = models.load_checkpoint(run.checkpoint(0, "last"))[0]
    dice = trainer.validator.scores(network, trainer.valid_rows).dice
    assert dice == pytest.approx(history["dice"].iloc[-1], abs=1e-5)  # 0.0013 apart with statistics of each process


NAMED = {  # by profiles and README, and those whose parameters are not all used
    "unet": ["resnet34", "resnet50", "tu-tf_efficientnet_lite0", "tu-tf_efficientnetv2_s", "efficientnet-b0"],
    "pspnet": ["resnet18"],
    "classic_unet": [""],
}
STEPS = """
    import sys
    import torch
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from conftest import recipe
    from carvana.training.state import TrainState
    for name in sys.argv[2:]:
        arch, _, encoder = name.partition(":")
        chosen = recipe(arch=arch, encoder=encoder, decoder_channels="", height=64, width=64, optimizer="sgd")
        state = TrainState(chosen, 0, 4, "data", Path("never_saved.pt"))
        images = torch.full((2, 64, 64, 3), state.accelerator.process_index * 90, dtype=torch.uint8)
        for _ in range(2):
            loss = state.train_step(images, images[..., 0])
        sums = torch.stack([parameter.detach().abs().sum() for parameter in state.model.parameters()])
        assert loss.isfinite() and sums.isfinite().all()
        everywhere = state.accelerator.gather(sums[None])
        assert len(everywhere) == 2 and torch.equal(everywhere[0], everywhere[1]), name
    state.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_step_every_network_that_is_named(tmp_path, monkeypatch):
    for path in (project_root() / "profiles").glob("*.yaml"):
        values = with_defaults(load_profile(path))
        assert values["encoder"] in NAMED[values["arch"]], path
    (tmp_path / "steps.py").write_text(textwrap.dedent(STEPS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    names = [f"{arch}:{encoder}" for arch, encoders in NAMED.items() for encoder in encoders]
    launch("steps", [Path(__file__).parents[1], *names], Processes(2))


def test_a_training_goes_on_where_its_encoder_weights_lie_elsewhere(shared_competition, tmp_path):
    encoder = models.SegmentationModel(recipe().model_config).net.encoder
    (tmp_path / "here").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, tmp_path / "here" / "encoder.safetensors")
    changes = {"epochs": 1, "encoder_weights": str(tmp_path / "here" / "encoder.safetensors")}
    train(trainer_of(shared_competition, tmp_path / "run", **changes))
    (tmp_path / "here").rename(tmp_path / "there")
    changes["encoder_weights"] = str(tmp_path / "there" / "encoder.safetensors")
    assert trainer_of(shared_competition, tmp_path / "run", **changes).finished
    with pytest.raises(UserError, match=r"was trained with another encoder_weights \(encoder.safetensors\)"):
        trainer_of(shared_competition, tmp_path / "run", **changes | {"encoder_weights": ""})
    with pytest.raises(UserError, match="none.pth does not exist"):
        trainer_of(shared_competition, tmp_path / "other", encoder_weights="none.pth")


def test_a_second_stage_starts_from_the_weights_of_the_same_fold(shared_competition, tmp_path):
    changes = {"epochs": 1, "crop_height": 64, "crop_width": 64, "init_from": "first"}
    train(trainer_of(shared_competition, tmp_path / "first", epochs=1))
    second = trainer_of(shared_competition, tmp_path / "second", **changes)
    best = load_file(tmp_path / "first" / "fold0" / "best.safetensors")
    for network in (second.state.network, second.state.model):
        assert all(torch.equal(tensor, best[name]) for name, tensor in network.state_dict().items())
    history = train(second)
    assert history["images_scored"].nunique() == 1  # or another epoch would be chosen by its images
    assert trainer_of(shared_competition, tmp_path / "second", **changes).finished


@pytest.mark.parametrize(("changes", "fold", "message"), [
    ({"decoder_channels": "32,16,8,8,8"}, 0, "first/fold0/best.safetensors is of another network"),
    ({}, 1, "first/fold1 has no trained network. Train that fold first"),
    ({"init_from": "lost"}, 0, "lost/folds.csv does not exist"),
    ({"holdout_cars": 1}, 0, "first has other folds, and has seen cars of this one"),
])  # fmt: skip
def test_a_start_that_is_another_network_or_has_seen_the_cars_is_refused(
    trained, shared_competition, tmp_path, changes, fold, message
):
    shutil.copytree(trained[2], tmp_path / "first")
    with pytest.raises(UserError, match=message):
        trainer_of(shared_competition, tmp_path / "second", fold, **{"init_from": "first"} | changes)


def test_an_untrained_network_is_no_start(shared_competition, tmp_path):
    trainer_of(shared_competition, tmp_path / "first").validate_and_checkpoint()
    with pytest.raises(UserError, match="first/fold0 has no trained network"):
        trainer_of(shared_competition, tmp_path / "second", init_from="first")


def test_two_trainers_of_one_process_keep_their_own_accumulation(shared_competition, tmp_path):
    changes = {"epochs": 1, "batch_size": 1, "optimizer": "sgd"}
    alone = trainer_of(shared_competition, tmp_path / "alone", **changes)
    train(alone)
    both = trainer_of(shared_competition, tmp_path / "both", **changes)
    trainer_of(shared_competition, tmp_path / "other", **changes | {"accumulate": 4})
    pd.testing.assert_series_equal(train(both)["dice"], alone.history["dice"])


def test_a_batch_that_cannot_fit_into_memory_is_refused_before_any_work(shared_competition, tmp_path, monkeypatch):
    free = 4 * 96 * 128 * 300
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    with pytest.raises(UserError, match=r"batch_size 5 needs more than 0 GB.* Halve batch_size"):
        trainer_of(shared_competition, tmp_path / "run", batch_size=5)
    assert not (tmp_path / "run" / "fold0").exists() and not (tmp_path / "cache").exists()
    recipe(batch_size=4).check_memory()
    recipe(batch_size=8, crop_height=96, crop_width=64).check_memory()


def test_several_processes_never_work_on_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="processes is 2, but there are 1 GPUs"):
        shared_among(2)
    assert shared_among(1) == Processes(1)


@pytest.mark.parametrize("text", ["", "num_processes: many", "- 2", "a: ]", "num_processes:"])
def test_a_file_of_accelerate_config_without_a_number_is_one_line(tmp_path, text):
    path = tmp_path / "machines.yaml"
    for _ in range(2):
        with pytest.raises(UserError, match=r"^accelerate_config .*machines.yaml gives no num_processes"):
            shared_among(1, str(path))
        path.write_text(text)
    path.write_text("num_processes: 3")
    assert shared_among(1, str(path)) == Processes(3, str(path))


def test_a_device_without_double_precision_is_never_given_any(monkeypatch):
    alone = SimpleNamespace(device=torch.device("mps"), process_index=0, num_processes=1)
    counts = PixelCounts(np.array([4.0, 0.0]), np.array([4.0, 1.0]), np.array([4.0, 1.0]))
    monkeypatch.setattr(Validator, "pixel_counts", lambda *_: counts)
    validator = Validator(pd.DataFrame(), None, 1, alone)
    assert validator.scores(torch.nn.Identity(), np.arange(2)) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["nmuon", "adamw", "adam", "sgd", "lamb"])
def test_an_overflow_in_the_first_step_leaves_no_trace(monkeypatch, tmp_path, name):
    monkeypatch.setattr(models, "build_network", lambda config: torch.nn.Conv2d(3, 1, 3, padding=1))
    state = TrainState(recipe(optimizer=name, ema=0.0), 0, 4, "data", tmp_path / "state.pt")
    optimizer, weight = state.optimizer.optimizer, state.model.net.weight
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (math.inf, 1.0):
        before = weight.detach().clone()
        scaler.scale((gradient * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(weight, before) == (gradient == math.inf)
        assert weight.isfinite().all()
        assert (weight - before).abs().max() < 1


@pytest.mark.parametrize("fold", [-1, 2])
def test_a_fold_that_the_run_does_not_have_is_refused(shared_competition, tmp_path, fold):
    with pytest.raises(UserError, match=f"fold is {fold}, but the run has the folds 0 to 1"):
        trainer_of(shared_competition, tmp_path, fold)


def test_text_from_a_yaml_file_becomes_the_number_it_means():
    assert Recipe.from_parameters(RECIPE | {"lr": "2e-3", "ema": 0}).lr == 0.002
