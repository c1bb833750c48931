"""One forward pass to a loss, eager or compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: ``(images, labels) -> (loss, {"task": .., "correct": .., and one entry per term of the penalty})``
LossStep = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]

#: Batches that a run must have before ``compile="auto"`` compiles: the compilation of ResNet-20 takes about the time
#: of 300 of its batches.
WORTH_COMPILING = 1000


def loss_step(model: nn.Module, penalty: Any | None) -> LossStep:
    """The function that is differentiated, and compiled: cross-entropy, plus ``terms.total`` if there is a penalty."""

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if penalty is None:
            logits, terms = model(images), None
        else:
            logits, terms = penalty(images)
        task = F.cross_entropy(logits, labels)
        numbers = {"task": task.detach(), "correct": (logits.argmax(1) == labels).sum()}
        if terms is None:
            return task, numbers
        for name in terms._fields:
            if name != "total":
                numbers[name] = getattr(terms, name).detach()
        return task + terms.total, numbers

    return step


def use_compile(choice: str, batches: int) -> bool:
    """Whether ``TrainConfig.compile`` means a compiled step for a run of this many batches."""
    if choice == "auto":
        return batches >= WORTH_COMPILING and any(map(shutil.which, ("c++", "g++", "clang++")))
    return choice == "on"


def compile_step(step: LossStep) -> LossStep:
    """``step`` through ``torch.compile``, as one graph."""
    return torch.compile(step, fullgraph=True)
