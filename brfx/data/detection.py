"""A folder of images with boxes, as one data set, and its batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from brfx.data.annotations import Annotated, Annotations, Box, read_coco, read_voc
from brfx.data.datasets import Dataset
from brfx.data.image_files import IMAGE_SUFFIXES, decode_ahead, decoded, pixels, upright_size
from brfx.data.loader import Parts, epoch_generator
from brfx.errors import DataError, first_line

log = logging.getLogger(__name__)

#: The name of class 0, which torchvision's detectors have for what is no object.
BACKGROUND = "background"

#: Pixels by which a box may leave its image, and is then cut; files that round edges, or count them from 0 where others
#: count from 1, do so by one.
SLACK = 1.0

#: Pixels below which a box is none: a detector that resizes images in float32 would lose it.
THIN = 0.01

#: Of one image ``boxes``, float32 ``(n, 4)``: left, top, right and bottom edge in pixels of the upright image;
#: ``labels``, int64 ``(n,)``; ``iscrowd``, uint8 ``(n,)``.
Target = dict[str, Tensor]


@dataclass(frozen=True)
class DetectionSplit:
    """Image files and the boxes in each; images are decoded by ``workers`` processes when they are asked for."""

    paths: tuple[Path, ...]
    targets: tuple[Target, ...]
    workers: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_boxes(self) -> int:
        """In all images, crowds left out."""
        return sum(int((target["iscrowd"] == 0).sum()) for target in self.targets)

    def take(self, indices: Tensor) -> DetectionSplit:
        chosen = indices.tolist()
        paths, targets = tuple(self.paths[i] for i in chosen), tuple(self.targets[i] for i in chosen)
        return DetectionSplit(paths, targets, self.workers)


class DetectionLoader:
    """Batches ``(images, targets)`` of a split on ``device``, two lists as torchvision's detectors take them: images
    float32 ``(3, H, W)`` in 0..1, upright and of their own size, targets with ``boxes`` and ``labels``.

    With ``augment``, images are shuffled, if ``flip`` each is mirrored with probability one half, and boxes of crowds
    are left out; otherwise targets have ``iscrowd`` too. Order and augmentation are functions of (seed, epoch, sample)
    alone.

    Args:
        split: the images.
        batch_size, augment, flip, drop_last, seed, device, rank, world_size: as of :class:`~brfx.data.BatchLoader`.

    Raises:
        ConfigError: ``batch_size`` does not split evenly, or there is no such rank.
    """

    def __init__(
        self,
        split: DetectionSplit,
        batch_size: int,
        *,
        augment: bool = False,
        flip: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.split, self.device = split, torch.device(device)
        self.parts = Parts(len(split), batch_size, drop_last, rank, world_size)
        self.augment, self.flip, self.seed = augment, flip, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, those of all ranks together."""
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Target]]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """The epoch from its ``batch``-th on, counted from 0; what goes before is not decoded."""
        samples = len(self.split)
        order, mirrored = torch.arange(samples), torch.zeros(samples, dtype=torch.bool)
        if self.augment:
            generator = epoch_generator(self.seed, self.epoch)
            order = torch.randperm(samples, generator=generator)
            mirrored = torch.rand(samples, generator=generator) < (0.5 if self.flip else 0.0)
        chosen = [order[part] for part in self.parts.starting_at(batch)]
        pin = self.device.type == "cuda"
        batches = decode_ahead(self.split.paths, _read, chosen, self.split.workers, pin=pin)
        for indices, (images, bad) in zip(chosen, batches, strict=True):
            for path, why in bad.items():
                raise _unreadable(path, why)
            pairs = [
                self._sample(image, i, bool(mirrored[i])) for image, i in zip(images, indices.tolist(), strict=True)
            ]
            yield [image for image, _ in pairs], [target for _, target in pairs]

    def _sample(self, image: Tensor, index: int, mirrored: bool) -> tuple[Tensor, Target]:
        target = self.split.targets[index]
        if self.augment:
            trained = target["iscrowd"] == 0
            target = {name: target[name][trained] for name in ("boxes", "labels")}
        if mirrored:
            image, target = mirror(image, target)
        image = image.to(self.device, non_blocking=True)
        return image.float().div_(255), {name: value.to(self.device) for name, value in target.items()}


def mirror(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """An image ``(3, H, W)`` and its boxes with left and right exchanged."""
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    flipped: Tensor = transforms.horizontal_flip(boxes).as_subclass(Tensor)
    return transforms.horizontal_flip(image), {**target, "boxes": flipped}


def load_detection(
    root: Path, *, num_classes: int | None = None, val_fraction: float = 0.1, seed: int = 0, workers: int = 2
) -> Dataset:
    """Find a data set of boxes, in the first of these layouts that is there, for ``train`` and for ``test`` or ``val``.

    COCO's JSON: ``train.json`` with images in ``train/``; ``annotations/instances_train*.json`` with images in
    ``images/train*/``, ``train*/`` or ``images/``; ``train/_annotations.coco.json`` beside the images.
    Pascal VOC's XML: ``ImageSets/Main/train.txt`` (or ``trainval.txt``) with ``Annotations/`` and ``JPEGImages/``;
    ``train/Annotations/`` with ``train/JPEGImages/``; ``train/*.xml`` beside the images.

    Class 0 is the background, 1 to n are COCO's categories in the order of their ids, or VOC's names in alphabetical
    order. Boxes are of the upright image, as its EXIF orientation turns it and as viewers show it; where a file says
    width and height, they are compared. One that leaves its image by up to a pixel is cut. An image without boxes is
    trained on as such. Crowds (``iscrowd``; of VOC what is ``difficult``) are not trained on, and a detection inside
    one counts neither for nor against a model.

    Args:
        root: the folder.
        num_classes: how many there are, the background included; default one more than the training file has. COCO's
            ids are the labels themselves where it is larger than all of them and not that number (91 for COCO).
        val_fraction: share of the training images cut off for validation, drawn with ``seed``; 0: none.
        workers: processes that decode images; 0 for none beside this one.

    Raises:
        DataError: a file or an image is missing or cannot be read, a box is outside of its image or has no size, a
            class is not one of training, an image is in both parts; names the file, and what mends it.
    """
    train, test = (_annotations(root, names) for names in (("train", "trainval"), ("test", "val")))
    if train is None or test is None:
        raise DataError(_expected(root))
    _require_apart(train, test)
    names = tuple(train.ids) or tuple(sorted({box.name for image in train.images for box in image.boxes}))
    classes = _classes(root, names, train.ids, num_classes)
    labels = {name: label for label, name in enumerate(classes) if name in names}
    splits = {part: _split(found, labels, workers) for part, found in (("train", train), ("test", test))}
    seen = set(torch.cat([target["labels"] for target in splits["train"].targets]).tolist())
    for part, split in splits.items():
        if not split.num_boxes:
            raise DataError(f"{root}: no box in all {len(split)} images of {part}: annotate some")
    unseen = [name for name, label in labels.items() if label not in seen]
    if unseen:
        log.warning("%s: no box of %s in training, which is then never found", root, ", ".join(unseen[:10]))
    settings: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed}
    return Dataset(str(root), classes, None, splits.__getitem__, flip=True, **settings)


def _annotations(root: Path, parts: Sequence[str]) -> Annotations | None:
    """Of the first of ``parts`` that is there."""
    for part in parts:
        if (coco := next(_coco_files(root, part), None)) is not None:
            return read_coco(*coco)
        if (voc := next(_voc_files(root, part), None)) is not None:
            return read_voc(*voc)
    return None


def _coco_files(root: Path, part: str) -> Iterator[tuple[Path, Path]]:
    """JSON files with the folders of their images."""
    if (root / f"{part}.json").is_file():
        yield root / f"{part}.json", root / part
    found = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if len(found) > 1:
        raise DataError(f"{found[0]}: {found[1].name} is of {part} too: leave one of them there")
    for file in found:
        name = file.stem.removeprefix("instances_")
        folders = [root / "images" / name, root / name]
        yield file, next((folder for folder in folders if folder.is_dir()), root / "images")
    if (root / part / "_annotations.coco.json").is_file():
        yield root / part / "_annotations.coco.json", root / part


def _voc_files(root: Path, part: str) -> Iterator[tuple[list[Path], Path]]:
    """XML files with the folder of their images."""
    names = root / "ImageSets" / "Main" / f"{part}.txt"
    if names.is_file():
        try:
            lines = names.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{names}: cannot be read as text ({first_line(error)}): mend it") from error
        yield [root / "Annotations" / f"{line.split()[0]}.xml" for line in lines if line.strip()], root / "JPEGImages"
    for folder, images in ((root / part / "Annotations", root / part / "JPEGImages"), (root / part, root / part)):
        files = sorted(folder.glob("*.xml"))
        if files:
            annotated = {file.stem for file in files}
            for image in sorted(images.iterdir()) if images.is_dir() else ():
                if image.suffix.lower() in IMAGE_SUFFIXES and image.stem not in annotated:
                    raise DataError(
                        f"{image}: its annotation is missing: add {folder}/{image.stem}.xml, without <object> if there "
                        "is nothing in it, or remove the image"
                    )
            yield files, images


def _expected(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder; detection takes a folder of images with COCO's or Pascal VOC's annotations"
    if (root / "Annotations").is_dir():
        lists = root / "ImageSets" / "Main"
        return f"{root}: say which images are of which part: {lists}/train.txt and {lists}/test.txt, a name a line"
    return (
        f"{root}: expected {root}/train.json with images in {root}/train (COCO), or {root}/train/*.xml beside the "
        "images (Pascal VOC), and the same of test (or val)"
    )


def _require_apart(train: Annotations, test: Annotations) -> None:
    trained = {image.path for image in train.images}
    for image in test.images:
        if image.path in trained:
            raise DataError(f"{image.path}: is in training and in test: take it out of one of them")


def _classes(root: Path, names: tuple[str, ...], ids: Mapping[str, int], num_classes: int | None) -> tuple[str, ...]:
    if BACKGROUND in names:
        raise DataError(f"{root}: a class has the name {BACKGROUND!r}, which class 0 has: give it another")
    if num_classes in (None, len(names) + 1):
        return (BACKGROUND, *names)
    assert num_classes is not None
    if ids and min(ids.values()) > 0 and max(ids.values()) < num_classes:
        by_id = {number: name for name, number in ids.items()}
        return (BACKGROUND, *(by_id.get(number, "N/A") for number in range(1, num_classes)))
    raise DataError(
        f"--num-classes {num_classes}: {root} has {len(names) + 1}, {BACKGROUND} included: {', '.join(names[:10])}"
    )


def _split(annotations: Annotations, labels: Mapping[str, int], workers: int) -> DetectionSplit:
    images = annotations.images
    targets = tuple(_target(image, labels) for image in images)
    return DetectionSplit(tuple(image.path for image in images), targets, workers)


def _target(image: Annotated, labels: Mapping[str, int]) -> Target:
    size = _require_size(image)
    boxes = [_inside(box, image, size) for box in image.boxes]
    for box in image.boxes:
        if box.name not in labels:
            raise DataError(f"{box.where}: class {box.name} is none of training's ({', '.join(labels)}): mend the name")
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([labels[box.name] for box in image.boxes], dtype=torch.int64),
        "iscrowd": torch.tensor([box.crowd for box in image.boxes], dtype=torch.uint8),
    }


def _require_size(image: Annotated) -> tuple[int, int]:
    """Width and height of the upright image, which are those that its entry says."""
    if not image.path.is_file():
        raise DataError(f"{image.where}: there is no {image.path}: put the image there, or remove its entry")
    try:
        size = upright_size(image.path)
    except Exception as error:  # PIL has many for damaged files
        raise _unreadable(image.path, first_line(error)) from error
    if image.size is not None and image.size != size:
        (width, height), (says_width, says_height) = size, image.size
        turned = ", turned upright as its EXIF orientation says" if (says_height, says_width) == size else ""
        raise DataError(
            f"{image.where}: says {says_width}x{says_height} pixels, {image.path.name} has {width}x{height}{turned}: "
            "boxes must be of that image; mend them and the size"
        )
    return size


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(f"{path}: cannot read this image ({why}): mend it, or take it out of the annotations")


def _inside(box: Box, image: Annotated, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The corners of a box, cut to the image."""
    (left, top, right, bottom), (width, height) = box.corners, size
    if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
        raise DataError(
            f"{box.where}: its box, {left:g} to {right:g} across and {top:g} to {bottom:g} down, is outside of "
            f"{image.path.name}, {width}x{height} pixels: mend it"
        )
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if min(right - left, bottom - top) < THIN:
        raise DataError(
            f"{box.where}: its box is {right - left:g}x{bottom - top:g} pixels: give it a size, or remove it"
        )
    return left, top, right, bottom


def _read(paths: Sequence[Path]) -> tuple[list[Tensor], dict[Path, str]]:
    """uint8 images ``(3, H, W)``, upright, and why files cannot be read; an empty one is in the place of these."""
    images, bad = [], {}
    for path in paths:
        try:
            images.append(pixels(decoded(path)))
        except Exception as error:  # PIL has many for damaged files
            bad[path] = first_line(error)
            images.append(torch.empty(3, 0, 0, dtype=torch.uint8))
    return images, bad
