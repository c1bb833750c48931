"""PACT: activations are clipped at a learned ``alpha`` and rounded to ``2**bits`` levels from 0 to it.

Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, eq. 1-3:

    y = clip(x, 0, alpha),    y^ = round(y / s) * s,    s = alpha / (2**bits - 1)

    dy^/dx = 1 in [0, alpha), else 0;    dy^/dalpha = 1 where x >= alpha, else 0

Alpha gets no weight decay here, as no step does; the paper gives it some, so that fewer values are clipped too late.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brfx.kernels.precision import at_least_float32
from brfx.quant.grid import MIN_STEP, Grid, clipped
from brfx.quant.quantizer import ActivationQuantizer


class _PACT(torch.autograd.Function):
    """``(values, alpha) -> step * code``; plain aten operations, so that compile and export see through it."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, alpha: Tensor, grid: Grid, floor: float, ceiling: float, grad_margin: float
    ) -> Tensor:
        ctx.save_for_backward(values, alpha)
        ctx.settings = (grid, floor, ceiling, grad_margin)
        step = alpha / grid.high
        code = grid.encode(clipped(at_least_float32(values), floor, ceiling), step, lower_bound=floor)
        return grid.decode(code, step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, alpha = ctx.saved_tensors
        grid, floor, ceiling, grad_margin = ctx.settings
        values, grad = at_least_float32(saved), at_least_float32(grads[0])
        above = clipped(values, floor, ceiling) >= alpha * (1 + grad_margin / grid.high)
        closed = above | (values < 0 if floor < 0 else values <= 0) | (values >= ceiling)
        grad_values = torch.where(closed, 0.0, grad).to(saved.dtype)
        return grad_values, torch.where(above, grad, 0.0).sum(), None, None, None, None


class PACTQuantizer(ActivationQuantizer):
    """PACT's quantizer of an activation that is never negative; ``step`` is ``alpha / (2**bits - 1)``.

    Args:
        bits, signed, regularized, reason: see :class:`~brfx.quant.quantizer.ActivationQuantizer`; ``signed`` is
            ``False``.
    """

    about = "s = alpha / (levels - 1), alpha learned (PACT)"
    scales = own_rate = ("alpha",)
    positive: ClassVar[dict[str, float]] = {"alpha": 255 * MIN_STEP}

    def __init__(self, bits: int, *, signed: bool = False, regularized: bool = True, reason: str = "") -> None:
        assert not signed, "PACT clips at 0"
        super().__init__(bits, signed=False, regularized=regularized, reason=reason)
        self.alpha = nn.Parameter(torch.tensor(math.nan))

    @property
    def step(self) -> Tensor:  # type: ignore[override]
        return self.alpha / self.grid.high

    def set_step(self, step: Tensor) -> None:
        self.alpha.copy_(step * self.grid.high)

    def quantize(self, values: Tensor) -> Tensor:
        return _PACT.apply(values, self.alpha, self.grid, self.floor, self.ceiling, self.grad_margin)  # type: ignore[no-any-return, no-untyped-call]


class PACTReLU(PACTQuantizer):
    """A ReLU, with a fixed ceiling too where ``clip_value`` is given, quantized by PACT."""

    floor = 0.0

    def __init__(self, bits: int, *, clip_value: float | None = None) -> None:
        super().__init__(bits)
        self.ceiling = math.inf if clip_value is None else clip_value

    def extra_repr(self) -> str:
        return f"bits={self.bits}, clip_value={self.clip_value}"
