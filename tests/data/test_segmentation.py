"""Images with masks: what a folder may hold, and that image and mask stay together."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from brfx.data import BatchLoader, Preprocessing, load_segmentation
from brfx.errors import DataError


def write(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if mode == "P":
        image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 0)])
        assert image.mode == "P"
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """Ten training and two test images of 12x8 pixels whose colour says each pixel's class, 0 to 2."""
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 2)):
        for number in range(count):
            mask = random.integers(0, 3, (8, 12))
            write(tmp_path / part / "images" / f"{number}.png", np.repeat(100 * mask[..., None], 3, 2))
            write(tmp_path / part / "masks" / f"{number}.png", mask)
    return tmp_path


def load(folder, size=8, **settings):
    return load_segmentation(folder, Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), stretch=True), **settings)


def test_images_and_masks_are_read_stretched_and_split(folder):
    data = load(folder, size=24, val_fraction=0.2)
    assert data.classes == ("0", "1", "2") and (len(data.train), len(data.val), len(data.test)) == (8, 2, 2)
    assert data.test.images.shape == (2, 3, 24, 24) and data.test.images.dtype == torch.uint8
    mask = torch.from_numpy(np.array(Image.open(folder / "test" / "masks" / "1.png")))
    assert torch.equal(data.test.labels[1], mask.repeat_interleave(3, 0).repeat_interleave(2, 1))
    assert not len(load(folder, val_fraction=0.0).val)


def test_a_mask_goes_with_its_image_in_every_epoch(folder):
    for part in ("train", "test"):
        for path in (folder / part).rglob("*.png"):  # square, so that nothing is blurred
            Image.fromarray(np.array(Image.open(path))[:, :8]).save(path)
    data = load(folder, val_fraction=0.0)
    loader = BatchLoader(data.train, data.preprocessing, 5, augment=True, seed=3)
    seen = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        for images, masks in loader:
            assert masks.dtype == torch.int64 and (masks == 255).any()
            there = masks != 255
            assert torch.equal((images[:, 0] * 255 / 100).round().long()[there], masks[there])
            assert not images[:, 0][~there].any()
            seen.append(masks)
    assert not torch.equal(seen[0], seen[2])
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader.starting_at(1)))[1], seen[1])
    plain = torch.cat([masks for _, masks in BatchLoader(data.test, data.preprocessing, 5)])
    assert torch.equal(plain, data.test.labels.long())


def test_masks_of_0_and_255_are_of_two_classes(folder):
    for path in folder.glob("t*/masks/*.png"):
        write(path, np.where(np.array(Image.open(path)) > 0, 255, 0))
    data = load(folder)
    assert data.classes == ("0", "1") and set(data.test.labels.unique().tolist()) == {0, 1}


def test_a_palettes_indices_are_the_classes_and_255_is_none(folder):
    for path in folder.glob("t*/masks/*.png"):
        mask = np.array(Image.open(path))
        mask[0] = 255
        write(path, mask, "P")
    data = load(folder, num_classes=21)
    assert len(data.classes) == 21 and set(data.test.labels.unique().tolist()) == {0, 1, 2, 255}
    assert load(folder).classes == ("0", "1", "2")


def without(folder):
    (folder / "train" / "masks" / "3.png").unlink()


def other_size(folder):
    write(folder / "train" / "masks" / "3.png", np.zeros((8, 11)))


def beyond(folder):
    write(folder / "test" / "masks" / "1.png", np.full((8, 12), 7))


def coloured(folder):
    write(folder / "train" / "masks" / "3.png", np.zeros((8, 12, 3)))


def damaged(folder):
    (folder / "train" / "masks" / "3.png").write_bytes(b"no image")


def twice(folder):
    write(folder / "train" / "masks" / "3.bmp", np.zeros((8, 12)))


def no_masks(folder):
    (folder / "train" / "masks").rename(folder / "train" / "labels")


def no_test(folder):
    (folder / "test").rename(folder / "other")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, r"train/images/3.png: its mask is missing: add .*train/masks/3.png, or remove the image"),
        (other_size, r"train/masks/3.png: is 11x8 pixels, its image 3.png 12x8: make it of that size"),
        (beyond, r"test/masks/1.png: has class 7, there are 3 \(0 to 2, 255 is of no class\): .* --num-classes"),
        (coloured, r"train/masks/3.png: is an image of mode RGB, a mask has class indices in one channel"),
        (damaged, r"train/masks/3.png: cannot read this mask"),
        (twice, r"train/masks/3.png: 3.bmp is a mask of the same name: remove one"),
        (no_masks, r"train: there is no .*train/masks: put a mask there for each file in .*train/images"),
        (no_test, r"expected .*train/images with .*train/masks, and the same in .*test \(or val\)"),
    ],
)
def test_what_is_wrong_is_named_with_what_mends_it(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        data = load(folder)
        assert len(data.train) + len(data.test)
    assert "\n" not in str(caught.value)


def test_masks_without_an_image_are_told(folder, caplog):
    write(folder / "train" / "masks" / "extra.png", np.zeros((8, 12)))
    caplog.set_level(logging.WARNING, "brfx")
    load(folder)
    assert "1 masks have no image, the first is extra.png" in caplog.text
