"""How often a classifier is right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.errors import DataError
from brfx.modes import eval_mode


@dataclass(frozen=True)
class Evaluation:
    """``correct`` of ``count`` images, and the mean cross-entropy."""

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return self.correct / self.count


@torch.no_grad()
def evaluate(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Top-1 accuracy and loss of ``model`` in eval mode; it comes back in the mode it had.

    Args:
        model: logits ``(batch, classes)`` from images.
        data: batches ``(images, labels)``, on the model's device or the CPU.

    Raises:
        DataError: there was no batch.
        NotCalibratedError: the model holds a quantizer without a step.
    """
    device = next(model.parameters()).device
    correct = loss = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with eval_mode(model):
        for images, labels in data:
            logits, labels = model(images.to(device)), labels.to(device)
            correct = correct + (logits.argmax(1) == labels).sum()
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            count += len(labels)
    if not count:
        raise DataError("there is nothing to evaluate on: the data gave no batch")
    return Evaluation(int(correct), count, float(loss) / count)
