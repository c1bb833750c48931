"""Augmentation by torchvision's transforms: each is a function of (seed, epoch, sample), or of (seed, epoch, batch)."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from brfx.config import Augmentation
from brfx.data import BatchLoader, ImageFiles, Preprocessing, Split, load_dataset
from brfx.data.augmentation import seeded
from brfx.errors import ConfigError

PLAIN = Preprocessing(16, (0.0,) * 3, (1.0,) * 3, resize=20)
EVERY = Augmentation(crop="resized", rand_augment=9, mixup=0.4, cutmix=1.0, erasing=0.5)


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(50) % 5)


def loader(split, augment, batch_size=16, **settings):
    return BatchLoader(split, PLAIN, batch_size, augment=augment, num_classes=5, **settings)


def epoch_of(data, number=0, start=0):
    data.set_epoch(number)
    return list(data.starting_at(start))


def same(batches, others):
    return all(torch.equal(a, b) for x, y in zip(batches, others, strict=True) for a, b in zip(x, y, strict=True))


def test_an_epoch_follows_from_its_seed_and_number_and_goes_on_at_any_batch(split):
    state = torch.get_rng_state()
    data = loader(split, EVERY, seed=3)
    whole = epoch_of(data, 2)
    assert same(whole, epoch_of(loader(split, EVERY, seed=3), 2))
    for start in (1, 3):
        assert same(epoch_of(data, 2, start), whole[start:])
    assert torch.equal(torch.get_rng_state(), state)  # nothing is taken from the run's own draws
    for other in (epoch_of(data, 1), epoch_of(loader(split, EVERY, seed=4), 2)):
        assert not same(whole, other)


@pytest.mark.parametrize("augment", [EVERY, Augmentation(mixup=0.3), Augmentation(crop="resized", erasing=1.0)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_mix_as_a_single_process_does(split, augment, world_size):
    each = [loader(split, augment, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = epoch_of(loader(split, augment))
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*map(epoch_of, each), strict=True)]
    assert same(joined, whole[: len(joined)])


def test_the_draws_of_shifts_are_those_of_before_whatever_else_is_drawn(split):
    plain, erased = epoch_of(loader(split, True)), epoch_of(loader(split, Augmentation(erasing=1.0)))
    for (images, labels), (others, same_labels) in zip(plain, erased, strict=True):
        assert torch.equal(labels, same_labels)
        kept = others != 0
        assert torch.equal(images[kept], others[kept])
        assert (images != others).flatten(1).any(1).float().mean() > 0.8  # a rectangle may lie at a black edge
    assert not any(images.eq(0).any() for images, _ in epoch_of(loader(split, Augmentation(crop="none"))))


def test_a_resized_crop_and_randaugment_are_torchvisions(split):
    data = loader(split, Augmentation(crop="resized", flip=False, rand_augment=5), seed=1)
    found = epoch_of(data, 4)
    draw = torch.Generator().manual_seed(1 * 1_000_003 + 4)
    order = torch.randperm(50, generator=draw)
    torch.randint(0, 1, (50, 2), generator=draw), torch.rand(50, generator=draw)
    seeds = torch.randint(2**62, (50,), generator=draw)
    theirs = v2.Compose([v2.RandomResizedCrop((16, 16)), v2.RandAugment(magnitude=5)])
    images = torch.cat([images for images, _ in found])
    for image, number in zip(images, order.tolist(), strict=True):
        with seeded(int(seeds[number])):
            expected = theirs(v2.functional.to_pil_image(split.images[number]))
        assert torch.equal(image, v2.functional.pil_to_tensor(expected).float() / 255)


def test_mixed_labels_say_how_images_are_mixed(split):
    flat = Split(torch.arange(1, 51, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16), torch.arange(50))
    for settings in ({"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}):
        augment = Augmentation(crop="none", flip=False, **settings)
        ways = set()
        for images, shares in BatchLoader(flat, PLAIN, 10, augment=augment, num_classes=50, drop_last=True):
            assert shares.shape == (10, 50)
            torch.testing.assert_close(shares.sum(1), torch.ones(10))
            torch.testing.assert_close(images.mean((1, 2, 3)) * 255, shares @ torch.arange(1.0, 51.0))
            ways.add(bool((images.amax((1, 2, 3)) == images.amin((1, 2, 3))).all()))
        assert ways == {name == "mixup" for name in settings}


def make_folder(root, size=(40, 30)):
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(10):
                noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(root / part / name / f"{number}{i}.png")
    return str(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crop_of_a_folder_sees_the_whole_picture(tmp_path, workers):
    folder = make_folder(tmp_path)
    data = load_dataset(folder, data_dir=tmp_path, preprocessing=PLAIN, workers=workers, decode_once=False)
    assert isinstance(data.train.images, ImageFiles) and (len(data.train), len(data.val), len(data.test)) == (18, 2, 20)
    assert isinstance(data.val.images, torch.Tensor) and isinstance(data.test.images, torch.Tensor)
    once = load_dataset(folder, data_dir=tmp_path, preprocessing=PLAIN, workers=workers)
    assert torch.equal(once.val.images, data.val.images) and torch.equal(once.test.images, data.test.images)
    augment = Augmentation(crop="resized", rand_augment=3)
    found = epoch_of(loader(data.train, augment, 5), 1)
    whole = [v2.functional.pil_to_tensor(Image.open(path)) for path in data.train.images.paths]
    in_memory = Split(torch.stack(whole), data.train.labels)
    assert same(found, epoch_of(loader(in_memory, augment, 5), 1))


def test_bad_images_are_left_out_of_a_folder_that_is_not_kept(tmp_path, caplog):
    folder = make_folder(tmp_path)
    (tmp_path / "train" / "dog" / "13.png").write_bytes(b"no image")
    common = {"data_dir": tmp_path, "preprocessing": PLAIN, "decode_once": False}
    data = load_dataset(folder, **common, skip_bad_images=True)
    assert isinstance(data.train.images, ImageFiles) and len(data.train) + len(data.val) == 19
    assert "left out 1 of 20 images" in caplog.text and "13.png" in caplog.text


def test_what_cannot_be_varied_is_refused(split):
    masks = Split(split.images, torch.zeros(50, 16, 16, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"resized crop, flip: masks are shifted and mirrored alone"):
        loader(masks, Augmentation(crop="resized"))
    with pytest.raises(ConfigError, match=r"mixup 0.3: mixed labels are shares of the classes: give num_classes"):
        BatchLoader(split, PLAIN, 8, augment=Augmentation(mixup=0.3))
    for settings in ({"crop": "centre"}, {"rand_augment": 31}, {"mixup": -1.0}, {"cutmix": -0.5}, {"erasing": 1.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}="):
            Augmentation(**settings)
