"""Running statistics that fit the weights as they are, and batches that are too small for any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from brfx.errors import TrainingError
from brfx.modes import eval_mode
from brfx.train.tasks import call


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running mean and variance of every batch norm to the plain average over ``batches``.

    Quantization shifts what reaches a batch norm, so that the FP32 network's statistics are wrong for it
    (Nagel et al., ICML 2022, section 5). Everything but the batch norms stays in eval mode.

    Args:
        model: on the batches' device; it comes back in the mode it had.
        batches: model inputs ``(batch, ...)``; a tuple is spread, a mapping given by name.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for a cumulative average
                norm.train()
            for batch in batches:
                call(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def small_batches_named(where: str) -> Iterator[None]:
    """A batch that leaves a batch norm one value a channel says what to do.

    Args:
        where: what the message begins with.

    Raises:
        TrainingError: instead of torch's ValueError.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:  # the latter out of torch.compile
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"{where}: a batch norm gets one value a channel, of which there is no variance: use a larger --batch-size"
        ) from error
