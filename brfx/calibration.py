"""Setting every step from data, and switching quantization off for a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from brfx.errors import DataError, NotCalibratedError
from brfx.nn import LSQQuantizer


def quantizers(model: nn.Module) -> dict[str, LSQQuantizer]:
    """Every quantizer of a rewritten model by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LSQQuantizer)}


@torch.no_grad()
def calibrate(qmodel: nn.Module, batches: Iterable[Any]) -> None:
    """Set every step to ``2 * mean|v| / sqrt(Qp)`` (LSQ, section 2.1) with the mean taken over ``batches``.

    Weights are read from the model. Each activation is seen as the layers before it, already quantized, give it.
    The model runs in eval mode and comes back in the mode it had.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned.
        batches: model inputs; of a tuple or list the first element is taken as the input (``(images, labels)``).

    Raises:
        DataError: there was no batch.
        NotCalibratedError: a batch or a weight holds NaN or infinity, or a quantizer was never reached.
    """
    found = quantizers(qmodel)
    modes = {module: module.training for module in qmodel.modules()}
    for quantizer in found.values():
        quantizer.begin_calibration()
    device = next(qmodel.parameters()).device
    try:
        qmodel.eval()
        number = 0
        for number, batch in enumerate(batches, start=1):
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            qmodel(inputs.to(device) if isinstance(inputs, torch.Tensor) else inputs)
        if not number:
            raise DataError("calibrate was given no batch: pass an iterable of model inputs")
    finally:
        for quantizer in found.values():
            quantizer.mode = "quantize"
        for module, training in modes.items():
            module.training = training
    missed = [name for name, quantizer in found.items() if not quantizer.calibrated]
    if missed:
        raise NotCalibratedError(f"the batches never reached {len(missed)} quantizers, the first is {missed[0]}")


def require_calibrated(qmodel: nn.Module) -> None:
    """Raise NotCalibratedError if any quantizer of ``qmodel`` has no step."""
    missing = [name for name, quantizer in quantizers(qmodel).items() if not quantizer.calibrated]
    if missing:
        raise NotCalibratedError(
            f"{len(missing)} quantizers have no step yet, the first is {missing[0]}: "
            "run brfx.calibrate(qmodel, batches) first"
        )


@contextmanager
def quantization_disabled(qmodel: nn.Module) -> Iterator[None]:
    """Within the block every quantizer lets its values through (ReLUs stay): the rewritten graph in FP32."""
    found = list(quantizers(qmodel).values())
    modes = [quantizer.mode for quantizer in found]
    for quantizer in found:
        quantizer.mode = "pass"
    try:
        yield
    finally:
        for quantizer, mode in zip(found, modes, strict=True):
            quantizer.mode = mode
