"""Names or folders to image data sets, decoded once, augmented in batches."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, get_worker_info

from brfx.errors import ConfigError, DataError, first_line

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset(torchvision.datasets.folder.IMG_EXTENSIONS)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it: resized to a square, scaled to 0..1, normalized.

    Attributes:
        image_size: side of the square in pixels.
        mean, std: per RGB channel, of images in 0..1.
    """

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images ``(N, 3, H, W)`` to float32, normalized."""
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return images.float().div_(255).sub_(mean).div_(std)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """``(1, 3, 1, 1)``; kept, as copying it to a GPU for each batch would wait for the GPU each time."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


#: Documented defaults by data set. CIFAR takes ImageNet's mean and std, as the checkpoints in circulation do.
#: A folder takes the model's own size (32 for the CIFAR ResNets, 224 else).
DEFAULTS = {
    "digits": Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": Preprocessing(32),
    "cifar100": Preprocessing(32),
}


class ImageFiles:
    """Images that are decoded each time they are asked for, for a folder that does not fit in memory.

    ``files[indices]`` gives uint8 ``(len(indices), 3, size, size)``, as a tensor of all images would; :meth:`batches`
    gives one such tensor after the other, decoded ahead by ``workers`` processes (0: by this one, when asked for).

    Raises:
        DataError: a file cannot be read; names it. Or a worker process died.
    """

    def __init__(self, paths: Sequence[Path], size: int, workers: int) -> None:
        self.paths, self.size, self.workers = paths, size, workers

    def __getitem__(self, indices: Tensor) -> Tensor:
        images, bad = _read([self.paths[i] for i in indices.tolist()], self.size)
        _require_readable(bad)
        return images

    def batches(self, order: Sequence[Tensor], *, pin: bool = False) -> Iterator[Tensor]:
        """``files[indices]`` for each of ``order``; with ``pin`` in pinned memory."""
        for images, bad in self.attempts(order, pin=pin):
            _require_readable(bad)
            yield images

    def attempts(self, order: Sequence[Tensor], *, pin: bool = False) -> Iterator[tuple[Tensor, dict[Path, str]]]:
        """As :meth:`batches`, beside why files among them cannot be read; what is in their place means nothing."""
        workers = self.workers if len(order) > 1 else 0
        loader: DataLoader[Any] = DataLoader(
            self.paths,  # type: ignore[arg-type]  # any sequence will do
            batch_sampler=map(Tensor.tolist, order),
            collate_fn=partial(_read, size=self.size),
            num_workers=workers,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=pin,
            generator=torch.Generator(),  # its seeds for the workers would come out of the global one
        )
        try:
            yield from _start(loader)
        except (RuntimeError, EOFError, OSError) as error:  # a worker that dies may leave its pipe half read
            why = (str(error).strip().splitlines() or ["DataLoader worker process exited unexpectedly"])[-1]
            raise DataError(f"decoding images in worker processes failed ({why}): try fewer --workers") from error

    def take(self, indices: Tensor) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.size, self.workers)


def _read(paths: Sequence[Path], size: int) -> tuple[Tensor, dict[Path, str]]:
    """uint8 ``(len(paths), 3, size, size)``, in shared memory in a worker process, and why files cannot be read.

    They are returned, not raised: an error that a worker process raises comes out with its traceback in the message.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    if get_worker_info() is not None:
        images.share_memory_()  # type: ignore[no-untyped-call]
    bad = {}
    for image, path in zip(images, paths, strict=True):
        try:
            image.copy_(_square(path, size))
        except Exception as error:  # PIL has many for damaged files
            bad[path] = first_line(error)
    return images, bad


def _require_readable(bad: dict[Path, str]) -> None:
    for path, why in bad.items():
        raise DataError(
            f"{path}: cannot read this image ({why}): mend it, or leave such files out with --skip-bad-images"
        )


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, without torch's signal handler.

    The handler raises a worker's death wherever the main thread happens to be; left to itself, the iterator raises it
    where the next batch is asked for, within five seconds.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


@dataclass(frozen=True)
class Split:
    """Images, uint8 ``(N, 3, S, S)`` or decoded on demand, and labels, int64 ``(N,)``."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        images = self.images.take(indices) if isinstance(self.images, ImageFiles) else self.images[indices]
        return Split(images, self.labels[indices])


class Dataset:
    """One data set; its splits are decoded when first asked for.

    ``val`` is cut from the training images, the same share of each class, and empty where that share is 0; ``test`` is
    what nothing is chosen on.

    Attributes:
        name: as the user gave it.
        classes: in the order of the labels.
        preprocessing: size, mean and std.
        flip: whether a mirrored image is still of its class.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        read: Callable[[str], Split],
        *,
        flip: bool,
        val_fraction: float,
        seed: int,
    ) -> None:
        self.name, self.classes, self.preprocessing, self.flip = name, classes, preprocessing, flip
        self._read, self._val_fraction, self._seed = read, val_fraction, seed

    @cached_property
    def _training(self) -> tuple[Split, Split]:
        split = self._read("train")
        counts = torch.bincount(split.labels, minlength=len(self.classes))
        for name, count in zip(self.classes, counts.tolist(), strict=True):
            if self._val_fraction and count < 2:
                raise DataError(
                    f"{self.name}: class {name!r} has too few training images ({count}) to leave one for training and "
                    "one for validation: add some, or remove the class"
                )
        keep, held = _cut(split.labels, self._val_fraction, self._seed)
        return split.take(keep), split.take(held)

    @property
    def train(self) -> Split:
        return self._training[0]

    @property
    def val(self) -> Split:
        return self._training[1]

    @cached_property
    def test(self) -> Split:
        return self._read("test")


class BatchLoader:
    """Batches ``(images, labels)`` of a split, normalized, on ``device``.

    With ``augment``, each image is shifted by up to an eighth of its side and, if ``flip``, mirrored with probability
    one half, for the whole batch at once. Order and augmentation are functions of (seed, epoch, sample) alone.

    Args:
        split: the images.
        preprocessing: how they are normalized.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        augment: shuffle and augment; otherwise the order is the split's own.
        drop_last: leave a smaller last batch out.
        seed: of order and augmentation.
        device: where the batches go.
        rank, ranks: yield the ``rank``-th of ``ranks`` equal parts of every batch; the parts of all ranks, one after
            the other, are the batch of a single process. A smaller last batch that does not split evenly is left out.

    Raises:
        ConfigError: ``batch_size`` does not split evenly, or there is no such rank.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        augment: bool = False,
        flip: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank={rank!r}, ranks={ranks!r}: takes a rank of 0 or more that is below ranks")
        if batch_size % ranks:
            raise ConfigError(f"batch_size={batch_size!r}: takes a multiple of ranks={ranks!r}, an equal part for each")
        self.split, self.preprocessing, self.batch_size = split, preprocessing, batch_size
        self.augment, self.flip, self.drop_last, self.seed = augment, flip, drop_last, seed
        self.device, self.rank, self.ranks = torch.device(device), rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, those of all ranks together."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (1 if rest and not self.drop_last and rest % self.ranks == 0 else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch from its ``batch``-th on, counted from 0; what goes before is neither decoded nor augmented."""
        if batch < 0:
            raise ConfigError(f"batch={batch!r}: takes 0 or more")
        samples = len(self.split)
        order = torch.arange(samples)
        if self.augment:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(samples, generator=generator)
            reach = max(1, self.preprocessing.image_size // 8)
            shifts = torch.randint(0, 2 * reach + 1, (samples, 2), generator=generator)
            mirrored = torch.rand(samples, generator=generator) < (0.5 if self.flip else 0.0)
            shifts, mirrored = self._copy(shifts[order]), self._copy(mirrored[order])
        labels = self._copy(self.split.labels[order])
        parts = [self._part(number) for number in range(batch, len(self))]
        for part, images in zip(parts, self._images([order[part] for part in parts]), strict=True):
            images = self._copy(images)
            if self.augment:
                images = _shift_and_mirror(images, shifts[part], mirrored[part], reach)
            yield self.preprocessing.normalize(images), labels[part]

    def _part(self, batch: int) -> slice:
        """Where this rank's part of a batch lies in the epoch's order."""
        start = batch * self.batch_size
        size = min(self.batch_size, len(self.split) - start) // self.ranks
        return slice(start + self.rank * size, start + (self.rank + 1) * size)

    def _images(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        """The uint8 batches of these indices."""
        images = self.split.images
        if isinstance(images, ImageFiles):
            return images.batches(order, pin=self.device.type == "cuda")
        return (images[chosen] for chosen in order)

    def _copy(self, values: Tensor) -> Tensor:
        """``values`` on the device; a GPU copies from pinned memory, and nobody waits for it."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


def _shift_and_mirror(images: Tensor, shifts: Tensor, mirrored: Tensor, reach: int) -> Tensor:
    """Crop each image at its own offset out of the batch padded with zeros, and mirror the marked ones."""
    count, _, height, width = images.shape
    windows = F.pad(images, (reach, reach, reach, reach)).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count, device=images.device), :, shifts[:, 0], shifts[:, 1]]
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(-1), cropped)


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
) -> Dataset:
    """Find a data set. Its images are read into memory when a split is first used.

    Args:
        source: ``digits``, ``cifar10``, ``cifar100``, or a folder with ``train/`` and ``test/`` or ``val/``, each with
            one folder of images a class.
        data_dir: where named data sets lie, and are downloaded to.
        preprocessing: size, mean and std; default :data:`DEFAULTS`, for a folder it must be given.
        download: let torchvision download a named data set that is not there.
        val_fraction: share of the training images cut off for validation, drawn per class with ``seed``; 0: none.
        workers: processes that decode a folder's images; 0 for none beside this one.
        skip_bad_images: leave out images of a folder that cannot be read, with a warning that names the first ten.

    Raises:
        DataError: nothing is there, or what is there cannot be used; with the command that mends it.
    """
    preprocessing = preprocessing or DEFAULTS.get(source)
    if preprocessing is None:
        raise DataError(f"{source}: say at which size to read the images of a folder (--image-size)")
    size = preprocessing.image_size
    if source == "digits":
        classes, read = _digits(size)
    elif source in ("cifar10", "cifar100"):
        classes, read = _cifar(source, data_dir, download, size)
    else:
        classes, read = _folder(Path(source), size, workers, skip_bad_images)
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


def _digits(size: int) -> _Source:
    """scikit-learn's 1,797 handwritten digits (8x8), every fifth for the test, enlarged to ``size``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'brfx[demo]'") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(size, size), mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    whole = Split(images, torch.from_numpy(bunch.target).long())
    is_test = torch.arange(len(whole)) % 5 == 0
    chosen = {"train": (~is_test).nonzero().flatten(), "test": is_test.nonzero().flatten()}
    return tuple(str(digit) for digit in range(10)), lambda part: whole.take(chosen[part])


def _cifar(name: str, data_dir: Path, download: bool, size: int) -> _Source:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's deprecations inside torchvision's reader
            parts = {part: kind(str(data_dir), train=part == "train", download=download) for part in ("train", "test")}
    except Exception as error:
        what = f"downloading {name} to {data_dir} failed ({error})" if download else f"{name} is not in {data_dir}"
        raise DataError(
            f"{what}: add --download, or give a folder of images with --data DIR (DIR/train/CLASS/*.png, DIR/test/...)"
        ) from error

    def read(part: str) -> Split:
        images = torch.from_numpy(parts[part].data).permute(0, 3, 1, 2)
        return Split(_resize(images, size), torch.tensor(parts[part].targets))

    return tuple(parts["train"].classes), read


def _resize(images: Tensor, size: int) -> Tensor:
    if tuple(images.shape[-2:]) == (size, size):
        return images.contiguous()
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _folder(root: Path, size: int, workers: int, skip_bad: bool) -> _Source:
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
        files[part] = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files[part]:
            raise DataError(f"{folder}: no image in it (one folder a class, files ending in .png, .jpg ...)")
        empty = sorted(set(range(len(classes))) - {label for _, label in files[part]})
        named = _first_ten([repr(classes[label]) for label in empty])
        if empty and part == "train":
            raise DataError(f"{folder}: no image of class {named}: add some, or remove the class from {test_name}/ too")
        if empty:
            log.warning("%s: no image of class %s, which no accuracy will count", folder, named)

    def read(part: str) -> Split:
        split, bad = _decode(files[part], size, workers, skip_bad)
        if bad:
            folder, counts = folders[part], (len(bad), len(files[part]))
            gone = {label for _, label in files[part]} - set(split.labels.tolist())
            if gone:
                named = _first_ten([repr(classes[label]) for label in sorted(gone)])
                raise DataError(f"{folder}: no image of class {named} can be read: mend them or remove the class")
            log.warning("%s: left out %d of %d images, which cannot be read: %s", folder, *counts, _first_ten(bad))
        return split

    return classes, read


def _decode(
    files: Sequence[tuple[Path, int]], size: int, workers: int, skip_bad: bool
) -> tuple[Split, dict[Path, str]]:
    """All images in memory where they take less than a third of it, else decoded batch by batch.

    With ``skip_bad``, without the files that cannot be read, which are returned with the reasons; images that do not
    fit in memory are all decoded once to find them.
    """
    images = ImageFiles([path for path, _ in files], size, workers)
    labels = torch.tensor([label for _, label in files])
    fits = len(files) * 3 * size * size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3
    if not fits and not skip_bad:
        return Split(images, labels), {}
    whole = torch.empty(len(files) if fits else 0, 3, size, size, dtype=torch.uint8)
    order = torch.split(torch.arange(len(files)), 64)
    bad: dict[Path, str] = {}
    for chosen, (batch, unreadable) in zip(order, images.attempts(order), strict=True):
        if not skip_bad:
            _require_readable(unreadable)
        bad |= unreadable
        if fits:
            whole[chosen] = batch
    split = Split(whole if fits else images, labels)
    if bad:
        split = split.take(torch.tensor([i for i, path in enumerate(images.paths) if path not in bad]).long())
    return split, bad


def _first_ten(names: Collection[object]) -> str:
    return ", ".join(map(str, islice(names, 10))) + (", ..." if len(names) > 10 else "")


def _square(path: Path, size: int) -> Tensor:
    """An image as uint8 ``(3, size, size)``: the shorter side resized to ``size``, then the centre cut out."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as transforms

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.size != (size, size):
        image = transforms.center_crop(transforms.resize(image, [size], antialias=True), [size, size])
    pixels: Tensor = transforms.pil_to_tensor(image)
    return pixels


def with_overrides(
    base: Preprocessing,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Preprocessing:
    """``base`` with what the user gave instead of its defaults."""
    changes: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std}
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
