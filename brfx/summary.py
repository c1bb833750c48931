"""What a rewritten model is made of, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brfx.calibration import quantization_disabled
from brfx.nn import LSQActivationQuantizer, QuantizedLayer
from brfx.observing import observed_sites

_LINEAR_ALGEBRA = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class LayerSummary:
    """One convolution, linear or activation quantizer.

    ``bits`` is ``None`` for a layer in FP32; ``step`` is NaN before calibration, and the mean over channels for a
    per-channel weight; ``macs`` are multiply-accumulates for the example's batch, over all calls.
    """

    name: str
    type: str
    weight_bits: int | None = None
    act_bits: int | None = None
    signed: bool | None = None
    step: float | None = None
    parameters: int = 0
    macs: int = 0
    regularized: bool = False


@torch.no_grad()
def summarize(qmodel: nn.Module, *example_inputs: Any) -> list[LayerSummary]:
    """Run the model once, quantization off, and describe each layer in order of first execution.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned; it need not be calibrated.
        example_inputs: the model's inputs.
    """
    macs: dict[str, int] = {}
    hooks = []

    def count(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            macs[name] = macs.get(name, 0) + _macs(module, output)

        return hook

    for name, module in qmodel.named_modules():
        if isinstance(module, (*_LINEAR_ALGEBRA, LSQActivationQuantizer)):
            hooks.append(module.register_forward_hook(count(name)))
    training = qmodel.training
    try:
        with quantization_disabled(qmodel):
            qmodel.eval()(*example_inputs)
    finally:
        qmodel.train(training)
        for handle in hooks:
            handle.remove()
    observed = observed_sites(qmodel)
    return [_describe(name, qmodel.get_submodule(name), count, name in observed) for name, count in macs.items()]


def _macs(module: nn.Module, output: Tensor) -> int:
    weight = getattr(module, "weight", None)
    if weight is None:
        return 0
    per_output: int = math.prod(
        weight.shape[1:]
    )  # of a transposed convolution: per input, counted by its output all the same
    return output.numel() * per_output


def _describe(name: str, module: nn.Module, macs: int, observed: bool) -> LayerSummary:
    kind = type(module).__name__
    if isinstance(module, LSQActivationQuantizer):
        step = float(module.step.mean())
        return LayerSummary(name, kind, None, module.bits, module.signed, step, 0, macs, observed)
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    if isinstance(module, QuantizedLayer):
        quantizer = module.weight_quantizer
        step = float(quantizer.step.mean())
        return LayerSummary(name, kind, quantizer.bits, None, True, step, parameters, macs, True)
    return LayerSummary(name, kind, parameters=parameters, macs=macs)
