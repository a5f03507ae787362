import os
import re
import shutil
import zipfile

import numpy as np
import pytest
from conftest import HEIGHT, VIEWS, WIDTH, ellipse
from PIL import Image

from carvana import rle
from carvana.data import images
from carvana.data.competition import Competition, excluded_names
from carvana.errors import UserError


def as_zips(folder):
    """Pack every folder and table of a competition as Kaggle does, and remove the originals."""
    for path in list(folder.iterdir()):
        with zipfile.ZipFile(folder / f"{path.name}.zip", "w") as packed:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                packed.write(file, file.relative_to(folder))
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_samples_pair_every_image_with_its_mask_by_name(shared_competition):
    samples = Competition(shared_competition).samples
    assert len(samples) == 4 * VIEWS
    assert samples["car"].nunique() == 4
    for row in samples.itertuples():
        car = int(row.car, 16) - 1
        assert np.array_equal(rle.decode(row.rle, HEIGHT, WIDTH), ellipse(car, row.view))
        assert row.area == pytest.approx(ellipse(car, row.view).mean())


def test_zips_give_the_same_samples_and_images_as_folders(competition, shared_competition):
    shared = shared_competition
    as_zips(competition)
    assert not (competition / "train").exists()
    assert Competition(competition).samples.equals(Competition(shared_competition).samples)
    pairs = ((Competition(folder).train_images, Competition(folder).test().images) for folder in (competition, shared))
    for packed, plain in zip(*pairs, strict=True):
        assert packed.names == plain.names
        assert packed.read(packed.names[0]) == plain.read(plain.names[0])


def test_what_is_missing_is_to_be_fetched_given_or_drawn_anew(competition):
    shutil.rmtree(competition / "test")
    with pytest.raises(UserError, match=r"carvana download --data-dir \S+ --files test.zip; for images of your own"):
        Competition(competition).test()
    (competition / "demo.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds neither test/ nor test.zip. Run 01_download, as with the profile"):
        Competition(competition).test()


def test_gifs_stand_in_for_a_missing_csv(competition, shared_competition):
    (competition / "train_masks.csv").unlink()
    assert Competition(competition).samples.equals(Competition(shared_competition).samples)


def test_hq_chooses_the_hq_archive(competition):
    (competition / "train").rename(competition / "train_hq")
    assert Competition(competition, hq=True).train_images.path.name == "train_hq"
    with pytest.raises(UserError, match=r"holds neither train/ nor train.zip"):
        Competition(competition).train_images.names


def test_natural_size_is_the_block_mean_of_the_padded_image(real_data):
    tests = Competition(real_data / "carvana").test().images
    full = images.read_full_image(tests, tests.names[0])
    assert full.shape == (1280, 1918, 3)
    padded = np.pad(full, [(0, 0), (0, 2), (0, 0)], mode="edge").astype(float)
    for height, width, k in ((320, 480, 4), (640, 960, 2)):
        small, size = images.read_image(tests, tests.names[0], height, width)
        assert size == (1280, 1918)
        mean = padded.reshape(height, k, width, k, 3).mean((1, 3))
        assert np.abs(small - mean).mean() < 0.3


def test_any_other_size_goes_through_one_resize(real_data):
    tests = Competition(real_data / "carvana").test().images
    assert images.read_image(tests, tests.names[0], 384, 384)[0].shape == (384, 384, 3)


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "saved by a spreadsheet"])
def test_a_table_excludes_the_images_that_a_person_has_marked(competition, tmp_path, start):
    names = ["000000000001_01.jpg", "000000000001_02.jpg", "000000000002_01.jpg"]
    rows = [f"{name},7,{mark}" for name, mark in zip(names, ("x", "", "wrong"), strict=True)]
    table = tmp_path / "quality.csv"
    table.write_text("\n".join([f"{start}img,disputed,exclude", *rows]), encoding="utf-8")
    train_images = Competition(competition).train_images
    assert excluded_names(table, train_images) == {names[0], names[2]}
    table.write_text(f"{start}img,disputed,exclude\n", encoding="utf-8")
    assert excluded_names(table, train_images) == set()


def test_excluded_images_are_left_out(competition, tmp_path):
    listed = tmp_path / "bad.csv"
    listed.write_text("img,reason\n000000000001_01.jpg,blurred\n")
    assert "000000000001_01.jpg" not in set(Competition(competition, exclude=listed).samples["img"])
    listed.write_text("000000000001_09.jpg\n")
    with pytest.raises(UserError, match=r"bad.csv names 000000000001_09.jpg, .* did you mean"):
        Competition(competition, exclude=listed).samples


def test_names_to_predict_follow_the_sample_or_the_folder(competition):
    opened, sample = Competition(competition), competition / "sample_submission.csv"
    names = sorted(opened.test().images.names, reverse=True)
    sample.write_text("img,rle_mask\n" + "".join(f"{name},1 1\n" for name in names))
    assert opened.test().names == names
    assert opened.test(competition / "train").names[0] == "000000000001_01.jpg"
    sample.write_text("img,rle_mask\n" + "".join(f"{name},1 1\n" for name in [*names, "x_01.jpg"]))
    with pytest.raises(UserError, match=r"lacks 1 of 5 .* x_01.jpg"):
        opened.test()


def remove_mask_row(data):
    lines = (data / "train_masks.csv").read_text().splitlines()
    (data / "train_masks.csv").write_text("\n".join(lines[:-1]))


def add_smaller_gif(data):
    Image.new("P", (WIDTH, HEIGHT - 1)).save(data / "train_masks" / "000000000001_01_mask.gif")


def cut_image(data):
    path = data / "train" / "000000000001_01.jpg"
    path.write_bytes(path.read_bytes()[:20])


def run_outside(data):
    text = (data / "train_masks.csv").read_text().replace("000000000001_01.jpg,", "000000000001_01.jpg,1 999999 ")
    (data / "train_masks.csv").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"data_dir .*data does not exist"),
        (lambda data: shutil.rmtree(data / "train"), r"holds neither train/ nor train.zip"),
        (lambda data: [file.unlink() for file in (data / "train").iterdir()], r"train holds no .jpg files"),
        (remove_mask_row, r"1 of 16 images have no mask in train_masks.csv, first 000000000004_04.jpg"),
        (add_smaller_gif, r"mask 000000000001_01_mask.gif is 126x95, its image 126x96"),
        (cut_image, r"image 000000000001_01.jpg cannot be decoded"),
        (run_outside, r"mask of 000000000001_01.jpg does not fit"),
        (lambda data: (data / "train" / "car.jpg").write_bytes(b""), r"image car.jpg cannot be decoded"),
        (lambda data: (data / "train_masks.csv").write_bytes(b"\xff\xfe"), r"train_masks.csv is not a table"),
    ],
)
def test_bad_input_is_one_line_that_names_it(competition, damage, message):
    damage(competition)
    with pytest.raises(UserError, match=message) as error:
        Competition(competition).samples
    assert "\n" not in str(error.value)


def test_a_broken_zip_is_named(competition):
    shutil.rmtree(competition / "train")
    (competition / "train.zip").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match=r"train.zip is not a whole zip"):
        Competition(competition).samples


def test_any_folder_is_predicted_whole_even_if_the_sample_names_more(competition, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(competition / "test" / "000000000005_02.jpg", own)
    assert Competition(competition).test(own).names == ["000000000005_02.jpg"]


def test_hidden_files_of_a_mac_are_no_images(competition, shared_competition):
    (competition / "train" / "._000000000001_01.jpg").write_bytes(b"resource fork")
    assert Competition(competition).samples.equals(Competition(shared_competition).samples)


def test_excluding_everything_is_refused(competition, tmp_path):
    listed = tmp_path / "all.txt"
    listed.write_text("\n".join(Competition(competition).train_images.names))
    with pytest.raises(UserError, match=r"all.txt names every image"):
        Competition(competition, exclude=listed).samples


def test_a_damaged_member_of_a_zip_is_named(competition):
    as_zips(competition)
    path = competition / "train.zip"
    data = bytearray(path.read_bytes())
    data[200:240] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"000000000001_01.jpg"):
        images.read_full_image(Competition(competition).train_images, "000000000001_01.jpg")


def listed(path, names):
    path.write_text("img,rle_mask\n" + "".join(f"{name},1 1\n" for name in names))
    return path


FIVE = [f"000000000005_{view:02d}.jpg" for view in range(1, VIEWS + 1)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"x{name}" for name in FIVE], r"lacks 4 of 4 images that .*mine.csv names, first x000000000005_01.jpg\. "),
        ([*FIVE, "x_01.jpg"], r"lacks 1 of 5 images that .*mine.csv names, first x_01.jpg\. "),
        ([name.replace(".jpg", ".JPG") for name in FIVE], r"first 000000000005_01.JPG, which is 000000000005_01.jpg"),
        ([], r"mine.csv is not a table of img: it has no rows"),
        ([FIVE[0], *FIVE], r"mine.csv is not a table of img: a name in img stands there twice"),
    ],
    ids=["none", "one more", "other case", "empty", "twice"],
)
@pytest.mark.parametrize("test_dir", ["", "test", "own"])
def test_a_sample_that_a_person_gave_is_never_replaced_by_a_guess(competition, names, message, test_dir):
    shutil.copytree(competition / "test", competition / "own")
    sample = listed(competition / "mine.csv", names)
    with pytest.raises(UserError, match=message):
        Competition(competition).test(test_dir and competition / test_dir, sample)


def test_a_sample_may_name_some_of_the_images_in_any_order(competition):
    sample = listed(competition / "mine.csv", FIVE[2:0:-1])
    assert Competition(competition).test("", sample).names == FIVE[2:0:-1]
    assert Competition(competition).test(competition / "test", sample).names == FIVE[2:0:-1]


def test_upper_case_test_images_against_lower_case_names_are_an_error_not_another_list(competition):
    for path in list((competition / "test").iterdir()):
        path.rename(path.with_suffix(".JPG"))
    with pytest.raises(UserError, match=r"lacks 4 of 4 .* which is 000000000005_01.JPG there"):
        Competition(competition).test()
    listed(competition / "sample_submission.csv", [name.replace(".jpg", ".JPG") for name in FIVE])
    assert len(Competition(competition).test().names) == VIEWS


@pytest.mark.parametrize("name", ["train", "train_masks", "test"])
def test_an_unpacking_that_was_cut_short_beside_its_zip_is_an_error(competition, name):
    folder = competition / name
    with zipfile.ZipFile(competition / f"{name}.zip", "w") as packed:
        for file in folder.iterdir():
            packed.write(file, f"{name}/{file.name}")
    opened = Competition(competition)
    assert len(opened.samples) + len(opened.test().names) == 5 * VIEWS  # whole beside whole
    for file in sorted(folder.iterdir())[:3]:
        file.unlink()
    with pytest.raises(UserError, match=rf"{name} lacks 3 of the \d+ files of {name}.zip, .* not unpacked whole"):
        opened = Competition(competition)
        opened.samples, opened.test()


@pytest.mark.parametrize("form", ["csv", "gif"])
def test_masks_without_an_image_are_counted_for_they_mean_missing_images(competition, form, capsys):
    if form == "gif":
        (competition / "train_masks.csv").unlink()
    for view in (1, 2, 3):
        (competition / "train" / f"000000000002_{view:02d}.jpg").unlink()
    assert len(Competition(competition).samples) == 13
    told = capsys.readouterr().out
    assert re.match(r"3 of 16 masks in train_masks\S* have no image in .*train, first 0000000000.*part of", told)


def test_a_car_named_like_a_missing_value_and_upper_case_extensions_are_as_good_as_any(competition):
    for old, new in (("000000000001", "nan"), ("000000000002", "NA")):
        for folder, end in (("train", ".JPG"), ("train_masks", "_mask.gif")):
            for path in list((competition / folder).glob(f"{old}*")):
                view = path.name.partition("_")[2][:2]
                path.rename(path.with_name(f"{new}_{view}{end}"))
        text = (competition / "train_masks.csv").read_text()
        lines = [line.replace(old, new).replace(".jpg", ".JPG") if old in line else line for line in text.splitlines()]
        (competition / "train_masks.csv").write_text("\n".join(lines))
    samples = Competition(competition).samples
    assert set(samples["car"]) == {"nan", "NA", "000000000003", "000000000004"}


TABLES = "train_masks.csv", "sample_submission.csv"
DAMAGES = {
    "empty": b"",
    "one byte": b"\n",
    "binary": bytes(range(256)) * 4,
    "zeros": bytes(100),
    "semicolons": b"img;rle_mask\na_01.jpg;1 1\n",
    "other columns": b"name,runs\na_01.jpg,1 1\n",
    "ragged": b"img,rle_mask\na_01.jpg,1 1,2,3\n",
    "header alone": b"img,rle_mask\n",
    "a name twice": b"img,rle_mask\na_01.jpg,1 1\na_01.jpg,2 1\n",
    "longer rows": b"img,rle_mask\n" + b"a_01.jpg,1 1,\n" * 3,
    "utf-16": "img,rle_mask\na_01.jpg,1 1\n".encode("utf-16"),
    "cut zip": b"PK\x03\x04" + bytes(40),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_one_line_with_its_name(competition, name, damage):
    (competition / name).write_bytes(DAMAGES[damage])
    with pytest.raises(UserError, match=rf"{name} is not a table of img") as error:
        opened = Competition(competition)
        opened.test() if name == "sample_submission.csv" else opened.samples
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GIF", b"GIF89a" + bytes(4), bytes(300)], ids=len)
def test_a_damaged_gif_is_named(competition, content):
    (competition / "train_masks" / "000000000001_01_mask.gif").write_bytes(content)
    with pytest.raises(UserError, match=r"mask 000000000001_01_mask.gif"):
        Competition(competition).samples


def test_a_stamp_is_of_contents_alone(competition, tmp_path):
    folder = competition / "train"
    names = sorted(path.name for path in folder.iterdir())
    stamp = images.Archive(folder, ".jpg").stamp(names)
    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)  # with other times
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as packed:
        for file in folder.iterdir():
            packed.write(file, f"train/{file.name}")
    assert images.Archive(moved, ".jpg").stamp(names) == stamp
    assert images.Archive(tmp_path / "x.zip", ".jpg").stamp(names) == stamp
    changed = folder / names[0]
    data, times = bytearray(changed.read_bytes()), changed.stat()
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert images.Archive(folder, ".jpg").stamp(names)[0] != stamp[0]
    assert images.Archive(folder, ".jpg").stamp(names[1:]) == stamp[1:]


def test_a_zip_packed_in_a_rare_way_is_read_and_a_damaged_one_named(competition):
    with zipfile.ZipFile(competition / "train.zip", "w", zipfile.ZIP_LZMA) as packed:
        for file in sorted((competition / "train").iterdir()):
            packed.write(file, f"train/{file.name}")
    shutil.rmtree(competition / "train")
    assert len(Competition(competition).samples) == 4 * VIEWS
    data = bytearray((competition / "train.zip").read_bytes())
    data[100:160] = bytes(60)
    (competition / "train.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"000000000001_01.jpg"):
        images.read_full_image(Competition(competition).train_images, "000000000001_01.jpg")


def test_every_test_image_has_its_own_size_and_a_broken_one_none(competition):
    Image.new("RGB", (64, 32)).save(competition / "test" / FIVE[1])
    (competition / "test" / FIVE[2]).write_bytes(b"\xff\xd8 not an image")
    test = Competition(competition).test()
    assert [test.size_of(name) for name in FIVE] == [(HEIGHT, WIDTH), (32, 64), (0, 0), (HEIGHT, WIDTH)]


def test_kaggle_mounts_the_data_in_one_of_two_places(shared_competition, tmp_path, monkeypatch):
    monkeypatch.setattr("carvana.data.competition.MOUNTS", tmp_path)
    (tmp_path / "competitions").mkdir()
    (tmp_path / "competitions" / "carvana").symlink_to(shared_competition)
    assert len(Competition(tmp_path / "carvana").samples) == len(Competition(shared_competition).samples)
    (tmp_path / "competitions").rename(tmp_path / "carvana")  # also a folder of that name right there
    assert Competition(tmp_path / "carvana").folder == tmp_path / "carvana"
