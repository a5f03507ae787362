import json

import numpy as np
import pytest
import torch
from conftest import HEIGHT, WIDTH

from carvana import inference, models, photos, rle
from carvana.files import UserError
from carvana.grid import Grid

SIZES = (96, 128), (64, 96)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Two untrained networks of different encoders and sizes."""
    folder, paths = tmp_path_factory.mktemp("members"), []
    for i, (encoder, size) in enumerate(zip(("resnet18", "tu-tf_efficientnet_lite0"), SIZES, strict=True)):
        torch.manual_seed(i)
        network = models.Network("unet", encoder, "16,8,8,8,8", *size)
        path = folder / f"fold{i}" / "best.safetensors"
        models.save_checkpoint(path, models.Segmenter(network).state_dict(), network)
        paths.append(path)
    return paths


@pytest.fixture
def tests(shared_competition):
    return photos.photographs(shared_competition, "train")


def test_views_are_turned_back_exactly():
    pictures = torch.randint(0, 255, (2, 64, 96, 3), dtype=torch.uint8)
    same = inference.view_logits(lambda batch: batch[..., 0].float(), pictures, "hflip")
    assert torch.equal(same, pictures[..., 0].float())


@pytest.mark.parametrize("view", ["scale0.5", "scale1.5", "scale2"])
def test_scaled_views_come_back_onto_the_same_pixels(view):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    smooth = (x + y)[None, ..., None].repeat(1, 1, 1, 3).byte()
    back = inference.view_logits(lambda batch: batch[..., 0].float(), smooth, view)
    assert (back - smooth[..., 0].float())[:, 4:-4, 4:-4].abs().max() < 1


@pytest.mark.parametrize("view", ["flip", "scale", "scale9", "scalex", "vflip"])
def test_unknown_views_are_refused(view, members):
    with pytest.raises(UserError, match=f'tta "{view}" is unknown'):
        inference.Ensemble(members, [0.5, 0.5], [view])


def test_ensemble_json_is_read_back_with_paths_relative_to_it(members, tmp_path):
    made = inference.Ensemble(members, [0.25, 0.75], ["none", "hflip"], 0.4)
    made.write(members[0].parent.parent / "ensemble.json")
    found = inference.Ensemble.read(members[0].parent.parent / "ensemble.json")
    assert (found.weights, found.views, found.threshold) == ([0.25, 0.75], ["none", "hflip"], 0.4)
    assert json.loads((members[0].parent.parent / "ensemble.json").read_text())["members"][0]["path"].startswith(
        "fold0"
    )


def test_members_of_different_sizes_are_blended_as_the_weighted_mean_of_enlarged_logits(members, tests):
    ensemble = inference.Ensemble(members, [0.25, 0.75], ["none", "hflip"])
    ensemble.dtypes = [None, None]
    each, full, rows = next(inference.batched(ensemble, tests, tests.names[:2], 2, workers=0))
    assert [tuple(logits.shape) for logits in each] == [(2, 2, *SIZES[0]), (2, 2, *SIZES[1])]
    blended = [logits[0] for logits in inference.blend(each, ensemble.weights)]
    parts = [
        Grid(*full[0], *size).enlarge(logits[:, 0].mean(0).numpy()) for logits, size in zip(each, SIZES, strict=True)
    ]
    assert np.allclose(inference.enlarged(blended, full[0]), 0.25 * parts[0] + 0.75 * parts[1], atol=1e-5)


def predicted(ensemble, tests, folder, **options):
    return inference.predict(ensemble, tests, tests.names, folder, **{"workers": 0, "batch_size": 4} | options)


def test_parts_hold_a_row_for_every_photograph_and_equal_the_probabilities_cut_at_the_threshold(
    members, tests, tmp_path
):
    ensemble = inference.Ensemble(members, [0.5, 0.5], ["none"])
    table = predicted(ensemble, tests, tmp_path)
    assert table["img"].tolist() == tests.names
    lines = (tmp_path / "part-00000.csv").read_text().splitlines()
    for name, line, probability in zip(
        tests.names, lines[1:], inference.masks(ensemble, tests, tests.names), strict=True
    ):
        assert line == f"{name},{rle.encode(probability > 0.5)}"
    assert table["area"].iloc[0] == pytest.approx(rle.area(lines[1].split(",")[1]) / HEIGHT / WIDTH, abs=1e-6)


def test_only_missing_or_damaged_parts_are_computed_again(members, tests, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "PART_SIZE", 5)
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    predicted(ensemble, tests, tmp_path)
    parts = sorted(tmp_path.glob("*.csv"))
    assert len(parts) == 4
    contents = [part.read_bytes() for part in parts]
    parts[1].unlink()
    parts[2].write_bytes(contents[2][:50])
    before = {part: part.stat().st_mtime_ns for part in (parts[0], parts[3])}
    predicted(ensemble, tests, tmp_path)
    assert [part.read_bytes() for part in parts] == contents
    assert before == {part: part.stat().st_mtime_ns for part in before}


def test_another_member_view_or_threshold_starts_anew(members, tests, tmp_path):
    made = []
    for paths, views, threshold in ((members[:1], ["none"], 0.5), (members[1:], ["none"], 0.5),
                                    (members[1:], ["hflip"], 0.5), (members[1:], ["hflip"], 0.45)):  # fmt: skip
        predicted(inference.Ensemble(paths, [1.0], views, threshold), tests, tmp_path)
        made.append(json.loads((tmp_path / "part-00000.json").read_text())["key"])
    assert len(set(made)) == 4


def test_max_hours_stops_after_a_whole_part(members, tests, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "PART_SIZE", 5)
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    assert len(predicted(ensemble, tests, tmp_path, max_hours=1e-9)) == 5
    assert len(predicted(ensemble, tests, tmp_path)) == len(tests.names)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photograph_that_cannot_be_decoded_is_named_and_leaves_no_row(members, competition, tmp_path, workers):
    (competition / "test" / "000000000005_02.jpg").write_bytes(b"\xff\xd8 not a picture")
    tests = photos.photographs(competition, "test")
    with pytest.raises(UserError, match=r"photograph 000000000005_02.jpg cannot be decoded") as error:
        predicted(inference.Ensemble(members[:1], [1.0], ["none"]), tests, tmp_path, workers=workers)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.csv"))


def test_a_missing_member_is_an_error_before_work(members):
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read"):
        inference.Ensemble([members[0].parent / "gone.safetensors"], [1.0], ["none"])


def test_logits_that_are_not_finite_are_an_error_not_an_empty_mask(members, tests, tmp_path):
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    ensemble.models[0].net.segmentation_head[0].bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite for one of 000000000001_01.jpg"):
        predicted(ensemble, tests, tmp_path)
    assert not list(tmp_path.glob("*.csv"))
