"""Soft masks of test images: kept by a prediction, learnt from by a training."""

import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import recipe, trainer_of
from safetensors.torch import load_file
from scipy.special import expit

from carvana import pipeline
from carvana.data import Competition
from carvana.data.dataset import PseudoSamples, add_pseudo, batches
from carvana.data.images import read_image
from carvana.errors import UserError
from carvana.grid import Grid
from carvana.inference import Ensemble, EnsembleSpec, Options
from carvana.inference.loader import InferenceDataset, in_batches, predict_batches
from carvana.inference.logits import blend
from carvana.inference.predict import keep_soft_masks, predict_run_lengths, surest
from carvana.profiles import check
from carvana.run import Run, read_csv
from carvana.training.launch import train

OPTIONS = Options(batch_size=3, workers=0)
LEARNS = {"pseudo_labels": "teacher", "epochs": 2}
BEFORE = [[(0, 4), (0, 0)], [(0, 1), (0, 2)], [(1, 1), (1, 4)], [(1, 0), (1, 3)]]  # of 5 images, 2 a batch, seed 1


def equal(checkpoints, tta=("none",)):
    return Ensemble(EnsembleSpec.equal(checkpoints, tta))


def labels_of(images, test_dir=""):
    return pd.DataFrame({"img": images.names, "unsure": 0.5, "test_dir": str(test_dir)})


def keep(data, run, ensemble):
    """The soft masks of all test images, kept in `run`; returns their index."""
    images = Competition(data).test().images
    keep_soft_masks(ensemble, images, labels_of(images), run.pseudo_path, OPTIONS)
    return run.pseudo_path


def samples_of(data, index, height=96, width=128):
    return PseudoSamples(Competition(data).test().images, read_csv(index), index.parent, height, width)


@pytest.fixture(scope="module")
def kept(shared_competition, members, tmp_path_factory):
    """Folder of runs in which the run `teacher` has soft masks of the four test images."""
    runs = tmp_path_factory.mktemp("kept")
    keep(shared_competition, Run(runs, "teacher"), equal(members[:1], ["none", "hflip"]))
    return runs


@pytest.fixture
def runs(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "runs")


def test_every_batch_has_its_share_and_every_true_image_comes_once_an_epoch():
    true = batches(30, 3, 2, 8, 1)
    mixed = add_pseudo(true, 30, 13, 2, 1)
    assert [batch[:3] for batch in mixed] == true
    assert all(len(batch) == 5 and all(30 <= i < 43 for _, i in batch[3:]) for batch in mixed)
    for epoch in range(8):
        assert sorted(i for batch in mixed for e, i in batch[:3] if e == epoch) == list(range(30))
    drawn = [key for batch in mixed for key in batch[3:]]
    assert len(drawn) == len(set(drawn)) == 160  # no key twice, so no augmentation either
    counts = Counter(i for _, i in drawn)
    assert set(counts.values()) == {12, 13} and len(counts) == 13
    orders = [tuple(i for turn, i in drawn if turn == wanted) for wanted in range(12)]
    assert len(set(orders)) == 12


def test_fewer_soft_masks_than_a_batch_takes_are_augmented_anew_within_it():
    (batch,) = add_pseudo([[(0, 0)]], 1, 2, 5, 1)
    assert Counter(batch[1:]) == Counter({(0, 1): 1, (0, 2): 1, (1, 1): 1, (1, 2): 1, batch[-1]: 1})
    assert batch[-1][0] == 2


def test_two_processes_take_the_images_of_one_with_the_doubled_batch():
    one, two = add_pseudo(batches(30, 4, 1, 3, 1), 30, 13, 2, 1), add_pseudo(batches(30, 2, 2, 3, 1), 30, 13, 1, 1)
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(two[::2], two[1::2], strict=True)]


@pytest.mark.parametrize(("batch_size", "share", "count"), [
    (2, 0.01, 1), (2, 0.99, 1), (8, 0.5, 4), (8, 0.25, 2), (8, 0.01, 1), (8, 0.99, 7), (5, 0.3, 2),
])  # fmt: skip
def test_a_share_is_rounded_so_that_each_batch_has_a_true_and_a_soft_mask(batch_size, share, count):
    chosen = {"batch_size": batch_size, "pseudo_batch": share}
    assert recipe(**chosen, pseudo_labels="teacher").pseudo_count == count
    assert recipe(**chosen).pseudo_count == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch_size": 1, "pseudo_labels": "teacher"}, "batch_size is 1, but with pseudo_labels it must be 2 or more"),
    ({"pseudo_batch": 0.0}, "pseudo_batch is 0.0, but must be a number from 0.01 to 0.99"),
    ({"pseudo_batch": 1.0}, "pseudo_batch is 1.0, but must be a number from 0.01 to 0.99"),
    ({"pseudo_labels": "../other"}, 'pseudo_labels "../other" is no name of a run'),
])  # fmt: skip
def test_a_wrong_parameter_is_refused_before_work(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("share", [-0.1, 1.1, "half"])
def test_a_share_of_the_test_images_is_from_0_to_1(share):
    with pytest.raises(UserError, match="pseudo_share is .*, but must be a number from 0 to 1"):
        check({"pseudo_share": share})


def test_without_pseudo_labels_the_batches_and_the_data_are_those_of_before(shared_competition, tmp_path):
    assert batches(5, 2, 1, 2, 1) == BEFORE
    trainer = trainer_of(shared_competition, tmp_path / "run")
    assert trainer.batch_keys == batches(8, 4, 1, 3, 1) and trainer.pseudo_names == []
    again = trainer_of(shared_competition, tmp_path / "run", pseudo_batch=0.3)
    assert again.batch_keys == trainer.batch_keys and again.state.data == trainer.state.data


def test_the_images_with_the_surest_edges_are_chosen_and_none_without_an_edge():
    area = [0.3, 0.0, np.nan, 1.0, 0.2, 0.25, 0.3, 0.2]
    unsure = [0.9, 0.0, np.nan, 0.0, 0.4, 0.3, 0.7, 0.4]
    predicted = pd.DataFrame({"img": list("abcdefgh"), "area": area, "unsure": unsure, "part": "x"})
    assert surest(predicted, 0.25)["img"].tolist() == ["f", "e"]
    assert surest(predicted, 0.375).to_dict("list") == {"img": ["f", "e", "h"], "unsure": [0.3, 0.4, 0.4]}
    assert surest(predicted, 0.001)["img"].tolist() == ["f"]
    assert surest(predicted, 1.0)["img"].tolist() == ["f", "e", "h", "g", "a"]


@pytest.mark.parametrize("n", [1, 2])
def test_soft_masks_are_the_probabilities_of_the_ensemble_at_network_size(shared_competition, members, tmp_path, n):
    ensemble, images = equal(members[:n], ["none", "hflip"]), Competition(shared_competition).test().images
    index = keep(shared_competition, Run(tmp_path, "teacher"), ensemble)
    samples = samples_of(shared_competition, index)
    dataset = InferenceDataset(images, images.names, ensemble.sizes)
    for batch in predict_batches(ensemble, dataset, in_batches(4, 3), workers=0):
        for row, blended, full in zip(
            batch.rows, blend(batch.logits, ensemble.spec.weights), batch.full_sizes, strict=True
        ):
            expected = Grid(*full, 96, 128).reduce(blended.probabilities(full)) if n > 1 else expit(blended.by_size[0])
            image, soft = samples[row]
            assert np.abs(soft / 255 - expected).max() <= 1 / 255
            assert len(np.unique(soft)) > 10
            assert np.array_equal(image, read_image(images, images.names[row], 96, 128)[0])
    table = pd.read_csv(index)
    assert table["img"].tolist() == images.names and (table["unsure"] == 0.5).all()
    assert sorted(path.name for path in index.parent.iterdir()) == [
        *(f"{name}.png" for name in images.names),
        "ensemble.json",
        index.name,
    ]


def test_soft_masks_of_another_size_lie_on_the_grid_of_the_image(shared_competition, kept):
    index = Run(kept, "teacher").pseudo_path
    small, large = samples_of(shared_competition, index), samples_of(shared_competition, index, 192, 256)
    for i in range(4):
        image, soft = large[i]
        assert image.shape == (192, 256, 3) and soft.shape == (192, 256) and soft.dtype == np.uint8
        assert abs(soft[:190, :250].mean() - small[i][1][:95, :125].mean()) < 2


def test_what_is_kept_is_not_predicted_again_and_another_ensemble_or_choice_is(shared_competition, members, runs):
    run, images = Run(runs, "teacher"), Competition(shared_competition).test().images
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.pseudo_path.parent.iterdir()}
    idle = equal(members[:1], ["none", "hflip"])
    idle.models = []  # which could not predict
    keep(shared_competition, run, idle)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.pseudo_path.parent.iterdir()} == before
    keep(shared_competition, run, equal(members[1:]))
    assert read_csv(run.pseudo_path)["crc32"].tolist() != pd.read_csv(kept_copy(before, run))["crc32"].tolist()
    keep_soft_masks(equal(members[1:]), images, labels_of(images).tail(2), run.pseudo_path, OPTIONS)
    assert len(list(run.pseudo_path.parent.glob("*.png"))) == len(read_csv(run.pseudo_path)) == 2
    samples_of(shared_competition, run.pseudo_path)[1]


def kept_copy(files, run):
    path = run.folder / "before.csv"
    path.write_bytes(files[run.pseudo_path][0])
    return path


def test_a_stop_before_the_index_leaves_nothing_that_counts(shared_competition, members, tmp_path, monkeypatch):
    run, ensemble = Run(tmp_path, "teacher"), equal(members[:1])
    monkeypatch.setattr("carvana.inference.predict.write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep(shared_competition, run, ensemble)
    monkeypatch.undo()
    assert len(list(run.pseudo_path.parent.glob("*.png"))) == 4 and not run.pseudo_path.exists()
    keep(shared_competition, run, ensemble)
    assert len([samples_of(shared_competition, run.pseudo_path)[i] for i in range(4)]) == 4


def flipped(data):
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


DAMAGED_PNG = {
    "empty": lambda data: b"", "cut": lambda data: data[:-9], "flipped": flipped, "text": lambda data: b"no image",
    "lost": None,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_PNG)
def test_a_damaged_soft_mask_is_one_line_that_names_it(shared_competition, runs, damage):
    path = sorted((runs / "teacher" / "pseudo").glob("*.png"))[1]
    data = path.read_bytes()
    path.unlink()
    if DAMAGED_PNG[damage]:
        path.write_bytes(DAMAGED_PNG[damage](data))
    with pytest.raises(UserError, match=rf"^{path}, its image in .*test or its row .* Give the same hq, or delete"):
        trainer_of(shared_competition, runs / "student", **LEARNS)
    path.write_bytes(data)
    assert trainer_of(shared_competition, runs / "student", **LEARNS).pseudo_names


def without(column):
    return lambda table: table.drop(columns=column).to_csv(index=False)


DAMAGED_INDEX = {
    "lost": None,
    "empty": lambda table: "",
    "binary": lambda table: "\0\1\2",
    "a header alone": lambda table: table.head(0).to_csv(index=False),
    "no crc32": without("crc32"),
    "no img": without("img"),
    "no test_dir": without("test_dir"),
    "no number": lambda table: table.assign(crc32="x").to_csv(index=False),
    "another number": lambda table: table.assign(crc32=table["crc32"] ^ 1).to_csv(index=False),
    "another name": lambda table: table.assign(img=[f"x{name}" for name in table["img"]]).to_csv(index=False),
    "names that changed places": lambda table: table.assign(img=table["img"].tolist()[::-1]).to_csv(index=False),
    "a row less": lambda table: table.head(3).to_csv(index=False),
    "a lost folder": lambda table: table.assign(test_dir="nowhere").to_csv(index=False),
    **{f"cut after {share:.0%}": lambda table, share=share: cut(table, share) for share in (0.3, 0.5, 0.8, 0.97)},
}


def cut(table, share):
    text = table.to_csv(index=False)
    return text[: int(share * len(text))]


@pytest.mark.parametrize("damage", DAMAGED_INDEX)
def test_a_damaged_index_is_one_line(shared_competition, runs, damage):
    path = Run(runs, "teacher").pseudo_path
    table = pd.read_csv(path, keep_default_na=False)
    path.unlink()
    if DAMAGED_INDEX[damage]:
        path.write_text(DAMAGED_INDEX[damage](table))
    with pytest.raises(UserError) as error:
        trainer_of(shared_competition, runs / "student", **LEARNS)
    assert "\n" not in str(error.value) and ("pseudo" in str(error.value) or "nowhere" in str(error.value))


def test_a_run_that_has_kept_no_soft_masks_is_one_line(shared_competition, tmp_path):
    advice = "does not exist. Run 05_predict there with a pseudo_share above 0"
    with pytest.raises(UserError, match=rf"^pseudo_labels: .*teacher/pseudo/labels.csv {advice}"):
        trainer_of(shared_competition, tmp_path / "student", **LEARNS)


def test_an_image_that_is_not_the_one_that_was_predicted_is_refused(competition, runs):
    trainer_of(competition, runs / "student", **LEARNS)
    first, second = sorted((competition / "test").glob("*.jpg"))[:2]
    shutil.copy(second, first)
    with pytest.raises(UserError, match=rf"{first.name}.png, its image in .* has changed"):
        trainer_of(competition, runs / "student", **LEARNS)
    first.unlink()
    with pytest.raises(UserError, match="lacks 1 of 4 images"):
        trainer_of(competition, runs / "student", **LEARNS)


def test_soft_masks_of_cars_that_have_true_masks_are_refused(shared_competition, members, tmp_path):
    images, run = Competition(shared_competition).train_images, Run(tmp_path, "teacher")
    folder = shutil.copytree(images.path, tmp_path / "copies")
    keep_soft_masks(equal(members[:1]), images, labels_of(images, folder), run.pseudo_path, OPTIONS)
    with pytest.raises(UserError, match=r"labels.csv holds car 000000000001, which has true masks"):
        trainer_of(shared_competition, tmp_path / "student", **LEARNS)


def test_a_teacher_that_has_learnt_from_cars_that_are_held_out_is_refused(shared_competition, runs):
    samples, teacher = Competition(shared_competition).samples, Run(runs, "teacher")
    teacher.split(samples, 2, 0, 1)
    with pytest.raises(UserError, match="has learnt from cars that this run holds out. Give both runs the same"):
        trainer_of(shared_competition, runs / "student", holdout_cars=1, **LEARNS)
    teacher.folds_path.unlink()
    teacher.split(samples, 2, 1, 1)
    assert trainer_of(shared_competition, runs / "student", holdout_cars=1, **LEARNS).pseudo_names


def test_soft_masks_of_a_blend_come_from_all_that_its_members_have_learnt_from(shared_competition, members, tmp_path):
    samples, blend = Competition(shared_competition).samples, Run(tmp_path, "teacher")
    for name, held_out in (("a", 0), ("b", 1)):
        member = Run(tmp_path, name)
        member.split(samples, 2, held_out, 1)
        member.fold_dir(0).mkdir()
        shutil.copy(members[0], member.checkpoint(0))
    keep(shared_competition, blend, equal([Run(tmp_path, name).checkpoint(0) for name in "ab"]))
    with pytest.raises(UserError, match="teacher has learnt from cars that this run holds out"):
        trainer_of(shared_competition, tmp_path / "student", holdout_cars=1, **LEARNS)
    shutil.rmtree(blend.folder)
    keep(shared_competition, blend, equal([Run(tmp_path, "b").checkpoint(0)]))
    assert trainer_of(shared_competition, tmp_path / "student", holdout_cars=1, **LEARNS).pseudo_names


def test_images_of_any_folder_are_learnt_from(shared_competition, members, tmp_path):
    images, run = Competition(shared_competition).test().images, Run(tmp_path, "teacher")
    folder = tmp_path / "mine"
    folder.mkdir()
    for i, name in enumerate(images.names):
        shutil.copy(images.path / name, folder / f"photo{i}.jpg")
    images = Competition(shared_competition).test(folder).images
    keep_soft_masks(equal(members[:1]), images, labels_of(images, folder), run.pseudo_path, OPTIONS)
    trainer = trainer_of(shared_competition, tmp_path / "student", **LEARNS)
    assert trainer.pseudo_names == ["photo0.jpg", "photo1.jpg", "photo2.jpg", "photo3.jpg"]


def test_a_changed_soft_mask_is_another_training_and_another_step(shared_competition, members, runs):
    values = {"data_dir": str(shared_competition), "runs_dir": str(runs), "run_name": "student", "n_folds": 2}

    def key():
        return next(step.key() for step in pipeline.steps(values | LEARNS) if step.notebook == "03_train")

    trainer, before = trainer_of(shared_competition, runs / "student", **LEARNS), key()
    assert key() == before
    train(trainer, max_hours=1e-9)
    keep(shared_competition, Run(runs, "teacher"), equal(members[1:]))
    assert key() != before
    with pytest.raises(UserError, match="was trained with another the images, masks, folds, processes or weights"):
        trainer_of(shared_competition, runs / "student", **LEARNS)
    other = trainer_of(shared_competition, runs / "other", **LEARNS)
    assert other.state.data != trainer.state.data


def test_a_prediction_that_keeps_soft_masks_is_done_when_their_index_is_there(tmp_path):
    for share, last in ((0.0, "x.csv.gz"), (0.1, "labels.csv")):
        values = {"runs_dir": str(tmp_path), "run_name": "x", "pseudo_share": share}
        step = next(step for step in pipeline.steps(values) if step.notebook == "05_predict")
        assert step.writes[-1].name == last


@pytest.fixture(scope="module")
def whole(shared_competition, kept):
    trainer = trainer_of(shared_competition, kept / "whole", **LEARNS)
    return trainer, train(trainer, workers=0)


def test_true_and_soft_masks_reach_the_network_in_their_share(whole):
    trainer, history = whole
    assert trainer.state.total_steps == 2 * 8 // 2  # of a batch of 4 two are true, and 8 images are
    assert history["images_seen"].tolist() == [0, 16, 32]
    assert history["images_scored"].tolist()[-1] == 8  # of the fold, all with true masks
    trainer.state.step = 0
    n = len(trainer.samples)
    rows = [rows.tolist() for _, _, rows in trainer.loader(0)]
    assert all(set(batch[:2]) <= set(trainer.train_rows) and min(batch[2:]) >= n for batch in rows)
    assert sorted(row for batch in rows[:4] for row in batch[:2]) == trainer.train_rows.tolist()
    assert Counter(row for batch in rows for row in batch[2:]) == dict.fromkeys(range(n, n + 4), 4)
    trainer.state.step = trainer.state.total_steps


def test_a_training_stopped_after_each_step_ends_in_the_same_weights(whole, shared_competition, runs):
    stops = 0
    while not (trainer := trainer_of(shared_competition, runs / "cut", **LEARNS)).finished:
        train(trainer, max_hours=1e-9, workers=stops % 3)
        stops += 1
    assert stops == 8
    expected, actual = (
        load_file(trainer.run.runs_dir / name / "fold0" / "last.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_loss_that_is_not_finite_names_the_soft_masks_of_its_batch_too(shared_competition, runs):
    trainer = trainer_of(shared_competition, runs / "student", **LEARNS)
    next(trainer.state.model.parameters()).data.fill_(np.nan)
    with pytest.raises(UserError, match=r"in the batch (0{11}[1-4]_0\d.jpg, ){2}0{11}5_0\d.jpg, 0{11}5_0\d.jpg"):
        train(trainer, workers=0)


def test_from_the_teacher_to_the_student_all_is_learnt_from_files(shared_competition, tmp_path):
    changes = {"height": 64, "width": 96, "epochs": 8, "validate_every": 8}
    taught = train(trainer_of(shared_competition, tmp_path / "teacher", **changes, batch_size=2))
    run, test = Run(tmp_path, "teacher"), Competition(shared_competition).test()
    ensemble = equal([run.checkpoint(0)])
    predicted = predict_run_lengths(ensemble, test, run.shards_dir, OPTIONS)
    labels = surest(predicted, 0.75).assign(test_dir="")
    keep_soft_masks(ensemble, test.images, labels, run.pseudo_path, OPTIONS)
    assert labels["unsure"].max() <= predicted.loc[~predicted["img"].isin(labels["img"]), "unsure"].min()
    student = trainer_of(shared_competition, tmp_path / "student", **changes | {"pseudo_labels": "teacher"})
    assert student.pseudo_names == labels["img"].tolist() and len(labels) == 3
    history = train(student)
    for dice in (taught["dice"], history["dice"]):
        assert dice.iloc[-1] > 0.8 and dice.iloc[-1] > dice.iloc[0] + 0.2
    assert trainer_of(shared_competition, tmp_path / "student", **changes | {"pseudo_labels": "teacher"}).finished
