"""Put a model into eval mode for a block, and restore the mode of each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After the block every module is in the mode that it had. ``model.train(True)`` would put frozen batch norms, and
    whatever else the user holds in eval mode, into training."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` is in eval mode; see :func:`modes_kept`."""
    with modes_kept(model):
        model.eval()
        yield
