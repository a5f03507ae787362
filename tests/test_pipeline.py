import ast
import contextlib
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import papermill
import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from hypothesis import given
from hypothesis import strategies as st

from carvana import device, files, pipeline, profiles
from carvana.errors import UserError
from carvana.files import project_root
from carvana.run import Run
from carvana.training.losses import LOSSES

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


def test_a_parameter_means_the_same_in_every_notebook_and_is_read_as_papermill_reads_it():
    lines, defined = {}, profiles.parameters()
    for name in profiles.NOTEBOOKS:
        for key, line in papermill.inspect_notebook(str(profiles.notebook_path(name))).items():
            assert line["help"], f"{key} of {name} has no comment"
            assert ast.literal_eval(line["default"]) == defined[key].default
            assert defined[key].help.startswith(line["help"])
            assert name in defined[key].notebooks
            assert lines.setdefault(key, (line["default"], line["help"])) == (line["default"], line["help"]), key
    assert lines.keys() == defined.keys()


def test_parameters_are_listed_without_the_seconds_that_torch_or_papermill_take_to_import():
    code = "import sys; from carvana import cli; cli.main(['params']); print({'torch', 'papermill'} & {*sys.modules})"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert listed.splitlines()[-1] == "set()"


def test_names_that_must_not_change_are_there():
    names = "data_dir runs_dir submissions_dir run_name fold n_folds seed holdout_cars exclude arch encoder"
    names += " height width encoder_weights epochs batch_size lr loss optimizer schedule amp members tta"
    assert {*names.split(), "ensemble", "test_dir", "sample", "submit", "max_hours"} <= set(profiles.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r'parameter "epoch" of .*own.yaml is in no notebook, did you mean "epochs"'),
        ("epochs: three", r'parameter "epochs" of .*own.yaml is \'three\', but must be a whole number such as 12'),
        ("epochs: 1.5", r'parameter "epochs" .* must be a whole number'),
        ("submit: 1", r'parameter "submit" .* must be True or False'),
        ("lr: fast", r'parameter "lr" .* must be a number'),
        ("encoder: 34", r'parameter "encoder" .* must be a text in quotes'),
        ("[1, 2]", r"must hold lines such as"),
        ("a: [", r"own.yaml is not YAML"),
    ],
)
def test_a_wrong_profile_is_refused_before_anything_runs(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        profiles.load_profile(profile(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("encoder: resnt18", 'encoder "resnt18" is unknown, did you mean "resnet18"'),
    ("optimizer: adamm", 'optimizer "adamm" is unknown, did you mean "adam'),
    ("arch: unett", 'arch "unett" is unknown, did you mean "unet"'),
    ('decoder_channels: "a,b"', 'decoder_channels is "a,b"'),
    ("height: 100", "height is 100, but must be a multiple of 32"),
    ("encoder_weights: lost.pth", "lost.pth does not exist"),
    ("loss: dise", 'loss "dise" is unknown, did you mean "dice"'),
    ("schedule: cosin", 'schedule "cosin" is unknown, did you mean "cosine"'),
    ("crop_height: 256", r"crop_height and crop_width are \(256, 0\)"),
    ("amp: fp16", "amp is fp16, which needs a GPU"),
])  # fmt: skip
def test_what_03_could_not_train_is_refused_before_01_downloads_anything(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(pipeline, "execute", None)
    folders = "".join(f"{name}_dir: {tmp_path / name}\n" for name in ("data", "runs", "submissions"))
    with pytest.raises(UserError, match=message):
        pipeline.run(profile(tmp_path, folders + text))


def test_the_losses_that_profiles_may_name_are_those_there_are():
    assert set(profiles.CHOICES["loss"]) == set(LOSSES)


def test_a_profile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"profile .*none.yaml cannot be read"):
        profiles.load_profile(tmp_path / "none.yaml")


def test_every_number_has_a_range_of_its_own_type_that_holds_its_default():
    defaults = {name: parameter.default for name, parameter in profiles.parameters().items()}
    numbers = {name: value for name, value in defaults.items() if not isinstance(value, str)}
    assert numbers.keys() == profiles.RANGES.keys()
    assert set(profiles.PATTERNS) < set(defaults)
    profiles.check(defaults)
    for name, default in numbers.items():
        assert {type(end) for end in profiles.RANGES[name]} == {type(default)}, name


@given(st.sampled_from(sorted(profiles.RANGES)), st.data())
def test_a_value_out_of_its_range_or_of_another_kind_is_refused_in_one_line(name, data):
    low, high = profiles.RANGES[name]
    outside = [st.floats(max_value=low, exclude_max=True), st.floats(min_value=high, exclude_min=True)]
    outside += [st.integers(max_value=int(low) - 1), st.integers(min_value=int(high) + 2), st.text("xyz,")]
    value = data.draw(st.one_of(*outside, st.sampled_from([math.nan, None, [], {}, [1], "nan", "1:30", 10**400])))
    with pytest.raises(UserError, match=f"^{name} is .* must be") as error:
        profiles.check({name: value})
    assert "\n" not in str(error.value)
    profiles.check({name: low, "other": value})
    profiles.check({name: high})


def test_true_is_no_number_and_a_number_does_not_submit():
    for name, value in {"lr": True, "epochs": True, "submit": 1, "skip_broken": "false", "batch_size": 8.0}.items():
        with pytest.raises(UserError, match=f"{name} is"):
            profiles.check({name: value})
    profiles.check({"lr": "2e-3", "workers": -1, "max_hours": 1})  # as papermill hands on a profile's lines


@pytest.mark.parametrize(("cells", "refused"), [
    (['epochs = 1\n', '# Parameters\nepochs = 3\nlr = "2e-3"\n', "check"], ""),
    (['epochs = 1', '# Parameters\nepohcs = 3\nlr = "2e-3"\n', "check"], "epohcs"),
    (["epohcs = 1", "# Parameters\nepohcs = 3\n", "check"], ""),  # a notebook of a person's own has it
    (["epochs = 1", "epohcs = 3", "check"], ""),  # not papermill's cell
    (["# Parameters\nepohcs = 3\n", "check", "check"], ""),  # run again by hand
    ([], ""),
])  # fmt: skip
def test_what_papermill_sets_and_no_notebook_has_is_refused_with_the_nearest_name(cells, refused):
    expected = pytest.raises(UserError, match=f'parameter "{refused}" of papermill .* did you mean "epochs"')
    with expected if refused else contextlib.nullcontext():
        profiles.check({"In": cells, "epohcs": 3})


def test_a_tracker_is_a_name_that_accelerate_knows_and_never_runs_a_finished_step_again(tmp_path):
    profiles.check({"tracker": ", ".join(LOGGER_TYPE_TO_CLASS)})
    with pytest.raises(UserError, match='tracker "tensorbord" is unknown. Choose from: aim, '):
        profiles.check({"tracker": "mlflow, tensorbord"})
    plain, watched = ([step.key() for step in pipeline.steps({"tracker": name})] for name in ("", "wandb"))
    assert plain == watched


NO_NAMES = "", ".", "..", "exp/one", "../../escaped", "a\\b", "a\0b", "a\nb", "-rf", "a,b", "$x$", "<b>", "x" * 101
NO_NAMES += "cache", "equal", "fold 0", "without hflip"  # which mean something else


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_a_name_that_is_no_folder_is_refused_before_work(name, tmp_path):
    for values in ({"run_name": name}, {"members": f"a, {name}"} if name and "," not in name else {"run_name": name}):
        with pytest.raises(UserError, match="is no name of a run"):
            profiles.check(values)
    for good in ("folds", "equals", "t4x2", "as written", "lr=0.004", "Größe 2 (b)"):
        profiles.check({"run_name": good, "members": f"{good}, x"})


@pytest.mark.parametrize("name", ["flip", "scale", "scale9", "scale0.2", "scale4.5", "scalenan", "none hflip"])
def test_an_unknown_tta_is_refused_with_the_profile(tmp_path, name):
    with pytest.raises(UserError, match=f'tta "{name}" is unknown'):
        profiles.load_profile(profile(tmp_path, f"tta: none, {name}"))
    profiles.check({"tta": "none,hflip,scale0.25,scale.75,scale1,scale1.25,scale4,scale4.0"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"epochs: 3\nepochs: 4", "stands twice"),
        (b"1: 2", '"1" of .* is in no notebook'),
        (b"? [a]\n: 2", "is in no notebook"),
        (b"run_name: null", "must be a text in quotes"),
        (b"data_dir:", "must be a text in quotes"),
        (b"lr: .nan", "must be a number"),
        (b"lr: .inf", "must be a number"),
        (b"lr: -1", "from 1e-09 to 10"),
        (b"lr: 1" + b"0" * 5000, "from 1e-09 to 10"),
        (b"epochs: 1" + b"0" * 5000, "must be a whole number"),
        (b"epochs: 010", "must be a whole number"),
        (b"epochs: 1:30", "must be a whole number"),
        (b"epochs: 1_000", "must be a whole number"),
        (b"lr: 1:30", "must be a number"),
        (b"epochs: 2020-01-01", "must be a whole number"),
        (b"run_name: 2020-01-01", "must be a text in quotes"),
        (b"epochs: [3]", "must be a whole number"),
        (b"epochs: {a: 1}", "must be a whole number"),
        (b"submit: yes please", "must be True or False"),
        (b"seed: -1", "from 0 to"),
        (b"seed: 1180591620717411303424", "must be a whole number"),
        (b'run_name: "a\\0b"', "is no name of a run"),
        (b'exclude: "a\\0b"', "is no file"),
        ("run_name: Größe".encode("latin-1"), "is not YAML"),
        ("run_name: x".encode("utf-16"), "is not YAML"),
        (bytes(range(256)), "is not YAML"),
        (b"[" * 20000, "is not YAML"),
        (b"--- {}\n--- {}", "is not YAML"),
        (b"a", "must hold lines"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_profile_that_nobody_could_mean_is_one_line(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        profiles.load_profile(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_profile_saved_with_a_mark_in_front_and_an_empty_one_are_read(tmp_path):
    assert profiles.load_profile(profile(tmp_path, "\ufeffepochs: 3  # few")) == {"epochs": 3}
    assert profiles.load_profile(profile(tmp_path, "# nothing")) == {}
    assert profiles.load_profile(profile(tmp_path, 'encoder_weights: ""\nlr: 2e-3\nsubmit: True')) == {
        "encoder_weights": "", "lr": 0.002, "submit": True,
    }  # fmt: skip


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


def test_a_notebook_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "notebooks").touch()
    with pytest.raises(UserError, match=r"02.ipynb could not be written: .*Free space or choose another folder"):
        pipeline.execute("02_explore", tmp_path / "notebooks" / "02.ipynb", {})


def test_a_reader_who_has_seen_enough_is_no_full_disk(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(papermill, "execute_notebook", gone)
    with pytest.raises(BrokenPipeError):
        pipeline.execute("02_explore", tmp_path / "02.ipynb", {})


def test_a_changed_sample_predicts_again(tmp_path):
    sample = tmp_path / "mine.csv"
    keys = []
    for text in ("img\na.jpg", "img\nab.jpg"):
        sample.write_text(text)
        keys.append([step.key() for step in pipeline.steps({"sample": str(sample)})][-2:])
    assert not set(keys[0]) & set(keys[1])


def test_the_range_of_a_number_is_told_with_its_meaning():
    assert profiles.parameters()["warmup"].help.endswith("[0 to 0.9]")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A profile whose notebooks only write what the next ones need; and the titles of those that ran."""
    ran, run = [], Run(tmp_path / "runs", "x")
    files_of = {
        "01_download": lambda _: [tmp_path / "data" / f"{name}.zip" for name in ("train", "test")],
        "03_train": lambda values: [run.checkpoint(values["fold"]), run.folds_path],
        "04_evaluate": lambda _: [run.scores_path, run.ensemble_path],
        "05_predict": lambda _: [tmp_path / "submissions" / "x.csv.gz"],
    }

    def execute(notebook, output, values):
        ran.append(output.stem)
        for path in (output, *files_of.get(notebook, lambda _: [])(values)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        (tmp_path / "data").mkdir(exist_ok=True)
        run.write_note("submission", {"path": "x.csv.gz", "rows": 1})
        return 0.1

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    folders = "".join(f"{name}_dir: {tmp_path / name}\n" for name in ("data", "runs", "submissions"))
    return profile(tmp_path, f"{folders}run_name: x\nn_folds: 2"), ran, run


def test_a_step_is_done_while_everything_that_the_next_one_needs_is_there(written, tmp_path):
    path, ran, run = written
    pipeline.run(path)
    assert len(ran) == 7
    needed = {
        tmp_path / "data" / "train.zip": "01_download",
        tmp_path / "data" / "test.zip": "01_download",
        run.checkpoint(1): "03_train_fold1",
        run.folds_path: "03_train_fold0",
        run.ensemble_path: "04_evaluate",
        run.scores_path: "04_evaluate",
        tmp_path / "submissions" / "x.csv.gz": "05_predict",
        run.submission_path: "06_submit",
    }
    for file, title in needed.items():
        file.unlink()
        ran.clear()
        pipeline.run(path)
        assert title in ran and file.exists()
        ran.clear()
        pipeline.run(path)
        assert not ran


def test_a_submission_file_that_another_has_written_is_not_taken_for_this_runs(written, tmp_path):
    path, ran, _ = written
    pipeline.run(path)
    ran.clear()
    (tmp_path / "submissions" / "x.csv.gz").write_text("of another run of this name")
    pipeline.run(path)
    assert "05_predict" in ran and (tmp_path / "submissions" / "x.csv.gz").read_text() == "x.csv.gz"


def test_what_is_given_on_the_command_line_is_not_looked_for_in_the_profile(tmp_path):
    path = profile(tmp_path, "epochs: 3")
    for wrong in ({"epochs": "abc"}, {"epoch": "3"}):
        with pytest.raises(UserError, match='parameter "epochs?" of -p is'):
            profiles.load_profile(path, wrong)


def test_two_commands_on_one_run_do_its_steps_once(written):
    path, ran, _ = written
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(pipeline.run, path) for _ in range(2))
        assert first.result() == second.result()
    assert sorted(ran) == sorted(set(ran))


def test_a_folder_may_have_braces_in_its_name(tmp_path):
    output = tmp_path / "{2024} {cars}" / "a{b.ipynb"
    with pytest.raises(UserError, match="does not exist"):  # of the data: the notebook ran
        pipeline.execute("02_explore", output, {"data_dir": str(tmp_path / "none")})
    assert output.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"03_train_fold0": 3}', bytes(99)], ids=repr)
def test_a_damaged_list_of_steps_runs_them_once_more(written, damage):
    path, ran, run = written
    for expected in (7, 7, 0):
        ran.clear()
        pipeline.run(path)
        assert len(ran) == expected
        if expected and not (run.folder / "seen").exists():
            (run.folder / "steps.json").write_bytes(damage)
            (run.folder / "seen").touch()


def test_what_a_kill_left_is_swept_when_the_run_starts_again(written, tmp_path):
    path, _, run = written
    gone = f"{files.MARK}999999999-abcdefgh"
    left = [run.fold_dir(0) / f".best.safetensors{gone}", tmp_path / "submissions" / f".x.csv.gz{gone}"]
    for file in left:
        file.parent.mkdir(parents=True)
        file.touch()
    pipeline.run(path)
    assert not [file for file in left if file.exists()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"members": "x, gone"}, "gone.* does not exist. Train with 03_train first, or correct run_name"),
        ({"members": "../x"}, 'members "../x" is no name of a run'),
        ({"run_name": "exp/one"}, 'run_name "exp/one" is no name of a run'),
        ({"tta": "none,vflip"}, 'tta "vflip" is unknown'),
        ({"ensemble": "gone.json"}, "ensemble .*gone.json does not exist. Correct it, or leave ensemble empty"),
        ({"ensemble": "bad.json"}, "bad.json cannot be read as JSON: .*threshold"),
        ({"ensemble": "lost.json"}, "lost.json: .*fold0/best.safetensors does not exist"),
        ({"test_dir": "gone"}, "test_dir .*gone does not exist"),
        ({"sample": "gone.csv"}, "sample .*gone.csv does not exist"),
        ({"exclude": "gone.csv"}, "exclude .*gone.csv does not exist"),
        ({"init_from": "gone"}, "init_from .*gone/folds.csv does not exist"),
        ({"pseudo_labels": "gone"}, "pseudo_labels .*gone/pseudo/labels.csv does not exist"),
        ({"accelerate_config": "gone.yaml"}, "accelerate_config .*gone.yaml does not exist"),
    ],
)
def test_what_only_a_late_step_reads_is_checked_before_the_first(written, tmp_path, values, message):
    path, ran, _ = written
    note = {"members": [{"path": "fold0/best.safetensors", "weight": 1}], "views": ["none"], "threshold": 0.5}
    files.write_json(tmp_path / "lost.json", note)
    files.write_json(tmp_path / "bad.json", note | {"threshold": 2})
    places = ("ensemble", "test_dir", "sample", "exclude", "accelerate_config")
    values = {name: str(tmp_path / value) if name in places else value for name, value in values.items()}
    with pytest.raises(UserError, match=message) as error:
        pipeline.run(path, values)
    assert "\n" not in str(error.value)
    assert not ran and not (tmp_path / "runs").exists()


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
