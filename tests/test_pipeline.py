import ast
import shutil

import papermill
import pytest
import yaml

from carvana import device, pipeline, profiles
from carvana.errors import UserError
from carvana.files import project_root

PROFILES = sorted((project_root() / "profiles").glob("*.yaml"))


def profile(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_loads_is_short_and_differs_from_the_defaults(path):
    defined, values = profiles.parameters(), profiles.load_profile(path)
    raw = yaml.safe_load(path.read_text())
    assert {name: type(value) for name, value in raw.items()} == {name: type(value) for name, value in values.items()}
    assert len(path.read_text().splitlines()) <= 40
    assert values["run_name"] == path.stem
    same = [name for name, value in values.items() if value == defined[name].default]
    assert not same, f"{same} stand at their defaults"


def test_a_parameter_means_the_same_in_every_notebook():
    lines = {}
    for name in profiles.NOTEBOOKS:
        for key, line in papermill.inspect_notebook(str(profiles.notebook_path(name))).items():
            assert line["help"], f"{key} of {name} has no comment"
            ast.literal_eval(line["default"])
            assert lines.setdefault(key, (line["default"], line["help"])) == (line["default"], line["help"]), key


def test_names_that_must_not_change_are_there():
    names = "data_dir runs_dir submissions_dir run_name fold n_folds seed holdout_cars exclude arch encoder"
    names += " height width encoder_weights epochs batch_size lr loss optimizer schedule amp members tta"
    assert {*names.split(), "ensemble", "test_dir", "sample", "submit", "max_hours"} <= set(profiles.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r'parameter "epoch" of .*own.yaml is in no notebook, did you mean "epochs"'),
        ("epochs: three", r'parameter "epochs" of .*own.yaml is \'three\', but must be int such as 12'),
        ("epochs: 1.5", r'parameter "epochs" .* must be int'),
        ("submit: 1", r'parameter "submit" .* must be bool'),
        ("lr: fast", r'parameter "lr" .* must be float'),
        ("encoder: 34", r'parameter "encoder" .* must be str'),
        ("[1, 2]", r"must hold lines such as"),
        ("a: [", r"own.yaml is not YAML"),
    ],
)
def test_a_wrong_profile_is_refused_before_anything_runs(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        profiles.load_profile(profile(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_profile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"profile .*none.yaml cannot be read"):
        profiles.load_profile(tmp_path / "none.yaml")


def test_overrides_are_text_that_takes_the_type_of_the_parameter(tmp_path):
    overrides = {"lr": "1e-4", "epochs": "3", "submit": "true", "encoder": "007", "decoder_channels": "8,8"}
    values = profiles.load_profile(profile(tmp_path, "lr: 2e-3"), overrides)
    assert values == {"lr": 1e-4, "epochs": 3, "submit": True, "encoder": "007", "decoder_channels": "8,8"}


def test_a_run_takes_every_notebook_in_order_and_03_once_a_fold(tmp_path):
    values = profiles.load_profile(profile(tmp_path, "n_folds: 3\nepochs: 2\nrun_name: x"))
    steps = list(pipeline.steps(values))
    folds = ["03_train_fold0", "03_train_fold1", "03_train_fold2"]
    assert [step.title for step in steps] == [
        "01_download",
        "02_explore",
        *folds,
        "04_evaluate",
        "05_predict",
        "06_submit",
    ]
    assert steps[3].values == {"n_folds": 3, "epochs": 2, "run_name": "x", "fold": 1}
    assert "epochs" not in steps[-1].values


def test_a_changed_file_of_the_package_runs_every_step_again_wherever_it_lies(tmp_path, monkeypatch):
    package = shutil.copytree(pipeline.PACKAGE, tmp_path / "carvana")
    monkeypatch.setattr(pipeline, "PACKAGE", package)
    step = next(pipeline.steps({}))
    keys = [step.key()]
    for name in ("rle.py", "data/folds.py", "plots/report.html.jinja"):
        (package / name).write_text((package / name).read_text() + "\n")
        keys.append(step.key())
    assert len(set(keys)) == 4


def test_a_run_that_only_blends_others_trains_nothing(tmp_path):
    steps = pipeline.steps(profiles.load_profile(profile(tmp_path, "run_name: blend\nmembers: a,b")))
    assert "03_train" not in {step.notebook for step in steps}


def test_folds_have_a_lane_for_each_gpu_and_other_steps_one(monkeypatch):
    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    steps = [step for step in pipeline.steps({"n_folds": 5}) if step.notebook == "03_train"]
    lanes = [[step.values["fold"] for step in lane] for lane in pipeline.lanes(steps)]
    assert lanes == [[0, 2, 4], [1, 3]]
    assert pipeline.lanes(steps[:1]) == [steps[:1]]
    shared = list(pipeline.steps({"n_folds": 2, "processes": 2}))[2:4]
    assert pipeline.lanes(shared) == [shared]


def test_the_seed_profile_is_the_original_write_up():
    values = yaml.safe_load((project_root() / "profiles" / "seed.yaml").read_text())
    wanted = {"arch": "classic_unet", "height": 512, "width": 512, "optimizer": "adam", "loss": "dice"}
    wanted |= {"batch_size": 4, "epochs": 10}
    assert wanted.items() <= values.items()
    assert float(values["lr"]) == 1e-4
