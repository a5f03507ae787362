from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from carvana.data import dataset
from carvana.data.competition import Competition
from carvana.errors import UserError


@pytest.fixture(scope="module")
def source(shared_competition):
    competition = Competition(shared_competition)
    return dataset.DecodedSamples(competition.train_images, competition.samples, 96, 128)


def test_cache_holds_what_decoding_gives(source, tmp_path):
    cached = dataset.cached(source, tmp_path)
    assert isinstance(cached, dataset.CachedSamples)
    for i in (0, 7, 15):
        for actual, expected in zip(cached[i], source[i], strict=True):
            assert np.array_equal(actual, expected)


def test_cache_is_built_where_the_system_cannot_reserve_space(source, tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate")  # as on macOS and Windows
    cached = dataset.cached(source, tmp_path)
    assert np.array_equal(cached[3][0], source[3][0])


def test_a_cache_that_is_half_the_disk_is_not_written_and_this_is_said(source, tmp_path, monkeypatch, capsys):
    need = 2 * len(source) * 96 * 128 * 4
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need - 1))
    assert dataset.cached(source, tmp_path) is source
    assert f"carvana: {tmp_path} has less than twice the 0.0 GB of a cache free" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_could_not_be_built_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def damaged(_, i):
        raise UserError("image cannot be decoded")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be decoded"):
        patch.setattr(dataset.DecodedSamples, "__getitem__", damaged)
        dataset.cached(source, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    left = tmp_path / f"{source.key}.tmp"  # of a build that was killed
    left.write_bytes(bytes(100))
    need = 2 * len(source) * 96 * 128 * 4
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need - left.exists()))
    assert isinstance(dataset.cached(source, tmp_path), dataset.CachedSamples)
    assert not left.exists()


def test_a_file_in_the_place_of_the_caches_folder_is_one_line(source, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cache/.*\.lock could not be locked: .*Choose another folder"):
        dataset.cached(source, tmp_path / "cache")


def test_cache_is_built_once_and_anew_for_another_size(source, tmp_path):
    first = dataset.cached(source, tmp_path).path
    built = first.stat().st_mtime_ns
    assert dataset.cached(source, tmp_path).path.stat().st_mtime_ns == built
    other = dataset.DecodedSamples(source.images, Competition(source.images.path.parent).samples, 64, 96)
    assert dataset.cached(other, tmp_path).path != first
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize("name", ["*.npy", "*.crc32"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "lost", "longer array"])
def test_a_cache_that_cannot_be_opened_is_built_anew(source, tmp_path, name, damage):
    dataset.cached(source, tmp_path)
    (path,) = tmp_path.glob(name)
    whole, longer = path.read_bytes(), np.zeros((17, *np.load(path).shape[1:]), np.uint8)
    with path.open("wb") as file:
        if damage == "longer array":
            np.save(file, longer)
        else:
            file.write({"empty": b"", "cut": whole[:-1], "text": b"no array", "lost": b""}[damage])
    if damage == "lost":
        path.unlink()
    for image, expected in zip(dataset.cached(source, tmp_path), source, strict=False):
        assert np.array_equal(image[0], expected[0]) and np.array_equal(image[1], expected[1])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_in_a_cache_ends_the_training_with_one_line_and_other_items_are_good(source, tmp_path, workers):
    cached = dataset.cached(source, tmp_path)
    data = bytearray(cached.path.read_bytes())
    at = len(data) - 5 * 4 * 96 * 128 + 9  # in the item before the last four
    data[at] ^= 1
    cached.path.write_bytes(data)
    again = training(dataset.cached(source, tmp_path))
    loader = DataLoader(again, batch_sampler=[[(0, 10)], [(0, 11)], [(0, 12)]], num_workers=workers)
    batches = iter(loader)
    next(batches)
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == f"{cached.path} is damaged. Delete it: the same command builds it again and goes on."
    assert [rows.tolist() for _, _, rows in batches] == [[12]]


def training(source, **changes):
    options = {"hflip": 0.5, "brightness": 0.2, "contrast": 0.2, "scale": 0.1, "shift": 0.05, "rotate": 5.0} | changes
    return dataset.TrainDataset(source, np.arange(16), dataset.Augmentation(**options).compose(), seed=1)


def test_same_key_same_image_whatever_came_before(source):
    samples = training(source)
    first = samples[2, 5][0].numpy()
    assert np.array_equal(training(source)[2, 5][0].numpy(), first)
    assert np.array_equal(samples[2, 5][0].numpy(), first)


def test_transforms_are_chosen_independently_of_each_other():
    source = [(np.full((2, 2, 3), [[60], [120]], np.uint8), np.zeros((2, 2), np.uint8))]  # dark left, bright right
    augment = dataset.Augmentation(hflip=0.5, brightness=0.2).compose()
    samples = dataset.TrainDataset(source, np.array([0]), augment, seed=1)
    counts = Counter()
    for epoch in range(2000):
        left, right = samples[epoch, 0][0][0, :, 0].tolist()
        counts[left > right, {left, right} != {60, 120}] += 1
    assert len(counts) == 4
    assert all(400 < count < 600 for count in counts.values())  # 500 each, five sigma


def test_scaling_keeps_the_proportions(source):
    augment = dataset.Augmentation(scale=0.3).compose()
    image, target = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96), np.uint8)
    target[32:64, 32:64] = 255
    for seed in range(20):
        augment.set_random_seed(seed)
        scaled = augment(image=image, mask=target)["mask"] > 127
        height, width = (np.count_nonzero(scaled.any(axis)) for axis in (1, 0))
        assert abs(height - width) <= 1


def test_colours_turn_only_where_that_is_asked_for():
    image = np.full((8, 8, 3), (150, 40, 60), np.uint8)
    for changes, turned in (({"hue": 0.5}, True), ({"saturation": 0.9}, True), ({"brightness": 0.0}, False)):
        augment = dataset.Augmentation(**changes).compose()
        samples = dataset.TrainDataset([(image, image[..., 0])], np.array([0]), augment, 1)
        changed = [bool((samples[epoch, 0][0].numpy() != image).any()) for epoch in range(60)]
        assert any(changed) == turned and not all(changed)


def test_random_states_never_repeat_over_epochs_and_samples(source):
    plain = training(source, hflip=0.0, scale=0.0, shift=0.0, rotate=0.0)
    changes = {float(plain[epoch, 0][0].float().mean()) for epoch in range(40)}
    assert len(changes) > 15  # half of the samples keep their brightness


def test_workers_do_not_change_the_samples(source):
    keys = dataset.batches(16, 4, 1, 2, 1)
    loaded = [
        [rows.tolist() + batch.flatten().tolist()[:50] for batch, _, rows in
         DataLoader(training(source), batch_sampler=keys, num_workers=workers)]
        for workers in (0, 2)
    ]  # fmt: skip
    assert loaded[0] == loaded[1]


def test_flip_turns_image_and_target_together(source):
    still = {"brightness": 0.0, "contrast": 0.0, "scale": 0.0, "shift": 0.0, "rotate": 0.0}
    plain, flipped = training(source, hflip=0.0, **still), training(source, hflip=1.0, **still)
    for actual, expected in zip(flipped[0, 3][:2], plain[0, 3][:2], strict=True):
        assert np.array_equal(actual.numpy(), expected.numpy()[:, ::-1])


def test_crops_have_their_size_and_pad_where_the_image_is_smaller(source):
    image, target, _ = training(source, crop_height=64, crop_width=160)[0, 0]
    assert image.shape == (64, 160, 3)
    assert target.shape == (64, 160)


def test_targets_stay_soft_and_in_range_under_all_augmentations(source):
    targets = [training(source)[epoch, 0][1].numpy() for epoch in range(8)]
    assert {target.dtype for target in targets} == {np.dtype(np.uint8)}
    assert max(len(np.unique(target)) for target in targets) > 10


def test_batches_use_every_image_once_an_epoch_in_another_order():
    keys = dataset.batches(8, 4, 1, 2, 1)
    epochs = [[i for batch in keys for epoch, i in batch if epoch == wanted] for wanted in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8))
    assert epochs[0] != epochs[1]


def test_batches_are_whole_groups_of_accumulation_even_in_a_tiny_fold():
    assert [len(batch) for batch in dataset.batches(3, 4, 2, 1, 1)] == [4, 4]
    assert len(dataset.batches(30, 4, 2, 1, 1)) == 6
