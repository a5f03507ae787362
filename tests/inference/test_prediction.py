import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HEIGHT, WIDTH

from carvana import rle
from carvana.data import Competition, TestSet
from carvana.data.images import read_full_image
from carvana.errors import UserError
from carvana.inference import Ensemble, EnsembleSpec, Options, predict_probabilities, predict_run_lengths
from carvana.inference.logits import BlendedLogits
from carvana.parallel import Processes


def predicted(ensemble, images, folder, **options):
    settings = Options(**{"workers": 0, "batch_size": 4} | options)
    return predict_run_lengths(ensemble, TestSet(images, images.names), folder, settings)


def equal(checkpoints, tta=("none",)):
    return Ensemble(EnsembleSpec.equal(checkpoints, tta))


def test_shards_hold_a_row_for_every_image_and_equal_the_probabilities_cut_at_the_threshold(members, tests, tmp_path):
    ensemble = equal(members)
    table = predicted(ensemble, tests, tmp_path)
    assert table["img"].tolist() == tests.names
    lines = (tmp_path / "part-00000.csv").read_text().splitlines()
    probabilities = predict_probabilities(ensemble, tests, tests.names)
    for name, line, probability in zip(tests.names, lines[1:], probabilities, strict=True):
        assert line == f"{name},{rle.encode(probability > 0.5)}"
    first = rle.decode(lines[1].split(",")[1], HEIGHT, WIDTH)
    assert table["area"].iloc[0] == pytest.approx(first.mean(), abs=1e-6)


def test_from_python_the_masks_have_the_run_lengths_that_a_prediction_writes(members, tests, tmp_path):
    spec = EnsembleSpec(members, [0.25, 0.75], ["none", "hflip"], 0.4)
    spec.write(tmp_path / "ensemble.json")
    predicted(Ensemble(spec), tests, tmp_path)
    rows = pd.read_csv(tmp_path / "part-00000.csv", keep_default_na=False)["rle_mask"].tolist()
    ensemble = Ensemble.read(tmp_path / "ensemble.json")
    for images in ([tests.read(name) for name in tests.names], [read_full_image(tests, name) for name in tests.names]):
        masks = ensemble.predict(images, batch_size=4)  # at whole scale an array is just what the JPEG holds
        assert [rle.encode(mask) for mask in masks] == rows
        probabilities = ensemble.predict(images, probabilities=True, batch_size=4)
        assert all(np.array_equal(p > 0.4, mask) for p, mask in zip(probabilities, masks, strict=True))


def test_from_python_images_of_any_sizes_and_a_single_one_are_taken_and_what_is_none_is_named(members):
    ensemble, random = equal(members), np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), np.uint8) for size in ((192, 256), (50, 70), (96, 126))]
    masks = ensemble.predict(images)
    assert [mask.shape for mask in masks] == [(192, 256), (50, 70), (96, 126)]
    assert np.array_equal(ensemble.predict(images[1])[0], ensemble.predict([images[1]])[0])
    for wrong in (images[1] / 255, images[1][..., 0], b"no JPEG", "car.jpg"):
        with pytest.raises(UserError, match=r"^image 1 is no image: .+ Give \(H, W, 3\) uint8 arrays"):
            ensemble.predict([images[0], wrong])


@pytest.mark.parametrize(("slope", "width"), [(0.25, 8), (1.0, 2), (4.0, 0)])
def test_boundary_uncertainty_is_the_width_of_the_band_in_which_a_network_hesitates(slope, width):
    logits = np.tile(np.float32(slope) * (np.arange(32, dtype=np.float32) - 15.5), (24, 1))  # an upright edge
    half = np.ascontiguousarray(logits.T / 2)
    assert BlendedLogits([logits]).boundary_uncertainty(0.0) == width
    assert BlendedLogits([logits + np.float32(0.4)]).boundary_uncertainty(0.4) == width
    assert BlendedLogits([half, half]).boundary_uncertainty(0.0) == width
    assert BlendedLogits([np.full((24, 32), -0.5, np.float32)]).boundary_uncertainty(0.0) == 24 * 32  # no outline


def test_only_missing_or_damaged_shards_are_computed_again(members, tests, tmp_path):
    ensemble = equal(members[:1])
    predicted(ensemble, tests, tmp_path, shard_size=5)
    parts = sorted(tmp_path.glob("*.csv"))
    assert len(parts) == 4
    contents = [part.read_bytes() for part in parts]
    parts[1].unlink()
    parts[2].write_bytes(contents[2][:50])
    before = {part: part.stat().st_mtime_ns for part in (parts[0], parts[3])}
    predicted(ensemble, tests, tmp_path, shard_size=5)
    assert [part.read_bytes() for part in parts] == contents
    assert before == {part: part.stat().st_mtime_ns for part in before}


NOTES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[]",
    "null": b"null",
    "no key": b"{}",
    "a number for a list": lambda note: note | {"areas": 1},
    "a shorter list": lambda note: note | {"areas": note["areas"][:-1]},
    "a text for a number": lambda note: note | {"unsure": ["x"] * len(note["unsure"])},
    "a null for a name": lambda note: note | {"names": [None] * len(note["names"])},
}


def test_a_shard_whose_note_or_rows_are_damaged_is_made_anew(members, tests, tmp_path):
    ensemble = equal(members[:1])
    expected = predicted(ensemble, tests, tmp_path, shard_size=4)
    part, note = tmp_path / "part-00001.csv", tmp_path / "part-00001.json"
    rows, facts = part.read_bytes(), note.read_bytes()
    for damage in NOTES.values():
        note.write_bytes(damage if isinstance(damage, bytes) else json.dumps(damage(json.loads(facts))).encode())
        assert predicted(ensemble, tests, tmp_path, shard_size=4).equals(expected)
        assert (part.read_bytes(), note.read_bytes()) == (rows, facts)
    for damage in (b"", rows[:50], rows.replace(b"1", b"2", 1), bytes(len(rows))):
        part.write_bytes(damage)
        assert predicted(ensemble, tests, tmp_path, shard_size=4).equals(expected)
        assert part.read_bytes() == rows
    part.unlink()
    part.mkdir()
    with pytest.raises(UserError, match=r"part-00001.csv could not be written: it is a folder"):
        predicted(ensemble, tests, tmp_path, shard_size=4)


def test_another_image_under_the_same_name_starts_anew(members, competition, tmp_path):
    tests = Competition(competition).test().images
    before = predicted(equal(members[:1]), tests, tmp_path)
    first, second = (competition / "test" / name for name in tests.names[:2])
    size = max(path.stat().st_size for path in (first, second))
    old = first.read_bytes().ljust(size, b"\0"), second.read_bytes().ljust(size, b"\0")
    for contents in (old, old[::-1]):  # of one size and one time
        for path, content in zip((first, second), contents, strict=True):
            path.write_bytes(content)
            os.utime(path, (1, 1))
        after = predicted(equal(members[:1]), tests, tmp_path)
    assert after["area"].tolist()[:2] == before["area"].tolist()[1::-1]


def test_another_member_tta_or_threshold_starts_anew(members, tests, tmp_path):
    keys = []
    for paths, tta, threshold in ((members[:1], ["none"], 0.5), (members[1:], ["none"], 0.5),
                                  (members[1:], ["hflip"], 0.5), (members[1:], ["hflip"], 0.45)):  # fmt: skip
        predicted(Ensemble(EnsembleSpec(paths, [1.0], tta, threshold)), tests, tmp_path)
        keys.append(json.loads((tmp_path / "part-00000.json").read_text())["key"])
    assert len(set(keys)) == 4


def test_max_hours_stops_after_a_whole_shard(members, tests, tmp_path):
    ensemble = equal(members[:1])
    assert len(predicted(ensemble, tests, tmp_path, max_hours=1e-9, shard_size=5)) == 5
    assert len(predicted(ensemble, tests, tmp_path, shard_size=5)) == len(tests.names)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_and_leaves_no_row(members, competition, tmp_path, workers):
    (competition / "test" / "000000000005_02.jpg").write_bytes(b"\xff\xd8 not an image")
    tests = Competition(competition).test().images
    with pytest.raises(UserError, match=r"image 000000000005_02.jpg cannot be decoded") as error:
        predicted(equal(members[:1]), tests, tmp_path, workers=workers)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.csv"))


def test_logits_that_are_not_finite_are_an_error_not_an_empty_mask(members, tests, tmp_path):
    ensemble = equal(members[:1])
    ensemble.models[0].net.segmentation_head[0].bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite for one of 000000000001_01.jpg"):
        predicted(ensemble, tests, tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def test_a_batch_that_overflows_in_half_precision_is_predicted_in_float32(members, tests, tmp_path):
    tables = {}
    for dtype in (None, torch.float16):
        ensemble = equal(members[1:])
        ensemble.models[0].net.segmentation_head[0].bias.data += 1e5  # a half ends at 65504
        ensemble.dtypes = [dtype]
        tables[dtype] = predicted(ensemble, tests, tmp_path / str(dtype)).drop(columns="part")
    assert (tables[None]["area"] == 1).all()
    assert tables[torch.float16].equals(tables[None])


def test_with_skip_broken_an_image_that_cannot_be_decoded_is_told_from_an_empty_one(members, competition, tmp_path):
    (competition / "test" / "000000000005_02.jpg").write_bytes(b"\xff\xd8 not an image")
    tests = Competition(competition).test().images
    table = predicted(equal(members[:1]), tests, tmp_path, skip_broken=True)
    assert table["img"].tolist() == tests.names
    assert table.loc[table["area"].isna(), "img"].tolist() == ["000000000005_02.jpg"]
    assert "000000000005_02.jpg,\n" in (tmp_path / "part-00000.csv").read_text()
    with pytest.raises(UserError, match="000000000005_02.jpg cannot be decoded"):  # not taken from the earlier shard
        predicted(equal(members[:1]), tests, tmp_path)


@pytest.mark.slow
def test_two_processes_write_the_shards_of_one(members, tests, tmp_path):
    ensemble = equal(members, ["none", "hflip"])
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    one = predicted(ensemble, tests, tmp_path / "one", shard_size=3)
    torch.set_num_threads(threads)
    two = predicted(ensemble, tests, tmp_path / "two", shard_size=3, processes=Processes(2))
    assert two.drop(columns="part").equals(one.drop(columns="part"))
    for part in sorted((tmp_path / "one").glob("*.csv")):
        assert (tmp_path / "two" / part.name).read_bytes() == part.read_bytes()


PREDICTS = """
    import re, sys
    from pathlib import Path
    from carvana.data import TestSet
    from carvana.data.images import Archive
    from carvana.inference import Ensemble, EnsembleSpec, Options, predict_run_lengths
    checkpoint, folder, shards, shard_size, batch_size = sys.argv[1:]
    ensemble = Ensemble(EnsembleSpec.equal([Path(checkpoint)], ["none", "hflip"]))
    images = Archive(folder, ".jpg")
    sizes = Options(shard_size=int(shard_size), batch_size=int(batch_size))
    predict_run_lengths(ensemble, TestSet(images, images.names), Path(shards), sizes)
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # of this program alone
"""


def predicting(*arguments) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(PREDICTS), *map(str, arguments)]


def repeated(tests, folder, n):
    """A folder of `n` names for the images of `tests`."""
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:06d}_01.jpg").hardlink_to(tests.path / tests.names[i % len(tests.names)])
    return folder


@pytest.mark.slow
def test_a_prediction_killed_at_ten_moments_ends_in_the_same_bytes(members, tests, tmp_path):
    folder, random = repeated(tests, tmp_path / "images", 400), np.random.default_rng(0)
    subprocess.run(predicting(members[0], folder, tmp_path / "whole", 20, 4), check=True, capture_output=True)
    for _ in range(10):
        command = predicting(members[0], folder, tmp_path / "cut", 20, 4)
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(random.uniform(4, 9))
            process.kill()
    subprocess.run(predicting(members[0], folder, tmp_path / "cut", 20, 4), check=True, capture_output=True)
    whole = sorted((tmp_path / "whole").glob("*.csv"))
    assert len(whole) == 20
    assert [part.read_bytes() for part in whole] == [(tmp_path / "cut" / part.name).read_bytes() for part in whole]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(members, tests, tmp_path):
    peaks = []
    for n in (500, 4000):
        command = predicting(members[0], repeated(tests, tmp_path / f"{n}", n), tmp_path / f"parts{n}", 128, 8)
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.05 * peaks[0]
