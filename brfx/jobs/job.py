"""The main job: from a checkpoint and images to a trained low-bit network and files to ship."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brfx.analysis.audit import Audit, audit
from brfx.analysis.network import Place, network
from brfx.calibration import calibrate, quantizers
from brfx.config import Augmentation, JobConfig, code_file
from brfx.data import DEFAULTS, BatchLoader, Dataset, DetectionLoader, Preprocessing, with_overrides
from brfx.distributed import broadcast_object, broadcast_state, process_group, rank, world_size
from brfx.errors import BrfxError, ConfigError, DataError, Interrupted, TrainingError, first_line
from brfx.export import OnnxReport, export_onnx, snap_biases
from brfx.export.reading import AsModule, entries_of, is_exported, preprocessing_in, runner
from brfx.extras import missing, needed
from brfx.graph.trace import trace_islands
from brfx.hubs import hub_transform, hub_weights, is_hub_model
from brfx.io.atomic import write_text_atomically
from brfx.io.float_checkpoint import load_float, read_about, read_state_dict
from brfx.io.model_file import is_brfx_file, load, save
from brfx.io.torch_file import require_file
from brfx.jobs.bits import BATCHES, BITS_FILE, BitsReport, has_budget, kind_of, measure, with_budget
from brfx.jobs.files import load_built
from brfx.jobs.machine import machine
from brfx.jobs.statistics import RunStatistics
from brfx.jobs.tasks import augmentation_of, class_weights, task_of
from brfx.metadata import metadata_of
from brfx.models import (
    CIFAR_RESNETS,
    ModelSource,
    build_model,
    example_inputs,
    published_as,
    published_names,
    published_weights,
    require_model,
)
from brfx.prepare import prepare_qat
from brfx.quant.factory import about_activations, about_weights
from brfx.quant.grid import Grid
from brfx.reconstruction import reconstruct
from brfx.regularizers import Regularizer, Regularizers
from brfx.regularizers.bin_penalty import BinPenalty
from brfx.regularizers.kurtosis import KurtosisTerm
from brfx.train import Callback, Evaluation, FitResult, Score, Task, TensorBoard, evaluate, fit, reestimate_batch_norm
from brfx.train.batch_norm import small_batches_named
from brfx.train.checkpoint import FOLDER, Checkpoints, has_checkpoints, written_into
from brfx.train.loop import Batches, seed_everything
from brfx.train.report import Phase, Told, tell
from brfx.train.tasks import call, to_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """What a run came to. ``test`` and ``test_float`` are on the test images, looked at once, at the end."""

    run_dir: Path
    fit: FitResult | None
    test: Evaluation | Score
    test_float: Evaluation | Score | None = None
    kind: str = "FP32"  #: ``"W2A2"``, say; see :func:`brfx.jobs.bits.kind_of`
    onnx: OnnxReport | None = None
    onnx_problem: str | None = None
    float_bytes: int = 0  #: of the FP32 network's weights and buffers


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
    job, callbacks = _with_checkpoint(job), tuple(callbacks)
    with process_group(job.train.device) as device:
        job = replace(job, train=replace(job.train, device=device))
        _require_device(device)
        run_dir = _run_dir(job, resume)
        require_model(job.model)
        task_of(job)
        if job.ckpt is None and (published := _where_published(job.model)):
            log.info("Training from random weights%s", published)
        tell(callbacks, Phase("reading data"))
        dataset = read_data(job, stored_preprocessing(job))
        log.info(data_line(job, dataset))
        seed_everything(job.train.seed)
        model, _ = _float_model(job, dataset, job.ckpt, new_head=not job.strict)
        callbacks, task = _with_tensorboard(job, run_dir, callbacks), _task(job, dataset)
        train_data, val_data = _loaders(job, dataset, callbacks)
        _open_run(job, run_dir, resume)
        where: dict[str, Any] = {"run_dir": run_dir, "resume": resume, "about": _about(job, dataset)}
        with _resumable(run_dir):
            result = fit(model, train_data, val_data, job.train, task=task, callbacks=callbacks, **where)
            test = evaluate(model, _test_loader(job, dataset, callbacks), task)
            return _close_run(JobResult(run_dir, result, test))


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
    job, callbacks = _with_checkpoint(job), tuple(callbacks)
    ckpt = _required_checkpoint(job)
    with process_group(job.train.device) as device:
        job = replace(job, train=replace(job.train, device=device))
        _require_penalty_epochs(job)
        _require_device(device)
        run_dir = _run_dir(job, resume)
        require_model(job.model)
        read_state_dict(ckpt, job.ckpt_key)
        if missing("onnx") and rank() == 0:
            log.warning("There will be no model.onnx: %s", needed("ONNX export", "onnx"))
        tell(callbacks, Phase("reading data"))
        dataset = read_data(job, stored_preprocessing(job))
        log.info(data_line(job, dataset))
        seed_everything(job.train.seed)
        model, head = _float_model(job, dataset, ckpt, new_head=not job.strict)
        _require_trained_teacher(job, head)
        teacher = _teacher(job, dataset, model)
        bits = _with_budget(job, model, dataset, head)
        job = job if bits is None else replace(job, qat=bits.qat)
        tell(callbacks, Phase("rewriting the model"))
        qmodel = prepare_qat(model, job.qat, _example(job, dataset, 2))
        metadata = metadata_of(qmodel)
        metadata.preprocessing, metadata.classes = dataset.preprocessing, dataset.classes
        callbacks, task = _with_tensorboard(job, run_dir, callbacks), _task(job, dataset)
        train_data, val_data = _loaders(job, dataset, callbacks)
        _open_run(job, run_dir, resume)
        if bits is not None and rank() == 0 and not resume:
            write_text_atomically(run_dir / BITS_FILE, bits.toml())
        with _resumable(run_dir):
            model.to(device)
            qmodel.to(device)
            if not (resume and has_checkpoints(run_dir)):
                _calibrate(job, None if head else model, qmodel, dataset, val_data, callbacks)
            _write_network(model, qmodel, run_dir, to_device(_example(job, dataset, 1), device))
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
                    about=_about(job, dataset),
                    callbacks=callbacks,
                )
            _export_weights(qmodel, run_dir, callbacks)
            onnx_report, problem = None, no_onnx
            if rank() == 0 and not no_onnx:
                onnx_report, problem = _write_onnx(qmodel, run_dir, to_device(_example(job, dataset, 8), device))
            test_data = _test_loader(job, dataset, callbacks)
            test = evaluate(qmodel, test_data, task)
            test_float = None if head else evaluate(model, test_data, task)
            weighs = sum(value.numel() * value.element_size() for value in model.state_dict().values())
            kind = kind_of(qmodel)
            return _close_run(JobResult(run_dir, result, test, test_float, kind, onnx_report, problem, weighs))


@contextmanager
def _resumable(run_dir: Path) -> Iterator[None]:
    """Around the work of a run whose folder there is: Ctrl-C then says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGINT, f"stopped; go on with --resume {run_dir}") from error


def _export_weights(qmodel: nn.Module, run_dir: Path, callbacks: Iterable[Callback]) -> None:
    """Leave ``model.pt``, with biases that integer kernels have."""
    tell(callbacks, Phase("exporting"))
    _write_model(qmodel, run_dir)
    try:
        snap_biases(qmodel)
    except Exception as error:  # the network is not to be lost for the sake of a file
        log.warning("biases stay as they are: %s", first_line(error))
    _write_model(qmodel, run_dir)


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
    task = _task(job, dataset)
    if val_data is not None and model is not None:
        tell(callbacks, Phase("evaluating FP32"))
        log.info("FP32 on validation: %.2f %%", 100 * evaluate(model, val_data, task).value)
    whole = _calibration_loader(job, dataset)
    tell(callbacks, Phase("calibrating"))
    if rank() == 0:
        coarse = any(quantizer.bits < 8 for quantizer in quantizers(qmodel).values())
        norm_batches = max(job.calibration_batches, NORM_IMAGES // job.batch_size)

        def batches(count: int) -> Iterator[Any]:
            return (images for images, _ in islice(iter(whole), count))

        with small_batches_named("calibration"):
            settings: dict[str, Any] = {"dead_filters": job.dead_filters, "seed": job.train.seed, "start": job.start}
            settings["forward"] = lambda qmodel, images: qmodel(images)  # a list of images is one input
            calibrate(qmodel, batches(job.calibration_batches), batch_statistics=coarse, **settings)
            if job.reconstruct:
                layers = reconstruct(qmodel, batches(job.calibration_batches), batch_statistics=coarse)
                log.info("Rounded the weights of %d layers to keep their outputs", len(layers))
            if coarse:
                reestimate_batch_norm(qmodel, batches(norm_batches))
    broadcast_state(qmodel)
    came_to = "" if val_data is None else f": {100 * evaluate(qmodel, val_data, task).value:.2f} % on validation"
    log.info("Calibrated on %d batches%s", min(job.calibration_batches, len(whole)), came_to)


def _statistics(job: JobConfig, qmodel: nn.Module, dataset: Dataset, run_dir: Path, batches: int) -> RunStatistics:
    """Those of a run with so many batches an epoch; activations are of few images, to take under 1 % of its time."""
    images = max(4, min(64, job.batch_size, batches * job.batch_size * world_size() // 512))
    return RunStatistics(qmodel, job.train.warmup_epochs or 0, run_dir, _example(job, dataset, images))


def _write_network(model: nn.Module, qmodel: nn.Module, run_dir: Path, example: Any) -> None:
    """Write ``network.json``, the graph with its bits, which the report draws; none where the audit fails. ``model`` is
    in FP32."""
    if rank() > 0 or (run_dir / "network.json").exists():
        return
    try:
        found = audit(qmodel, example)
        content = {
            "footer": found.footer,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "exceptions": found.exceptions,
            "places": [asdict(place) for place in network(qmodel, found)],
        }
    except Exception as error:  # a picture is no reason to lose a run
        log.warning("no network.json: %s", first_line(error))
        return
    with written_into(run_dir):
        write_text_atomically(run_dir / "network.json", json.dumps(content) + "\n")


def _write_model(qmodel: nn.Module, run_dir: Path) -> None:
    """Write ``model.pt``; rank 0 alone."""
    if rank() == 0:
        with written_into(run_dir):
            save(qmodel, run_dir / "model.pt")


def _write_onnx(qmodel: nn.Module, run_dir: Path, example: Tensor) -> tuple[OnnxReport | None, str | None]:
    """Write ``model.onnx``; the report, or why there is no such file, whatever went wrong."""
    try:
        return export_onnx(qmodel, run_dir / "model.onnx", example), None
    except Exception as error:
        if isinstance(error.__cause__, OSError):  # a full disk says nothing of the model
            raise TrainingError(f"{error}; free some space, then go on with --resume {run_dir}") from error
        return None, str(error) if isinstance(error, BrfxError) else f"{type(error).__name__}: {first_line(error)}"


def _with_tensorboard(job: JobConfig, run_dir: Path, callbacks: tuple[Callback, ...]) -> tuple[Callback, ...]:
    if not job.tensorboard or rank() > 0:
        return callbacks
    return (*callbacks, TensorBoard(run_dir / "tensorboard"))


@torch.no_grad()
def dry_run_float(job: JobConfig, callbacks: Iterable[Callback] = ()) -> str:
    """What ``train_float`` would train, in a line, and the loss that it would begin with; nothing is written."""
    job, callbacks = _with_checkpoint(job), tuple(callbacks)
    _require_device(job.train.device)
    require_model(job.model)
    task_of(job)
    tell(callbacks, Phase("reading data"))
    dataset = read_data(job, stored_preprocessing(job))
    log.info(data_line(job, dataset))
    seed_everything(job.train.seed)
    model, _ = _float_model(job, dataset, job.ckpt, new_head=not job.strict)
    task, (train_data, _) = _task(job, dataset), _loaders(job, dataset)
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
    job, callbacks = _with_checkpoint(job), tuple(callbacks)
    ckpt = _required_checkpoint(job)
    tell(callbacks, Phase("reading data"))
    dataset = read_data(job, stored_preprocessing(job))
    log.info(data_line(job, dataset))
    model, head = _float_model(job, dataset, ckpt, new_head=not job.strict)
    bits = _with_budget(job, model, dataset, head)
    job = job if bits is None else replace(job, qat=bits.qat)
    tell(callbacks, Phase("rewriting the model"))
    qmodel = prepare_qat(model, job.qat, _example(job, dataset, 2))
    return audit(qmodel, _example(job, dataset, 1))


def sensitivity(job: JobConfig, batches: int = BATCHES) -> BitsReport:
    """What each layer's bits cost alone, on so many training batches, and the bits that a budget gives; nothing is
    written."""
    job = _with_checkpoint(job)
    ckpt = _required_checkpoint(job)
    _require_device(job.train.device)
    dataset = read_data(job, stored_preprocessing(job))
    model, _ = _float_model(job, dataset, ckpt)
    qmodel = prepare_qat(model, job.qat, _example(job, dataset, 2)).to(job.train.device)
    return measure(job, qmodel, _training_images(job, dataset, batches), _task(job, dataset))


def _with_budget(job: JobConfig, model: nn.Module, dataset: Dataset, head: tuple[str, ...]) -> BitsReport | None:
    """See :func:`brfx.jobs.bits.with_budget`."""
    if head and has_budget(job):
        raise ConfigError(
            f"a budget needs an FP32 network to compare with, and {job.ckpt} is of other classes: "
            f"`brfx train --model {job.model} --ckpt {job.ckpt}` first"
        )
    return with_budget(
        job, model, _example(job, dataset, 2), lambda: _training_images(job, dataset), _task(job, dataset)
    )


def _training_images(job: JobConfig, dataset: Dataset, batches: int = BATCHES) -> list[Any]:
    """Some training batches as one process sees them, on the device."""
    loader = _calibration_loader(job, dataset)
    return [to_device(images, job.train.device) for images, _ in islice(iter(loader), batches)]


def evaluate_file(job: JobConfig, callbacks: Iterable[Callback] = ()) -> tuple[str, Evaluation | Score]:
    """How good an FP32 checkpoint, a run's ``model.pt`` or a file exported from it is on the test images, behind what
    it is: ``"FP32"``, ``"W2A2"`` ..."""
    job, callbacks = _with_checkpoint(job), tuple(callbacks)
    ckpt = job.ckpt
    if ckpt is None:
        raise ConfigError("say what to evaluate: --ckpt FILE")
    _require_device(job.train.device)
    tell(callbacks, Phase("reading data"))
    if is_exported(ckpt):
        return _evaluate_exported(job, ckpt, callbacks)
    if is_brfx_file(ckpt):
        qmodel = load_built(ckpt, job.model)
        metadata = metadata_of(qmodel)
        name = metadata.source.name if metadata.source else job.model
        classes = None if metadata.classes is None else len(metadata.classes)
        job = replace(job, model=name, num_classes=classes)
        dataset = read_data(job, metadata.preprocessing)
        _tell_of_other_images(ckpt, metadata.preprocessing, dataset.preprocessing)
        _require_classes(ckpt, metadata.classes, dataset)
        return kind_of(qmodel), evaluate(
            qmodel.to(job.train.device), _test_loader(job, dataset, callbacks), _task(job, dataset)
        )
    require_model(job.model)
    read_state_dict(ckpt, job.ckpt_key)
    dataset = read_data(job, stored_preprocessing(job))
    _require_classes(ckpt, read_about(ckpt).get("classes"), dataset)
    model, _ = _float_model(job, dataset, ckpt)
    return "FP32", evaluate(model.to(job.train.device), _test_loader(job, dataset, callbacks), _task(job, dataset))


def _evaluate_exported(job: JobConfig, path: Path, callbacks: Iterable[Callback]) -> tuple[str, Evaluation | Score]:
    """:func:`evaluate_file` of a file that was exported; what images go through, and the classes, it says itself."""
    entries = entries_of(path)
    classes, config = entries.get("classes"), entries.get("config")
    job = replace(job, num_classes=None if classes is None else len(classes), train=replace(job.train, device="cpu"))
    stored = preprocessing_in(path, entries)
    dataset = read_data(job, stored)
    _tell_of_other_images(path, stored, dataset.preprocessing)
    _require_classes(path, classes, dataset)
    kind = f"W{config['weight_bits']}A{config['act_bits']}" if config else path.suffix.removeprefix(".").upper()
    model = AsModule(runner(path, load))
    return kind, evaluate(model, _test_loader(job, dataset, callbacks), _task(job, dataset))


def _require_classes(path: Path, classes: Sequence[str] | None, dataset: Dataset) -> None:
    if classes is not None and tuple(classes) != dataset.classes:
        raise DataError(
            f"{path} knows {len(classes)} classes ({', '.join(classes[:3])} ...), "
            f"the data has {len(dataset.classes)} ({', '.join(dataset.classes[:3])} ...): give it its own data"
        )


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
    job = _with_checkpoint(job)
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
    size, channels = _inspected_size(job, stored_preprocessing(job)), _input_channels(model)
    qmodel = prepare_qat(model, job.qat, example_inputs(job.model, size, 2, channels=channels))
    return model, qmodel, example_inputs(job.model, size, channels=channels)


def _inspected_size(job: JobConfig, stored: Preprocessing | None) -> int:
    """Pixels a side of an example for a model of any task."""
    seen = stored or _published_preprocessing(job)
    return job.image_size or (seen.image_size if seen is not None else _own_image_size(job.model))


def _input_channels(model: nn.Module) -> int:
    """Of the images that ``model`` takes: 3, unless its first convolution says 1, 2 or 4."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return first if first in (1, 2, 4) else 3


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
    _tell_of_other_images(job.ckpt, stored, _with_settings(job, stored))
    return stored


def _tell_of_other_images(ckpt: Path | None, stored: Preprocessing | None, seen: Preprocessing | None) -> None:
    if stored is not None and seen != stored:
        log.warning("%s was trained on images of %s, and sees %s", ckpt, stored, seen)


def own_preprocessing(job: JobConfig) -> Preprocessing:
    """What the model wants: as it or its published weights come with it, else of its size."""
    published = _published_preprocessing(job)
    return published or Preprocessing(_own_image_size(job.model), stretch=task_of(job).stretch)


def _published_preprocessing(job: JobConfig) -> Preprocessing | None:
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


def _about(job: JobConfig, dataset: Dataset) -> dict[str, Any]:
    """What a run writes beside its weights, for :func:`brfx.io.float_checkpoint.read_about`."""
    seen = dataset.preprocessing and dataset.preprocessing.as_dict()
    return {"brfx": version("brfx"), "model": job.model, "preprocessing": seen, "classes": list(dataset.classes)}


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


def _task(job: JobConfig, dataset: Dataset) -> Task:
    return task_of(job).of(len(dataset.classes), class_weights(job, dataset))


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


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from error


def _own_dataset(model: str) -> str:
    if model in CIFAR_RESNETS:
        return "cifar10"
    raise DataError(
        f"{model or 'this model'} has no data set of its own: give one with --data DIR (or digits, cifar10, cifar100)"
    )


def _own_image_size(model: str) -> int:
    return 32 if model in CIFAR_RESNETS else 224


def _classes(job: JobConfig, dataset: Dataset) -> int:
    if job.num_classes not in (None, len(dataset.classes)):
        raise DataError(f"--num-classes {job.num_classes}, but {dataset.name} has {len(dataset.classes)} classes")
    return len(dataset.classes)


def _float_model(
    job: JobConfig, dataset: Dataset, ckpt: Path | None, *, new_head: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """The FP32 model of a job, for the data's classes, with the checkpoint's weights if there is one; and the
    parameters that the checkpoint has for other classes, where ``new_head`` lets these stay as initialized."""
    model = build_model(job.model, _classes(job, dataset), cifar_stem=job.cifar_stem)
    head: tuple[str, ...] = ()
    if ckpt is not None:
        head = load_float(model, ckpt, key=job.ckpt_key, new_head=new_head)
        classes = read_about(ckpt).get("classes")
        if not head and classes is not None and tuple(classes) != dataset.classes:
            log.warning("%s knows other classes (%s ...), whose outputs it begins with", ckpt, ", ".join(classes[:3]))
        _compare_normalization(job.model, model, ckpt, dataset.preprocessing)
    task_of(job).require(model, job.model, dataset)
    return model, head


def _required_checkpoint(job: JobConfig) -> Path:
    if job.ckpt is None:
        where = _where_published(job.model)
        raise ConfigError(f"quantize starts from an FP32 checkpoint: --ckpt FILE (`brfx train` makes one{where})")
    return job.ckpt


def _with_checkpoint(job: JobConfig) -> JobConfig:
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


def _where_published(model: str) -> str:
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


def _require_trained_teacher(job: JobConfig, head: tuple[str, ...]) -> None:
    """A head made anew has learned nothing, so no network with it is distilled from."""
    if head and job.train.distill and job.teacher is None:
        raise ConfigError(
            f"--distill {job.train.distill:g}: {job.ckpt} is of other classes, so there is no FP32 network to distill "
            f"from: `brfx train --model {job.model} --ckpt {job.ckpt}` first, or give --teacher NAME=FILE"
        )


def _teacher(job: JobConfig, dataset: Dataset, model: nn.Module) -> nn.Module | None:
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
    _tell_of_other_images(path, content and Preprocessing.from_dict(content), dataset.preprocessing)
    task_of(job).require(teacher, name, dataset)
    return teacher


def _example(job: JobConfig, dataset: Dataset, count: int) -> Any:
    """The first images of validation, or of training where there is none, as the model sees them."""
    split = dataset.val if len(dataset.val) else dataset.train
    return next(iter(task_of(job).loader(split, dataset.preprocessing, count)))[0]


_Loader = BatchLoader | DetectionLoader


def _loaders(job: JobConfig, dataset: Dataset, callbacks: Iterable[Callback] = ()) -> tuple[_Loader, Batches | None]:
    """Of training, this process's part of each batch, and, unless every image is trained on, of validation, which tells
    ``callbacks`` of its batches."""
    augment = augmentation_of(job, dataset.preprocessing, flip=dataset.flip)
    train = _train_loader(job, dataset, augment, rank=rank(), world_size=world_size())
    loader = task_of(job).loader
    if not job.val_fraction:
        return train, None
    val = loader(_limited(job, dataset.val), dataset.preprocessing, job.batch_size, device=job.train.device)
    return train, Told(val, callbacks, "validating")


def _calibration_loader(job: JobConfig, dataset: Dataset) -> _Loader:
    """Of whole training batches, whose images are cropped and mirrored as in training, and not changed otherwise."""
    augment = augmentation_of(job, dataset.preprocessing, flip=dataset.flip)
    return _train_loader(job, dataset, Augmentation(crop=augment.crop, flip=augment.flip))


def _train_loader(job: JobConfig, dataset: Dataset, augment: Augmentation, **part: int) -> _Loader:
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


def _test_loader(job: JobConfig, dataset: Dataset, callbacks: Iterable[Callback] = ()) -> Batches:
    split = _limited(job, dataset.test)
    loader = task_of(job).loader(split, dataset.preprocessing, job.batch_size, device=job.train.device)
    return Told(loader, callbacks, "evaluating on test images")


def _limited(job: JobConfig, split: Any) -> Any:
    """``split``, or as many of its images as ``limit_batches`` has: from all over it, where classes are in order."""
    if job.limit_batches is None or len(split) <= job.limit_batches * job.batch_size:
        return split
    count = job.limit_batches * job.batch_size
    return split.take(torch.arange(count) * len(split) // count)


def _run_dir(job: JobConfig, resume: bool) -> Path:
    """The folder of this run, the same on all ranks. Nothing is written yet.

    Raises:
        ConfigError: a new run's folder holds something already; one to resume is not there, or complete.
    """
    return broadcast_object(_resumed_run_dir(job) if resume else _free_run_dir(job))


def _resumed_run_dir(job: JobConfig) -> Path:
    run_dir = job.output_dir
    if run_dir is None or not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run to resume")
    if (run_dir / "result.json").exists():
        raise ConfigError(f"{run_dir}: this run is complete, there is nothing to resume")
    return run_dir


def _free_run_dir(job: JobConfig) -> Path:
    """The folder named, or a free name under ``runs/``."""
    run_dir = job.output_dir
    if run_dir is None:
        bits = "fp32" if job.command == "train" else f"w{job.qat.weight_bits}a{job.qat.act_bits}"
        code = code_file(job.model)
        name = f"runs/{job.model if code is None else Path(code[0]).stem}-{bits}"
        return next(path for i in count(1) if not (path := Path(name if i == 1 else f"{name}-{i}")).exists())
    begun = {"config.json.partial"}  # all that a run leaves that is killed while it is opened
    if rank() == 0 and run_dir.exists() and (not run_dir.is_dir() or {p.name for p in run_dir.iterdir()} - begun):
        raise ConfigError(
            f"{run_dir} is not empty: choose another --output-dir, or move it away; nothing was changed "
            "(an unfinished run goes on with --resume)"
        )
    return run_dir


def _open_run(job: JobConfig, run_dir: Path, resume: bool) -> None:
    """Make the run folder and write ``config.json``; of a run that is resumed the first one stays."""
    if rank() > 0 or resume:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = asdict(job) | {
        "versions": {name: version(name) for name in ("brfx", "torch", "torchvision")},
        "python": sys.version.split()[0],
        "command_line": sys.argv,
        "machine": machine(job.train.device),
    }
    write_text_atomically(run_dir / "config.json", json.dumps(settings, indent=2, default=str) + "\n")


def _close_run(result: JobResult) -> JobResult:
    """Write ``result.json``: accuracies on the test images, the epoch that they are of, and what each file weighs.

    The run is then complete, and its checkpoints go.
    """
    if rank() > 0:
        return result
    run_dir = result.run_dir
    files = [path for path in sorted(run_dir.iterdir()) if path.is_file()]
    content = {
        "test": result.test.as_dict(),
        "test_float": result.test_float and result.test_float.as_dict(),
        "epoch": result.fit and result.fit.epoch,
        "stage": result.fit and result.fit.stage,
        f"val_{result.test.metric}": result.fit and result.fit.val_metric,
        "compiled": result.fit and result.fit.compiled,
        "skipped_batches": result.fit and result.fit.skipped,
        "teacher_sha256": result.fit and result.fit.teacher_sha256,
        "onnx": result.onnx and asdict(result.onnx),
        "bytes": {path.name: path.stat().st_size for path in files},
    }
    with written_into(run_dir):
        write_text_atomically(run_dir / "result.json", json.dumps(content, indent=2, default=str) + "\n")
    Checkpoints(run_dir / FOLDER, keep=1).remove()
    return result
