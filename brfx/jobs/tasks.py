"""What of a job depends on its task: the data that it reads, how it is trained, and the models that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn

from brfx.config import JobConfig
from brfx.data import Dataset, Preprocessing, load_dataset, load_segmentation
from brfx.errors import ConfigError, DataError
from brfx.models import CIFAR_RESNETS, model_names
from brfx.modes import eval_mode
from brfx.train.tasks import Task, classification, pixel_logits, segmentation


@dataclass(frozen=True)
class JobTask:
    """A task of the command line.

    Attributes:
        read: ``read(job, source, preprocessing)``, the data set.
        of: the task for so many classes.
        logits: the ``(batch, classes, ...)`` in a model's output, ``None`` where there are none.
        model: what a model of the task is called.
    """

    read: Callable[[JobConfig, str, Preprocessing], Dataset]
    of: Callable[[int], Task]
    logits: Callable[[Any], torch.Tensor | None]
    model: str

    def require(self, model: nn.Module, name: str, dataset: Dataset) -> None:
        """Raise ConfigError or DataError unless ``model`` gives logits for the data's classes and images."""
        size, channels = dataset.preprocessing.image_size, dataset.preprocessing.channels
        try:
            with eval_mode(model), torch.no_grad():
                output: Any = model(torch.zeros(2, channels, size, size))
        except Exception as error:
            first = (str(error).splitlines() or [repr(error)])[0]
            raise ConfigError(
                f"{name} does not run on images of {channels}x{size}x{size} ({first}); see --image-size, and --mean, "
                "whose numbers are the channels: three for colour or one for grey"
            ) from error
        logits = self.logits(output)
        if logits is None:
            raise ConfigError(
                f"{name} is no {self.model} (its output is a {type(output).__name__}): the command line trains "
                "classifiers and segmenters (--task); use brfx.fit with a loss= and a metric= of your own"
            )
        if logits.shape[1] != len(dataset.classes):
            raise DataError(f"{name} has {logits.shape[1]} classes, {dataset.name} has {len(dataset.classes)}")


def task_of(job: JobConfig) -> JobTask:
    """The task that ``--task`` names, or else the model's own.

    Raises:
        ConfigError: the model is of a task that the command line does not train.
    """
    return TASKS[job.task or _own_task(job.model)]


def _own_task(model: str) -> str:
    if model in CIFAR_RESNETS or model not in model_names():
        return "classification"
    home: str = torchvision.models.get_model_builder(model).__module__
    for part, what, instead in (
        (".detection.", "a detector", "task=brfx.train.detection()"),
        (".optical_flow.", "an optical flow model", "a loss= and a metric= of your own"),
    ):
        if part in home:
            raise ConfigError(
                f"{model} is {what}: the command line trains classifiers and segmenters; use brfx.fit with {instead}"
            )
    return "segmentation" if ".segmentation." in home else "classification"


def _read_classes(job: JobConfig, source: str, preprocessing: Preprocessing) -> Dataset:
    train = Path(source) / "train"
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
    )


def _read_masks(job: JobConfig, source: str, preprocessing: Preprocessing) -> Dataset:
    settings: dict[str, Any] = {"val_fraction": job.val_fraction, "seed": job.train.seed}
    return load_segmentation(Path(source), preprocessing, num_classes=job.num_classes, **settings)


def _class_logits(output: Any) -> torch.Tensor | None:
    return output if isinstance(output, torch.Tensor) and output.dim() == 2 else None


def _mask_logits(output: Any) -> torch.Tensor | None:
    found = pixel_logits(output) if not isinstance(output, dict) or "out" in output else None
    return found if isinstance(found, torch.Tensor) and found.dim() == 4 else None


TASKS = {
    "classification": JobTask(_read_classes, lambda classes: classification(), _class_logits, "classifier"),
    "segmentation": JobTask(_read_masks, segmentation, _mask_logits, "segmenter"),
}
