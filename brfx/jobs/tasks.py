"""What of a job depends on its task: the data that it reads, how it is trained, and the models that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn
from torch.nn import functional as F

from brfx.config import Augmentation, JobConfig, listed_class_weights
from brfx.data import (
    BatchLoader,
    Dataset,
    DetectionLoader,
    DetectionSplit,
    Preprocessing,
    load_dataset,
    load_detection,
    load_segmentation,
)
from brfx.data.segmentation import IGNORED
from brfx.errors import ConfigError, DataError, first_line
from brfx.hubs import hub_task, is_hub_model
from brfx.models import CIFAR_RESNETS, model_names
from brfx.modes import eval_mode
from brfx.train.tasks import Task, classification, detection, pixel_logits, segmentation


@dataclass(frozen=True)
class JobTask:
    """A task of the command line.

    Attributes:
        model: what a model of the task is called.
        read: ``read(job, source, preprocessing)``, the data set.
        loader: ``loader(split, preprocessing, batch_size, ..)``, batches as :class:`~brfx.data.BatchLoader` gives them.
        of: the task for so many classes, and how much each counts in the loss.
        require: ``require(model, name, dataset)``, which raises ConfigError or DataError unless the model is one for
            the data's classes and images.
        crop: ``crop(preprocessing)``, how training images are cropped unless something else is wanted.
        stretch: whether pictures are stretched to the model's square unless something else is wanted.
        refused: ``refused(job)``, flags that were given and that this task has no use for, each with the reason.
        no_onnx: why no ``model.onnx`` is written; ``None``: one is.
    """

    model: str
    read: Callable[[JobConfig, str, Preprocessing], Dataset]
    loader: Callable[..., BatchLoader | DetectionLoader]
    of: Callable[[int, Sequence[float] | None], Task]
    require: Callable[[nn.Module, str, Dataset], None]
    crop: Callable[[Any], str]
    stretch: bool = False
    refused: Callable[[JobConfig], dict[str, str]] = lambda job: {}
    no_onnx: str | None = None


def task_of(job: JobConfig) -> JobTask:
    """The task that ``--task`` names, or else the model's own.

    Raises:
        ConfigError: the model is of a task that the command line does not train, or a flag is not for the task.
    """
    own = _own_task(job.model)
    task = TASKS[job.task or own]
    for flag, why in task.refused(job).items():
        raise ConfigError(f"{flag} is not for a {task.model}: {why}")
    return task


#: Where torchvision has models that the command line does not train: what they are, and what to train them with.
_OTHERS = {
    ".keypoint_rcnn": (
        "a keypoint detector",
        "task=brfx.train.detection(), targets that have keypoints, and channels_last=False, as its loss wants it",
    ),
    ".mask_rcnn": ("a detector of boxes and masks", "task=brfx.train.detection() and targets that have masks"),
    ".optical_flow.": ("an optical flow model", "a loss= and a metric= of your own"),
    ".video.": ("a video classifier", "batches of clips"),
}


#: Above so many pixels a side, training images of classifiers are crops of the whole picture unless told otherwise.
SHIFTED = 64


def augmentation_of(job: JobConfig, preprocessing: Preprocessing | None, *, flip: bool = True) -> Augmentation:
    """How training images are varied; ``flip`` is the data set's own."""
    return job.augmentation(task_of(job).crop(preprocessing), flip=flip)


def class_weights(job: JobConfig, dataset: Dataset) -> tuple[float, ...] | None:
    """``--class-weights`` as numbers of mean 1 over the training images, or over the pixels of their masks.

    Raises:
        DataError: they are not as many as the classes, or no training image is of a class that counts.
    """
    if job.class_weights is None:
        return None
    labels = dataset.train.labels.flatten()
    counts = torch.bincount(labels[labels != IGNORED].long() if labels.dtype == torch.uint8 else labels)
    counts = F.pad(counts, (0, len(dataset.classes) - len(counts))).double()
    given = listed_class_weights(job.class_weights)
    weights = 1 / counts.clamp(min=1) if given is None else torch.tensor(given, dtype=torch.float64)
    if len(weights) != len(counts):
        raise DataError(f"--class-weights has {len(weights)} numbers, {dataset.name} has {len(counts)} classes")
    total = float((weights * counts).sum())
    if not total:
        raise DataError(f"--class-weights {job.class_weights}: no training image of {dataset.name} would count")
    return tuple((weights * counts.sum() / total).tolist())


def training_task(job: JobConfig, dataset: Dataset) -> Task:
    """The job's task for the data's classes, as :func:`brfx.fit` and :func:`brfx.evaluate` take it."""
    return task_of(job).of(len(dataset.classes), class_weights(job, dataset))


def _own_task(model: str) -> str:
    if is_hub_model(model):
        return hub_task(model)
    if model in CIFAR_RESNETS or model not in model_names():
        return "classification"
    home: str = torchvision.models.get_model_builder(model).__module__
    for part, (what, instead) in _OTHERS.items():
        if part in home:
            trained = "classifiers, segmenters and detectors of boxes"
            raise ConfigError(f"{model} is {what}: the command line trains {trained}; use brfx.fit with {instead}")
    return next((task for task in ("detection", "segmentation") if f".{task}." in home), "classification")


def _read_classes(job: JobConfig, source: str, preprocessing: Preprocessing) -> Dataset:
    train, boxes = Path(source) / "train", Path(source) / "train.json"
    if boxes.is_file():
        raise DataError(f"{boxes}: has boxes of the images in {train}, not a folder a class: add --task detection")
    if train.is_dir() and {path.name for path in train.iterdir() if path.is_dir()} == {"images", "masks"}:
        raise DataError(f"{train}: has images/ and masks/, not a folder a class: add --task segmentation")
    return load_dataset(
        source,
        data_dir=job.data_dir,
        preprocessing=preprocessing,
        download=job.download,
        val_fraction=job.val_fraction,
        seed=job.train.seed,
        workers=job.workers,
        skip_bad_images=job.skip_bad_images,
        decode_once=augmentation_of(job, preprocessing).crop != "resized",
    )


def _read_masks(job: JobConfig, source: str, preprocessing: Preprocessing) -> Dataset:
    settings: dict[str, Any] = {"val_fraction": job.val_fraction, "seed": job.train.seed}
    return load_segmentation(Path(source), preprocessing, num_classes=job.num_classes, **settings)


def _read_boxes(job: JobConfig, source: str, preprocessing: Preprocessing) -> Dataset:
    settings: dict[str, Any] = {"val_fraction": job.val_fraction, "seed": job.train.seed, "workers": job.workers}
    return load_detection(Path(source), num_classes=job.num_classes, **settings)


def _box_batches(
    split: DetectionSplit,
    preprocessing: None,
    batch_size: int,
    *,
    augment: Augmentation | None = None,
    num_classes: int = 0,
    **settings: Any,
) -> DetectionLoader:
    """Of what mAP50 is measured on there must be a box; detectors preprocess images themselves."""
    if not augment and not split.num_boxes:
        raise DataError(
            f"mAP50 needs a box: there is none in {len(split)} images: raise --val-fraction, --limit-batches"
        )
    flip = augment is not None and augment.flip
    return DetectionLoader(split, batch_size, augment=augment is not None, flip=flip, **settings)


#: Settings of the evaluation transform, and of what training does to images beyond cropping and mirroring them.
TRANSFORM = ("image_size", "mean", "std", "resize", "stretch", "interpolation", "channel_order", "divisor")
VARIATION = ("rand_augment", "mixup", "cutmix", "erasing")


def _not_for_detectors(job: JobConfig) -> dict[str, str]:
    own, undistilled, train = "it resizes and normalizes images itself", "nothing can be distilled into it", job.train
    losses, mirrored = "its losses are its own", "its images are mirrored alone"
    given = {
        **{f"--{name.replace('_', '-')}": (getattr(job, name) is not None, own) for name in TRANSFORM},
        "--crop": (job.crop is not None, mirrored),
        **{f"--{name.replace('_', '-')}": (getattr(job, name) > 0, mirrored) for name in VARIATION},
        "--class-weights": (job.class_weights is not None, losses),
        "--label-smoothing": (train.label_smoothing, losses),
        "--teacher": (job.teacher is not None, undistilled),
        "--distill": (train.distill, undistilled),
        f"--compile {train.compile}": (train.compile in ("on", "kernels"), "a batch of it is no one graph"),
        "--skip-bad-images": (job.skip_bad_images, "take such images out of the annotations"),
    }
    return {flag: why for flag, (is_given, why) in given.items() if is_given}


def _require_logits(logits: Callable[[Any], torch.Tensor | None], kind: str) -> Callable[..., None]:
    """What raises unless a model gives ``logits``, ``(batch, classes, ...)`` in its output, for the data's classes."""

    def require(model: nn.Module, name: str, dataset: Dataset) -> None:
        assert dataset.preprocessing is not None
        size, channels = dataset.preprocessing.image_size, dataset.preprocessing.channels
        try:
            with eval_mode(model), torch.no_grad():
                output: Any = model(torch.zeros(2, channels, size, size))
        except Exception as error:
            raise ConfigError(
                f"{name} does not run on images of {channels}x{size}x{size} ({first_line(error)}); see --image-size, "
                "and --mean, whose numbers are the channels: three for colour or one for grey"
            ) from error
        found = logits(output)
        if found is None:
            raise ConfigError(
                f"{name} is no {kind} (its output is a {type(output).__name__}): the command line trains classifiers, "
                "segmenters and detectors (--task); use brfx.fit with a loss= and a metric= of your own"
            )
        if found.shape[1] != len(dataset.classes):
            raise DataError(f"{name} has {found.shape[1]} classes, {dataset.name} has {len(dataset.classes)}")

    return require


def _require_detector(model: nn.Module, name: str, dataset: Dataset) -> None:
    """Raise ConfigError unless a copy of ``model`` gives losses of the last class in training, and boxes in eval."""
    images, _ = next(iter(DetectionLoader(dataset.train.take(torch.zeros(2, dtype=torch.long)), 2)))
    height, width = images[0].shape[1:]
    target = {"boxes": torch.tensor([[0.0, 0.0, width, height]]), "labels": torch.tensor([len(dataset.classes) - 1])}
    detector = deepcopy(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            losses: Any = detector.train()(images, [target, target])
            found: Any = detector.eval()(images)
    except Exception as error:
        raise ConfigError(
            f"{name} does not train as a detector ({first_line(error)}): it takes a list of images and one of targets, "
            f"as torchvision's do, and {len(dataset.classes)} classes, the background included"
        ) from error
    if not isinstance(losses, Mapping) or not isinstance(found, list) or not all("boxes" in of for of in found):
        what = f"a {type(losses).__name__} in training and a {type(found).__name__} in eval"
        raise ConfigError(f"{name} is no detector (it gives {what}, not losses and boxes by name): see --task")


def _class_logits(output: Any) -> torch.Tensor | None:
    return output if isinstance(output, torch.Tensor) and output.dim() == 2 else None


def _mask_logits(output: Any) -> torch.Tensor | None:
    found = pixel_logits(output) if not isinstance(output, dict) or "out" in output else None
    return found if isinstance(found, torch.Tensor) and found.dim() == 4 else None


TASKS = {
    "classification": JobTask(
        model="classifier",
        read=_read_classes,
        loader=BatchLoader,
        of=lambda classes, weights: classification(weights),
        require=_require_logits(_class_logits, "classifier"),
        crop=lambda preprocessing: "resized" if preprocessing.image_size > SHIFTED else "shift",
    ),
    "segmentation": JobTask(
        model="segmenter",
        read=_read_masks,
        loader=BatchLoader,
        of=lambda classes, weights: segmentation(classes, class_weights=weights),
        require=_require_logits(_mask_logits, "segmenter"),
        crop=lambda preprocessing: "shift",
        stretch=True,
        refused=lambda job: {"--skip-bad-images": "remove such images and their masks"} if job.skip_bad_images else {},
    ),
    "detection": JobTask(
        model="detector",
        read=_read_boxes,
        loader=_box_batches,
        of=lambda classes, weights: detection(),
        require=_require_detector,
        crop=lambda preprocessing: "none",
        refused=_not_for_detectors,
        no_onnx="a detector chooses its boxes in Python code, which no exporter takes (docs/export.md)",
    ),
}
