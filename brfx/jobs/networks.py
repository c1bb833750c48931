"""The float networks of a job: its own, from a checkpoint, and a teacher."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from torch import nn

from brfx.config import JobConfig
from brfx.data import Dataset, Preprocessing
from brfx.errors import ConfigError, DataError
from brfx.hubs import hub_transform, hub_weights
from brfx.io.float_checkpoint import load_float, read_about
from brfx.io.torch_file import require_file
from brfx.jobs.data import tell_of_other_images
from brfx.jobs.tasks import task_of
from brfx.models import (
    CIFAR_RESNETS,
    build_model,
    published_as,
    published_names,
    published_weights,
    require_model,
)

log = logging.getLogger(__name__)


def input_channels(model: nn.Module) -> int:
    """Of the images that ``model`` takes: 3, unless its first convolution says 1, 2 or 4."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return first if first in (1, 2, 4) else 3


def float_model(
    job: JobConfig, dataset: Dataset, ckpt: Path | None, *, new_head: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """The FP32 model of a job, for the data's classes, with the checkpoint's weights if there is one; and the
    parameters that the checkpoint has for other classes, where ``new_head`` lets these stay as initialized."""
    model = build_model(job.model, _class_count(job, dataset), cifar_stem=job.cifar_stem)
    head: tuple[str, ...] = ()
    if ckpt is not None:
        head = load_float(model, ckpt, key=job.ckpt_key, new_head=new_head)
        classes = read_about(ckpt).get("classes")
        if not head and classes is not None and tuple(classes) != dataset.classes:
            log.warning("%s knows other classes (%s ...), whose outputs it begins with", ckpt, ", ".join(classes[:3]))
        _compare_normalization(job.model, model, ckpt, dataset.preprocessing)
    task_of(job).require(model, job.model, dataset)
    return model, head


def _class_count(job: JobConfig, dataset: Dataset) -> int:
    if job.num_classes not in (None, len(dataset.classes)):
        raise DataError(f"--num-classes {job.num_classes}, but {dataset.name} has {len(dataset.classes)} classes")
    return len(dataset.classes)


def required_checkpoint(job: JobConfig) -> Path:
    if job.ckpt is None:
        where = where_published(job.model)
        raise ConfigError(f"quantize starts from an FP32 checkpoint: --ckpt FILE (`brfx train` makes one{where})")
    return job.ckpt


def with_checkpoint(job: JobConfig) -> JobConfig:
    """``job`` with the file of torchvision's weights where its ``ckpt`` is their name, and with that of the weights in
    a Hugging Face folder where it has none."""
    if job.ckpt is not None:
        return replace(job, ckpt=_found_checkpoint(job.model, job.ckpt))
    found = hub_weights(job.model)
    if found is not None and job.command != "inspect":
        log.info("Starting from %s", found)
        return replace(job, ckpt=found)
    return job


def _found_checkpoint(model: str, ckpt: Path) -> Path:
    """``ckpt``, or, where that is the word ``torchvision`` or the name of torchvision's weights of ``model``, such as
    ``IMAGENET1K_V1``, their file.

    Raises:
        ConfigError: torchvision has none, or they are not on disk; nothing is downloaded.
        CheckpointError: there is no such file.
    """
    name = str(ckpt)
    if name != "torchvision" and (ckpt.exists() or name not in published_names(model)):
        require_file(ckpt)
        return ckpt
    require_model(model)
    published = published_weights(model, "DEFAULT" if name == "torchvision" else name)
    if published is None:
        raise ConfigError(f"torchvision has no weights of {model}: give a FILE")
    if not published.path.is_file():
        raise ConfigError(
            f"torchvision's weights of {model} are not at {published.path}: get them from {published.url}"
        )
    return published.path


def where_published(model: str) -> str:
    """Where torchvision's weights of ``model`` are, as the end of a sentence; empty if there are none."""
    published = published_weights(model)
    if published is None:
        return ""
    if published.path.is_file():
        return "; torchvision's are on disk: --ckpt torchvision"
    return f"; torchvision's are at {published.url}"


def _compare_normalization(name: str, model: nn.Module, ckpt: Path, preprocessing: Preprocessing | None) -> None:
    """Warn where weights that come with a mean and a std get images of others."""
    if preprocessing is None:
        return
    published = published_as(name, ckpt)
    if published is not None:
        all_wanted = published.normalization(model)
    elif ckpt == hub_weights(name) and (transform := hub_transform(name)) is not None:
        all_wanted = transform["mean"], transform["std"]
    else:
        return
    for flag, wanted, given in zip(("mean", "std"), all_wanted, (preprocessing.mean, preprocessing.std), strict=True):
        if wanted is not None and wanted != tuple(given):
            values = ",".join(f"{value:g}" for value in wanted)
            log.warning("%s was trained on images of another %s: --%s %s", ckpt, flag, flag, values)


def require_trained_teacher(job: JobConfig, head: tuple[str, ...]) -> None:
    """A head made anew has learned nothing, so no network with it is distilled from."""
    if head and job.train.distill and job.teacher is None:
        raise ConfigError(
            f"--distill {job.train.distill:g}: {job.ckpt} is of other classes, so there is no FP32 network to distill "
            f"from: `brfx train --model {job.model} --ckpt {job.ckpt}` first, or give --teacher NAME=FILE"
        )


def teacher_of(job: JobConfig, dataset: Dataset, model: nn.Module) -> nn.Module | None:
    """What is distilled from: the network that ``--teacher`` names, or else ``model``, the student's own in FP32.

    It sees the student's images, and has a small stem where the student does (the CIFAR ResNets have no other).
    """
    if not job.train.distill:
        return None
    if job.teacher is None:
        return model
    name, _, file = job.teacher.partition("=")
    require_model(name)
    teacher = build_model(name, len(dataset.classes), cifar_stem=job.cifar_stem and name not in CIFAR_RESNETS)
    path = _found_checkpoint(name, Path(file))
    load_float(teacher, path, named_by="--teacher")
    content = read_about(path).get("preprocessing")
    tell_of_other_images(path, content and Preprocessing.from_dict(content), dataset.preprocessing)
    task_of(job).require(teacher, name, dataset)
    return teacher
