"""The main job: from a checkpoint and images to a trained low-bit network and files to ship."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from brfx.calibration import calibrate, quantizers
from brfx.config import JobConfig
from brfx.data import Dataset
from brfx.distributed import broadcast_state, process_group, rank, world_size
from brfx.errors import ConfigError, first_line
from brfx.export import snap_biases
from brfx.extras import missing, needed
from brfx.io.atomic import write_text_atomically
from brfx.io.float_checkpoint import read_state_dict
from brfx.jobs.bits import BITS_FILE, SENSITIVITY_FILE, bits_within_budget, kind_of
from brfx.jobs.data import (
    calibration_loader,
    data_line,
    example_batch,
    read_data,
    stored_preprocessing,
    test_loader,
    train_and_val_loaders,
)
from brfx.jobs.machine import require_device
from brfx.jobs.networks import (
    float_model,
    require_trained_teacher,
    required_checkpoint,
    teacher_of,
    where_published,
    with_checkpoint,
)
from brfx.jobs.run_folder import (
    JobResult,
    about_run,
    close_run,
    folder_for,
    open_run,
    resumable,
    with_tensorboard,
    write_model,
    write_network,
    write_onnx,
)
from brfx.jobs.statistics import RunStatistics
from brfx.jobs.tasks import task_of, training_task
from brfx.metadata import metadata_of
from brfx.models import require_model
from brfx.prepare import prepare_qat
from brfx.quant.factory import about_activations, about_weights
from brfx.quant.grid import Grid
from brfx.reconstruction import reconstruct
from brfx.regularizers import Regularizer, Regularizers
from brfx.regularizers.bin_penalty import BinPenalty
from brfx.regularizers.kurtosis import KurtosisTerm
from brfx.train import Callback, evaluate, fit, reestimate_batch_norm
from brfx.train.batch_norm import small_batches_named
from brfx.train.checkpoint import has_checkpoints
from brfx.train.loop import Batches, seed_everything
from brfx.train.report import Phase, tell
from brfx.train.tasks import to_device

log = logging.getLogger(__name__)


def train_float(job: JobConfig, callbacks: Iterable[Callback] = (), *, resume: bool = False) -> JobResult:
    """Train an FP32 baseline; leaves ``best.pth``, ``last.pth``, ``config.json`` and ``metrics.jsonl`` in its folder.

    Args:
        job: the settings. Of processes that ``torchrun`` started, each calls this; rank 0 alone writes.
        callbacks: told of phases, batches and epochs.
        resume: go on with the unfinished run in ``job.output_dir``.

    Raises:
        BrfxError: a setting, the data or the output folder is not right; nothing has been written then.
        Interrupted: Ctrl-C or SIGTERM; says how to go on.
    """
    job, callbacks = with_checkpoint(job), tuple(callbacks)
    with process_group(job.train.device) as device:
        job = replace(job, train=replace(job.train, device=device))
        require_device(device)
        run_dir = folder_for(job, resume, "FP32")
        require_model(job.model)
        task_of(job)
        if job.ckpt is None and (published := where_published(job.model)):
            log.info("Training from random weights%s", published)
        tell(callbacks, Phase("reading data"))
        dataset = read_data(job, stored_preprocessing(job))
        log.info(data_line(job, dataset))
        seed_everything(job.train.seed)
        model, _ = float_model(job, dataset, job.ckpt, new_head=not job.strict)
        callbacks, task = with_tensorboard(job, run_dir, callbacks), training_task(job, dataset)
        train_data, val_data = train_and_val_loaders(job, dataset, callbacks)
        open_run(job, run_dir, resume, "FP32")
        where: dict[str, Any] = {"run_dir": run_dir, "resume": resume, "about": about_run(job, dataset)}
        with resumable(run_dir):
            result = fit(model, train_data, val_data, job.train, task=task, callbacks=callbacks, **where)
            test = evaluate(model, test_loader(job, dataset, callbacks), task)
            return close_run(JobResult(run_dir, result, test))


def quantize(job: JobConfig, callbacks: Iterable[Callback] = (), *, resume: bool = False) -> JobResult:
    """The main job; leaves ``model.pt``, ``model.onnx``, ``best.pth``, ``last.pth``, ``config.json``,
    ``metrics.jsonl`` and ``result.json`` in the run folder.

    Args:
        job: the settings. Of processes that ``torchrun`` started, each calls this; rank 0 alone writes.
        callbacks: told of phases, batches and epochs.
        resume: go on with the unfinished run in ``job.output_dir``.

    Raises:
        BrfxError: a setting, the checkpoint, the data or the output folder is not right; nothing has been written then.
        Interrupted: Ctrl-C or SIGTERM; says how to go on.
    """
    job, callbacks = with_checkpoint(job), tuple(callbacks)
    ckpt = required_checkpoint(job)
    with process_group(job.train.device) as device:
        job = replace(job, train=replace(job.train, device=device))
        _require_penalty_epochs(job)
        require_device(device)
        folder_for(job, resume)  # one that cannot be is refused before any work
        require_model(job.model)
        read_state_dict(ckpt, job.ckpt_key)
        if missing("onnx") and rank() == 0:
            log.warning("There will be no model.onnx: %s", needed("ONNX export", "onnx"))
        tell(callbacks, Phase("reading data"))
        dataset = read_data(job, stored_preprocessing(job))
        log.info(data_line(job, dataset))
        seed_everything(job.train.seed)
        model, head = float_model(job, dataset, ckpt, new_head=not job.strict)
        require_trained_teacher(job, head)
        teacher = teacher_of(job, dataset, model)
        bits = bits_within_budget(job, model, dataset, head)
        job = job if bits is None else replace(job, qat=bits.qat)
        tell(callbacks, Phase("rewriting the model"))
        qmodel = prepare_qat(model, job.qat, example_batch(job, dataset, 2))
        kind = kind_of(qmodel)
        run_dir = folder_for(job, resume, kind)
        metadata = metadata_of(qmodel)
        metadata.preprocessing, metadata.classes = dataset.preprocessing, dataset.classes
        callbacks, task = with_tensorboard(job, run_dir, callbacks), training_task(job, dataset)
        train_data, val_data = train_and_val_loaders(job, dataset, callbacks)
        open_run(job, run_dir, resume, kind)
        if bits is not None and rank() == 0 and not resume:
            write_text_atomically(run_dir / BITS_FILE, bits.toml())
            if bits.layers:
                write_text_atomically(run_dir / SENSITIVITY_FILE, json.dumps(bits.as_dict(), indent=2) + "\n")
        with resumable(run_dir):
            model.to(device)
            qmodel.to(device)
            if not (resume and has_checkpoints(run_dir)):
                _calibrate(job, None if head else model, qmodel, dataset, val_data, callbacks)
            write_network(model, qmodel, run_dir, to_device(example_batch(job, dataset, 1), device))
            statistics = _statistics(job, qmodel, dataset, run_dir, len(train_data))
            for line in banner(job):
                log.info(line)
            no_onnx = task_of(job).no_onnx
            if no_onnx:
                log.info("No model.onnx will be written: %s", no_onnx)
            result = None
            if not job.train.epochs:
                statistics.begin()
            else:
                result = fit(
                    qmodel,
                    train_data,
                    val_data,
                    job.train,
                    task=task,
                    penalty=_penalty(job, qmodel),
                    statistics=statistics,
                    teacher=teacher,
                    run_dir=run_dir,
                    resume=resume,
                    about=about_run(job, dataset),
                    callbacks=callbacks,
                )
            _export_weights(qmodel, run_dir, callbacks)
            onnx_report, problem = None, no_onnx
            if rank() == 0 and not no_onnx:
                onnx_report, problem = write_onnx(qmodel, run_dir, to_device(example_batch(job, dataset, 8), device))
            test_data = test_loader(job, dataset, callbacks)
            test = evaluate(qmodel, test_data, task)
            test_float = None if head else evaluate(model, test_data, task)
            weighs = sum(value.numel() * value.element_size() for value in model.parameters())
            return close_run(JobResult(run_dir, result, test, test_float, kind, onnx_report, problem, weighs))


def _export_weights(qmodel: nn.Module, run_dir: Path, callbacks: Iterable[Callback]) -> None:
    """Leave ``model.pt``, with biases that integer kernels have."""
    tell(callbacks, Phase("exporting"))
    write_model(qmodel, run_dir)
    try:
        snap_biases(qmodel)
    except Exception as error:  # the network is not to be lost for the sake of a file
        log.warning("biases stay as they are: %s", first_line(error))
    write_model(qmodel, run_dir)


#: Training images of which batch norms' statistics are estimated before training.
NORM_IMAGES = 4096


def _calibrate(
    job: JobConfig,
    model: nn.Module | None,
    qmodel: nn.Module,
    dataset: Dataset,
    val_data: Batches | None,
    callbacks: Iterable[Callback],
) -> None:
    """Start the steps and the batch norms' statistics of ``qmodel`` from whole batches, on rank 0 for all. ``model`` is
    the FP32 network, where it is trained for these classes.

    Where every quantizer has 8 bits, the FP32 network's statistics fit better than new ones of a few images. Where one
    has fewer, new ones are needed, of the more images the better (docs/results.md).
    """
    task = training_task(job, dataset)
    if val_data is not None and model is not None:
        tell(callbacks, Phase("evaluating FP32"))
        log.info("FP32 on validation: %.2f %%", 100 * evaluate(model, val_data, task).value)
    whole = calibration_loader(job, dataset)
    tell(callbacks, Phase("calibrating"))
    if rank() == 0:
        coarse = any(quantizer.bits < 8 for quantizer in quantizers(qmodel).values())
        norm_batches = max(job.calibration_batches, NORM_IMAGES // job.batch_size)

        def batches(count: int) -> Iterator[Any]:
            return (images for images, _ in islice(iter(whole), count))

        with small_batches_named("calibration"):
            settings: dict[str, Any] = {"dead_filters": job.dead_filters, "seed": job.train.seed, "start": job.start}
            how: dict[str, Any] = {"batch_statistics": coarse}
            how["forward"] = lambda qmodel, images: qmodel(images)  # a list of images is one input
            calibrate(qmodel, batches(job.calibration_batches), **how, **settings)
            if job.reconstruct:
                layers = reconstruct(qmodel, batches(job.calibration_batches), **how)
                log.info("Rounded the weights of %d layers to keep their outputs", len(layers))
            if coarse:
                reestimate_batch_norm(qmodel, batches(norm_batches))
    broadcast_state(qmodel)
    came_to = "" if val_data is None else f": {100 * evaluate(qmodel, val_data, task).value:.2f} % on validation"
    log.info("Calibrated on %d batches%s", min(job.calibration_batches, len(whole)), came_to)


def _statistics(job: JobConfig, qmodel: nn.Module, dataset: Dataset, run_dir: Path, batches: int) -> RunStatistics:
    """Those of a run with so many batches an epoch; activations are of few images, to take under 1 % of its time."""
    images = max(4, min(64, job.batch_size, batches * job.batch_size * world_size() // 512))
    return RunStatistics(qmodel, job.train.warmup_epochs or 0, run_dir, example_batch(job, dataset, images))


def banner(job: JobConfig) -> list[str]:
    """What is about to happen to weights and activations, a line each."""
    assert job.qat.weight_bits is not None and job.qat.act_bits is not None
    lines = []
    qat, weights, acts = job.qat, about_weights(job.qat.weight_quantizer), about_activations(job.qat.act_quantizer)
    for name, bits, grid, about, weight in (
        ("Weights", qat.weight_bits, Grid(job.qat.weight_bits, True, qat.symmetric), weights, job.lambda_br),
        ("Activations", qat.act_bits, Grid(job.qat.act_bits, False), acts, job.lambda_br_act),
    ):
        if bits == 32:
            lines.append(f"{name}: FP32")
            continue
        form = " per value" if job.br_form == "per_value" else ""
        regularized = f"BR lambda {weight:g}{form}" if weight and job.train.epochs else "no BR"
        lines.append(f"{name}: {len(grid.codes)} levels, {grid}, {about}; {regularized}")
    if job.lambda_kurtosis and job.train.epochs:
        lines[0] += f", kurtosis lambda {job.lambda_kurtosis:g}"
    return lines


def _penalty(job: JobConfig, qmodel: nn.Module) -> Regularizer | None:
    bins = _bin_penalty(job, qmodel) if job.lambda_br or job.lambda_br_act else None
    if not job.lambda_kurtosis:
        return bins
    return Regularizers(bins or qmodel, KurtosisTerm(qmodel, job.lambda_kurtosis))


def _bin_penalty(job: JobConfig, qmodel: nn.Module) -> BinPenalty:
    return BinPenalty(
        qmodel,
        weight=job.lambda_br or 0.0,
        act=job.lambda_br_act or 0.0,
        form=job.br_form,
        act_gradient_to_step=job.br_backprop_to_alpha_act,
        freeze_weight_steps=job.freeze_weight_alpha,
        freeze_act_steps=job.freeze_act_alpha,
    )


def _require_penalty_epochs(job: JobConfig) -> None:
    warmup = job.train.warmup_epochs
    assert warmup is not None
    if job.train.epochs and warmup >= job.train.epochs and (job.lambda_br or job.lambda_br_act or job.lambda_kurtosis):
        also = " --lambda-kurtosis 0" if job.lambda_kurtosis else ""
        raise ConfigError(
            f"a warm-up of {warmup} epochs leaves none of {job.train.epochs} for bin regularization: "
            f"lower --warmup-epochs, raise --qat-epochs, or set --lambda-br 0 --lambda-br-act 0{also}"
        )
