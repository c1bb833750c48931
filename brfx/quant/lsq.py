"""Learned step size quantization: the function with its two gradients, and the quantizer modules that hold a step.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brfx.kernels.channel_sums import sum_by_channel
from brfx.kernels.precision import at_least_float32
from brfx.quant.grid import MIN_STEP, Grid, clipped, where_unclipped
from brfx.quant.quantizer import GRAD_MARGIN_OF_SUMS, ActivationQuantizer, Quantizer, WeightQuantizer


class _LSQ(torch.autograd.Function):
    """``v -> step * code(v)``; plain aten operations, so that compile and export see through it."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step: Tensor,
        grid: Grid,
        scale: float,
        floor: float,
        ceiling: float,
        grad_margin: float,
    ) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.settings = (grid, scale, floor, ceiling, grad_margin)
        code = grid.encode(clipped(at_least_float32(values), floor, ceiling), step, lower_bound=floor)
        return grid.decode(code, step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, step = ctx.saved_tensors
        grid, scale, floor, ceiling, grad_margin = ctx.settings
        grad = at_least_float32(grads[0])
        values = at_least_float32(saved)
        _, ratio, code = grid.recompute(values, step, floor=floor, ceiling=ceiling)
        if grid.binary:  # v^ = s * sign(v): the gradient passes straight to v, and d v^ / d s = sign(v)
            grad_values, slope = grad, code
        else:
            inside = partial(grid.where_on_grid, ratio=ratio, floor=floor, grad_margin=grad_margin)
            slope = grid.in_steps(code) - inside(grid.in_steps(ratio))
            grad_values = where_unclipped(inside(grad), values, floor, ceiling)
        grad_step = _sum_to(grad * slope, step) * scale
        return grad_values.to(saved.dtype), grad_step, None, None, None, None, None


def _sum_to(values: Tensor, step: Tensor) -> Tensor:
    """The sum in the shape of ``step``; by channel first, in which compiled code fuses it with a batch norm's sums."""
    if step.numel() == 1 and values.dim() > 2:
        values = sum_by_channel(values)
    return values.sum_to_size(step.shape)


def lsq_quantize(
    values: Tensor,
    step: Tensor,
    grid: Grid,
    *,
    gradient_scale: float,
    floor: float = -math.inf,
    ceiling: float = math.inf,
    grad_margin: float = 0.0,
) -> Tensor:
    """Quantize ``clip(values, floor, ceiling)`` to the levels ``code * step``.

    Args:
        values: any shape.
        step: a scalar, or one step per output channel in a shape that broadcasts.
        grid: the codes.
        gradient_scale: LSQ's g, which multiplies the gradient of ``step``; ``1 / sqrt(N * Qp)``.
        floor, ceiling: bounds applied before quantizing: ``0`` and infinity make a ReLU, ``0`` and ``6`` a ReLU6.
            At and beyond a bound no gradient reaches ``values``, as in ``torch.relu`` and ``F.hardtanh``.
        grad_margin: how far beyond the outermost code a value still counts as inside for its gradient, in codes.

    Returns:
        A tensor like ``values``. Inside the grid's range its gradient to ``values`` is 1, outside 0; to ``step`` it is
        ``code - v / step`` inside and ``Qn`` or ``Qp`` outside (LSQ, eq. 3 and 5). Binary grids (signed, one bit):
        1 everywhere and ``sign(v)``.
    """
    return _LSQ.apply(values, step, grid, gradient_scale, floor, ceiling, grad_margin)  # type: ignore[no-any-return, no-untyped-call]


class LSQQuantizer(Quantizer):
    """Base of LSQ's quantizers: a learned positive ``step``."""

    step: nn.Parameter
    about = "s learned by LSQ"
    own_rate = ("step",)
    positive: ClassVar[dict[str, float]] = {"step": MIN_STEP}


class LSQWeightQuantizer(LSQQuantizer, WeightQuantizer):
    """Signed quantizer of a weight; ``g = 1 / sqrt(N * Qp)`` with N the number of weights that share a step.

    ``symmetric=True``: on the grid without a zero, whose largest level in steps stands for Qp.
    """

    def __init__(self, bits: int, *, step_shape: tuple[int, ...] = (), symmetric: bool = False) -> None:
        super().__init__(bits, symmetric=symmetric)
        self.step = nn.Parameter(torch.full(step_shape, math.nan))

    def quantize(self, values: Tensor) -> Tensor:
        shared = values.numel() // self.step.numel()
        return lsq_quantize(values, self.step, self.grid, gradient_scale=1 / math.sqrt(shared * self.grid.reach))


class LSQActivationQuantizer(LSQQuantizer, ActivationQuantizer):
    """Quantizer of an activation ``(batch, ...)``; ``g = 1 / sqrt(N * Qp)`` with N the features of one sample.

    N leaves the batch out, so that the batch size does not change the training.

    Args:
        bits, signed, regularized, reason: see :class:`~brfx.quant.quantizer.ActivationQuantizer`.
    """

    def __init__(self, bits: int, *, signed: bool | None = False, regularized: bool = True, reason: str = "") -> None:
        super().__init__(bits, signed=signed, regularized=regularized, reason=reason)
        self.step = nn.Parameter(torch.tensor(math.nan))

    def quantize(self, values: Tensor) -> Tensor:
        features = math.prod(values.shape[1:])
        return lsq_quantize(
            values,
            self.step,
            self.grid,
            gradient_scale=1 / math.sqrt(features * self.grid.high),
            floor=self.floor,
            ceiling=self.ceiling,
            grad_margin=self.grad_margin,
        )


class QuantizedClippedReLU(LSQActivationQuantizer):
    """ReLU, clip and unsigned quantization in one: ``quantize(clip(x, 0, clip_value))``.

    ``clip_value=None`` is a plain ReLU, ``6.0`` a ReLU6.
    """

    floor = 0.0

    def __init__(self, bits: int, *, clip_value: float | None = None) -> None:
        super().__init__(bits, signed=False)
        self.ceiling = math.inf if clip_value is None else clip_value

    def extra_repr(self) -> str:
        return f"bits={self.bits}, clip_value={self.clip_value}"


class StreamQuantizer(QuantizedClippedReLU):
    """The quantizer of a residual stream: one step for every ReLU of the stream, each of which calls this module.

    Calibration sets the step for the ReLU whose values reach farthest.
    """

    is_stream = True
    grad_margin = GRAD_MARGIN_OF_SUMS

    def __init__(self, bits: int, *, clip_value: float | None = None) -> None:
        super().__init__(bits, clip_value=clip_value)
        self.regularized, self.reason = False, "a residual stream"

    def _joined(self, estimate: Tensor) -> Tensor:
        self._estimates = torch.maximum(self._estimates.to(estimate), estimate)
        return self._estimates
