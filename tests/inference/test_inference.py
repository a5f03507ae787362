import json

import numpy as np
import pytest
import torch
from conftest import MEMBER_SIZES

from carvana import rle
from carvana.files import UserError
from carvana.grid import Grid
from carvana.inference import ensemble as inference


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
    path = members[0].parent.parent / "ensemble.json"
    inference.write_ensemble(path, list(zip(members, [0.25, 0.75], strict=True)), ["none", "hflip"], 0.4)
    found = inference.Ensemble.read(members[0].parent.parent / "ensemble.json")
    assert (found.weights, found.views, found.threshold) == ([0.25, 0.75], ["none", "hflip"], 0.4)
    assert json.loads((members[0].parent.parent / "ensemble.json").read_text())["members"][0]["path"].startswith(
        "fold0"
    )


def test_members_of_different_sizes_are_blended_as_the_weighted_mean_of_enlarged_logits(members, tests):
    ensemble = inference.Ensemble(members, [0.25, 0.75], ["none", "hflip"])
    ensemble.dtypes = [None, None]
    photographs = inference.Photographs(tests, tests.names, ensemble.sizes)
    each, full, rows = next(inference.batched(ensemble, photographs, [[0, 1]], workers=0))
    assert [tuple(logits.shape) for logits in each] == [(2, 2, *MEMBER_SIZES[0]), (2, 2, *MEMBER_SIZES[1])]
    blended = [logits[0].numpy() for logits in inference.blend(each, ensemble.weights)]
    parts = [
        Grid(*full[0], *size).enlarge(logits[:, 0].mean(0).numpy())
        for logits, size in zip(each, MEMBER_SIZES, strict=True)
    ]
    assert np.allclose(inference.enlarged(blended, full[0]), 0.25 * parts[0] + 0.75 * parts[1], atol=1e-5)


def test_a_missing_member_is_an_error_before_work(members):
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read"):
        inference.Ensemble([members[0].parent / "gone.safetensors"], [1.0], ["none"])


@pytest.mark.parametrize("n", [1, 2])
def test_edges_found_on_the_device_are_those_found_on_the_cpu(n):
    torch.manual_seed(0)
    blended = [torch.randn(48, 64), torch.randn(32, 32)][:n]
    for cut in (0.0, 0.3):
        found = inference._edges_on_device(blended, (96, 126), cut)
        assert np.array_equal(found, inference.edges(blended, (96, 126), cut))
        mask = inference.enlarged([logits.numpy() for logits in blended], (96, 126)) > cut
        assert rle.from_edges(found) == rle.encode(mask)
