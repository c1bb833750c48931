"""The generic training loop: a module, data, settings and, if wanted, a penalty. It knows no quantizer."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brfx.config import TrainConfig
from brfx.distributed import (
    all_reduce_max,
    broadcast_buffers,
    broadcast_object,
    name_lost_ranks,
    rank,
    sync_batch_norms,
    world_size,
)
from brfx.errors import ConfigError, DataError, Interrupted, TrainingError, first_line
from brfx.io.atomic import write_atomically, write_text_atomically
from brfx.io.state_dict import versioned
from brfx.train.batch_norm import reestimate_batch_norm, small_batches_named
from brfx.train.checkpoint import (
    has_checkpoints,
    written_into,
)
from brfx.train.evaluate import Evaluation, Score, evaluate
from brfx.train.finite import culprit
from brfx.train.memory import memory_kept
from brfx.train.random_state import parts_of, random_state, set_random_state
from brfx.train.report import Callback, EpochMetrics, FitResult, Phase, Progress, Sums, tell
from brfx.train.run_state import RunState, Statistics
from brfx.train.step import (
    COMPILING_TAKES,
    LossStep,
    build_step,
    build_teacher,
    compiles_pieces,
    how_to_compile,
    objective,
    shapes_of,
)
from brfx.train.stopping import StopRequest, stop_requests
from brfx.train.tasks import Task, classification, custom, positional, to_device

log = logging.getLogger(__name__)

#: Batches between two syncs of the host with the device.
LOG_EVERY = 10

#: Seconds after which callbacks are told of a batch where the host syncs after each.
TELL_EVERY = 1.0


def always_syncs(config: TrainConfig) -> bool:
    """Whether the host syncs after each batch: where it waits for no device and no other rank, and where a batch may be
    left out, which the next one builds on."""
    return config.on_nonfinite == "skip" or (torch.device(config.device).type == "cpu" and world_size() == 1)


class Batches(Protocol):
    """What ``fit`` trains on: iterable once an epoch, such as any ``DataLoader``. Its length is the batches of an
    epoch, unless the settings say how many these are. ``set_epoch(epoch)`` is called where it exists, of a loader also
    of its samplers and its data set, and ``starting_at(batch)`` instead of dropping batches where a resumed run
    continues inside an epoch."""

    def __iter__(self) -> Iterator[Any]: ...


class Penalty(Protocol):
    """A module around the trained one: ``penalty(x) -> (output, terms)``, ``terms`` a named tuple.

    ``terms.total`` is added to the loss, the others are logged. ``begin()`` is called when the warm-up is over.
    :class:`brfx.regularizers.Regularizer` is one that says which terms are logged, and may have a faster form.
    """

    def __call__(self, *inputs: Any) -> tuple[Any, Any]: ...
    def begin(self) -> None: ...


def fit(
    model: nn.Module,
    train_data: Batches,
    val_data: Iterable[Any] | None,
    config: TrainConfig,
    *,
    loss: Callable[..., Tensor] | None = None,
    metric: Any = None,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
    task: Task | None = None,
    penalty: Penalty | None = None,
    teacher: nn.Module | None = None,
    statistics: Statistics | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    callbacks: Iterable[Callback] = (),
) -> FitResult:
    """Train a classifier, or for another task; afterwards ``model`` holds the weights of the epoch that ``config.keep``
    names.

    With a ``run_dir`` a run that is cut off anywhere goes on with ``resume=True``, and on the same machine ends with
    the weights, bit for bit, that it would have had (docs/reliability.md). Ctrl-C and SIGTERM leave a checkpoint.
    Where ``torchrun`` started several processes, each calls this with its share of every batch.
    Until it returns, the process keeps freed memory instead of giving it back (:mod:`brfx.train.memory`).

    Args:
        model: logits ``(batch, classes)`` from images, or what the task takes; trained in place and moved to
            ``config.device``.
        train_data: batches ``(images, labels)``; of another task ``(inputs, targets)``, each a tensor or a tuple, list
            or dict of such at any depth. A model is given a tuple of inputs by position, a dict by name.
        val_data: batches that each epoch is measured on, and chosen on with ``keep="best"``; ``None``: no validation.
            Give images cut from the training set, not the test set.
        config: the settings.
        loss: ``loss(output, targets)``, one number, a mean over the batch; default cross-entropy.
        metric: how ``val_data`` is measured, more is better: ``metric(model, val_data) -> float``, or an object with
            ``update(output, targets)``, ``compute()`` and ``reset()``, such as one of torchmetrics. Its name is that of
            the figure in ``metrics.jsonl``. Default top-1 accuracy, unless ``loss`` or ``split`` is given.
        split: a batch to ``(inputs, targets)``, where it is no such pair.
        task: all of this in one, see :class:`brfx.train.Task`; default :func:`brfx.train.classification`.
        penalty: a module around ``model`` whose total joins the loss after ``config.warmup_epochs``.
        teacher: the FP32 model to distill from, with ``config.distill`` above 0; it is run in eval mode, once a batch,
            compiled where the step is.
        statistics: asked at the end of each epoch, of the weights that are validated; ``EpochMetrics.weights`` has what
            it told.
        run_dir: where ``metrics.jsonl``, ``last.pth`` (the last epoch), ``best.pth`` (the epoch that ``keep="best"``
            chooses, whatever ``keep`` is; none without validation) and ``checkpoints/`` are written; nothing is when
            ``None``. The folder is made where there is none.
        resume: go on from the newest whole checkpoint in ``run_dir``; where there is none, start from ``model``.
        about: plain data that ``last.pth`` and ``best.pth`` hold beside the weights, such as what images go through.
        callbacks: told of batches and epochs.

    Raises:
        ConfigError: the warm-up leaves the penalty no epoch; distillation without a teacher or the reverse;
            ``keep="best"`` without validation; or the settings or the teacher are not those that the checkpoint was
            written under; or ``run_dir`` holds the checkpoints of another run; a ``task`` and parts of one; validation
            without a metric; a loss or a metric is not one number; or inputs are not those that the model takes.
        CheckpointError: every checkpoint is damaged, or the newest is of another model.
        DataError: ``train_data`` is empty, or an epoch has fewer batches than it was to have.
        TrainingError: a loss or gradient is not finite; names epoch, batch and layer. A batch is too small for a batch
            norm. A file in ``run_dir`` cannot be written; names it. Another rank is gone.
        Interrupted: Ctrl-C or SIGTERM; there is a checkpoint if there is a ``run_dir``.
        NotCalibratedError: ``model`` holds a quantizer without a step.
    """
    task = _chosen_task(task, loss, metric, split, validates=val_data is not None)
    warmup = config.warmup_epochs if penalty is not None else 0
    assert warmup is not None
    if penalty is not None and warmup >= config.epochs:
        raise ConfigError(
            f"a warm-up of {warmup} epochs leaves none of {config.epochs} for the regularizer: "
            "lower --warmup-epochs, raise --qat-epochs, or set both lambdas to 0"
        )
    if (teacher is None) != (config.distill == 0):
        raise ConfigError(f"distill={config.distill} and {'no' if teacher is None else 'a'} teacher: give both or none")
    if val_data is None and config.keep == "best":
        raise ConfigError("keep='best' chooses on validation data, and there is none: give val_data, or keep='last'")
    batches = _batches_of(train_data, config)
    seed_everything(config.seed)
    layout = _on_device(model, teacher, config)
    run = RunState(
        model,
        config,
        data=train_data,
        batches=batches,
        compiled=how_to_compile(config.compile, config.epochs * batches, config.device) if task.compiles else "none",
        metric=task.metric,
        teacher=teacher,
        statistics=statistics,
        run_dir=run_dir,
    )
    loop = _Loop(run, train_data, task, layout, penalty, teacher, dict(about or {}), tuple(callbacks))
    if resume:
        run.resume()
    elif run_dir is not None and has_checkpoints(run_dir):
        raise ConfigError(f"{run_dir}: holds a run that can be resumed: resume it, or give another folder")
    if run_dir is not None and rank() == 0:
        with written_into(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
    if statistics is not None and (run.epoch, run.batch) == (1, 0):
        statistics.begin()
    with stop_requests() as stop, name_lost_ranks(), sync_batch_norms(model), memory_kept(), _frozen_for_now(model):
        while run.epoch <= config.epochs and not run.out_of_patience():
            stage = "plain" if penalty is None else "penalty" if run.epoch > warmup else "warm-up"
            loop.train_epoch(stage, stop)
            loop.end_epoch(stage, val_data)
            loop.stop_if_asked(stop)
    return loop.result()


def _on_device(model: nn.Module, teacher: nn.Module | None, config: TrainConfig) -> torch.memory_format:
    """Move both to the device, in the memory layout that is given back: images come in it too."""
    spatial = {parameter.dim() for parameter in model.parameters()}  # 5: of volumes, which have no such layout
    channels_last = config.channels_last and 5 not in spatial
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in (model, teacher):
        if module is not None:
            module.to(config.device, memory_format=layout)  # type: ignore[call-overload]
    return layout


def _batches_of(train_data: Any, config: TrainConfig) -> int:
    """Batches of an epoch."""
    if config.epoch_batches is not None:
        return config.epoch_batches
    try:
        batches = len(train_data)
    except TypeError as error:  # also a DataLoader's, whose data set has none
        raise ConfigError(
            f"train_data has no length ({first_line(error)}): say how many batches an epoch has with "
            "TrainConfig(epoch_batches=)"
        ) from error
    if not batches:
        raise DataError("there is no training batch: are there fewer images than --batch-size?")
    return batches


def _chosen_task(task: Task | None, loss: Any, metric: Any, split: Any, *, validates: bool) -> Task:
    parts = {"loss": loss, "metric": metric, "split": split}
    given = [name for name, part in parts.items() if part is not None]
    if task is not None and given:
        raise ConfigError(f"task= has its own {given[0]}: give task= or {given[0]}=")
    if not given:
        return task or classification()
    if validates and metric is None:
        raise ConfigError(f"{given[0]}= is your own, so say how val_data is measured: metric=, or val_data=None")
    return custom(loss, metric, split)


@contextmanager
def _frozen_for_now(model: nn.Module) -> Iterator[None]:
    """What a penalty freezes when it begins is trained again by the next run, as from the start: this one may have been
    cut off, and go on in the same process from a checkpoint of before."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, before in trained.items():
            parameter.requires_grad_(before)


class _Loop:
    """The work on a run: its epochs and their batches."""

    def __init__(
        self,
        run: RunState,
        data: Batches,
        task: Task,
        layout: torch.memory_format,
        penalty: Penalty | None,
        teacher: nn.Module | None,
        about: dict[str, Any],
        callbacks: tuple[Callback, ...],
    ) -> None:
        self.run, self.model, self.config = run, run.model, run.config
        self.data, self.task, self.layout, self.penalty = data, task, layout, penalty
        self.about, self.callbacks = about, callbacks
        self.objective = objective(run.config, task)
        self.teacher = None if teacher is None else teacher.eval()
        self.soft: Callable[[Any], Any] | None = None  # the teacher's output
        self.always_syncs = always_syncs(run.config)
        self.lr = 0.0  # of the last batch
        self.stage = ""
        self.built = run.compiled  # of the last stage: nothing is compiled where there are no kernels to compile
        self.step: LossStep | None = None
        self.uncompiled = False  # the next batch is the first of its stage, and compiles

    def train_epoch(self, stage: str, stop: StopRequest) -> None:
        """Train from batch ``run.batch`` to the epoch's end."""
        if stage != self.stage:
            self._begin(stage)
        self.model.train()
        saved = started = told = monotonic()
        before = self.run.seconds
        self._tell_phase()
        for inputs, targets in self._remaining():
            at_end = self.run.batch + 1 == self.run.batches
            completes = at_end or (self.run.batch + 1) % self.config.accumulate == 0  # an update; none is saved half
            slow = self.always_syncs and monotonic() - told >= TELL_EVERY
            tells = at_end or slow or (self.run.batch + 1) % LOG_EVERY == 0
            syncs = tells or self.always_syncs or (completes and self.config.accumulate > 1)
            with self._compiling(stop) if self.uncompiled else nullcontext():
                self._train_batch(inputs, targets, syncs)
            self.run.batch += 1
            self.run.seconds = before + monotonic() - started
            if tells:
                self._tell(stage)
                told = monotonic()
            if at_end:
                break
            if not (syncs and completes):
                continue
            due = monotonic() - saved >= 60 * self.config.checkpoint_minutes
            if all_reduce_max(stop.signal, self.config.device):
                self.run.save()
                self.stop_if_asked(stop)
            if broadcast_object(due):
                self.run.save()
                saved = monotonic()
        if self.run.batch < self.run.batches:
            raise DataError(
                f"epoch {self.run.epoch}: train_data gave {self.run.batch} batches, not {self.run.batches}, for which "
                "the rates are: give it its true length, or say how many there are with TrainConfig(epoch_batches=)"
            )

    def _begin(self, stage: str) -> None:
        active = self.penalty if stage == "penalty" else None
        if active is not None:
            active.begin()
        own: dict[str, Any] = {"loss": self.objective, "correct": self.task.correct, "shapes": self.run.shapes}
        idle = self.run.compiled == "kernels" and not compiles_pieces(self.model, active)
        self.built = "none" if idle else self.run.compiled
        self.step = build_step(self.model, active, self.run.compiled, self.config.precision, **own)
        if self.teacher is not None and self.soft is None:
            self.soft = build_teacher(self.teacher, self.run.compiled, self.run.shapes)
        self.stage, self.uncompiled = stage, self.built != "none"

    @contextmanager
    def _compiling(self, stop: StopRequest) -> Iterator[None]:
        """Around the first batch of a stage, of which a stop loses nothing: the newest checkpoint is where it began.
        Several processes wait for the end of the batch, as one that left would take the others down."""
        tell(self.callbacks, Phase("compiling", note=f"usually {COMPILING_TAKES[self.built]}"))
        if world_size() > 1:
            yield
        else:
            try:
                with stop.at_once():
                    yield
            except KeyboardInterrupt:
                self.stop_if_asked(stop)
                raise
        self.uncompiled = False
        self._tell_phase()

    def _tell_phase(self) -> None:
        done = (self.run.epoch - 1) * self.run.batches + self.run.batch
        tell(self.callbacks, Phase("training", done, self.config.epochs * self.run.batches))

    def _remaining(self) -> Iterator[tuple[Any, Any]]:
        """The epoch's batches from ``run.batch`` on, on the device."""
        for part in parts_of(self.data):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.run.epoch)
        if not self.run.batch:
            self.run.epoch_random = random_state(self.run.generators)
        for batch in self._resumed() if self.run.batch else self.data:
            inputs, targets = self.task.split(batch)
            inputs = positional(self.model, to_device(inputs, self.config.device, self.layout))
            yield inputs, to_device(targets, self.config.device)

    def _resumed(self) -> Iterator[Any]:
        """The rest of an epoch that was cut off; what random numbers finding its place takes, the run did not take."""
        if hasattr(self.data, "starting_at"):
            batches = self.data.starting_at(self.run.batch)
            found = list(islice(batches, 1))
        else:  # draw again what was drawn
            set_random_state(self.run.epoch_random, self.run.generators)
            batches, found = iter(self.data), []
            for _ in islice(batches, self.run.batch):
                pass
        set_random_state(self.run.random, self.run.generators)
        yield from chain(found, batches)

    def _train_batch(self, inputs: Any, targets: Any, syncs: bool) -> None:
        """Train on one batch; with ``syncs``, wait for the device and see whether all went well since the last sync."""
        self.run.shapes = self.run.shapes or shapes_of(inputs, targets)
        skips = self.config.on_nonfinite == "skip"
        buffers = [buffer.clone() for buffer in self.model.buffers()] if skips else []
        self.lr = self.run.update.lr
        loss, numbers = self._forward(inputs, targets)
        of_update, together = self._place_in_update()
        completes = of_update + 1 == together
        failed = self.run.update(loss, sync=syncs, share=1 / together, completes=completes)
        if not failed:
            self.run.sums.add(numbers, self.task.size(inputs))
            if self.run.average is not None and completes:
                self.run.average.update(self.model)
            return
        if failed > 1:
            inputs, targets, loss = self._again(failed)
        where = f"{self.run.where(1)}: {culprit(self.model, inputs, loss, targets)}"
        if not skips:
            raise TrainingError(f"{where}; try a lower --lr or --clip-grad, or --on-nonfinite skip")
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.run.update.forgive()
        self.run.skipped += 1
        log.warning("%s; the batch was skipped", where)

    def _forward(self, inputs: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.step is not None
        soft = None if self.soft is None else self.soft(inputs)
        with small_batches_named(self.run.where(1)):
            return self.step(inputs, targets, soft)

    def _again(self, failed: int) -> tuple[Any, Any, Tensor]:
        """The first of the last ``failed`` batches and its loss, whose gradients the parameters then hold.

        It is drawn and run once more: nothing that decides its gradients has changed since.
        """
        self.run.batch -= failed - 1
        set_random_state(self.run.epoch_random, self.run.generators)
        inputs, targets = next(self._remaining())
        self.run.update.clear()
        loss, _ = self._forward(inputs, targets)
        self.run.update(loss, completes=False)
        return inputs, targets, loss

    def _place_in_update(self) -> tuple[int, int]:
        """Which of the batches of an update the next one is, from 0, and how many these are: the last of an epoch may
        have fewer."""
        place = self.run.batch % self.config.accumulate
        return place, min(self.config.accumulate, self.run.batches - (self.run.batch - place))

    def stop_if_asked(self, stop: StopRequest) -> None:
        """Raise Interrupted if any rank was asked to stop; what there is has been saved."""
        number = int(all_reduce_max(stop.signal, self.config.device))
        if number:
            more = f"; go on with --resume {self.run.run_dir}" if self.run.run_dir else ""
            raise Interrupted(number, f"stopped at {self.run.where()}{more}")

    def _tell(self, stage: str) -> None:
        means = self.run.sums.means()
        progress = Progress(self.run.epoch, self.config.epochs, self.run.batch, self.run.batches, stage, self.lr, means)
        for callback in self.callbacks:
            callback.on_batch(progress)

    def end_epoch(self, stage: str, val_data: Iterable[Any] | None) -> None:
        """Validate, write, and be at the start of the next epoch."""
        broadcast_buffers(self.model)
        if val_data is not None:
            tell(self.callbacks, Phase("validating"))
        with self.run.average.applied(self.model) if self.run.average is not None else nullcontext():
            if self.config.reestimate_bn:
                self._reestimate()
            metrics = self._metrics(stage, None if val_data is None else evaluate(self.model, val_data, self.task))
            weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.run.history.append(metrics)
        improved = self.run.keep(metrics, weights)
        self.run.epoch, self.run.batch = self.run.epoch + 1, 0
        self.run.sums, self.run.seconds = Sums(), 0.0
        if self.run.run_dir is not None and rank() == 0:
            content = {**self.about, "state_dict": weights, "metrics": metrics.as_dict()}
            with written_into(self.run.run_dir):
                write_metrics(self.run.run_dir, self.run.history)
                for name in ("last.pth", "best.pth") if improved else ("last.pth",):
                    write_atomically(self.run.run_dir / name, content)
        self.run.save()
        for callback in self.callbacks:
            callback.on_epoch(metrics)

    def _reestimate(self) -> None:
        """Batch norms' statistics from the first batches of the epoch; nothing random moves on."""
        before = random_state(self.run.generators)
        batches = islice(iter(self.data), self.config.reestimate_bn)
        inputs = (to_device(self.task.split(batch)[0], self.config.device) for batch in batches)
        reestimate_batch_norm(self.model, inputs)
        broadcast_buffers(self.model)
        set_random_state(before, self.run.generators)

    def _metrics(self, stage: str, result: Evaluation | Score | None) -> EpochMetrics:
        return EpochMetrics(
            epoch=self.run.epoch,
            stage=stage,
            lr=self.lr,
            train=self.run.sums.means(),
            val_loss=None if result is None else result.loss,
            val_metric=None if result is None else result.value,
            seconds=self.run.seconds,
            images_per_second=world_size() * self.run.sums.images / self.run.seconds if self.run.seconds else 0.0,
            weights={} if self.run.statistics is None else self.run.statistics(self.run.epoch, self.run.batches),
            metric=self.task.metric,
            further=dict(result.further) if isinstance(result, Score) else {},
        )

    def result(self) -> FitResult:
        history, metric = tuple(self.run.history), self.task.metric
        if not history:
            return FitResult(history, 0, "", None, self.built, self.run.skipped, self.run.teacher_sha256, metric)
        self.model.load_state_dict(versioned(self.run.kept_weights, self.model))
        kept = history[self.run.kept - 1]
        chosen = kept.epoch, kept.stage, kept.val_metric
        return FitResult(history, *chosen, self.built, self.run.skipped, self.run.teacher_sha256, metric)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_metrics(run_dir: Path, history: Iterable[EpochMetrics]) -> None:
    """``metrics.jsonl``, whole and at once, so that no line is ever cut or doubled."""
    lines = [json.dumps(metrics.as_dict()) + "\n" for metrics in history]
    write_text_atomically(run_dir / "metrics.jsonl", "".join(lines))
