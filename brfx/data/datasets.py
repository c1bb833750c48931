"""Data sets by name or folder, and their splits."""

from __future__ import annotations

import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from brfx.compat import memory_bytes
from brfx.data.image_files import IMAGE_SUFFIXES, ImageFiles, pixels
from brfx.data.preprocessing import DEFAULTS, Preprocessing
from brfx.errors import DataError, first_line
from brfx.extras import needed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images, uint8 ``(N, 3, S, S)`` or decoded on demand, and labels, int64 ``(N,)``.

    Of segmentation ``labels`` are masks, uint8 ``(N, S, S)``.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        images = self.images.take(indices) if isinstance(self.images, ImageFiles) else self.images[indices]
        return Split(images, self.labels[indices])

    def in_memory(self) -> Split:
        """With its images decoded, where they take less than a third of the memory."""
        if not isinstance(self.images, ImageFiles) or not _fits(self.images):
            return self
        order = torch.split(torch.arange(len(self)), 64)
        return Split(_joined(self.images, self.images.batches(order)), self.labels)


class Dataset:
    """One data set; its splits are decoded when first asked for.

    ``val`` is cut from the training images, the same share of each class, and empty where that share is 0; ``test`` is
    what nothing is chosen on.

    Attributes:
        name: as the user gave it.
        classes: in the order of the labels.
        preprocessing: size, mean and std; ``None`` where the model sees images as they are.
        flip: whether a mirrored image is still of its class.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        preprocessing: Preprocessing | None,
        read: Callable[[str], Any],
        *,
        flip: bool,
        val_fraction: float,
        seed: int,
    ) -> None:
        self.name, self.classes, self.preprocessing, self.flip = name, classes, preprocessing, flip
        self._read, self._val_fraction, self._seed = read, val_fraction, seed

    @cached_property
    def _training(self) -> tuple[Any, Any]:
        split = self._read("train")
        if not isinstance(split, Split) or split.labels.dim() > 1:  # boxes and masks are of many classes
            if self._val_fraction and len(split) < 2:
                raise DataError(f"{self.name}: too few training images (1) to leave one for validation: add some")
            keep, held = _cut(torch.zeros(len(split), dtype=torch.long), self._val_fraction, self._seed)
            return split.take(keep), split.take(held)
        counts = torch.bincount(split.labels, minlength=len(self.classes))
        for name, count in zip(self.classes, counts.tolist(), strict=True):
            if self._val_fraction and count < 2:
                raise DataError(
                    f"{self.name}: class {name!r} has too few training images ({count}) to leave one for training and "
                    "one for validation: add some, or remove the class"
                )
        keep, held = _cut(split.labels, self._val_fraction, self._seed)
        return split.take(keep), split.take(held).in_memory()

    @property
    def train(self) -> Any:
        """A :class:`Split`, or what else the data's reader has for one."""
        return self._training[0]

    @property
    def val(self) -> Any:
        return self._training[1]

    @cached_property
    def test(self) -> Any:
        return self._read("test")


def load_dataset(
    source: str,
    *,
    data_dir: Path,
    preprocessing: Preprocessing | None = None,
    download: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
    workers: int = 2,
    skip_bad_images: bool = False,
    decode_once: bool = True,
) -> Dataset:
    """Find a data set. Its images are read into memory when a split is first used.

    Args:
        source: ``digits``, ``cifar10``, ``cifar100``, or a folder with ``train/`` and ``test/`` or ``val/``, each with
            one folder of images a class.
        data_dir: where named data sets lie, and are downloaded to.
        preprocessing: the evaluation transform; default :data:`DEFAULTS`, for a folder it must be given. The digits
            are drawn at its ``resize`` pixels, whatever the interpolation.
        download: let torchvision download a named data set that is not there.
        val_fraction: share of the training images cut off for validation, drawn per class with ``seed``; 0: none.
        workers: processes that decode a folder's images; 0 for none beside this one.
        skip_bad_images: leave out images of a folder that cannot be read, with a warning that names the first ten.
        decode_once: keep the squares of a folder's training images in memory where they fit; ``False`` leaves them
            files, of which an augmentation sees the whole picture.

    Raises:
        DataError: nothing is there, or what is there cannot be used; with the command that mends it.
    """
    preprocessing = preprocessing or DEFAULTS.get(source)
    if preprocessing is None:
        raise DataError(f"{source}: say at which size to read the images of a folder (--image-size)")
    if source == "digits":
        classes, read = _digits(preprocessing)
    elif source in ("cifar10", "cifar100"):
        classes, read = _cifar(source, data_dir, download, preprocessing)
    else:
        classes, read = _folder(Path(source), preprocessing, workers, skip_bad_images, decode_once)
    flip = source != "digits"
    return Dataset(source, classes, preprocessing, read, flip=flip, val_fraction=val_fraction, seed=seed)


def _cut(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of what stays in training and of what is held out: the same share of every class, of both at least one.
    A share of 0 holds out nothing.

    Requires: two images of each class, unless the share is 0.
    """
    if not fraction:
        return torch.arange(len(labels)), torch.arange(0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in set(labels.tolist()):
        members = order[labels[order] == label]
        held[members[: min(max(1, round(len(members) * fraction)), len(members) - 1)]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


#: The class names, and what reads a split by its name, ``"train"`` or ``"test"``.
_Source = tuple[tuple[str, ...], Callable[[str], Split]]


def _digits(preprocessing: Preprocessing) -> _Source:
    """scikit-learn's 1,797 handwritten digits (8x8), every fifth for the test, enlarged to ``preprocessing.resize``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(needed("the data set digits", "demo", error)) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    size = (preprocessing.side, preprocessing.side)
    images = F.interpolate(images, size=size, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    left, top, right, bottom = preprocessing.centre(*size)
    whole = Split(images[:, :, top:bottom, left:right], torch.from_numpy(bunch.target).long())
    is_test = torch.arange(len(whole)) % 5 == 0
    chosen = {"train": (~is_test).nonzero().flatten(), "test": is_test.nonzero().flatten()}
    return tuple(str(digit) for digit in range(10)), lambda part: whole.take(chosen[part])


def _cifar(name: str, data_dir: Path, download: bool, preprocessing: Preprocessing) -> _Source:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's deprecations inside torchvision's reader
            parts = {part: kind(str(data_dir), train=part == "train", download=download) for part in ("train", "test")}
    except Exception as error:
        folder = "give a folder of images with --data DIR (DIR/train/CLASS/*.png, DIR/test/...)"
        if download:
            raise DataError(
                f"downloading {name} to {data_dir} failed ({first_line(error)}): try again, or {folder}"
            ) from error
        raise DataError(f"{name} is not in {data_dir}: add --download, or {folder}") from error

    def read(part: str) -> Split:
        return Split(_squares(parts[part].data, preprocessing), torch.tensor(parts[part].targets))

    return tuple(parts["train"].classes), read


def _squares(images: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """uint8 ``(N, H, W, 3)`` to ``(N, 3, S, S)``."""
    from PIL import Image

    size = preprocessing.image_size
    if images.shape[1:3] == (size, size) and preprocessing.side == size:
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    squares = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for square, image in zip(squares, images, strict=True):
        square.copy_(pixels(preprocessing.square(Image.fromarray(image))))
    return squares


def _folder(root: Path, preprocessing: Preprocessing, workers: int, skip_bad: bool, decode_once: bool) -> _Source:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, and not one of {', '.join(DEFAULTS)}")
    test_name = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_name is None:
        raise DataError(f"{root}: expected {root}/train/CLASS/*.png and {root}/test/CLASS/*.png (or val/)")
    classes = tuple(sorted(path.name for path in (root / "train").iterdir() if path.is_dir()))
    folders = {"train": root / "train", "test": root / test_name}
    files: dict[str, list[tuple[Path, int]]] = {}
    for part, folder in folders.items():
        strange = sorted({path.name for path in folder.iterdir() if path.is_dir()} ^ set(classes))
        if strange:
            raise DataError(f"{root}: train/ and {test_name}/ differ in their classes, first in {strange[0]!r}")
        found = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob("*"))]
        files[part] = [(path, label) for path, label in found if path.suffix.lower() in IMAGE_SUFFIXES]
        _name_others(folder, [path for path, _ in found])
        if not files[part]:
            raise DataError(f"{folder}: no image in it (one folder a class, files ending in .png, .jpg ...)")
        empty = sorted(set(range(len(classes))) - {label for _, label in files[part]})
        named = _first_ten([repr(classes[label]) for label in empty])
        if empty and part == "train":
            raise DataError(f"{folder}: no image of class {named}: add some, or remove the class from {test_name}/ too")
        if empty:
            log.warning("%s: no image of class %s, which no accuracy will count", folder, named)

    def read(part: str) -> Split:
        images = ImageFiles([path for path, _ in files[part]], preprocessing, workers)
        whole = Split(images, torch.tensor([label for _, label in files[part]]))
        split, bad = _decode(whole, images, skip_bad, keep=decode_once or part == "test")
        if bad:
            folder, counts = folders[part], (len(bad), len(files[part]))
            gone = {label for _, label in files[part]} - set(split.labels.tolist())
            if gone:
                named = _first_ten([repr(classes[label]) for label in sorted(gone)])
                raise DataError(f"{folder}: no image of class {named} can be read: mend them or remove the class")
            log.warning("%s: left out %d of %d images, which cannot be read: %s", folder, *counts, _first_ten(bad))
        return split

    return classes, read


def _name_others(folder: Path, paths: Sequence[Path]) -> None:
    """Warn of files among ``paths`` that are not read as images, counted by suffix; hidden ones are no one's images."""
    suffixes = Counter(
        path.suffix.lower() or path.name
        for path in paths
        if path.suffix.lower() not in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if suffixes:
        counts = _first_ten([f"{count} {suffix}" for suffix, count in suffixes.most_common()])
        log.warning("%s: files that are not read as images: %s", folder, counts)


def _decode(split: Split, images: ImageFiles, skip_bad: bool, keep: bool) -> tuple[Split, dict[Path, str]]:
    """``split`` with all of its ``images`` in memory where they fit and ``keep`` is set, else to be decoded batch by
    batch.

    With ``skip_bad``, without the files that cannot be read, which are returned with the reasons; images that are not
    kept in memory are all decoded once to find them.
    """
    keep = keep and _fits(images)
    if not skip_bad:
        return split.in_memory() if keep else split, {}
    order = torch.split(torch.arange(len(split)), 64)
    bad: dict[Path, str] = {}

    def readable() -> Iterator[Tensor]:
        for batch, unreadable in images.attempts(order):
            bad.update(unreadable)
            yield batch

    if keep:
        split = Split(_joined(images, readable()), split.labels)
    else:
        deque(readable(), maxlen=0)
    if bad:
        split = split.take(torch.tensor([i for i, path in enumerate(images.paths) if path not in bad]).long())
    return split, bad


def _fits(images: ImageFiles) -> bool:
    """Whether all of them take less than a third of the memory."""
    size = images.preprocessing.image_size
    return len(images) * 3 * size * size < memory_bytes() / 3


def _joined(images: ImageFiles, batches: Iterable[Tensor]) -> Tensor:
    """``batches`` of all images in one tensor, which is filled as they come."""
    size, start = images.preprocessing.image_size, 0
    whole = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for batch in batches:
        whole[start : start + len(batch)] = batch
        start += len(batch)
    return whole


def _first_ten(names: Collection[object]) -> str:
    return ", ".join(map(str, islice(names, 10))) + (", ..." if len(names) > 10 else "")
