"""How good a file is on the test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from brfx.config import JobConfig
from brfx.data import Dataset
from brfx.errors import ConfigError, DataError
from brfx.export.reading import AsModule, entries_of, is_exported, preprocessing_in, runner
from brfx.io.float_checkpoint import read_about, read_state_dict
from brfx.io.model_file import is_brfx_file, load
from brfx.jobs.bits import kind_of
from brfx.jobs.data import read_data, stored_preprocessing, tell_of_other_images, test_loader
from brfx.jobs.files import load_built
from brfx.jobs.machine import require_device
from brfx.jobs.networks import float_model, with_checkpoint
from brfx.jobs.tasks import training_task
from brfx.metadata import metadata_of
from brfx.models import require_model
from brfx.train import Callback, Evaluation, Score, evaluate
from brfx.train.report import Phase, tell


def evaluate_file(job: JobConfig, callbacks: Iterable[Callback] = ()) -> tuple[str, Evaluation | Score]:
    """How good an FP32 checkpoint, a run's ``model.pt`` or a file exported from it is on the test images, behind what
    it is: ``"FP32"``, ``"W2A2"`` ..."""
    job, callbacks = with_checkpoint(job), tuple(callbacks)
    ckpt = job.ckpt
    if ckpt is None:
        raise ConfigError("say what to evaluate: --ckpt FILE")
    require_device(job.train.device)
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
        tell_of_other_images(ckpt, metadata.preprocessing, dataset.preprocessing)
        _require_classes(ckpt, metadata.classes, dataset)
        return kind_of(qmodel), evaluate(
            qmodel.to(job.train.device), test_loader(job, dataset, callbacks), training_task(job, dataset)
        )
    require_model(job.model)
    read_state_dict(ckpt, job.ckpt_key)
    dataset = read_data(job, stored_preprocessing(job))
    _require_classes(ckpt, read_about(ckpt).get("classes"), dataset)
    model, _ = float_model(job, dataset, ckpt)
    return "FP32", evaluate(
        model.to(job.train.device), test_loader(job, dataset, callbacks), training_task(job, dataset)
    )


def _evaluate_exported(job: JobConfig, path: Path, callbacks: Iterable[Callback]) -> tuple[str, Evaluation | Score]:
    """:func:`evaluate_file` of a file that was exported; what images go through, and the classes, it says itself."""
    entries = entries_of(path)
    classes, config = entries.get("classes"), entries.get("config")
    job = replace(job, num_classes=None if classes is None else len(classes), train=replace(job.train, device="cpu"))
    stored = preprocessing_in(path, entries)
    dataset = read_data(job, stored)
    tell_of_other_images(path, stored, dataset.preprocessing)
    _require_classes(path, classes, dataset)
    kind = f"W{config['weight_bits']}A{config['act_bits']}" if config else path.suffix.removeprefix(".").upper()
    model = AsModule(runner(path, load))
    return kind, evaluate(model, test_loader(job, dataset, callbacks), training_task(job, dataset))


def _require_classes(path: Path, classes: Sequence[str] | None, dataset: Dataset) -> None:
    if classes is not None and tuple(classes) != dataset.classes:
        raise DataError(
            f"{path} knows {len(classes)} classes ({', '.join(classes[:3])} ...), "
            f"the data has {len(dataset.classes)} ({', '.join(dataset.classes[:3])} ...): give it its own data"
        )
