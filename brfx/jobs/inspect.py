"""What a job would do: the network layer by layer, and what the bits of each layer cost. Nothing is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from brfx.analysis.audit import Audit, audit
from brfx.analysis.network import Place, network
from brfx.config import JobConfig, code_file
from brfx.data import Preprocessing
from brfx.errors import ConfigError, DataError
from brfx.graph.trace import trace_islands
from brfx.io.float_checkpoint import load_float
from brfx.io.model_file import is_brfx_file
from brfx.jobs.bits import BitsReport, bits_within_budget, measure
from brfx.jobs.data import (
    BATCHES,
    data_line,
    example_batch,
    own_image_size,
    published_preprocessing,
    read_data,
    stored_preprocessing,
    train_and_val_loaders,
    training_images,
)
from brfx.jobs.files import load_built
from brfx.jobs.machine import require_device
from brfx.jobs.networks import float_model, input_channels, required_checkpoint, with_checkpoint
from brfx.jobs.tasks import task_of, training_task
from brfx.metadata import metadata_of
from brfx.models import ModelSource, build_model, example_inputs, require_model
from brfx.prepare import prepare_qat
from brfx.train import Callback
from brfx.train.batch_norm import small_batches_named
from brfx.train.loop import seed_everything
from brfx.train.report import Phase, tell
from brfx.train.tasks import call

log = logging.getLogger(__name__)


@torch.no_grad()
def dry_run_float(job: JobConfig, callbacks: Iterable[Callback] = ()) -> str:
    """What ``train_float`` would train, in a line, and the loss that it would begin with; nothing is written."""
    job, callbacks = with_checkpoint(job), tuple(callbacks)
    require_device(job.train.device)
    require_model(job.model)
    task_of(job)
    tell(callbacks, Phase("reading data"))
    dataset = read_data(job, stored_preprocessing(job))
    log.info(data_line(job, dataset))
    seed_everything(job.train.seed)
    model, _ = float_model(job, dataset, job.ckpt, new_head=not job.strict)
    task, (train_data, _) = training_task(job, dataset), train_and_val_loaders(job, dataset)
    if not len(train_data):
        raise DataError("there is no training batch: are there fewer images than --batch-size?")
    inputs, targets = task.split(next(iter(train_data)))
    with small_batches_named("training"):
        loss = float(task.loss(call(model.to(job.train.device).train(), inputs), targets))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{job.model}: {parameters:,} parameters, {job.train.epochs} epochs of {len(train_data):,} batches of "
        f"{job.batch_size}; before training, the loss of a batch is {loss:.4f}"
    )


def dry_run(job: JobConfig, callbacks: Iterable[Callback] = ()) -> Audit:
    """What ``quantize`` would train, layer by layer; nothing is written."""
    job, callbacks = with_checkpoint(job), tuple(callbacks)
    ckpt = required_checkpoint(job)
    require_device(job.train.device)
    tell(callbacks, Phase("reading data"))
    dataset = read_data(job, stored_preprocessing(job))
    log.info(data_line(job, dataset))
    model, head = float_model(job, dataset, ckpt, new_head=not job.strict)
    bits = bits_within_budget(job, model, dataset, head)
    job = job if bits is None else replace(job, qat=bits.qat)
    tell(callbacks, Phase("rewriting the model"))
    qmodel = prepare_qat(model, job.qat, example_batch(job, dataset, 2))
    return audit(qmodel, example_batch(job, dataset, 1))


def sensitivity(job: JobConfig, batches: int = BATCHES) -> BitsReport:
    """What each layer's bits cost alone, on so many training batches, and the bits that a budget gives; nothing is
    written."""
    job = with_checkpoint(job)
    ckpt = required_checkpoint(job)
    require_device(job.train.device)
    dataset = read_data(job, stored_preprocessing(job))
    model, _ = float_model(job, dataset, ckpt)
    qmodel = prepare_qat(model, job.qat, example_batch(job, dataset, 2)).to(job.train.device)
    return measure(job, qmodel, training_images(job, dataset, batches), training_task(job, dataset))


def inspect(job: JobConfig) -> Audit:
    """What runs quantized, and what not, of a run's ``model.pt``, or of ``--model`` as ``job.qat`` would rewrite it."""
    _, qmodel, example = _inspected(job)
    return audit(qmodel, *example)


def inspect_graphs(job: JobConfig) -> tuple[Audit, list[Place], list[Place]]:
    """:func:`inspect`, and the graphs of the model before and after it is rewritten."""
    model, qmodel, example = _inspected(job)
    found = audit(qmodel, *example)
    return found, network(trace_islands(model, metadata_of(qmodel).tracing).model), network(qmodel, found)


def _inspected(job: JobConfig) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """The float model, the rewritten one, and an example of its inputs."""
    job = with_checkpoint(job)
    if job.ckpt is not None and is_brfx_file(job.ckpt):
        qmodel = load_built(job.ckpt, job.model)
        metadata = metadata_of(qmodel)
        preprocessing, source = metadata.preprocessing, metadata.source or ModelSource(job.model)
        size = _inspected_size(replace(job, model=job.model or source.name), preprocessing)
        channels = preprocessing.channels if preprocessing else 3
        name = job.model if code_file(job.model) else source.name
        own = build_model(name, source.num_classes, cifar_stem=source.cifar_stem)
        return own, qmodel, example_inputs(job.model, size, channels=channels)
    if not job.model:
        raise ConfigError("say what to inspect: --model NAME, or --ckpt with a run's model.pt")
    model = build_model(job.model, job.num_classes, cifar_stem=job.cifar_stem)
    if job.ckpt is not None:
        load_float(model, job.ckpt, key=job.ckpt_key)
    size, channels = _inspected_size(job, stored_preprocessing(job)), input_channels(model)
    qmodel = prepare_qat(model, job.qat, example_inputs(job.model, size, 2, channels=channels))
    return model, qmodel, example_inputs(job.model, size, channels=channels)


def _inspected_size(job: JobConfig, stored: Preprocessing | None) -> int:
    """Pixels a side of an example for a model of any task."""
    seen = stored or published_preprocessing(job)
    return job.image_size or (seen.image_size if seen is not None else own_image_size(job.model))
