"""Images of a job: which there are, how a model sees them, and their batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from brfx.config import Augmentation, JobConfig
from brfx.data import DEFAULTS, BatchLoader, Dataset, DetectionLoader, Preprocessing, with_overrides
from brfx.distributed import rank, world_size
from brfx.errors import DataError
from brfx.hubs import hub_transform, is_hub_model
from brfx.io.float_checkpoint import read_about
from brfx.jobs.tasks import augmentation_of, task_of
from brfx.models import CIFAR_RESNETS, build_model, published_as
from brfx.train import Callback
from brfx.train.loop import Batches
from brfx.train.report import Told
from brfx.train.tasks import to_device

log = logging.getLogger(__name__)

#: Training batches that sensitivities are measured on, unless another number is given.
BATCHES = 4


def read_data(job: JobConfig, preprocessing: Preprocessing | None = None) -> Dataset:
    """The data set of a job; where none is named, the model's own.

    Images go through what the settings say, and else through ``preprocessing``; where there is none, through what a
    named data set has, or what the model wants.
    """
    source = job.data or _own_dataset(job.model)
    default = preprocessing or DEFAULTS.get(source) or own_preprocessing(job)
    return task_of(job).read(job, source, _with_settings(job, default))


def _with_settings(job: JobConfig, preprocessing: Preprocessing) -> Preprocessing:
    given = {name: getattr(job, name) for name in (field.name for field in fields(Preprocessing))}
    return with_overrides(preprocessing, **given)


def stored_preprocessing(job: JobConfig) -> Preprocessing | None:
    """What the checkpoint's own run trained it on, where brfx wrote it; a log line where the settings differ."""
    content = None if job.ckpt is None else read_about(job.ckpt).get("preprocessing")
    if content is None:
        return None
    stored = Preprocessing.from_dict(content)
    tell_of_other_images(job.ckpt, stored, _with_settings(job, stored))
    return stored


def tell_of_other_images(ckpt: Path | None, stored: Preprocessing | None, seen: Preprocessing | None) -> None:
    if stored is not None and seen != stored:
        log.warning("%s was trained on images of %s, and sees %s", ckpt, stored, seen)


def own_preprocessing(job: JobConfig) -> Preprocessing:
    """What the model wants: as it or its published weights come with it, else of its size."""
    published = published_preprocessing(job)
    return published or Preprocessing(own_image_size(job.model), stretch=task_of(job).stretch)


def published_preprocessing(job: JobConfig) -> Preprocessing | None:
    """What comes with the model or its published weights, if anything does."""
    if is_hub_model(job.model):
        found = hub_transform(job.model)
        return None if found is None else Preprocessing.from_dict(found)
    published = None if job.ckpt is None else published_as(job.model, job.ckpt)
    if published is None or published.transform is None:
        return None
    with torch.device("meta"):
        mean, std = published.normalization(build_model(job.model))
    return Preprocessing.from_dict(published.transform | {"mean": mean, "std": std})


def data_line(job: JobConfig, dataset: Dataset) -> str:
    """What a run trains on: images of each split, classes, the transform and the augmentation."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    counts = ", ".join(f"{len(_limited(job, split)):,} {name}" for name, split in splits.items())
    classes = ", ".join(dataset.classes[:4]) + (" ..." if len(dataset.classes) > 4 else "")
    seen = "" if dataset.preprocessing is None else f"{dataset.preprocessing}, "
    augmentation = augmentation_of(job, dataset.preprocessing, flip=dataset.flip)
    return (
        f"{dataset.name}: {counts} images of {len(dataset.classes)} classes ({classes}), {seen}augmentation "
        f"{augmentation}"
    )


def _own_dataset(model: str) -> str:
    if model in CIFAR_RESNETS:
        return "cifar10"
    raise DataError(
        f"{model or 'this model'} has no data set of its own: give one with --data DIR (or digits, cifar10, cifar100)"
    )


def own_image_size(model: str) -> int:
    return 32 if model in CIFAR_RESNETS else 224


def example_batch(job: JobConfig, dataset: Dataset, count: int) -> Any:
    """The first images of validation, or of training where there is none, as the model sees them."""
    split = dataset.val if len(dataset.val) else dataset.train
    return next(iter(task_of(job).loader(split, dataset.preprocessing, count)))[0]


Loader = BatchLoader | DetectionLoader


def train_and_val_loaders(
    job: JobConfig, dataset: Dataset, callbacks: Iterable[Callback] = ()
) -> tuple[Loader, Batches | None]:
    """Of training, this process's part of each batch, and, unless every image is trained on, of validation, which tells
    ``callbacks`` of its batches."""
    augment = augmentation_of(job, dataset.preprocessing, flip=dataset.flip)
    train = _train_loader(job, dataset, augment, rank=rank(), world_size=world_size())
    loader = task_of(job).loader
    if not job.val_fraction:
        return train, None
    val = loader(_limited(job, dataset.val), dataset.preprocessing, job.batch_size, device=job.train.device)
    return train, Told(val, callbacks, "validating")


def calibration_loader(job: JobConfig, dataset: Dataset) -> Loader:
    """Of whole training batches, whose images are cropped and mirrored as in training, and not changed otherwise."""
    augment = augmentation_of(job, dataset.preprocessing, flip=dataset.flip)
    return _train_loader(job, dataset, Augmentation(crop=augment.crop, flip=augment.flip))


def training_images(job: JobConfig, dataset: Dataset, batches: int = BATCHES) -> list[Any]:
    """Some training batches as one process sees them, on the device."""
    loader = calibration_loader(job, dataset)
    return [to_device(images, job.train.device) for images, _ in islice(iter(loader), batches)]


def _train_loader(job: JobConfig, dataset: Dataset, augment: Augmentation, **part: int) -> Loader:
    split = _limited(job, dataset.train)
    return task_of(job).loader(
        split,
        dataset.preprocessing,
        job.batch_size,
        augment=augment,
        drop_last=len(split) >= job.batch_size,
        seed=job.train.seed,
        device=job.train.device,
        num_classes=len(dataset.classes),
        **part,
    )


def test_loader(job: JobConfig, dataset: Dataset, callbacks: Iterable[Callback] = ()) -> Batches:
    split = _limited(job, dataset.test)
    loader = task_of(job).loader(split, dataset.preprocessing, job.batch_size, device=job.train.device)
    return Told(loader, callbacks, "evaluating on test images")


def _limited(job: JobConfig, split: Any) -> Any:
    """``split``, or as many of its images as ``limit_batches`` has: from all over it, where classes are in order."""
    if job.limit_batches is None or len(split) <= job.limit_batches * job.batch_size:
        return split
    count = job.limit_batches * job.batch_size
    return split.take(torch.arange(count) * len(split) // count)
