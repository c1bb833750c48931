"""Image files: decoded to tensors, ahead of time in worker processes or when asked for."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from brfx.data.preprocessing import Preprocessing
from brfx.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

#: A picture and its place among the images to the uint8 ``(3, S, S)`` that a model is trained on.
Variation = Callable[["Image", int], Tensor]

IMAGE_SUFFIXES = frozenset(torchvision.datasets.folder.IMG_EXTENSIONS)


class ImageFiles:
    """Images that are decoded each time they are asked for, for a folder that does not fit in memory.

    ``files[indices]`` gives the squares that ``preprocessing`` makes of them, uint8 ``(len(indices), 3, S, S)``, as a
    tensor of all images would; :meth:`batches` gives one such tensor after the other, decoded ahead by ``workers``
    processes (0: by this one, when asked for).

    Raises:
        DataError: a file cannot be read; names it. Or a worker process died.
    """

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing, workers: int) -> None:
        self.paths, self.preprocessing, self.workers = paths, preprocessing, workers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        images, bad = _read([(i, self.paths[i]) for i in indices.tolist()], self.preprocessing, None)
        require_readable(bad)
        return images

    def batches(self, order: Sequence[Tensor], *, pin: bool = False, vary: Variation | None = None) -> Iterator[Tensor]:
        """``files[indices]`` for each of ``order``, or what ``vary`` makes of these files; with ``pin`` in pinned
        memory."""
        for images, bad in self.attempts(order, pin=pin, vary=vary):
            require_readable(bad)
            yield images

    def attempts(
        self, order: Sequence[Tensor], *, pin: bool = False, vary: Variation | None = None
    ) -> Iterator[tuple[Tensor, dict[Path, str]]]:
        """As :meth:`batches`, beside why files among them cannot be read; what is in their place means nothing."""
        read = partial(_read, preprocessing=self.preprocessing, vary=vary)
        return decode_ahead(list(enumerate(self.paths)), read, order, self.workers, pin=pin)

    def take(self, indices: Tensor) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.preprocessing, self.workers)


def decode_ahead(
    items: Sequence[Any],
    read: Callable[[Sequence[Any]], Any],
    order: Sequence[Tensor],
    workers: int,
    *,
    pin: bool = False,
) -> Iterator[Any]:
    """What ``read`` makes of the items at each of ``order``'s indices, ahead of time by ``workers`` processes (0: by
    this one, when asked for); with ``pin`` in pinned memory.

    Raises:
        DataError: a worker process died.
    """
    workers = workers if len(order) > 1 else 0
    loader: DataLoader[Any] = DataLoader(
        items,  # type: ignore[arg-type]  # any sequence will do
        batch_sampler=map(Tensor.tolist, order),
        collate_fn=read,
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


def _read(
    files: Sequence[tuple[int, Path]], preprocessing: Preprocessing, vary: Variation | None
) -> tuple[Tensor, dict[Path, str]]:
    """uint8 ``(len(files), 3, S, S)`` of places and files, in shared memory in a worker process, and why files cannot
    be read.

    They are returned, not raised: an error that a worker process raises comes out with its traceback in the message.
    """
    size = preprocessing.image_size
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    if get_worker_info() is not None:
        images.share_memory_()  # type: ignore[no-untyped-call]
    bad = {}
    for image, (place, path) in zip(images, files, strict=True):
        try:
            picture = decoded(path)
            image.copy_(pixels(preprocessing.square(picture)) if vary is None else vary(picture, place))
        except Exception as error:  # PIL has many for damaged files
            bad[path] = first_line(error)
    return images, bad


def require_readable(bad: dict[Path, str]) -> None:
    for path, why in bad.items():
        raise DataError(
            f"{path}: cannot read this image ({why}): mend it, or leave such files out with --skip-bad-images"
        )


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, without torch's signal handler.

    The handler raises a worker's death wherever the main thread happens to be; left to itself, the iterator raises it
    where the next batch is asked for, within five seconds.
    """
    child = getattr(signal, "SIGCHLD", None)  # Windows has none, and torch sets no handler there
    if child is None or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(child)
    batches = iter(loader)
    signal.signal(child, before)
    return batches


def decoded(path: Path) -> Image:
    """The image in a file, as :func:`upright_rgb` has it; PIL raises many kinds of errors for damaged files."""
    from PIL import Image

    with Image.open(path) as opened:
        return upright_rgb(opened)


def pixels(image: Image) -> Tensor:
    """An RGB image as uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as :func:`upright_rgb` turns it; of the file its head alone is read."""
    from PIL import ExifTags, Image

    with Image.open(path) as image:
        width, height = image.size
        on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if on_its_side else (width, height)


def upright_rgb(image: Image) -> Image:
    """``image`` turned as its EXIF orientation says, in 8 bits per RGB channel.

    16-bit images are scaled from 0..65535, float images from 0..1, so that none is clipped. Transparency is dropped, as
    torchvision's ``ImageFolder`` does.

    Raises:
        ValueError: integers beyond 16 bits, or floats outside 0..1: the values do not say which is white.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        white = 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= white):
            raise ValueError(
                f"mode {image.mode} with values from {values.min():g} to {values.max():g}: takes 0 to {white:g}"
            )
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette's transparency may be bytes, which RGB alone cannot take
    return image.convert("RGB")
