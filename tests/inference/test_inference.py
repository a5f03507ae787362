import json

import numpy as np
import pytest
import torch
from conftest import MEMBER_SIZES

from carvana import rle
from carvana.errors import UserError
from carvana.grid import Grid
from carvana.inference import Ensemble, EnsembleSpec
from carvana.inference.ensemble import tta_logits
from carvana.inference.loader import InferenceDataset, predict_batches
from carvana.inference.logits import BlendedLogits, blend


def test_tta_is_turned_back_exactly():
    images = torch.randint(0, 255, (2, 64, 96, 3), dtype=torch.uint8)
    same = tta_logits(lambda batch: batch[..., 0].float(), images, "hflip")
    assert torch.equal(same, images[..., 0].float())


@pytest.mark.parametrize("name", ["scale0.5", "scale1.5", "scale2"])
def test_scaled_tta_comes_back_onto_the_same_pixels(name):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    smooth = (x + y)[None, ..., None].repeat(1, 1, 1, 3).byte()
    back = tta_logits(lambda batch: batch[..., 0].float(), smooth, name)
    assert (back - smooth[..., 0].float())[:, 4:-4, 4:-4].abs().max() < 1


@pytest.mark.parametrize("name", ["flip", "scale", "scale9", "scalex", "vflip"])
def test_unknown_tta_is_refused(name, members):
    with pytest.raises(UserError, match=f'tta "{name}" is unknown'):
        Ensemble(EnsembleSpec.equal(members, [name]))


def test_ensemble_json_is_read_back_with_paths_relative_to_it(members, tmp_path):
    path = members[0].parent.parent / "ensemble.json"
    spec = EnsembleSpec(tuple(members), (0.25, 0.75), ("none", "hflip"), 0.4)
    spec.write(path)
    assert EnsembleSpec.read(path) == spec
    assert json.loads(path.read_text())["members"][0]["path"].startswith("fold0")


def test_members_of_different_sizes_are_blended_as_the_weighted_mean_of_enlarged_logits(members, tests):
    ensemble = Ensemble(EnsembleSpec(members, [0.25, 0.75], ["none", "hflip"]))
    ensemble.dtypes = [None, None]
    dataset = InferenceDataset(tests, tests.names, ensemble.sizes)
    batch = next(predict_batches(ensemble, dataset, [[0, 1]], workers=0))
    assert [tuple(logits.shape) for logits in batch.logits] == [(2, 2, *size) for size in MEMBER_SIZES]
    blended, full = blend(batch.logits, ensemble.spec.weights)[0], batch.full_sizes[0]
    parts = [
        Grid(*full, *size).enlarge(logits[:, 0].mean(0).numpy())
        for logits, size in zip(batch.logits, MEMBER_SIZES, strict=True)
    ]
    assert np.allclose(blended.enlarge(full), 0.25 * parts[0] + 0.75 * parts[1], atol=1e-5)


def test_a_missing_member_is_an_error_before_work(members):
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read"):
        Ensemble(EnsembleSpec.equal([members[0].parent / "gone.safetensors"], ["none"]))


@pytest.mark.parametrize("n", [1, 2])
def test_edges_are_those_of_the_enlarged_mask(n):
    torch.manual_seed(0)
    logits = BlendedLogits([torch.randn(48, 64).numpy(), torch.randn(32, 32).numpy()][:n])
    for logit_threshold in (0.0, 0.3):
        mask = logits.enlarge((96, 126)) > logit_threshold
        assert rle.from_edges(logits.edges((96, 126), logit_threshold)) == rle.encode(mask)
