import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch

from carvana import models
from carvana.data.images import read_full_image
from carvana.errors import UserError
from carvana.export import export
from carvana.files import project_root
from carvana.inference import Ensemble, EnsembleSpec
from carvana.inference.logits import blend
from carvana.run import Run

README = project_root() / "README.md"


@pytest.fixture
def run(members, tmp_path) -> Run:
    """A run of one fold with depthwise convolutions, scored on four images of two cars."""
    run = Run(tmp_path, "mine")
    run.fold_dir(0).mkdir(parents=True)
    shutil.copy(members[1], run.checkpoint(0))
    pd.DataFrame({"car": ["a", "b"], "fold": [0, 1]}).to_csv(run.folds_path, index=False)
    scores = pd.DataFrame({"img": list("wxyz"), "car": list("aabb"), "fold": 0, "dice": [0.98, 0.98, 0.96, 0.96]})
    scores.to_csv(run.scores_path, index=False)
    facts = {"data_dir": "/gone/studio", "hq": False, "encoder_weights": "imagenet"}
    run.write_note("run", {"parameters": facts, "data": "cafe", "versions": {"timm": "9.9"}})
    return run


def test_smp_loads_the_folder_and_gives_the_same_logits_after_the_normalisation_that_the_card_says(run, tmp_path):
    lines = export(run.folder, tmp_path / "car", "smp")
    card = (tmp_path / "car" / "README.md").read_text()
    mean, std = (torch.tensor(json.loads(f"[{text}]")) for text in re.findall(r"\((0\.\d+, 0\.\d+, 0\.\d+)\)", card))
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    model, _ = models.load_checkpoint(run.checkpoint(0))
    with torch.no_grad():
        given = smp.from_pretrained(str(tmp_path / "car"))(((images / 255 - mean) / std).permute(0, 3, 1, 2))
        assert torch.allclose(given[:, 0], model(images), atol=1e-4)
    assert re.search(
        r"on 10 images of noise probabilities differ .* by \d\.\de-\d\d at most; 0 of 61440 pixels", lines[-1]
    )


def test_the_card_says_data_dice_versions_and_licence_and_no_folder_of_this_machine(run, tmp_path):
    export(run.folder, tmp_path / "car", "smp")
    card = (tmp_path / "car" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n---\n# Car masks: run mine\n")
    assert "- Data: studio, fingerprint cafe." in card
    assert re.search(r"Dice at full size: 0\.970000 \(95 % 0\.\d{6} to 0\.\d{6}\) of the run, 4 images of 2 cars", card)
    assert "timm 9.9" in card
    assert "imagenet, licence apache-2.0." in card
    assert "/gone" not in card
    assert str(tmp_path) not in card


def test_what_a_format_cannot_hold_is_one_line(members, tmp_path, monkeypatch):
    both = tmp_path / "ensemble.json"
    EnsembleSpec.equal(members, ["none"]).write(both)
    config = models.ModelConfig("classic_unet", "", "", 32, 32)
    classic = tmp_path / "fold0" / "best.safetensors"
    models.save_checkpoint(classic, models.SegmentationModel(config).state_dict(), config)
    for source, what in ((both, "2 of unet"), (classic, "1 of classic_unet")):
        with pytest.raises(UserError, match=rf"format smp holds one network .* this is {what}. Give --fold"):
            export(source, tmp_path / "out", "smp")
    monkeypatch.setattr("carvana.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^format onnx needs onnx: pip install onnx onnxscript onnxruntime$"):
        export(both, tmp_path / "out.onnx", "onnx")
    monkeypatch.setattr("carvana.export.find_spec", lambda name: True)
    with pytest.raises(UserError, match=r"format onnx holds one size .* this ensemble has 2 and tta none"):
        export(both, tmp_path / "out.onnx", "onnx")
    assert not list(tmp_path.glob("out*"))


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"gone does not exist. Give a run's folder"):
        export(tmp_path / "gone", tmp_path / "out", "smp")
    with pytest.raises(UserError, match=r"fold 3: .*mine has the trained folds 0. Give --fold"):
        export(run.folder, tmp_path / "out", "smp", fold=3)


@pytest.mark.parametrize("name", ["run.json", "fold0/state.pt", "scores.csv"])
def test_a_file_of_another_kind_is_one_line_that_advises_to_delete_nothing(run, tmp_path, name):
    (run.folder / name).touch()
    with pytest.raises(UserError, match=rf"{name} is no run's folder, no checkpoint .* Give one of these.") as error:
        export(run.folder / name, tmp_path / "out", "smp")
    assert "elete" not in str(error.value)


def test_a_fold_is_taken_beside_an_ensemble_too(run, tmp_path):
    EnsembleSpec([run.checkpoint(0)], [1.0], ["none", "hflip"]).write(run.ensemble_path)
    whole, single = (export(run.ensemble_path, tmp_path / f"{fold}", "smp", fold) for fold in (None, 0))
    assert "tta none, hflip is left out" in whole[1] and not any("left out" in line for line in single)


def test_a_card_never_replaces_another_file(run, tmp_path):
    readme = tmp_path / "car" / "README.md"
    readme.parent.mkdir()
    readme.write_text("mine")
    for out, kind in ((readme.parent, "smp"), (readme.with_suffix(".onnx"), "onnx"), (tmp_path / "car.md", "onnx")):
        with pytest.raises(UserError, match=r"\.md, where the card goes, is another file, and stays"):
            export(run.folder, out, kind, fold=0)
    assert [path.name for path in readme.parent.iterdir()] == ["README.md"] and readme.read_text() == "mine"
    readme.unlink()
    for _ in range(2):  # a card of our own is written anew
        export(run.folder, readme.parent, "smp")


@pytest.mark.parametrize(("name", "text"), [("run.json", "{"), ("run.json", '{"versions": 3}'), ("scores.csv", "a,b")])
def test_what_cannot_be_read_for_the_card_ends_it_before_anything_is_written(run, tmp_path, name, text):
    (run.folder / name).write_text(text)
    with pytest.raises(UserError, match=name):
        export(run.folder, tmp_path / "car", "smp", fold=0)
    assert not (tmp_path / "car").exists()


def test_a_disk_without_room_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("carvana.files.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"car: .* GB are needed and 0.0 GB are free. Free space"):
        export(run.folder, tmp_path / "car", "smp")
    assert not list((tmp_path / "car").iterdir())


def readme_mask() -> np.ndarray:
    """The mask that README's lines for a person without this package give, in a folder with car.onnx and car.jpg."""
    code = re.search(r"```python\n(import math.*?)```", README.read_text("utf-8"), re.S)[1]
    names: dict = {}
    exec(code.replace("threshold = 0.5 ", "threshold = 0.6 "), names)
    return names["mask"]


def test_onnx_gives_what_the_ensemble_gives_for_any_batch_and_through_the_lines_of_the_readme(
    members, tests, tmp_path, monkeypatch
):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    model, _ = models.load_checkpoint(members[0])
    other, path = tmp_path / "fold1" / "best.safetensors", tmp_path / "ensemble.json"
    changed = {
        name: 0.9 * tensor if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    models.save_checkpoint(other, changed, model.config)
    EnsembleSpec([members[0], other], [0.25, 0.75], ["none", "hflip"], 0.6).write(path)
    monkeypatch.setattr("carvana.device.best", lambda: torch.device("cpu"))
    ensemble = Ensemble.read(path)
    ensemble.dtypes = [None, None]
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    export(path, Path("car.onnx"), "onnx")
    session = onnxruntime.InferenceSession("car.onnx")
    for n in (1, 3):
        images = np.random.default_rng(n).integers(0, 256, (n, 96, 128, 3), np.uint8)
        logits = ensemble.predict_logits({(96, 128): torch.from_numpy(images)}, ["noise"] * n)
        blended = [of_image.by_size[0] for of_image in blend(logits, ensemble.spec.weights)]
        assert np.allclose(session.run(["logits"], {"images": images})[0], blended, atol=1e-4)
    image = read_full_image(tests, tests.names[0])
    cv2.imwrite("car.jpg", image)
    again = cv2.cvtColor(cv2.imread("car.jpg"), cv2.COLOR_BGR2RGB)
    assert np.count_nonzero(readme_mask() != ensemble.predict(again)[0]) <= 3
