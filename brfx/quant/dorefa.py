"""DoReFa: weights go through tanh, are normalized by their largest magnitude, and are rounded to ``2**bits`` levels.

Source: Zhou et al., "DoReFa-Net", 2016, eq. 9:

    w^ = 2 * round_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1,    round_k(r) = round(r * (2**bits - 1)) / (2**bits - 1)

with the gradient passed straight through the rounding. These levels, the odd multiples of ``1 / (2**bits - 1)`` from -1
to 1, are the symmetric grid's. On the signed grid, which has a zero, the levels are ``k / (2**(bits-1) - 1)``.

The paper's levels end at 1 in every layer, and a batch norm has to make up for it. Here they are multiplied by a
constant of the layer, ``max|tanh(w)|`` as calibration finds it, so that a network starts at the size of its FP32
weights. It is ``reach * step``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brfx.kernels.precision import at_least_float32
from brfx.quant.grid import positive_step
from brfx.quant.lsq import lsq_quantize
from brfx.quant.quantizer import GRAD_MARGIN_OF_SUMS, WeightQuantizer
from brfx.quant.step_init import StepInitRule


class DoReFaWeightQuantizer(WeightQuantizer):
    """DoReFa's quantizer of a weight; ``step`` is a constant.

    Args:
        bits, symmetric: see :class:`~brfx.quant.quantizer.WeightQuantizer`.
        step_shape: one step, or one per output channel, whose weights are then normalized on their own.
    """

    about = "tanh and s fixed at max|tanh(w)| (DoReFa)"

    def __init__(self, bits: int, *, step_shape: tuple[int, ...] = (), symmetric: bool = False) -> None:
        super().__init__(bits, symmetric=symmetric)
        self.register_buffer("step", torch.full(step_shape, math.nan))

    def transform(self, values: Tensor) -> Tensor:
        """``tanh(w) / max|tanh(w)|``, times the largest level."""
        return self._scaled(values, self.step)

    def _scaled(self, values: Tensor, step: Tensor) -> Tensor:
        squashed = torch.tanh(at_least_float32(values))
        return squashed / positive_step(self._largest(squashed)) * (self.grid.reach * step)

    def _largest(self, squashed: Tensor) -> Tensor:
        """The largest magnitude of the values that share a step, in the shape of the step."""
        if self.step.numel() == 1:
            return squashed.abs().max().reshape(self.step.shape)
        return squashed.abs().amax([dim for dim, size in enumerate(self.step.shape) if size == 1], keepdim=True)

    def encode(self, values: Tensor, step: Tensor | None = None) -> Tensor:
        return super().encode(values) if step is None else self.grid.encode(self._scaled(values, step), step)

    def first_step(self, values: Tensor, start: StepInitRule) -> Tensor:
        """``max|tanh(w)|`` at the largest level; no rule is searched by."""
        return self._largest(torch.tanh(at_least_float32(values))) / self.grid.reach

    def quantize(self, values: Tensor) -> Tensor:
        levels = lsq_quantize(
            self.prepare(values), self.step, self.grid, gradient_scale=0.0, grad_margin=GRAD_MARGIN_OF_SUMS
        )
        return levels.to(values.dtype)
