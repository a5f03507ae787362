import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carvana import rle, submission
from carvana.errors import UserError

HEIGHT, WIDTH = 4, 5  # 20 pixels: every number below can be checked by hand
GOOD = "2 3 10 2"  # 5 pixels = 25 %
MASKS = arrays(bool, (HEIGHT, WIDTH))
FILES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, rows: dict | list, header: str = "img,rle_mask") -> Path:
    pairs = rows.items() if isinstance(rows, dict) else rows
    lines = [header, *(",".join(pair) for pair in pairs)]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.fixture
def sample(tmp_path):
    return write(tmp_path / "sample.csv", {f"{i}.jpg": "1 1" for i in range(4)})


def check(tmp_path, sample, rows, **options):
    path = rows if isinstance(rows, Path) else write(tmp_path / "ours.csv", rows, **options)
    return submission.validate(path, submission.Expected(sample, HEIGHT, WIDTH))


def rows(**other):
    """Four good rows; r1="..." replaces the run lengths of 1.jpg."""
    return {f"{i}.jpg": other.get(f"r{i}", GOOD) for i in range(4)}


def kinds(found):
    return {problem.kind: problem.count for problem in found}


def test_a_good_file_is_valid_and_its_area_known(tmp_path, sample):
    result = check(tmp_path, sample, rows(r1="1 10"))
    assert result.ok
    assert (result.rows, result.problems, result.warnings) == (4, [], [])
    assert result.mean_area == pytest.approx((0.25 * 3 + 0.5) / 4)
    assert result.lines() == [
        f"{tmp_path / 'ours.csv'}: 4 rows, 31.25% of the image masked on average",
        f"{tmp_path / 'ours.csv'}: valid",
    ]


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        ("1 2 3", "odd", "3 values"),
        ("1 2 x 4", "integer", "'x' is not a whole number"),
        ("1 2.0", "integer", "'2.0' is not a whole number"),
        ("1_0 2", "integer", "'1_0' is not a whole number"),
        ("nan", "odd", "1 values"),
        ('2 "3"', "integer", "'\"3\"' is not a whole number"),
        ('"2" 3', "integer", "'\"2\"' is not a whole number"),
        ('2 3""', "integer", "'3\"\"' is not a whole number"),
        ("2\t3", "integer", "'2\\t3' is not a whole number"),
        ("2\r3", "integer", "'2\\r3' is not a whole number"),
        ("2 3\f", "integer", "'3\\x0c' is not a whole number"),
        ("2 3\v", "integer", "'3\\x0b' is not a whole number"),
        ("2 3\r\r", "integer", "'3\\r' is not a whole number"),
        ("2\u00a03", "integer", "'2\\xa03' is not a whole number"),
        ("\u0662 3", "integer", "'\u0662' is not a whole number"),
        ("0 3", "positive", "run 0 3"),
        ("3 0", "positive", "run 3 0"),
        ("3 -1", "positive", "run 3 -1"),
        ("19 3", "outside", "run 19 3"),
        ("21 1", "outside", "run 21 1"),
        ("99999999999999999999999 1", "outside", "run 9223372036854775807 1"),
        ("1 9999999999999999999", "outside", "run 1 9223372036854775807"),
        ("1 3 3 2", "order", "run 3 2"),
        ("9 1 2 3", "order", "run 2 3"),
    ],
)
def test_each_fault_of_a_row_is_found_with_its_line(tmp_path, sample, text, kind, detail):
    result = check(tmp_path, sample, rows(r2=text))
    assert not result.ok
    problem = next(problem for problem in result.problems if problem.kind == kind)
    assert (problem.count, problem.examples) == (1, [f"line 4 (2.jpg): {detail}"])
    assert result.mean_area == pytest.approx(0.25)  # the broken row does not count


@pytest.mark.parametrize("text", ["", "1 20", "20 1", "1 2 3 2", " 2  3 ", '"2 3"'])
def test_unusual_but_good_run_lengths(tmp_path, sample, text):
    assert check(tmp_path, sample, rows(r2=text)).ok


@settings(max_examples=300, deadline=None)
@given(st.text('0123456789 \t\r\f\v\n"-+._\xa0', max_size=12))
def test_run_lengths_are_digits_and_spaces_alone(text):
    plain = not set(text) - set("0123456789 ")
    try:
        assert rle.parse(text.encode()).size == len(text.split()) and (plain or "-" in text)
    except ValueError:
        assert not plain


@pytest.mark.parametrize("name", ['1.jpg""', '"1.jpg', '1."jpg"', "1.jpg\t", " 1.jpg", "1.JPG"])
def test_a_name_with_anything_added_is_another_name(tmp_path, sample, name):
    result = check(tmp_path, sample, [("0.jpg", GOOD), (name, GOOD), ("2.jpg", GOOD), ("3.jpg", GOOD)])
    assert kinds(result.problems) == {"extra": 1, "missing": 1}


def test_windows_line_ends_and_quoted_fields_are_read_as_they_are_meant(tmp_path, sample):
    quoted = [(f'"{name}"', f'"{text}"') for name, text in rows().items()]
    assert check(tmp_path, sample, quoted, header='"img","rle_mask"').ok
    path = write(tmp_path / "ours.csv", rows())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(tmp_path, sample, path).ok


@pytest.mark.parametrize("text", ["", "img,rle_mask\n", "\n\n"])
def test_nothing_at_all_is_neither_valid_nor_scored(tmp_path, sample, text):
    nothing = tmp_path / "nothing.csv"
    nothing.write_text(text)
    assert not check(tmp_path, sample, nothing).ok
    for names in (nothing, []):
        with pytest.raises(UserError, match="sample .*names no image"):
            submission.validate(nothing, submission.Expected(names, HEIGHT, WIDTH))
    with pytest.raises(UserError, match=r"nothing.csv has no rows"):
        submission.score(nothing, nothing)


@given(st.one_of(st.integers(max_value=0), st.integers(min_value=65536), st.just(10**30)), st.booleans())
def test_sizes_that_no_image_has_are_refused(size, tall):
    with pytest.raises(UserError, match=f"{'height' if tall else 'width'} is .*, but must be 1 to 65535"):
        submission.Expected([], *((size, 1) if tall else (1, size)))


def test_each_row_is_checked_with_the_size_of_its_own_image(tmp_path):
    sizes = {"a.jpg": (4, 5), "b.jpg": (2, 5), "broken.jpg": (0, 0)}
    expected = submission.Expected(list(sizes), size_of=lambda name: sizes.get(name, (0, 0)))
    good = write(tmp_path / "good.csv", {"a.jpg": "1 20", "b.jpg": "6 5", "broken.jpg": ""})
    result = submission.validate(good, expected)
    assert result.ok and result.mean_area == pytest.approx((1 + 0.5 + 0) / 3)
    bad = write(tmp_path / "bad.csv", [("a.jpg", "1 21"), ("b.jpg", "6 6"), ("broken.jpg", "1 1"), *[("x", "1 1")] * 2])
    assert kinds(submission.validate(bad, expected).problems) == {"outside": 5, "extra": 1, "duplicate": 1}


def test_a_pipe_is_refused_and_an_endless_line_too(tmp_path, sample, monkeypatch):
    os.mkfifo(tmp_path / "pipe.csv")
    monkeypatch.setattr(submission, "LONGEST", 1 << 16)
    endless = tmp_path / "endless.csv.gz"
    with gzip.open(endless, "wb") as file:
        file.write(b"img,rle_mask\n0.jpg," + b"1 " * (1 << 16))
    for path, reason in ((tmp_path / "pipe.csv", "a folder or a device"), (endless, "line 2 is longer than")):
        problem = check(tmp_path, sample, path).problems[0]
        assert problem.kind == "unreadable" and reason in problem.examples[0]


def test_names_missing_extra_and_twice(tmp_path, sample):
    result = check(tmp_path, sample, [("0.jpg", GOOD), ("1.jpg", GOOD), ("1.jpg", GOOD), ("x.jpg", GOOD)])
    found = {problem.kind: (problem.count, problem.examples) for problem in result.problems}
    assert found == {
        "duplicate": (1, ["line 4 (1.jpg)"]),
        "extra": (1, ["line 5 (x.jpg)"]),
        "missing": (2, ["2.jpg", "3.jpg"]),
    }


def test_header_and_columns(tmp_path, sample):
    assert kinds(check(tmp_path, sample, rows(), header="id,rle").problems) == {"header": 1}
    bare = tmp_path / "bare.csv"
    bare.write_text("".join(f"{name},{text}\n" for name, text in rows().items()))
    assert kinds(check(tmp_path, sample, bare).problems) == {"header": 1}  # the first row counts as a row
    many = [("0.jpg", GOOD), ("1.jpg",), ("2.jpg", GOOD, GOOD), ("3.jpg", GOOD)]
    problem = check(tmp_path, sample, many).problems[0]
    assert (problem.kind, problem.count) == ("columns", 2)
    assert problem.examples == ["line 3 (1.jpg): 1 columns", "line 4 (2.jpg): 3 columns"]


def test_names_that_pandas_would_take_for_missing_values(tmp_path):
    names = write(tmp_path / "sample.csv", {"NA": "", "": "", "null": ""})
    assert check(tmp_path, names, {"NA": GOOD, "": GOOD, "null": GOOD}).ok


def test_mixed_faults_are_found_together_and_warnings_do_not_count(tmp_path, sample):
    mixed = [("0.jpg", "1 2 2 2 3"), ("1.jpg", "0 1 25 1"), ("1.jpg", "x"), ("y.jpg", "1 20"), ("2.jpg", "")]
    result = check(tmp_path, sample, mixed)
    assert kinds(result.problems) == {
        **{"odd": 2, "order": 1, "positive": 1, "outside": 1},
        **{"duplicate": 1, "integer": 1, "extra": 1, "missing": 1},
    }
    assert kinds(result.warnings) == {"large": 1, "small": 1}
    assert len(result.lines()) == 1 + 8 + 2 + 1
    assert result.lines()[-1].endswith("not valid, 8 kind(s) of problems")
    assert check(tmp_path, sample, rows(r0="", r1="1 20")).ok


def test_many_faults_are_counted_and_the_first_three_named(tmp_path, sample):
    problem = check(tmp_path, sample, rows(r0="1", r1="1", r2="1", r3="1")).problems[0]
    assert problem.count == 4
    assert [example.split(" (")[0] for example in problem.examples] == ["line 2", "line 3", "line 4"]


@FILES
@given(st.lists(MASKS, min_size=4, max_size=4))
def test_every_encoded_mask_is_valid(tmp_path, sample, masks):
    result = check(tmp_path, sample, {f"{i}.jpg": rle.encode(mask) for i, mask in enumerate(masks)})
    assert result.ok
    assert result.mean_area == pytest.approx(np.mean(masks))


@FILES
@given(st.lists(st.integers(-2, 24), max_size=8))
def test_validate_agrees_with_decode(tmp_path, sample, values):
    text = " ".join(map(str, values))
    try:
        rle.decode(text, HEIGHT, WIDTH)
        good = True
    except ValueError:
        good = False
    assert check(tmp_path, sample, rows(r1=text)).ok == good


def packed(path: Path, suffix: str) -> Path:
    other = path.with_name(path.name + suffix)
    if suffix == ".gz":
        other.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with zipfile.ZipFile(other, "w") as archive:
            archive.write(path, path.name)
            archive.writestr("__MACOSX/._ours.csv", "what a Mac adds")
    return other


@pytest.mark.parametrize("suffix", [".gz", ".zip"])
def test_compressed_files(tmp_path, sample, suffix):
    ours = packed(write(tmp_path / "ours.csv", rows()), suffix)
    assert check(tmp_path, packed(sample, suffix), ours).rows == 4
    assert check(tmp_path, packed(sample, suffix), ours).ok
    assert submission.score(ours, ours).dice.tolist() == [1.0] * 4


def test_unreadable_files(tmp_path, sample):
    plain = write(tmp_path / "ours.csv", rows())
    whole = packed(plain, ".gz")
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(whole.read_bytes()[:-9])
    fake = tmp_path / "fake.csv.gz"
    fake.write_bytes(plain.read_bytes())
    renamed = tmp_path / "renamed.csv"
    renamed.write_bytes(whole.read_bytes())
    two = tmp_path / "two.zip"
    with zipfile.ZipFile(two, "w") as archive:
        archive.write(plain, "a.csv")
        archive.write(plain, "b.csv")
    for path in (cut, fake, renamed, two, tmp_path / "none.csv", tmp_path):
        result = check(tmp_path, sample, path)
        assert kinds(result.problems)["unreadable"] == 1
        assert str(path) in result.problems[0].examples[0]
        assert "missing" not in kinds(result.problems)
        with pytest.raises(UserError, match="cannot be read"):
            submission.validate(plain, submission.Expected(path, HEIGHT, WIDTH))


def test_empty_file(tmp_path, sample):
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert kinds(check(tmp_path, sample, empty).problems) == {"header": 1, "missing": 4}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("1 10", "6 10", (5, 10, 10)),
        ("1 2 3 2 9 1", "2 1 3 1 4 6", (4, 5, 8)),  # runs that touch
        ("1 3", "4 3", (0, 3, 3)),
        ("", "1 3", (0, 0, 3)),
        ("1 3", "", (0, 3, 0)),
        ("", "", (0, 0, 0)),
        ("1 1 3 1 5 1", "1 5", (3, 3, 5)),
    ],
)
def test_overlap_by_hand(a, b, expected):
    assert rle.overlap(a, b) == expected


@settings(max_examples=200, deadline=None)
@given(MASKS, MASKS)
def test_overlap_is_that_of_the_masks(a, b):
    assert rle.overlap(rle.encode(a), rle.encode(b)) == ((a & b).sum(), a.sum(), b.sum())


def test_overlap_of_large_ragged_masks():
    a, b = np.random.default_rng(0).random((2, 1280, 1918)) < 0.5
    assert rle.overlap(rle.encode(a), rle.encode(b)) == ((a & b).sum(), a.sum(), b.sum())


@FILES
@given(st.lists(st.tuples(MASKS, MASKS), min_size=1, max_size=4), st.randoms())
def test_score_is_dice_and_iou_of_the_masks_in_any_order(tmp_path, pairs, random):
    ours = {f"{i}.jpg": rle.encode(a) for i, (a, _) in enumerate(pairs)}
    truth = [(f"{i}.jpg", rle.encode(b)) for i, (_, b) in enumerate(pairs)]
    random.shuffle(truth)
    table = submission.score(write(tmp_path / "ours.csv", ours), write(tmp_path / "truth.csv", truth))
    assert table.columns.tolist() == ["img", "dice", "iou"]
    assert table.img.tolist() == list(ours)
    for (a, b), dice, iou in zip(pairs, table.dice, table.iou, strict=True):
        both, either = (a & b).sum(), (a | b).sum()
        assert dice == pytest.approx(2 * both / (a.sum() + b.sum()) if either else 1)
        assert iou == pytest.approx(both / either if either else 1)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ([("0.jpg", GOOD)], "1 names of .* are missing: 1.jpg"),
        ([("0.jpg", GOOD), ("1.jpg", GOOD), ("2.jpg", GOOD)], "1 names of .* are not in the truth, or twice: 2.jpg"),
        ([("0.jpg", GOOD), ("0.jpg", GOOD), ("1.jpg", GOOD)], "not in the truth, or twice: 0.jpg"),
        ([("0.jpg", "1 x"), ("1.jpg", GOOD)], r"ours.csv, line 2 \(0.jpg\): 'x' is not a whole number"),
        ([("0.jpg", "5 1 1 1"), ("1.jpg", GOOD)], "line 2 .* overlap or are not sorted"),
        ([("0.jpg",), ("1.jpg", GOOD)], "line 2: two columns"),
    ],
)
def test_score_refuses_other_names_and_broken_rows(tmp_path, ours, message):
    truth = write(tmp_path / "truth.csv", {"0.jpg": GOOD, "1.jpg": GOOD})
    with pytest.raises(UserError, match=message):
        submission.score(write(tmp_path / "ours.csv", ours), truth)


@pytest.fixture
def shards(tmp_path):
    both = [[("0.jpg", GOOD), ("1.jpg", "")], [("2.jpg", "1 20"), ("3.jpg", GOOD)]]
    return [write(tmp_path / f"part-{i}.csv", slice_) for i, slice_ in enumerate(both)]


def test_assemble_keeps_order_and_is_repeatable(tmp_path, shards, sample):
    path, again = tmp_path / "a" / "run.csv.gz", tmp_path / "b" / "run.csv.gz"
    for target in (path, again):
        submission.assemble(shards, [f"{i}.jpg" for i in range(4)], target)
    assert path.read_bytes() == again.read_bytes()
    assert check(tmp_path, sample, path).ok
    expected = "img,rle_mask\n0.jpg,2 3 10 2\n1.jpg,\n2.jpg,1 20\n3.jpg,2 3 10 2\n"
    assert gzip.decompress(path.read_bytes()).decode() == expected
    assert path.read_bytes()[3:8] == bytes(5)  # neither a name nor a time


@pytest.mark.parametrize(
    ("names", "order", "message"),
    [
        ("0123", (1, 0), "part-1.csv, line 2: expected 0.jpg, found 2.jpg"),
        ("0132", (0, 1), "part-1.csv, line 2: expected 3.jpg, found 2.jpg"),
        ("0123", (0,), "2.jpg and 1 more images are in no shard"),
        ("012", (0, 1), "part-1.csv, line 3: expected nothing, found 3.jpg"),
    ],
)
def test_assemble_refuses_what_does_not_fit(tmp_path, shards, names, order, message):
    path = tmp_path / "run.csv.gz"
    with pytest.raises(UserError, match=message):
        submission.assemble([shards[i] for i in order], [f"{i}.jpg" for i in names], path)
    assert not path.exists()
    assert not list(tmp_path.glob(".*"))


def test_assemble_names_a_missing_shard(tmp_path):
    with pytest.raises(UserError, match="part-9.csv cannot be read"):
        submission.assemble([tmp_path / "part-9.csv"], ["0.jpg"], tmp_path / "run.csv.gz")
