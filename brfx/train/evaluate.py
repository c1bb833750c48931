"""How good a model is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import nn
from torch.nn import functional as F

from brfx.compat import float64_device
from brfx.errors import DataError
from brfx.modes import eval_mode

if TYPE_CHECKING:
    from brfx.train.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """``correct`` of ``count`` images, and the mean cross-entropy."""

    metric: ClassVar[str] = "accuracy"

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return self.correct / self.count

    @property
    def value(self) -> float:
        """The same, under the name that a :class:`Score` has for it."""
        return self.accuracy

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Score:
    """What another metric than accuracy came to; more is better."""

    value: float
    metric: str  #: its name
    count: int | None = None  #: of samples, where it is known
    loss: float | None = None  #: a mean over these, where the task has one in eval mode
    further: dict[str, float] = field(default_factory=dict)  #: other figures by name, which nothing is chosen by

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate_classifier(model: nn.Module, data: Iterable[Any]) -> Evaluation:
    """Top-1 accuracy and cross-entropy of ``model`` on batches ``(images, labels)``."""
    device = next(model.parameters()).device
    correct = loss = torch.zeros((), dtype=torch.float64, device=float64_device(device))
    count = 0
    with eval_mode(model):
        for images, labels in data:
            logits, labels = model(images.to(device)), labels.to(device)
            correct = correct + (logits.argmax(1) == labels).sum().to(correct.device)
            loss = loss + F.cross_entropy(logits, labels, reduction="sum").to(loss.device)
            count += len(labels)
    if not count:
        raise DataError("there is nothing to evaluate on: the data gave no batch")
    return Evaluation(int(correct), count, float(loss) / count)


@overload
def evaluate(model: nn.Module, data: Iterable[Any]) -> Evaluation: ...
@overload
def evaluate(model: nn.Module, data: Iterable[Any], task: Task | None) -> Evaluation | Score: ...
def evaluate(model: nn.Module, data: Iterable[Any], task: Task | None = None) -> Evaluation | Score:
    """How good ``model`` is in eval mode; it comes back in the mode it had.

    Args:
        model: logits ``(batch, classes)`` from images; of another ``task`` what that takes.
        data: batches ``(images, labels)``, or the task's, on the model's device or the CPU.
        task: what is measured, and how; default :func:`brfx.train.classification`.

    Returns:
        An :class:`Evaluation` with top-1 accuracy and loss; of another task what that measures, a :class:`Score`.

    Raises:
        DataError: there was no batch.
        NotCalibratedError: the model holds a quantizer without a step.
    """
    return evaluate_classifier(model, data) if task is None else task.evaluate(model, data)
