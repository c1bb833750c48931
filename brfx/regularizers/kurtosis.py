"""Kurtosis regularization (KURE): give each layer's weights the shape of a uniform distribution.

Source: Shkolnik et al., "Robust Quantization: One Model to Rule Them All", NeurIPS 2020, eq. 12 and 13:

    L_K = mean over layers of (kurtosis(w) - 1.8)^2,    kurtosis(w) = mean of ((w - mean(w)) / std(w))^4

1.8 is the kurtosis of a uniform distribution, 3 that of a normal one. The standard deviation is the biased one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brfx.kernels.precision import at_least_float32
from brfx.nn import QuantizedLayer, QuantizedMultiheadAttention
from brfx.regularizers import WeightTerm

#: The kurtosis of a uniform distribution.
UNIFORM = 1.8


def kurtosis(values: Tensor) -> Tensor:
    """The fourth standardized moment of all ``values``, of any shape; 0 where all of them are equal."""
    centred = at_least_float32(values) - at_least_float32(values).mean()
    deviation = centred.square().mean().clamp(min=torch.finfo(centred.dtype).tiny).sqrt()
    return (centred / deviation).square().square().mean()


class KurtosisTerm(WeightTerm):
    """L_K of the quantized weights of a model's layers (those that functions read are left out).

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned.
        strength: lambda (``--lambda-kurtosis``).
    """

    name = "kurtosis"

    def __init__(self, qmodel: nn.Module, strength: float) -> None:
        super().__init__(strength)
        kinds = (QuantizedLayer, QuantizedMultiheadAttention)
        self._layers = [module for module in qmodel.modules() if isinstance(module, kinds) and module.regularized()]

    def forward(self) -> Tensor:
        found = [(kurtosis(weight) - UNIFORM).square() for layer in self._layers for weight, _ in layer.regularized()]
        return torch.stack(found).mean() if found else self.strength.new_zeros(())
