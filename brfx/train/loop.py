"""The generic training loop: a module, data, settings and, if wanted, a penalty. It knows no quantizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brfx.config import TrainConfig
from brfx.errors import ConfigError, DataError, TrainingError
from brfx.train.checkpoint import write_atomically
from brfx.train.evaluate import Evaluation, evaluate
from brfx.train.optim import build_optimizer, rate_factor
from brfx.train.step import LossStep, build_step, how_to_compile

#: Batches between two looks at the numbers on the device.
LOG_EVERY = 10


class Batches(Protocol):
    """What ``fit`` trains on: sized, iterable once an epoch. ``set_epoch(epoch)`` is called where it exists."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class Penalty(Protocol):
    """A module around the trained one: ``penalty(x) -> (output, terms)``, ``terms`` a named tuple.

    ``terms.total`` is added to the loss, the others are logged. ``begin()`` is called when the warm-up is over.
    :class:`brfx.BinPenalty` is one.
    """

    def __call__(self, *inputs: Any) -> tuple[Any, Any]: ...
    def begin(self) -> None: ...


@dataclass(frozen=True)
class Means:
    """Training figures averaged since the epoch began. ``accuracy`` is 0 to 1, ``terms`` are the penalty's parts."""

    loss: float
    accuracy: float
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a run is, told to callbacks every few batches."""

    epoch: int  #: from 1
    epochs: int
    batch: int  #: from 1
    batches: int  #: in each epoch
    stage: str  #: ``"warm-up"``, ``"penalty"``, or ``"plain"`` where there is no penalty
    lr: float
    means: Means


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``."""

    epoch: int  #: from 1
    stage: str
    lr: float  #: of the last batch
    train: Means
    val_loss: float
    val_accuracy: float
    seconds: float  #: of the training part
    images_per_second: float


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns. The model holds the weights of ``best_epoch``."""

    history: tuple[EpochMetrics, ...]
    best_epoch: int
    best_accuracy: float
    compiled: str  #: ``"whole"`` step, its ``"kernels"``, or ``"none"``


class Callback:
    """Override what you need."""

    def on_batch(self, progress: Progress) -> None:
        """Some batches went by."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch and its validation are over."""


def fit(
    model: nn.Module,
    train_data: Batches,
    val_data: Iterable[tuple[Tensor, Tensor]],
    config: TrainConfig,
    *,
    penalty: Penalty | None = None,
    run_dir: Path | None = None,
    callbacks: Iterable[Callback] = (),
) -> FitResult:
    """Train a classifier; afterwards ``model`` holds the weights that did best on ``val_data``.

    Args:
        model: logits ``(batch, classes)`` from images; trained in place and moved to ``config.device``.
        train_data: batches ``(images, labels)``.
        val_data: batches to choose the best epoch on. Give images cut from the training set, not the test set.
        config: the settings.
        penalty: a module around ``model`` whose total joins the loss after ``config.warmup_epochs``.
        run_dir: where ``metrics.jsonl``, ``best.pth`` and ``last.pth`` are written; nothing is when ``None``.
        callbacks: told of batches and epochs.

    Raises:
        ConfigError: the warm-up leaves the penalty no epoch.
        DataError: ``train_data`` is empty.
        TrainingError: the loss is not finite; names the epoch and batch.
        NotCalibratedError: ``model`` holds a quantizer without a step.
    """
    warmup = config.warmup_epochs if penalty is not None else 0
    assert warmup is not None
    if penalty is not None and warmup >= config.epochs:
        raise ConfigError(
            f"a warm-up of {warmup} epochs leaves none of {config.epochs} for the regularizer: "
            "lower --warmup-epochs, raise --qat-epochs, or set both lambdas to 0"
        )
    batches = len(train_data)
    if not batches:
        raise DataError("there is no training batch: are there fewer images than --batch-size?")
    seed_everything(config.seed)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(config.device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config)
    total = config.epochs * batches
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_factor(i, total, config.lr_warmup))
    compiled = how_to_compile(config.compile, total, config.device)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "fp16")
    callbacks = tuple(callbacks)

    history: list[EpochMetrics] = []
    best, best_weights = -1.0, {}
    for epoch in range(1, config.epochs + 1):
        stage = "plain" if penalty is None else "penalty" if epoch > warmup else "warm-up"
        if epoch in (1, warmup + 1):
            active = penalty if stage == "penalty" else None
            if active is not None:
                active.begin()
            step = build_step(model, active, compiled, config.precision)
        where = _Where(epoch, config.epochs, batches, stage, config.device, layout)
        trained = _train_epoch(model, train_data, step, optimizer, scheduler, scaler, where, callbacks)
        metrics = _epoch_metrics(where, trained, evaluate(model, val_data))
        history.append(metrics)
        improved = metrics.val_accuracy > best
        if improved:
            best, best_weights = metrics.val_accuracy, {k: v.clone() for k, v in model.state_dict().items()}
        if run_dir is not None:
            _record(run_dir, model, metrics, is_best=improved)
        for callback in callbacks:
            callback.on_epoch(metrics)
    if history:
        model.load_state_dict(best_weights)
    best_epoch = next((metrics.epoch for metrics in history if metrics.val_accuracy == best), 0)
    return FitResult(tuple(history), best_epoch, best, compiled)


@dataclass(frozen=True)
class _Where:
    """An epoch's place in the run, and where its batches go."""

    epoch: int
    epochs: int
    batches: int
    stage: str
    device: str
    layout: torch.memory_format


@dataclass(frozen=True)
class _Trained:
    """What an epoch's training came to."""

    means: Means
    lr: float
    seconds: float
    images: int


def _train_epoch(
    model: nn.Module,
    data: Batches,
    step: LossStep,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    where: _Where,
    callbacks: tuple[Callback, ...],
) -> _Trained:
    if hasattr(data, "set_epoch"):
        data.set_epoch(where.epoch)
    model.train()
    sums, means, lr = _Sums(), Means(0.0, 0.0), 0.0
    started = perf_counter()
    for batch, (images, labels) in enumerate(data, start=1):
        images = images.to(where.device, non_blocking=True, memory_format=where.layout)
        labels = labels.to(where.device, non_blocking=True)
        lr = float(scheduler.get_last_lr()[0])
        loss, numbers = step(images, labels)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        sums.add(numbers, len(labels))
        if batch % LOG_EVERY == 0 or batch == where.batches:
            means = sums.means(f"epoch {where.epoch}, batch {batch}")
            progress = Progress(where.epoch, where.epochs, batch, where.batches, where.stage, lr, means)
            for callback in callbacks:
                callback.on_batch(progress)
    return _Trained(means, lr, perf_counter() - started, sums.images)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _epoch_metrics(where: _Where, trained: _Trained, result: Evaluation) -> EpochMetrics:
    return EpochMetrics(
        epoch=where.epoch,
        stage=where.stage,
        lr=trained.lr,
        train=trained.means,
        val_loss=result.loss,
        val_accuracy=result.accuracy,
        seconds=trained.seconds,
        images_per_second=trained.images / trained.seconds,
    )


def _record(run_dir: Path, model: nn.Module, metrics: EpochMetrics, *, is_best: bool) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(asdict(metrics)) + "\n")
    content = {"state_dict": model.state_dict(), "metrics": asdict(metrics)}
    for name in ("last.pth", "best.pth") if is_best else ("last.pth",):
        write_atomically(run_dir / name, content)


class _Sums:
    """Running sums of one epoch; they stay on the device until ``means`` reads them."""

    def __init__(self) -> None:
        self.numbers: dict[str, Tensor] = {}
        self.batches = self.images = 0

    def add(self, numbers: dict[str, Tensor], images: int) -> None:
        self.numbers = {name: self.numbers.get(name, 0) + value for name, value in numbers.items()}
        self.batches += 1
        self.images += images

    def means(self, where: str) -> Means:
        numbers = {name: float(value) / self.batches for name, value in self.numbers.items()}
        if not all(np.isfinite(value) for value in numbers.values()):
            raise TrainingError(f"{where}: the loss is not finite ({numbers}); try a lower --lr")
        accuracy = numbers.pop("correct") * self.batches / self.images
        return Means(numbers.pop("task"), accuracy, numbers)
