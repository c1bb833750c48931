"""Residual adds in integers: the two addends on grids whose units fit, so that an integer kernel adds their codes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brfx.kernels.channel_sums import sum_by_channel
from brfx.kernels.masks import keep_within
from brfx.kernels.precision import at_least_float32
from brfx.quant.grid import nearest_code, positive_step

#: Codes of a branch are uint8 or int8.
LEVELS = 255


class _Round(torch.autograd.Function):
    """``v -> unit * clamp(round(v / unit), low, high)``; the gradient passes inside the range and not outside.

    The gradient of ``unit``, where it is wanted, is LSQ's (eq. 3) times ``scale``.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, unit: Tensor, low: Tensor, high: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(values, unit, low, high)
        ctx.scale = scale
        return nearest_code(values / unit, low, high) * unit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, unit, low, high = ctx.saved_tensors
        ratio, grad_unit = values / unit, None
        within = ratio.clamp(low, high)
        inside = partial(keep_within, x=within - ratio, low=0.0, high=0.0)
        if ctx.needs_input_grad[1]:
            slope = within.round() - inside(ratio)
            weighted = grads[0] * slope
            grad_unit = (sum_by_channel(weighted) if weighted.dim() > 2 else weighted).sum() * ctx.scale
        return inside(grads[0]), grad_unit, None, None, None


class AddendUnits(NamedTuple):
    """The integers that a residual add adds: ``value == integer * unit``."""

    unit: Tensor
    zero_point: Tensor  #: what is added to an integer that is rounded here, to store it as uint8
    multiple: Tensor | None  #: how many units a code of the shortcut is worth; ``None``: the shortcut is rounded too


class ResidualAdd(nn.Module):
    """``branch + shortcut`` in integers of one unit: the branch is rounded, and so is a shortcut that is on no grid.

    ``forward(branch, shortcut, step_out, step_in=None)`` returns the sum, shape as ``branch``. ``step_out`` is the step
    of the quantizer behind the add, ``step_in`` that of the shortcut's grid where the add is told of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = "quantize"

    def units(self, step_out: Tensor, step_in: Tensor | None) -> AddendUnits:
        """The addends' units, from the steps around the add."""
        raise NotImplementedError

    def forward(self, branch: Tensor, shortcut: Tensor, step_out: Tensor, step_in: Tensor | None = None) -> Tensor:
        if self.mode != "quantize":
            return branch + shortcut
        dtype = torch.promote_types(branch.dtype, shortcut.dtype)
        branch, shortcut = at_least_float32(branch), at_least_float32(shortcut)
        units = self.units(step_out, step_in)
        rounded = self.round(branch, units.unit, units.zero_point)
        if units.multiple is None:
            total = rounded + self.round(shortcut, units.unit, units.zero_point)
        else:
            factor = self.shortcut_factor(units, step_in)
            total = rounded + (shortcut if factor is None else shortcut * factor)
        if torch.is_autocast_enabled(total.device.type):
            return total  # exact; layers cast what they read
        return total.to(dtype)

    @staticmethod
    def shortcut_factor(units: AddendUnits, step_in: Tensor | None) -> Tensor | None:
        """The factor of a shortcut on the grid of ``step_in`` that makes its codes worth whole numbers of
        units; ``None``: nothing, they are so already, or the shortcut is rounded."""
        if units.multiple is None or step_in is None:
            return None
        return units.unit * units.multiple / positive_step(step_in.detach())

    @staticmethod
    def round(values: Tensor, unit: Tensor, zero_point: Tensor) -> Tensor:
        """``values`` at the nearest multiple of ``unit`` that uint8 codes with this zero point have."""
        scale = 1 / math.sqrt(LEVELS * max(1, math.prod(values.shape[1:])))
        return _Round.apply(values, unit, -zero_point, LEVELS - zero_point, scale)  # type: ignore[no-any-return, no-untyped-call]


class AlignedAdd(ResidualAdd):
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
    """

    ratios: Tensor

    def __init__(self, high_out: int, high_in: int | None) -> None:
        super().__init__()
        self.high_out, self.high_in = high_out, high_in
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

    def units(self, step_out: Tensor, step_in: Tensor | None) -> AddendUnits:
        step_out = positive_step(step_out.detach())
        if step_in is None:
            return AddendUnits(step_out / self.unit, torch.full_like(step_out, 128.0), None)
        numerator, denominator = self.snap(positive_step(step_in.detach()) / step_out)
        assert self.high_in is not None
        return AddendUnits(step_out / denominator, self.high_in * numerator, numerator)

    def snap(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """M and N, N odd, with M/N nearest to ``ratio`` among those that fit into 8 bits."""
        assert self.high_in is not None
        odd = self.ratios.to(ratio)
        room = ((LEVELS - (self.high_out - 0.5) * odd) / self.high_in).floor()
        numerators = (ratio * odd).round().clamp(min=1).minimum(room.clamp(min=1))
        best = (numerators / odd - ratio).abs().argmin(dim=0, keepdim=True)  # as an index of its own, no host sync
        return numerators.gather(0, best).squeeze(0), odd.gather(0, best).squeeze(0)

    def extra_repr(self) -> str:
        return f"high_out={self.high_out}, high_in={self.high_in}"


class StreamAdd(ResidualAdd):
    """``branch + shortcut`` on the grid of a residual stream: one step S for all adds of the stream.

    The branch is rounded to int8 codes of S, the shortcut is on the grid already (or is a projection and is rounded
    like the branch), and the quantizer behind the add clips the sum. Nothing is rounded twice, so that an integer
    kernel that adds the codes is exact. S learns from here as from its quantizer.

    Args:
        projection: whether the shortcut comes from a layer and is on no grid.
    """

    def __init__(self, *, projection: bool) -> None:
        super().__init__()
        self.projection = projection

    def units(self, step_out: Tensor, step_in: Tensor | None = None) -> AddendUnits:
        unit = positive_step(step_out)
        multiple = None if self.projection else torch.ones_like(unit)
        return AddendUnits(unit, torch.full_like(unit, 128.0), multiple)

    def extra_repr(self) -> str:
        return f"projection={self.projection}"
