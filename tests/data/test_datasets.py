import logging
import os
import signal
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import brfx.data.image_files
from brfx.config import JobConfig
from brfx.data import DEFAULTS, BatchLoader, ImageFiles, Preprocessing, Split, load_dataset, with_overrides
from brfx.errors import ConfigError, DataError
from brfx.jobs.data import read_data


def make_folder(root: Path, parts=("train", "test"), classes=("cat", "dog"), each=10) -> Path:
    for part in parts:
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (40 + i, 30), (number * 100, i, 0)).save(root / part / name / f"{i}.png")
    return root


def test_digits_are_split_without_overlap(digits):
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.train.images.shape[1:] == (3, 16, 16)
    assert digits.train.images.dtype == torch.uint8
    assert set(digits.val.labels.tolist()) == set(range(10))
    assert not digits.flip


def test_a_folder_is_read_resized_and_cut(tmp_path):
    data = load_dataset(
        str(make_folder(tmp_path)), data_dir=tmp_path, preprocessing=Preprocessing(16), val_fraction=0.2
    )
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 20)
    assert data.test.images.shape == (20, 3, 16, 16)
    assert data.test.images[10, 0].float().mean() == 100  # the first dog


def test_a_folder_too_large_for_memory_is_decoded_batch_by_batch(tmp_path, monkeypatch):
    folder = str(make_folder(tmp_path))
    whole = load_dataset(folder, data_dir=tmp_path, preprocessing=Preprocessing(16))
    assert isinstance(whole.train.images, torch.Tensor) and isinstance(whole.test.images, torch.Tensor)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    lazy = load_dataset(folder, data_dir=tmp_path, preprocessing=Preprocessing(16))
    assert isinstance(lazy.train.images, ImageFiles)
    for part in ("train", "val", "test"):
        batches = [
            list(BatchLoader(getattr(data, part), data.preprocessing, 4, augment=part == "train"))
            for data in (whole, lazy)
        ]
        for (a, labels_a), (b, labels_b) in zip(*batches, strict=True):
            assert torch.equal(a, b) and torch.equal(labels_a, labels_b)


def folder_batches(root: Path, workers: int, **settings):
    """Batches of 3 of the 20 training images, decoded when asked for."""
    paths = sorted((root / "train").rglob("*.png"))
    split = Split(ImageFiles(paths, Preprocessing(16), workers), torch.arange(len(paths)))
    return BatchLoader(split, Preprocessing(16), 3, **settings)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    make_folder(tmp_path, ("train",))

    def epochs(workers):
        loader = folder_batches(tmp_path, workers, augment=True, seed=5)
        for epoch in range(2):
            loader.set_epoch(epoch)
            yield from loader

    state = torch.get_rng_state()
    alone, helped = list(epochs(0)), list(epochs(2))
    assert len(alone) == 14 and torch.equal(torch.get_rng_state(), state)
    for (a, labels_a), (b, labels_b) in zip(alone, helped, strict=True):
        assert torch.equal(a, b) and torch.equal(labels_a, labels_b)
    assert not torch.equal(alone[0][0], alone[7][0])


def same(batches, others):
    pairs = list(zip(batches, others, strict=True))
    return all(torch.equal(a, b) and torch.equal(labels_a, labels_b) for (a, labels_a), (b, labels_b) in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_continued_without_decoding_what_goes_before(tmp_path, workers):
    loader = folder_batches(make_folder(tmp_path, ("train",)), workers, augment=True, seed=5)
    loader.set_epoch(1)
    whole = list(loader)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 1)
    for i in torch.randperm(20, generator=generator)[: 4 * 3]:
        loader.split.images.paths[i].unlink()
    assert same(loader.starting_at(4), whole[4:])
    assert list(loader.starting_at(7)) == []


def test_an_epoch_may_be_left_early_and_two_may_run_at_once(tmp_path):
    loader = folder_batches(make_folder(tmp_path, ("train",)), 2)
    assert next(iter(loader))[1].tolist() == [0, 1, 2]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(loader, loader, strict=True))
    assert not active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_in_one_line(tmp_path, workers):
    make_folder(tmp_path, ("train",))
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no image")
    seen = []
    with pytest.raises(
        DataError, match=r"^/.*dog/3\.png: cannot read this image \(.*\): .*--skip-bad-images$"
    ) as caught:
        seen.extend(labels for _, labels in folder_batches(tmp_path, workers))
    assert torch.cat(seen).tolist() == list(range(12))  # the 14th is damaged
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fits", [True, False])
def test_bad_images_are_left_out_and_named(tmp_path, monkeypatch, caplog, fits):
    if not fits:
        monkeypatch.setattr("os.sysconf", lambda name: 100)
    folder = make_folder(tmp_path)
    damaged = sorted((folder / "train").rglob("*.png"))[4:16]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:40])
    data = load_dataset(str(folder), data_dir=tmp_path, preprocessing=Preprocessing(16), skip_bad_images=True)
    with caplog.at_level(logging.WARNING, "brfx.data"):
        assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 20)
    assert isinstance(data.train.images, torch.Tensor) == fits
    [line] = [record.message for record in caplog.records]
    assert line.startswith(f"{folder}/train: left out 12 of 20 images, which cannot be read: {damaged[0]}, ")
    assert f"{damaged[9]}, ..." in line and str(damaged[10]) not in line
    for path in damaged:
        path.unlink()
    other = load_dataset(str(folder), data_dir=tmp_path, preprocessing=Preprocessing(16))
    for part in ("train", "val"):
        assert same(*(BatchLoader(getattr(one, part), one.preprocessing, 4) for one in (data, other)))


def test_a_class_of_bad_images_alone_is_named(tmp_path):
    folder = make_folder(tmp_path)
    for path in (folder / "test" / "dog").iterdir():
        path.write_bytes(b"no image")
    data = read_data(JobConfig(command="evaluate", model="resnet20", data=str(folder), skip_bad_images=True))
    assert len(data.train) == 18
    with pytest.raises(DataError, match=r"test: no image of class 'dog' can be read: mend them or remove the class"):
        _ = data.test


def test_a_worker_that_dies_is_a_data_error(tmp_path, monkeypatch):
    make_folder(tmp_path, ("train",))
    decoded, parent = brfx.data.image_files.decoded, os.getpid()

    def deadly(path):
        if path.parts[-2:] == ("dog", "3.png") and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return decoded(path)

    monkeypatch.setattr(brfx.data.image_files, "decoded", deadly)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # looks each 5 s else
    with pytest.raises(DataError, match=r"^decoding .* failed \(.+\): .*$"):
        list(folder_batches(tmp_path, 2))
    assert not active_children()


def test_val_is_taken_where_there_is_no_test(tmp_path):
    data = load_dataset(str(make_folder(tmp_path, ("train", "val"))), data_dir=tmp_path, preprocessing=Preprocessing(8))
    assert len(data.test) == 20


def test_problems_are_one_clear_line(tmp_path):
    size = Preprocessing(8)
    (tmp_path / "empty").mkdir()
    odd = make_folder(tmp_path / "odd")
    (odd / "test" / "cow").mkdir()
    bare = make_folder(tmp_path / "bare", each=0)
    gap = make_folder(tmp_path / "gap")
    for path in (gap / "train" / "cat").iterdir():
        path.unlink()
    broken = make_folder(tmp_path / "broken")
    (broken / "test" / "dog" / "3.png").write_bytes(b"no image")
    for source, message in [
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "empty", "expected .*train/CLASS"),
        (odd, "differ in their classes.*'cow'"),
        (bare, "no image in it"),
        (gap, r"train: no image of class 'cat': add some, or remove the class from test/ too"),
        (broken, r"dog/3\.png: cannot read"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            _ = load_dataset(str(source), data_dir=tmp_path, preprocessing=size).test
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cifar10 is not in .*--download"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_every_class_leaves_images_for_training_and_for_validation(tmp_path):
    folder = make_folder(tmp_path, each=3)
    for fraction, held in ((0.01, 2), (0.5, 4), (0.99, 4)):
        data = load_dataset(str(folder), data_dir=tmp_path, preprocessing=Preprocessing(8), val_fraction=fraction)
        assert (len(data.train), len(data.val)) == (6 - held, held)
        assert set(data.train.labels.tolist()) == set(data.val.labels.tolist()) == {0, 1}
    for i in (0, 1):
        (folder / "train" / "dog" / f"{i}.png").unlink()
    whole = load_dataset(str(folder), data_dir=tmp_path, preprocessing=Preprocessing(8), val_fraction=0)
    assert (len(whole.train), len(whole.val)) == (4, 0)  # nothing is held out, so one image of a class will do
    data = load_dataset(str(folder), data_dir=tmp_path, preprocessing=Preprocessing(8))
    with pytest.raises(DataError, match=r"class 'dog' has too few training images \(1\) .*: add some, or remove"):
        _ = data.train
    assert len(data.test) == 6


def test_a_class_without_test_images_is_a_warning(tmp_path, caplog):
    folder = make_folder(tmp_path, ("train", "val"))
    for path in (folder / "val" / "cat").iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING, "brfx.data"):
        data = load_dataset(str(folder), data_dir=tmp_path, preprocessing=Preprocessing(8))
    assert [record.message for record in caplog.records] == [
        f"{folder}/val: no image of class 'cat', which no accuracy will count"
    ]
    assert set(data.test.labels.tolist()) == {1}


def test_real_images_come_through_pixel_for_pixel(cifar10_folder, cifar10_test):
    data = load_dataset(str(cifar10_folder), data_dir=cifar10_folder, preprocessing=Preprocessing(32))
    assert len(data.test) == 600
    assert torch.equal(data.test.images[60:120], cifar10_test.images[1000:1060])


def test_normalization():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    out = Preprocessing(4, (0.5, 0.0, 0.0), (0.5, 1.0, 2.0)).normalize(images)
    assert out[:, :, 0, 0].tolist() == [[-1, 0, 0], [1, 1, 0.5]]
    assert with_overrides(DEFAULTS["cifar10"], mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)
    assert with_overrides(DEFAULTS["cifar10"]) == DEFAULTS["cifar10"]


def loader(side=8, **settings):
    images = torch.arange(50 * 3 * side * side).remainder(251).to(torch.uint8).view(50, 3, side, side)
    return BatchLoader(Split(images, torch.arange(50)), Preprocessing(side, (0, 0, 0), (1, 1, 1)), 16, **settings)


def test_without_augmentation_the_order_is_the_splits():
    batches = list(loader())
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(50))
    assert len(loader(drop_last=True)) == len(list(loader(drop_last=True))) == 3


def test_all_but_the_uint8_images_is_on_the_device():
    batches = list(loader(augment=True, device="meta"))
    assert {(images.device.type, labels.device.type) for images, labels in batches} == {("meta", "meta")}
    assert batches[-1][0].shape == (2, 3, 8, 8)


def test_augmentation_is_a_function_of_seed_and_epoch():
    def epoch(seed, number):
        data = loader(augment=True, seed=seed)
        data.set_epoch(number)
        batches = list(data)
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    first, again = epoch(0, 1), epoch(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert sorted(first[1].tolist()) == list(range(50))
    for other in (epoch(0, 2), epoch(1, 1)):
        assert not torch.equal(first[1], other[1])


def test_each_augmented_image_is_a_shifted_perhaps_mirrored_original():
    data = loader(augment=True)
    plain, shifted, mirrored = data.preprocessing.normalize(data.split.images), 0, 0
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1))
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            crops = [padded[label, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
            straight = [i for i, crop in enumerate(crops) if torch.equal(image, crop)]
            flipped = [i for i, crop in enumerate(crops) if torch.equal(image, crop.flip(-1))]
            assert len(straight) + len(flipped) == 1
            shifted += (straight + flipped)[0] != 4
            mirrored += len(flipped)
    assert shifted > 25 and 10 < mirrored < 40


@pytest.mark.parametrize(("side", "reach"), [(4, 1), (8, 1), (15, 1), (16, 2), (24, 3)])
def test_how_an_image_is_shifted_goes_by_its_number_and_not_by_its_place_in_the_epoch(side, reach):
    """The draws of a seed and an epoch, as they have been since the first runs: a resumed run needs them again."""
    data = loader(side, augment=True, seed=3)
    data.set_epoch(2)
    draw = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    order = torch.randperm(50, generator=draw)
    shifts, mirrored = torch.randint(0, 2 * reach + 1, (50, 2), generator=draw), torch.rand(50, generator=draw) < 0.5
    padded = torch.nn.functional.pad(data.preprocessing.normalize(data.split.images), (reach,) * 4)
    images = torch.cat([images for images, _ in data])
    for image, number in zip(images, order, strict=True):
        y, x = shifts[number]
        crop = padded[number, :, y : y + side, x : x + side]
        assert torch.equal(image, crop.flip(-1) if mirrored[number] else crop)


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_in_memory_is_continued_at_any_batch(augment):
    data = loader(augment=augment)
    whole = list(data)
    for start in range(5):
        assert same(data.starting_at(start), whole[start:])
    with pytest.raises(ConfigError, match="batch=-1: takes 0 or more"):
        next(data.starting_at(-1))


@pytest.mark.parametrize(("world_size", "batches"), [(2, 4), (4, 3)])
def test_the_parts_of_all_ranks_are_the_batch_of_a_single_process(world_size, batches):
    each = [loader(augment=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [len(one) for one in each] == [batches] * world_size  # of 50 images, 2 are left for the fourth
    for start in (0, 2):
        parts = zip(*(one.starting_at(start) for one in each), strict=True)
        joined = [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]
        assert same(joined, list(loader(augment=True).starting_at(start))[: batches - start])


def test_ranks_decode_their_own_images_alone(tmp_path):
    make_folder(tmp_path, ("train",))
    whole = [(images[1:2], labels[1:2]) for images, labels in folder_batches(tmp_path, 0)]
    second = folder_batches(tmp_path, 0, rank=1, world_size=3)
    for i, path in enumerate(second.split.images.paths):
        if i % 3 != 1:
            path.unlink()
    assert same(second, whole[:6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 3}, "batch_size=16: takes a multiple of world_size=3"),
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2: takes a rank below world_size"),
        ({"rank": -1}, "rank=-1"),
        ({"world_size": 0}, "rank=0"),
    ],
)
def test_ranks_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        loader(**settings)
