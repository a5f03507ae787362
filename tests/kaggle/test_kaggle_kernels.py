import json
import shutil
import subprocess
import sys
import zipfile

import nbformat
import papermill
import pytest
import torch
from conftest import RECIPE, write_competition
from fake_kaggle import USER, hide_credentials, refused
from safetensors.torch import load_file

import carvana
from carvana import cli, models, submission
from carvana.data import Competition
from carvana.errors import UserError
from carvana.files import project_root
from carvana.kaggle import client, inside, kernels

SLUG = f"{USER}/carvana-tiny"


@pytest.fixture
def profile(tmp_path):
    values = RECIPE | {"run_name": "tiny", "n_folds": 2, "epochs": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    return path


@pytest.fixture
def built(profile, tmp_path):
    return kernels.build(kernels.KernelPlan(profile, USER, wheels=False), tmp_path / "built")


def test_what_is_built_says_every_field_and_holds_the_suite(built, profile):
    kernel = json.loads((built / "kernel" / "kernel-metadata.json").read_text())
    assert (kernel["id"], kernel["dataset_sources"]) == (SLUG, [f"{SLUG}-suite"])
    assert kernel["competition_sources"] == ["carvana-image-masking-challenge"]
    assert (kernel["enable_gpu"], kernel["machine_shape"]) == (True, "NvidiaTeslaT4")
    assert (kernel["enable_internet"], kernel["is_private"]) == (False, True)
    assert (built / "kernel" / kernel["code_file"]).exists()
    with zipfile.ZipFile(built / "dataset" / "suite.zip") as suite:
        assert suite.read("profile.yaml") == profile.read_bytes()
        package = {"src/carvana/cli.py", "src/carvana/data/folds.py"}
        assert package | {"notebooks/03_train.ipynb", "requirements.txt"} <= {*suite.namelist()}
        assert not [name for name in suite.namelist() if "pycache" in name]


def test_the_same_is_built_from_the_same(built, profile, tmp_path):
    again = kernels.build(kernels.KernelPlan(profile, USER, wheels=False), tmp_path / "again")
    assert (again / "dataset" / "suite.zip").read_bytes() == (built / "dataset" / "suite.zip").read_bytes()


def test_a_weights_file_is_packed(profile, tmp_path):
    with pytest.raises(UserError, match="--weights .*w.safetensors is no .safetensors"):
        kernels.build(kernels.KernelPlan(profile, USER, tmp_path / "w.safetensors", wheels=False), tmp_path / "built")
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    arguments = ["--profile", profile, "--folder", tmp_path / "built", "--user", USER, "--no-wheels"]
    arguments += ["--weights", tmp_path / "w.safetensors"]
    assert cli.main(["kernel", "build", *map(str, arguments)]) == 0
    assert (tmp_path / "built" / "dataset" / "encoder.safetensors").read_bytes() == b"weights"


class Encoder:
    """What the hub gives for ImageNet weights."""

    def state_dict(self):
        return {"conv1.weight": torch.ones(2, 3).T}


def test_the_default_profile_packs_the_weights_of_the_hub_and_says_what_to_give_without_it(tmp_path, monkeypatch):
    built, asked = tmp_path / "built", []

    def offline(*_, **__):
        raise OSError("no route")

    plan = kernels.KernelPlan(project_root() / "profiles" / "t4x2.yaml", USER, wheels=False)
    monkeypatch.setattr(models.smp.encoders, "get_encoder", offline)
    refused("imagenet of resnet34 could not be fetched.*https://.*Here: --weights FILE", kernels.build, plan, built)
    assert not (built / "dataset").exists()
    monkeypatch.setattr(
        models.smp.encoders, "get_encoder", lambda *names, **options: asked.append((names, options)) or Encoder()
    )
    kernels.build(plan, built)
    assert asked == [(("resnet34",), {"weights": "imagenet"})]
    assert load_file(built / "dataset" / "encoder.safetensors")["conv1.weight"].shape == (3, 2)


def test_the_file_that_a_profile_names_is_packed(profile, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    profile.write_text(profile.read_text().replace('encoder_weights: ""', f"encoder_weights: {tmp_path / 'w.pth'}"))
    built = kernels.build(kernels.KernelPlan(profile, USER, wheels=False), tmp_path / "built")
    assert (built / "dataset" / "encoder.pth").read_bytes() == b"weights"


def test_only_wheels_that_the_image_lacks_are_fetched(profile, tmp_path, monkeypatch):
    commands = []
    ended = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(inside.subprocess, "run", lambda command, **_: commands.append(command) or ended)
    kernels.build(kernels.KernelPlan(profile, USER), tmp_path / "built")
    wanted = [word.partition(">")[0].partition("<")[0] for word in commands[0][-2:]]
    assert wanted == ["segmentation-models-pytorch", "simplejpeg"]
    assert not commands[0][-3].startswith("albumentations")


def test_the_kernel_never_replaces_what_is_imported(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("numpy>=999")
    monkeypatch.setattr(inside.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    refused("numpy>=999: another version is imported already", inside.install, tmp_path, tmp_path)


def test_wheels_of_what_kaggle_may_lack_leave_torch_and_the_client_out():
    names = {requirement.name for requirement in inside.requirements(project_root() / "requirements.txt")}
    assert {"segmentation-models-pytorch", "albumentations", "simplejpeg", "papermill"} <= names
    assert not names & {"torch", "torchvision", "kaggle", "six"}


def test_the_kernel_may_import_its_module_before_anything_is_installed():
    absent = ("simplejpeg", "papermill", "timm", "albumentations")
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in absent)
    code = f"import sys; {blocked}from carvana.kaggle import inside"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_push_makes_the_dataset_then_the_kernel(fake, built, capfd):
    fake.verdict = {}
    fake.faults["GetDatasetStatus"] = ["404"]
    assert cli.main(["kernel", "push", str(built)]) == 0
    shown = capfd.readouterr().out
    assert f"{SLUG}/1 runs on Kaggle" in shown
    assert f"carvana kernel push {built} --wait" in shown
    assert fake.uploaded == [(built / "dataset" / "suite.zip").read_bytes()]
    assert (fake.dataset["slug"], fake.dataset["isPrivate"]) == ("carvana-tiny-suite", True)
    assert fake.dataset["files"] == [{"token": "suite.zip"}]
    assert fake.kernels[0]["enableGpu"] is True
    assert not fake.kernels[0].get("enableInternet")
    assert not [path for path in (built / "dataset").iterdir() if path.name.startswith(".")]


def test_a_second_push_makes_new_versions_and_can_go_on_from_the_output(fake, built):
    fake.verdict = {}
    assert kernels.push(built) == f"{SLUG}/1"
    assert kernels.push(built, resume=True) == f"{SLUG}/2"
    assert fake.calls("CreateDataset") == 0
    assert fake.calls("CreateDatasetVersion") == 2
    assert fake.kernels[0].get("kernelDataSources", []) == []
    assert fake.kernels[1]["kernelDataSources"] == [SLUG]


@pytest.mark.parametrize(
    ("faults", "verdict", "message"),
    [
        ({}, {"error": "Notebook not found"}, "kernel-metadata.json: Kaggle refused it: Notebook not found"),
        ({}, {"invalidCompetitionSources": ["carvana"]}, "refused it: competition carvana is unknown to it"),
        ({}, {"invalidDatasetSources": ["a/b"]}, "refused it: dataset a/b is unknown to it"),
        ({"SaveKernel": ["403"]}, {}, ".*Kaggle refused access"),
        (
            {"SaveKernel": ["stored:drop"]},
            {},
            f"answer was lost.*A kernel may run. Look at {kernels.CODE}/{SLUG} before",
        ),
        (
            {"SaveKernel": ["stored:502"]},
            {},
            f"answer was lost.*A kernel may run. Look at {kernels.CODE}/{SLUG} before",
        ),
        (
            {"CreateDatasetVersion": ["stored:drop"]},
            {},
            f"answer was lost.*Its files may be there. Look at https://www.kaggle.com/datasets/{SLUG}-suite before",
        ),
        ({}, {"error": "GPU quota exceeded"}, "GPU quota exceeded. Wait until the limit ends"),
        ({}, {"invalidDatasetSources": ["a/b"]}, f"It runs without: stop it at {kernels.CODE}/{SLUG}"),
        ({"CreateDatasetVersion": ["403"]}, {}, "Look whether it is yours to change"),
        ({"upload": ["403"]}, {}, "suite.zip: Kaggle's storage refused it"),
        ({"CreateDatasetVersion": ["429"]}, {}, "suite: Kaggle wants fewer requests"),
        ({"StartBlobUpload": ["401"]}, {}, "refused the credentials"),
    ],
)
def test_what_the_client_hides_of_a_push_is_said(fake, built, faults, verdict, message):
    fake.verdict, fake.faults = verdict, faults
    refused(message, kernels.push, built)
    assert fake.calls("SaveKernel") <= 1


@pytest.mark.parametrize("answer", ["stored:drop", "stored:stall"])
def test_a_push_whose_answer_was_lost_is_looked_for_before_it_is_repeated(fake, built, answer, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", (1, 0.2))
    fake.verdict, fake.faults["SaveKernel"] = {}, [answer]
    refused("A kernel may run", kernels.push, built)
    fake.session = "RUNNING"
    refused(f"{SLUG} runs on Kaggle already. Add --wait, or stop it at", kernels.push, built)
    assert len(fake.kernels) == fake.calls("SaveKernel") == 1
    fake.session = "COMPLETE"
    assert kernels.push(built) == f"{SLUG}/2"


def test_a_push_that_is_interrupted_says_where_to_look(fake, built, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    fake.verdict = {}
    api = client.sign_in()
    monkeypatch.setattr(api, "kernels_push", interrupted)
    monkeypatch.setattr(kernels, "sign_in", lambda: api)
    refused("stopped. A kernel may run. Look at", kernels.push, built)


def test_the_old_version_of_a_dataset_is_not_taken_for_the_new_one(fake, built, monkeypatch, capfd):
    states = ["READY", "READY", "READY", "BLOBS_RECEIVED", "READY"]
    monkeypatch.setattr(fake, "getdatasetstatus", lambda body: {"status": states.pop(0)})
    fake.verdict = {}
    kernels.push(built)
    assert states == []
    assert "waiting until Kaggle has unpacked it, 10 minutes at most" in capfd.readouterr().out


def test_a_folder_of_the_users_own_stays(profile, tmp_path):
    mine = tmp_path / "dataset" / "photo.jpg"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    plan = kernels.KernelPlan(profile, USER, wheels=False)
    refused("dataset was not made by `kernel build`, and stays. Choose another --folder", kernels.build, plan, tmp_path)
    assert mine.read_bytes() == b"mine"


def test_building_again_replaces_what_was_built(built, profile):
    (built / "dataset" / "old.whl").write_bytes(b"")
    kernels.build(kernels.KernelPlan(profile, USER, wheels=False), built)
    assert not (built / "dataset" / "old.whl").exists()


def test_a_build_needs_no_weights_for_a_profile_that_fetches_none(profile, tmp_path):
    arguments = ["--profile", profile, "--folder", tmp_path / "built", "--user", USER, "--no-wheels"]
    assert cli.main(["kernel", "build", *map(str, arguments)]) == 0


@pytest.mark.parametrize(
    ("run", "slug"), [("My_run 2", "my-run-2"), ("_x_", "x"), ("\u00fcber", "ber"), ("a" * 99, "a" * 32)]
)
def test_odd_names_become_names_that_kaggle_takes(profile, tmp_path, run, slug):
    profile.write_text(profile.read_text().replace('"tiny"', json.dumps(run)))
    built = kernels.build(kernels.KernelPlan(profile, USER, wheels=False), tmp_path / "built")
    kernel = json.loads((built / "kernel" / "kernel-metadata.json").read_text())
    assert (kernel["id"], kernel["title"]) == (f"{USER}/carvana-{slug}", f"carvana {slug.replace('-', ' ')}")
    refused("--user 'a b' is no name", kernels.build, kernels.KernelPlan(profile, "a b", wheels=False), tmp_path / "b")


def test_a_dataset_that_kaggle_cannot_unpack(fake, built, monkeypatch):
    monkeypatch.setattr(fake, "getdatasetstatus", lambda body: {"status": "FAILED"})
    refused(f"dataset {SLUG}-suite: Kaggle says FAILED", kernels.push, built)


def kaggle_session(built, folder, unpacked=True):
    """Folders as Kaggle lays them out; returns what papermill gives the kernel's notebook."""
    suite = folder / "input" / "datasets" / USER / "carvana-tiny-suite"
    suite.mkdir(parents=True)
    if unpacked:
        shutil.unpack_archive(built / "dataset" / "suite.zip", suite / "suite")
    else:
        shutil.copy(built / "dataset" / "suite.zip", suite)
    write_competition(folder / "made")
    data = folder / "input" / "carvana-image-masking-challenge"
    data.mkdir()
    for part in ("train", "test"):
        shutil.make_archive(data / part, "zip", folder / "made", part)
    for name in ("train_masks.csv", "sample_submission.csv"):
        with zipfile.ZipFile(data / f"{name}.zip", "w") as archive:
            archive.write(folder / "made" / name, name)
    (folder / "working").mkdir()
    return {"input_dir": str(folder / "input"), "working_dir": str(folder / "working"), "gpus": 0}


def run_kernel(built, folder, values):
    """The pushed notebook, in a folder of its own, with no credentials and no network."""
    output = folder / "executed.ipynb"
    code = built / "kernel" / "carvana.ipynb"
    papermill.execute_notebook(str(code), str(output), values, cwd=str(folder), progress_bar=False)
    cells = nbformat.read(output, 4).cells
    return "".join(out.get("text", "") for cell in cells if cell.cell_type == "code" for out in cell.outputs)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    hide_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("FAKE_KAGGLE_PORT", "9")
    monkeypatch.setenv("PYTHONPATH", str(project_root() / "tests" / "confined"))


def test_the_kernel_finds_everything_and_stops_when_its_hours_are_over(offline, built, tmp_path):
    values = kaggle_session(built, tmp_path, unpacked=False)
    shown = run_kernel(built, tmp_path, values | {"hours": 1e-9})
    assert "Installed: nothing, all was there" in shown
    assert f"data_dir          {tmp_path}/input/carvana-image-masking-challenge" in shown
    assert "The hours given are over before 01_download" in shown


@pytest.mark.slow
def test_the_kernel_makes_a_submission_and_goes_on_from_its_output(offline, built, tmp_path):
    values = kaggle_session(built, tmp_path)
    shown = run_kernel(built, tmp_path, values)
    assert "06_submit: done" in shown
    working = tmp_path / "working"
    names = Competition(tmp_path / "made").test().names
    assert submission.validate(working / "tiny.csv.gz", submission.Expected(names, 96, 126)).ok
    shutil.move(working, tmp_path / "input" / "carvana-tiny")  # attached in the next session
    working.mkdir()
    weights = tmp_path / "input" / "carvana-tiny" / "runs" / "tiny" / "fold0" / "best.safetensors"
    shown = run_kernel(built, tmp_path, values)
    assert (working / "runs" / "tiny" / "fold0" / "best.safetensors").read_bytes() == weights.read_bytes()
    assert "02_explore: nothing has changed, skipped" in shown


def test_a_session_that_lacks_something_is_told_all_at_once(built, tmp_path):
    values = kaggle_session(built, tmp_path)
    suite = tmp_path / "suite"
    shutil.unpack_archive(built / "dataset" / "suite.zip", suite)
    shutil.rmtree(tmp_path / "input" / "carvana-image-masking-challenge")
    (suite / "profile.yaml").write_text("run_name: tiny")
    expected = "lacks the competition's data below .*; encoder weights .*; 2 of 2 GPUs"
    with pytest.raises(UserError, match=expected):
        inside.prepare(suite, suite, tmp_path / "input", tmp_path / "working", 2)
    assert values["gpus"] == 0


def test_a_missing_requirement_is_installed_from_its_wheel(tmp_path, monkeypatch):
    wheel = tmp_path / "tinypkg_of_a_test-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinypkg_of_a_test.py", "")
        archive.writestr(
            "tinypkg_of_a_test-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinypkg-of-a-test\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinypkg_of_a_test-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n"
        )
        archive.writestr("tinypkg_of_a_test-1.0.dist-info/RECORD", "")
    (tmp_path / "requirements.txt").write_text("tinypkg-of-a-test>=1  # why\nnumpy>=2\ntorch>=99\n")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    assert inside.install(tmp_path, tmp_path) == ["tinypkg-of-a-test>=1"]
    assert (tmp_path / "site" / "tinypkg_of_a_test.py").exists()
    wheel.unlink()
    with pytest.raises(UserError, match="tinypkg-of-a-test>=1 cannot be installed"):
        inside.install(tmp_path, tmp_path)


def test_the_kernel_imports_the_package_that_was_pushed_and_that_kaggle_has_unpacked(offline, built, tmp_path):
    values = kaggle_session(built, tmp_path)
    code = built / "kernel" / "carvana.ipynb"
    notebook = nbformat.read(code, 4)
    notebook.cells[-1].source = "import carvana; print('package', carvana.__file__)"
    nbformat.write(notebook, code)
    shown = run_kernel(built, tmp_path, values)
    assert "Installed: nothing, all was there" in shown
    assert f"package {tmp_path}/input/datasets" in shown
    assert carvana.__file__ not in shown
