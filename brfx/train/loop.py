"""The generic training loop: a module, data, settings and, if wanted, a penalty. It knows no quantizer."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brfx.config import TrainConfig
from brfx.distributed import (
    all_gather_object,
    all_reduce_max,
    broadcast_buffers,
    broadcast_object,
    name_lost_ranks,
    rank,
    sync_batch_norms,
    world_size,
)
from brfx.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError, first_line
from brfx.io.atomic import write_atomically, write_text_atomically
from brfx.io.state_dict import versioned
from brfx.train.batch_norm import reestimate_batch_norm, small_batches_named
from brfx.train.checkpoint import (
    FOLDER,
    Checkpoints,
    has_checkpoints,
    state_sha256,
    written_into,
)
from brfx.train.ema import WeightAverage
from brfx.train.evaluate import Evaluation, Score, evaluate
from brfx.train.finite import culprit
from brfx.train.memory import memory_kept
from brfx.train.random_state import generators_of, parts_of, random_state, set_random_state
from brfx.train.report import Callback, EpochMetrics, FitResult, Phase, Progress, Sums, tell
from brfx.train.step import (
    COMPILING_TAKES,
    LossStep,
    Shapes,
    build_step,
    build_teacher,
    compiles_pieces,
    how_to_compile,
    objective,
    shapes_of,
)
from brfx.train.stopping import StopRequest, stop_requests
from brfx.train.tasks import Task, classification, custom, positional, to_device
from brfx.train.update import Update

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


class Statistics(Protocol):
    """Figures of the model's weights after each epoch, and what the next ones are measured against, as plain data and
    tensors. :class:`brfx.WeightStatistics` is one."""

    def begin(self) -> None: ...
    def __call__(self, epoch: int, batches: int) -> dict[str, dict[str, float | None]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
    run = _Run(model, train_data, batches, task, config, penalty, teacher, statistics, run_dir, tuple(callbacks))
    run.about = dict(about or {})
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
            run.train_epoch(stage, stop)
            run.end_epoch(stage, val_data)
            run.stop_if_asked(stop)
    return run.result()


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


class _Run:
    """A run between two batches: everything that decides how it goes on."""

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        batches: int,
        task: Task,
        config: TrainConfig,
        penalty: Penalty | None,
        teacher: nn.Module | None,
        statistics: Statistics | None,
        run_dir: Path | None,
        callbacks: tuple[Callback, ...],
    ) -> None:
        spatial = {parameter.dim() for parameter in model.parameters()}  # 5: of volumes, which have no such layout
        channels_last = config.channels_last and 5 not in spatial
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        for module in (model, teacher):
            if module is not None:
                module.to(config.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.model, self.data, self.config, self.penalty, self.run_dir = model, data, config, penalty, run_dir
        self.task, self.objective = task, objective(config, task)
        self.callbacks, self.statistics = callbacks, statistics
        self.teacher = None if teacher is None else teacher.eval()
        self.checkpoints = None if run_dir is None else Checkpoints(run_dir / FOLDER, config.keep_checkpoints)
        self.batches, self.generators = batches, generators_of(data)
        total = config.epochs * self.batches
        self.update = Update(model, config, config.epochs * -(-self.batches // config.accumulate))
        self.always_syncs = always_syncs(config)
        self.lr = 0.0  # of the last batch
        self.compiled = how_to_compile(config.compile, total, config.device) if task.compiles else "none"
        self.built = self.compiled  # of the last stage: nothing is compiled where there are no kernels to compile
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.epoch, self.batch = 1, 0  # the epoch from 1, and how many of its batches are done
        self.shapes: Shapes | None = None  # of the first batch, for which the step is compiled
        self.epoch_random = self.random = random_state(self.generators)  # when the epoch began, and now
        self.sums, self.seconds = Sums(), 0.0
        self.history: list[EpochMetrics] = []
        self.best = -math.inf  # the metric of best.pth
        self.kept, self.kept_weights = 0, dict[str, Tensor]()  # the epoch that would be the result now
        self.skipped = 0
        self.about: dict[str, Any] = {}
        self.stage = ""
        self.step: LossStep | None = None
        self.uncompiled = False  # the next batch is the first of its stage, and compiles
        self.teacher_sha256 = None if teacher is None else state_sha256(teacher)
        self.soft: Callable[[Any], Any] | None = None  # the teacher's output

    # From and to a checkpoint.

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, from which :meth:`restore` makes this run again."""
        return {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "batch": self.batch,
            "batches": self.batches,
            "model": self.model.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "scheduler": self.update.scheduler.state_dict(),
            "scaler": self.update.scaler.state_dict(),
            "average": self.average and {"values": self.average.average, "updates": self.average.updates},
            "random": all_gather_object((self.epoch_random, random_state(self.generators))),
            "compiled": self.compiled,
            "metric": self.task.metric,
            "shapes": self.shapes and [list(map(list, shapes)) for shapes in self.shapes],
            "sums": vars(self.sums),
            "seconds": self.seconds,
            "history": [metrics.as_dict() for metrics in self.history],
            "best": self.best,
            "kept": self.kept,
            "kept_weights": self.kept_weights,
            "skipped": self.skipped,
            "teacher_sha256": self.teacher_sha256,
            "statistics": None if self.statistics is None else self.statistics.state_dict(),
        }

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        state = None
        if self.run_dir is not None and rank() == 0:
            assert self.checkpoints is not None
            state = self.checkpoints.newest()
        state = broadcast_object(state)
        if state is None:
            return
        try:
            self._check(state)
            self.restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(
                f"{self.run_dir}: the checkpoint does not fit this model ({first_line(error)})"
            ) from error
        log.info("Resumed at epoch %d, batch %d of %d", self.epoch, self.batch, self.batches)

    def _check(self, state: dict[str, Any]) -> None:
        """What may change between the parts of a run: where it runs, and how often it is saved."""
        free = {"device", "checkpoint_minutes", "keep_checkpoints"}
        now = asdict(self.config) | {"batches": self.batches, "world_size": world_size(), "metric": self.task.metric}
        then = state["config"] | {"batches": state["batches"], "world_size": len(state["random"])}
        then["metric"] = state["metric"]
        for name in now:
            if name not in then:
                raise ConfigError(f"{self.run_dir}: begun by an older brfx, which had no {name!r}: begin a new run")
            if name not in free and now[name] != then[name]:
                raise ConfigError(
                    f"{self.run_dir}: the run was begun with {name}={then[name]!r}, now it is {now[name]!r}: "
                    "resume with the settings of the start, or begin a new run"
                )
        if self.teacher_sha256 != state["teacher_sha256"]:
            raise ConfigError(
                f"{self.run_dir}: the run was begun with another teacher, whose weights differ: give that"
            )
        if self.statistics is not None and state.get("statistics") is None:
            raise ConfigError(f"{self.run_dir}: the run was begun without statistics: resume without them")

    def restore(self, state: dict[str, Any]) -> None:
        device = self.config.device
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.model.load_state_dict(versioned(state["model"], self.model))
        self.update.optimizer.load_state_dict(state["optimizer"])
        self.update.scheduler.load_state_dict(state["scheduler"])
        self.update.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.updates = state["average"]["updates"]
            self.average.average = {k: v.to(device) for k, v in state["average"]["values"].items()}
        self.epoch_random, self.random = state["random"][rank()]
        set_random_state(self.random, self.generators)
        self.compiled = state["compiled"]
        shapes = state["shapes"]
        self.shapes = shapes and tuple(tuple(map(torch.Size, found)) for found in shapes)
        self.sums = Sums(**state["sums"]).to(device)
        self.seconds = float(state["seconds"])
        self.history = [EpochMetrics.from_dict(metrics) for metrics in state["history"]]
        self.best = float(state["best"])
        self.kept = int(state["kept"])
        self.kept_weights = {k: v.to(device) for k, v in state["kept_weights"].items()}
        self.skipped = int(state["skipped"])
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])

    def save(self) -> None:
        state = self.state()
        if self.checkpoints is not None and rank() == 0:
            with written_into(self.run_dir):
                self.checkpoints.write((self.epoch - 1) * self.batches + self.batch, state)

    # An epoch.

    def train_epoch(self, stage: str, stop: StopRequest) -> None:
        """Train from batch ``self.batch`` to the epoch's end."""
        if stage != self.stage:
            self._begin(stage)
        self.model.train()
        saved = started = told = monotonic()
        before = self.seconds
        self._tell_phase()
        for inputs, targets in self._remaining():
            at_end = self.batch + 1 == self.batches
            completes = at_end or (self.batch + 1) % self.config.accumulate == 0  # an update; none is saved half
            slow = self.always_syncs and monotonic() - told >= TELL_EVERY
            tells = at_end or slow or (self.batch + 1) % LOG_EVERY == 0
            syncs = tells or self.always_syncs or (completes and self.config.accumulate > 1)
            with self._compiling(stop) if self.uncompiled else nullcontext():
                self._train_batch(inputs, targets, syncs)
            self.batch += 1
            self.seconds = before + monotonic() - started
            if tells:
                self._tell(stage)
                told = monotonic()
            if at_end:
                break
            if not (syncs and completes):
                continue
            due = monotonic() - saved >= 60 * self.config.checkpoint_minutes
            if all_reduce_max(stop.signal, self.config.device):
                self.save()
                self.stop_if_asked(stop)
            if broadcast_object(due):
                self.save()
                saved = monotonic()
        if self.batch < self.batches:
            raise DataError(
                f"epoch {self.epoch}: train_data gave {self.batch} batches, not {self.batches}, for which the rates "
                "are: give it its true length, or say how many there are with TrainConfig(epoch_batches=)"
            )

    def _begin(self, stage: str) -> None:
        active = self.penalty if stage == "penalty" else None
        if active is not None:
            active.begin()
        own: dict[str, Any] = {"loss": self.objective, "correct": self.task.correct, "shapes": self.shapes}
        idle = self.compiled == "kernels" and not compiles_pieces(self.model, active)
        self.built = "none" if idle else self.compiled
        self.step = build_step(self.model, active, self.compiled, self.config.precision, **own)
        if self.teacher is not None and self.soft is None:
            self.soft = build_teacher(self.teacher, self.compiled, self.shapes)
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
        done = (self.epoch - 1) * self.batches + self.batch
        tell(self.callbacks, Phase("training", done, self.config.epochs * self.batches))

    def _remaining(self) -> Iterator[tuple[Any, Any]]:
        """The epoch's batches from ``self.batch`` on, on the device."""
        for part in parts_of(self.data):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        if not self.batch:
            self.epoch_random = random_state(self.generators)
        for batch in self._resumed() if self.batch else self.data:
            inputs, targets = self.task.split(batch)
            inputs = positional(self.model, to_device(inputs, self.config.device, self.layout))
            yield inputs, to_device(targets, self.config.device)

    def _resumed(self) -> Iterator[Any]:
        """The rest of an epoch that was cut off; what random numbers finding its place takes, the run did not take."""
        if hasattr(self.data, "starting_at"):
            batches = self.data.starting_at(self.batch)
            found = list(islice(batches, 1))
        else:  # draw again what was drawn
            set_random_state(self.epoch_random, self.generators)
            batches, found = iter(self.data), []
            for _ in islice(batches, self.batch):
                pass
        set_random_state(self.random, self.generators)
        yield from chain(found, batches)

    def _train_batch(self, inputs: Any, targets: Any, syncs: bool) -> None:
        """Train on one batch; with ``syncs``, wait for the device and see whether all went well since the last sync."""
        self.shapes = self.shapes or shapes_of(inputs, targets)
        skips = self.config.on_nonfinite == "skip"
        buffers = [buffer.clone() for buffer in self.model.buffers()] if skips else []
        self.lr = self.update.lr
        loss, numbers = self._forward(inputs, targets)
        of_update, together = self._place_in_update()
        completes = of_update + 1 == together
        failed = self.update(loss, sync=syncs, share=1 / together, completes=completes)
        if not failed:
            self.sums.add(numbers, self.task.size(inputs))
            if self.average is not None and completes:
                self.average.update(self.model)
            return
        if failed > 1:
            inputs, targets, loss = self._again(failed)
        where = f"{self._where(1)}: {culprit(self.model, inputs, loss, targets)}"
        if not skips:
            raise TrainingError(f"{where}; try a lower --lr or --clip-grad, or --on-nonfinite skip")
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.update.forgive()
        self.skipped += 1
        log.warning("%s; the batch was skipped", where)

    def _forward(self, inputs: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.step is not None
        soft = None if self.soft is None else self.soft(inputs)
        with small_batches_named(self._where(1)):
            return self.step(inputs, targets, soft)

    def _again(self, failed: int) -> tuple[Any, Any, Tensor]:
        """The first of the last ``failed`` batches and its loss, whose gradients the parameters then hold.

        It is drawn and run once more: nothing that decides its gradients has changed since.
        """
        self.batch -= failed - 1
        set_random_state(self.epoch_random, self.generators)
        inputs, targets = next(self._remaining())
        self.update.clear()
        loss, _ = self._forward(inputs, targets)
        self.update(loss, completes=False)
        return inputs, targets, loss

    def _place_in_update(self) -> tuple[int, int]:
        """Which of the batches of an update the next one is, from 0, and how many these are: the last of an epoch may
        have fewer."""
        place = self.batch % self.config.accumulate
        return place, min(self.config.accumulate, self.batches - (self.batch - place))

    def _where(self, more: int = 0) -> str:
        return f"epoch {self.epoch}, batch {self.batch + more}"

    def stop_if_asked(self, stop: StopRequest) -> None:
        """Raise Interrupted if any rank was asked to stop; what there is has been saved."""
        number = int(all_reduce_max(stop.signal, self.config.device))
        if number:
            more = f"; go on with --resume {self.run_dir}" if self.run_dir else ""
            raise Interrupted(number, f"stopped at {self._where()}{more}")

    def _tell(self, stage: str) -> None:
        means = self.sums.means()
        progress = Progress(self.epoch, self.config.epochs, self.batch, self.batches, stage, self.lr, means)
        for callback in self.callbacks:
            callback.on_batch(progress)

    def end_epoch(self, stage: str, val_data: Iterable[Any] | None) -> None:
        """Validate, write, and be at the start of the next epoch."""
        broadcast_buffers(self.model)
        if val_data is not None:
            tell(self.callbacks, Phase("validating"))
        with self.average.applied(self.model) if self.average is not None else nullcontext():
            if self.config.reestimate_bn:
                self._reestimate()
            metrics = self._metrics(stage, None if val_data is None else evaluate(self.model, val_data, self.task))
            weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.history.append(metrics)
        improved = self._keep(metrics, weights)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.seconds = Sums(), 0.0
        if self.run_dir is not None and rank() == 0:
            content = {**self.about, "state_dict": weights, "metrics": metrics.as_dict()}
            with written_into(self.run_dir):
                write_metrics(self.run_dir, self.history)
                for name in ("last.pth", "best.pth") if improved else ("last.pth",):
                    write_atomically(self.run_dir / name, content)
        self.save()
        for callback in self.callbacks:
            callback.on_epoch(metrics)

    def _keep(self, metrics: EpochMetrics, weights: dict[str, Tensor]) -> bool:
        """Keep the weights if they would be the result now. Whether they are the best so far, the later of equals.

        An epoch of the warm-up has another objective, so it does not compete.
        """
        value = metrics.val_metric
        best = metrics.stage != "warm-up" and value is not None and value >= self.best
        if best:
            assert value is not None
            self.best = value
        if best or self.config.keep == "last":
            self.kept, self.kept_weights = metrics.epoch, weights
        return best

    def out_of_patience(self) -> bool:
        """Whether the last ``config.patience`` epochs of the final objective did no better than one before them."""
        measured = (metrics.val_metric for metrics in self.history if metrics.stage != "warm-up")
        scores = [-math.inf if score is None else score for score in measured]
        if self.config.patience is None or not scores:
            return False
        waited = len(scores) - 1 - scores.index(max(scores))
        if waited >= self.config.patience:
            log.info("Stopped after epoch %d: none better on validation in %d epochs", len(self.history), waited)
        return waited >= self.config.patience

    def _reestimate(self) -> None:
        """Batch norms' statistics from the first batches of the epoch; nothing random moves on."""
        before = random_state(self.generators)
        batches = islice(iter(self.data), self.config.reestimate_bn)
        inputs = (to_device(self.task.split(batch)[0], self.config.device) for batch in batches)
        reestimate_batch_norm(self.model, inputs)
        broadcast_buffers(self.model)
        set_random_state(before, self.generators)

    def _metrics(self, stage: str, result: Evaluation | Score | None) -> EpochMetrics:
        return EpochMetrics(
            epoch=self.epoch,
            stage=stage,
            lr=self.lr,
            train=self.sums.means(),
            val_loss=None if result is None else result.loss,
            val_metric=None if result is None else result.value,
            seconds=self.seconds,
            images_per_second=world_size() * self.sums.images / self.seconds if self.seconds else 0.0,
            weights={} if self.statistics is None else self.statistics(self.epoch, self.batches),
            metric=self.task.metric,
            further=dict(result.further) if isinstance(result, Score) else {},
        )

    def result(self) -> FitResult:
        history, metric = tuple(self.history), self.task.metric
        if not history:
            return FitResult(history, 0, "", None, self.built, self.skipped, self.teacher_sha256, metric)
        self.model.load_state_dict(versioned(self.kept_weights, self.model))
        kept = history[self.kept - 1]
        chosen = kept.epoch, kept.stage, kept.val_metric
        return FitResult(history, *chosen, self.built, self.skipped, self.teacher_sha256, metric)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_metrics(run_dir: Path, history: Iterable[EpochMetrics]) -> None:
    """``metrics.jsonl``, whole and at once, so that no line is ever cut or doubled."""
    lines = [json.dumps(metrics.as_dict()) + "\n" for metrics in history]
    write_text_atomically(run_dir / "metrics.jsonl", "".join(lines))
