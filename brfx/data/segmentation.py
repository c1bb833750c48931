"""A folder of images and masks, as one data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brfx.data.datasets import Dataset, Split
from brfx.data.image_files import IMAGE_SUFFIXES, decoded, pixels
from brfx.data.preprocessing import Preprocessing
from brfx.errors import DataError, first_line

log = logging.getLogger(__name__)

#: The value of a mask's pixel that is of no class.
IGNORED = 255


def load_segmentation(
    root: Path,
    preprocessing: Preprocessing,
    *,
    num_classes: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Find a data set of masks: ``train/images/NAME.*`` with ``train/masks/NAME.*``, and the same in ``test/`` or
    ``val/``.

    A mask is a file of one channel, of its image's size: class indices, where 255 is of no class; a palette's indices,
    as in PASCAL VOC; or, where no mask of the training set has another value than 0 and 255, 255 is class 1. Both are
    brought to the model's square when a split is first used, the mask to the nearest pixel, and kept in memory:
    ``split.labels`` is uint8 ``(N, S, S)``.

    Args:
        root: the folder.
        preprocessing: the evaluation transform.
        num_classes: how many there are, the background included; default what the training masks have.
        val_fraction: share of the training images cut off for validation, drawn with ``seed``; 0: none.

    Raises:
        DataError: a folder, a mask or an image is missing or cannot be read, a mask is of another size than its image,
            has several channels, or an index beyond the classes; names the file, and what mends it.
    """
    test = next((name for name in ("test", "val") if (root / name / "images").is_dir()), None)
    if not (root / "train" / "images").is_dir() or test is None:
        raise DataError(
            f"{root}: expected {root}/train/images with {root}/train/masks, and the same in {root}/test (or val)"
        )
    files = {"train": _pairs(root / "train"), "test": _pairs(root / test)}
    values = sorted({value for _, mask in files["train"] for value in np.unique(_indices(mask)).tolist()})
    binary = values in ([0, IGNORED], [IGNORED])
    found = 2 if binary else 1 + max((value for value in values if value != IGNORED), default=0)
    classes = num_classes or max(found, 2)
    if classes > IGNORED:
        raise DataError(f"{root}: {classes} classes: a mask has at most 255 (0 to 254; 255 is of no class)")

    def read(part: str) -> Split:
        return _read(files[part], preprocessing, classes, binary)

    names = tuple(map(str, range(classes)))
    return Dataset(str(root), names, preprocessing, read, flip=True, val_fraction=val_fraction, seed=seed)


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Each image of a part with its mask."""
    masks: dict[str, Path] = {}
    if not (folder / "masks").is_dir():
        raise DataError(f"{folder}: there is no {folder}/masks: put a mask there for each file in {folder}/images")
    for path in sorted((folder / "masks").iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in masks:
                raise DataError(f"{path}: {masks[path.stem].name} is a mask of the same name: remove one of them")
            masks[path.stem] = path
    images = [path for path in sorted((folder / "images").iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{folder}/images: no image in it (files ending in .png, .jpg ...)")
    for path in images:
        if path.stem not in masks:
            raise DataError(f"{path}: its mask is missing: add {folder}/masks/{path.stem}.png, or remove the image")
    unused = sorted(set(masks) - {path.stem for path in images})
    if unused:
        log.warning("%s/masks: %d masks have no image, the first is %s", folder, len(unused), masks[unused[0]].name)
    return [(path, masks[path.stem]) for path in images]


def _indices(path: Path) -> np.ndarray:
    """The values of a mask ``(H, W)``."""
    from PIL import Image

    try:
        with Image.open(path) as mask:
            mode, values = mask.mode, np.asarray(mask)
    except Exception as error:  # PIL has many for damaged files
        raise DataError(f"{path}: cannot read this mask ({first_line(error)}): mend it") from error
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise DataError(
            f"{path}: is an image of mode {mode}, a mask has class indices in one channel: save it as grey or palette"
        )
    return values.astype(np.int64)


def _read(files: Sequence[tuple[Path, Path]], preprocessing: Preprocessing, classes: int, binary: bool) -> Split:
    size = preprocessing.image_size
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    masks = torch.empty(len(files), size, size, dtype=torch.uint8)
    for i, (path, mask) in enumerate(files):
        images[i], shape = _image(path, preprocessing)
        indices = _indices(mask)
        if indices.shape != shape:
            height, width = shape
            raise DataError(
                f"{mask}: is {indices.shape[1]}x{indices.shape[0]} pixels, its image {path.name} {width}x{height}: "
                "make it of that size, to the nearest pixel"
            )
        if binary:
            if not set(np.unique(indices).tolist()) <= {0, IGNORED}:
                raise DataError(f"{mask}: has other values than 0 and 255, which the training masks have: mend it")
            indices = indices // IGNORED
        beyond = indices[(indices >= classes) & (indices != IGNORED)]
        if beyond.size:
            raise DataError(
                f"{mask}: has class {beyond.min()}, there are {classes} (0 to {classes - 1}, 255 is of no class): "
                "mend the mask, or give --num-classes"
            )
        masks[i] = _nearest(torch.from_numpy(indices).to(torch.uint8), preprocessing)
    return Split(images, masks)


def _image(path: Path, preprocessing: Preprocessing) -> tuple[Tensor, tuple[int, int]]:
    """An image as uint8 ``(3, S, S)``, and the height and width that its file has."""
    try:
        image = decoded(path)
    except Exception as error:
        raise DataError(f"{path}: cannot read this image ({first_line(error)}): mend it, or remove it") from error
    return pixels(preprocessing.square(image)), (image.height, image.width)


def _nearest(mask: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``(H, W)`` to ``(S, S)``."""
    width, height = preprocessing.resized_to(mask.shape[1], mask.shape[0])
    left, top, right, bottom = preprocessing.centre(width, height)
    rows = ((torch.arange(height) + 0.5) * mask.shape[0] / height)[top:bottom]
    columns = ((torch.arange(width) + 0.5) * mask.shape[1] / width)[left:right]
    return mask[rows.long()][:, columns.long()]
