"""The 8-bit quantizer of a branch into a residual add, aligned with the quantizer behind the add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from brfx.grid import MIN_STEP, in_full

#: Codes of a branch are uint8 or int8.
LEVELS = 255


class _Round(torch.autograd.Function):
    """``v -> unit * clamp(round(v / unit), low, high)``; the gradient passes inside the range and not outside."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(values, unit, low, high)
        return torch.minimum(torch.maximum((values / unit).round(), low), high) * unit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, unit, low, high = ctx.saved_tensors
        code = values / unit
        return torch.where((code >= low) & (code <= high), grads[0], 0.0), None, None, None


class AlignedAdd(nn.Module):
    """``branch + shortcut`` in integers that round exactly as the quantizer behind the add rounds real numbers.

    With S the step behind the add and the shortcut on a grid of step s: s/S is taken as the nearest M/N with N odd, so
    that the shortcut contributes ``k * M`` and the branch ``round(branch * N / S)`` in units of S/N. With N odd the
    thresholds of the final code lie between these integers: rounding the branch moves none. The branch is uint8 with
    zero point ``Qp_in * M``; where it saturates the final code has saturated too, while
    ``Qp_in * M + (Qp_out - 1/2) * N <= 255``. Where the shortcut is a convolution too (a projection), both are int8 in
    units of S/N with the largest odd N up to 31 that holds S's range. Steps get no gradient from here.

    Args:
        high_out: Qp of the quantizer behind the add.
        high_in: Qp of the shortcut's grid; ``None`` for a projection.

    ``forward(branch, shortcut, step_out, step_in=None)`` returns the sum, shape as ``branch``.
    """

    ratios: Tensor

    def __init__(self, high_out: int, high_in: int | None) -> None:
        super().__init__()
        self.high_out, self.high_in = high_out, high_in
        self.mode = "quantize"
        if high_in is None:
            limit = min(31, int(127 / (high_out - 0.5)))
            self.unit = limit if limit % 2 else limit - 1
        else:
            limit = int((LEVELS - high_in) / (high_out - 0.5))
            odd = torch.arange(1, limit + 1, 2, dtype=torch.float32)
            self.register_buffer("ratios", odd, persistent=False)

    @staticmethod
    def fits(high_out: int, high_in: int | None) -> bool:
        """Whether 8 bits hold such an add: up to 4 bits on both sides."""
        return high_out <= 15 and (high_in is None or high_in <= 15)

    def forward(self, branch: Tensor, shortcut: Tensor, step_out: Tensor, step_in: Tensor | None = None) -> Tensor:
        if self.mode != "quantize":
            return branch + shortcut
        branch, shortcut = in_full(branch), in_full(shortcut)  # the sum stays exact under autocast
        step_out = step_out.detach().clamp(min=MIN_STEP)
        if step_in is None:
            unit = step_out / self.unit
            low, high = torch.full_like(unit, -128.0), torch.full_like(unit, 127.0)
            return self.round(branch, unit, low, high) + self.round(shortcut, unit, low, high)
        step_in = step_in.detach().clamp(min=MIN_STEP)
        numerator, denominator = self.snap(step_in / step_out)
        assert self.high_in is not None
        unit, zero_point = step_out / denominator, self.high_in * numerator
        return self.round(branch, unit, -zero_point, LEVELS - zero_point) + shortcut * (unit * numerator / step_in)

    def snap(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """M and N, N odd, with M/N nearest to ``ratio`` among those that fit into 8 bits."""
        assert self.high_in is not None
        odd = self.ratios.to(ratio)
        room = ((LEVELS - (self.high_out - 0.5) * odd) / self.high_in).floor()
        numerators = (ratio * odd).round().clamp(min=1).minimum(room.clamp(min=1))
        best = (numerators / odd - ratio).abs().argmin(dim=0, keepdim=True)  # as an index of its own, no host sync
        return numerators.gather(0, best).squeeze(0), odd.gather(0, best).squeeze(0)

    @staticmethod
    def round(values: Tensor, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``values`` at the nearest multiple of ``unit`` between ``low`` and ``high`` units."""
        return _Round.apply(values, unit, low, high)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        return f"high_out={self.high_out}, high_in={self.high_in}"
