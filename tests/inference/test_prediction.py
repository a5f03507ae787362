import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import HEIGHT, WIDTH

from carvana import rle
from carvana.data import competition as photos
from carvana.files import UserError
from carvana.inference import ensemble as inference
from carvana.inference import predict as prediction


def predicted(ensemble, tests, folder, **options):
    return prediction.predict(ensemble, tests, tests.names, folder, **{"workers": 0, "batch_size": 4} | options)


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


@pytest.mark.parametrize(("slope", "width"), [(0.25, 8), (1.0, 2), (4.0, 0)])
def test_unsure_is_the_width_of_the_band_in_which_a_network_hesitates(slope, width):
    logits = (slope * (torch.arange(32.0) - 15.5)).repeat(24, 1)  # an upright edge between columns 15 and 16
    assert inference.unsure([logits], 0.0) == width
    assert inference.unsure([logits + 0.4], 0.4) == width
    assert inference.unsure([logits.T.contiguous() / 2, logits.T.contiguous() / 2], 0.0) == width
    assert inference.unsure([torch.zeros(24, 32) - 0.5], 0.0) == 24 * 32  # no outline


def test_a_part_from_before_unsure_was_measured_stays_valid(members, tests, tmp_path):
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    new = predicted(ensemble, tests, tmp_path)
    assert (new["unsure"] > 0).all()
    note = json.loads((tmp_path / "part-00000.json").read_text())
    del note["unsure"]
    (tmp_path / "part-00000.json").write_text(json.dumps(note))
    before = (tmp_path / "part-00000.csv").stat().st_mtime_ns
    old = predicted(ensemble, tests, tmp_path)
    assert (tmp_path / "part-00000.csv").stat().st_mtime_ns == before
    assert old["unsure"].isna().all() and old.drop(columns="unsure").equals(new.drop(columns="unsure"))


def test_only_missing_or_damaged_parts_are_computed_again(members, tests, tmp_path):
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    predicted(ensemble, tests, tmp_path, part_size=5)
    parts = sorted(tmp_path.glob("*.csv"))
    assert len(parts) == 4
    contents = [part.read_bytes() for part in parts]
    parts[1].unlink()
    parts[2].write_bytes(contents[2][:50])
    before = {part: part.stat().st_mtime_ns for part in (parts[0], parts[3])}
    predicted(ensemble, tests, tmp_path, part_size=5)
    assert [part.read_bytes() for part in parts] == contents
    assert before == {part: part.stat().st_mtime_ns for part in before}


def test_another_member_view_or_threshold_starts_anew(members, tests, tmp_path):
    made = []
    for paths, views, threshold in ((members[:1], ["none"], 0.5), (members[1:], ["none"], 0.5),
                                    (members[1:], ["hflip"], 0.5), (members[1:], ["hflip"], 0.45)):  # fmt: skip
        predicted(inference.Ensemble(paths, [1.0], views, threshold), tests, tmp_path)
        made.append(json.loads((tmp_path / "part-00000.json").read_text())["key"])
    assert len(set(made)) == 4


def test_max_hours_stops_after_a_whole_part(members, tests, tmp_path):
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    assert len(predicted(ensemble, tests, tmp_path, max_hours=1e-9, part_size=5)) == 5
    assert len(predicted(ensemble, tests, tmp_path, part_size=5)) == len(tests.names)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photograph_that_cannot_be_decoded_is_named_and_leaves_no_row(members, competition, tmp_path, workers):
    (competition / "test" / "000000000005_02.jpg").write_bytes(b"\xff\xd8 not a picture")
    tests = photos.photographs(competition, "test")
    with pytest.raises(UserError, match=r"photograph 000000000005_02.jpg cannot be decoded") as error:
        predicted(inference.Ensemble(members[:1], [1.0], ["none"]), tests, tmp_path, workers=workers)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.csv"))


def test_logits_that_are_not_finite_are_an_error_not_an_empty_mask(members, tests, tmp_path):
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    ensemble.models[0].net.segmentation_head[0].bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite for one of 000000000001_01.jpg"):
        predicted(ensemble, tests, tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def test_with_skip_broken_a_photograph_that_cannot_be_decoded_is_told_from_an_empty_one(members, competition, tmp_path):
    (competition / "test" / "000000000005_02.jpg").write_bytes(b"\xff\xd8 not a picture")
    tests = photos.photographs(competition, "test")
    table = predicted(inference.Ensemble(members[:1], [1.0], ["none"]), tests, tmp_path, skip_broken=True)
    assert table["img"].tolist() == tests.names
    assert table.loc[table["area"].isna(), "img"].tolist() == ["000000000005_02.jpg"]
    assert "000000000005_02.jpg,\n" in (tmp_path / "part-00000.csv").read_text()


def test_two_processes_write_the_parts_of_one(members, tests, tmp_path):
    ensemble = inference.Ensemble(members, [0.5, 0.5], ["none", "hflip"])
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    one = predicted(ensemble, tests, tmp_path / "one", part_size=3)
    torch.set_num_threads(threads)
    two = predicted(ensemble, tests, tmp_path / "two", part_size=3, processes=2)
    assert two.drop(columns="part").equals(one.drop(columns="part"))
    for part in sorted((tmp_path / "one").glob("*.csv")):
        assert (tmp_path / "two" / part.name).read_bytes() == part.read_bytes()


CLAIMS = """
    import sys, time
    from pathlib import Path
    from carvana.data import competition as photos
    from carvana.inference import ensemble as inference, predict as prediction
    ensemble = inference.Ensemble([Path(sys.argv[1])], [1.0], ["none"])
    tests = photos.photographs(Path(sys.argv[2]), "train")
    whole = prediction.Prediction(ensemble, tests, tests.names, Path(sys.argv[3]), 4, False, 5)
    lock = (Path(sys.argv[3]) / "claims.lock").open("a")
    claims = prediction._Claims(whole, [(1, whole.parts[1])], lock, float("inf"))
    next(iter(claims))
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_part_that_another_process_works_on_is_left_to_it_and_taken_when_that_is_killed(members, tests, tmp_path):
    data = str(tests.path.parent)
    command = [sys.executable, "-c", textwrap.dedent(CLAIMS), str(members[0]), data, str(tmp_path)]
    ensemble = inference.Ensemble(members[:1], [1.0], ["none"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        table = predicted(ensemble, tests, tmp_path, part_size=5, max_hours=1 / 3600)
        other.kill()
    assert not (tmp_path / "part-00001.csv").exists()
    assert len(table) == len(tests.names) - 5
    assert len(predicted(ensemble, tests, tmp_path, part_size=5)) == len(tests.names)


PREDICTS = """
    import re, sys
    from pathlib import Path
    from carvana.data import competition as photos
    from carvana.inference import ensemble as inference, predict as prediction
    checkpoint, folder, parts, part_size, batch_size = sys.argv[1:]
    ensemble = inference.Ensemble([Path(checkpoint)], [1.0], ["none", "hflip"])
    tests = photos.Archive(Path(folder), ".jpg")
    sizes = {"part_size": int(part_size), "batch_size": int(batch_size)}
    prediction.predict(ensemble, tests, tests.names, Path(parts), **sizes)
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # of this program alone
"""


def predicting(*arguments) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(PREDICTS), *map(str, arguments)]


def repeated(tests: photos.Archive, folder, n: int):
    """A folder of `n` names for the photographs of `tests`."""
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:06d}_01.jpg").hardlink_to(tests.path / tests.names[i % len(tests.names)])
    return folder


@pytest.mark.slow
def test_a_prediction_killed_at_ten_moments_ends_in_the_same_bytes(members, tests, tmp_path):
    folder, random = repeated(tests, tmp_path / "photos", 400), np.random.default_rng(0)
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
def test_memory_does_not_grow_with_the_number_of_photographs(members, tests, tmp_path):
    peaks = []
    for n in (500, 4000):
        command = predicting(members[0], repeated(tests, tmp_path / f"{n}", n), tmp_path / f"parts{n}", 128, 8)
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.05 * peaks[0]
