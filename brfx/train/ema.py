"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """``average = decay * average + (1 - decay) * now`` of every floating-point parameter and buffer.

    The decay rises as ``(1 + n) / (10 + n)`` over the first updates, so that the start does not linger.

    Args:
        model: its values now are the first average.
        decay: 0 to 1; 0.999 averages over about the last thousand updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: value.clone() for name, value in _floats(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), list(_floats(model).values()), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside, and what it held before afterwards."""
        now = {name: value.clone() for name, value in _floats(model).items()}
        _write(model, self.average)
        try:
            yield
        finally:
            _write(model, now)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in _floats(model).items():
        value.copy_(values[name])
