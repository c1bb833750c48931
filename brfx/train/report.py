"""What a run tells: sums while an epoch goes on, means of it, and what it came to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Means:
    """Training figures averaged since the epoch began. ``accuracy`` is 0 to 1, ``None`` where the task counts none;
    ``terms`` are the penalty's parts."""

    loss: float
    accuracy: float | None
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
class Phase:
    """What a run is doing, told to callbacks when that begins, and as batches of it go by."""

    name: str  #: such as ``"compiling"`` or ``"validating"``
    done: int = 0  #: batches
    total: int | None = None  #: ``None`` where nobody knows
    note: str = ""  #: how long it usually takes


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``."""

    epoch: int  #: from 1
    stage: str
    lr: float  #: of the last batch
    train: Means
    val_loss: float | None  #: ``None`` where there is no validation
    val_metric: float | None  #: the same; what ``metric`` measured, written as ``val_accuracy``, ``val_mIoU`` ...
    seconds: float  #: of the training part
    images_per_second: float
    weights: dict[str, dict[str, float | None]] = field(default_factory=dict)  #: what ``statistics`` told of each
    metric: str = "accuracy"  #: the task's
    further: dict[str, float] = field(default_factory=dict)  #: other figures on validation, written as ``val_mAP`` ...

    @property
    def val_accuracy(self) -> float | None:
        """Of a classifier, 0 to 1; ``None`` where there is no validation, or the metric is another one."""
        return self.val_metric if self.metric == "accuracy" else None

    def as_dict(self) -> dict[str, Any]:
        """The line: plain data, with the metric under its name."""
        found = asdict(self)
        del found["metric"], found["further"]
        line = {f"val_{self.metric}" if name == "val_metric" else name: value for name, value in found.items()}
        return line | {f"val_{name}": value for name, value in self.further.items()}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> EpochMetrics:
        """What :meth:`as_dict` gave."""
        measured = {key.removeprefix("val_"): line[key] for key in line if key.startswith("val_") and key != "val_loss"}
        metric, *others = measured
        rest = {key: value for key, value in line.items() if key == "val_loss" or not key.startswith("val_")}
        rest |= {"train": Means(**line["train"]), "further": {name: measured[name] for name in others}}
        return cls(**rest, val_metric=measured[metric], metric=metric)


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns. The model holds the weights of ``epoch``."""

    history: tuple[EpochMetrics, ...]
    epoch: int  #: whose weights are kept; 0 where no epoch was trained
    stage: str  #: of that epoch, as in :class:`EpochMetrics`
    val_metric: float | None  #: of that epoch; ``None`` where there is no validation
    compiled: str  #: ``"whole"`` step, its ``"kernels"``, or ``"none"``
    skipped: int = 0  #: batches left out because a loss or gradient was not finite
    teacher_sha256: str | None = None  #: of the weights of what was distilled from
    metric: str = "accuracy"  #: what ``val_metric`` is of

    @property
    def val_accuracy(self) -> float | None:
        """As in :class:`EpochMetrics`."""
        return self.val_metric if self.metric == "accuracy" else None


class Callback:
    """Override what you need."""

    def on_batch(self, progress: Progress) -> None:
        """Some batches went by."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch and its validation are over."""

    def on_phase(self, phase: Phase) -> None:
        """Something else began, or went on."""


def tell(callbacks: Iterable[Callback], phase: Phase) -> None:
    """Tell each of ``callbacks``."""
    for callback in callbacks:
        callback.on_phase(phase)


class Told:
    """``batches`` that tell ``callbacks`` how many of them went by, as a :class:`Phase` of this name."""

    def __init__(self, batches: Any, callbacks: Iterable[Callback], name: str) -> None:
        self.batches, self.callbacks, self.name = batches, tuple(callbacks), name

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        total = len(self.batches)
        tell(self.callbacks, Phase(self.name, 0, total))
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            tell(self.callbacks, Phase(self.name, done, total))


class Sums:
    """Running sums of one epoch; they stay on the device until ``means`` reads them."""

    def __init__(self, numbers: dict[str, Tensor] | None = None, batches: int = 0, images: int = 0) -> None:
        self.numbers, self.batches, self.images = dict(numbers or {}), batches, images

    def to(self, device: str) -> Sums:
        return Sums({name: value.to(device) for name, value in self.numbers.items()}, self.batches, self.images)

    def add(self, numbers: dict[str, Tensor], images: int) -> None:
        self.numbers = {name: self.numbers.get(name, 0) + value for name, value in numbers.items()}
        self.batches += 1
        self.images += images

    def means(self) -> Means:
        """Of the batches so far; 0 where there was none."""
        numbers = {name: float(value) / self.batches for name, value in self.numbers.items()}
        correct = numbers.pop("correct", None if self.batches else 0.0)
        accuracy = None if correct is None else correct * self.batches / max(1, self.images)
        return Means(numbers.pop("task", 0.0), accuracy, numbers)
