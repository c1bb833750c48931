"""The integer grid of a quantizer: which codes it has, which code a value gets, which level a code stands for.

All rounding to codes is here: :func:`nearest_code` rounds and clips, :meth:`Grid.encode` and :meth:`Grid.decode` are
LSQ's two halves, and :meth:`Grid.recompute` is :meth:`Grid.encode` in the form that a backward pass compiles best in.
``tests/quant/test_grid.py`` holds the last two equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brfx.kernels.masks import clamp, keep_between, keep_within

#: A step is never taken as smaller than this, so that it cannot reach zero or change its sign.
MIN_STEP = 1e-8


def positive_step(step: Tensor) -> Tensor:
    """``step``, nowhere below :data:`MIN_STEP`."""
    return step.clamp(min=MIN_STEP)


def nearest_code(ratio: Tensor, low: Any, high: Any) -> Tensor:
    """The integer nearest to each ``value / step``, half to even, of those from ``low`` to ``high``; NaN stays NaN.

    Args:
        ratio: any shape.
        low, high: integers as numbers, or as tensors; a number may be ``None`` where nothing lies beyond it.
    """
    return ratio.clamp(low, high).round_()


def clipped(values: Tensor, floor: float, ceiling: float) -> Tensor:
    """``values`` between two bounds, by the operations of a ReLU and a ReLU6, so that compiled code has them once."""
    if floor == -math.inf and ceiling == math.inf:
        return values
    if floor == 0.0 and ceiling == math.inf:
        return nn.functional.relu(values)
    return nn.functional.hardtanh(values, floor, ceiling)


class Recomputed(NamedTuple):
    """Quantities that a backward pass needs of the quantized values."""

    within: Tensor  #: between floor and ceiling
    ratio: Tensor  #: ``within / step - offset``
    code: Tensor


def where_unclipped(grad: Tensor, values: Tensor, floor: float, ceiling: float) -> Tensor:
    """``grad`` where :func:`clipped` hands on the value, 0 where it is at or beyond a bound."""
    if floor == -math.inf and ceiling == math.inf:
        return grad
    return keep_between(grad, values, floor, ceiling)


@dataclass(frozen=True)
class Grid:
    """The codes of a ``bits``-bit quantizer; a level is ``code * step`` (LSQ, Esser et al., ICLR 2020, eq. 1-2).

    Signed: ``-2**(bits-1) .. 2**(bits-1) - 1``. Unsigned: ``0 .. 2**bits - 1``. Signed with one bit is binary: the
    codes are ``-1`` and ``+1`` and there is no zero, since LSQ's Qp would be 0.

    Symmetric: the signed codes with the level ``(code + 1/2) * step``. There is no zero, and as many levels lie above
    it as below: ``-1.5, -0.5, 0.5, 1.5`` steps at 2 bits (N2UQ, Liu et al., CVPR 2022; ParetoQ, Liu et al., 2025).
    At one bit it is the binary grid.
    """

    bits: int
    signed: bool
    symmetric: bool = False

    @property
    def binary(self) -> bool:
        return self.signed and self.bits == 1

    @property
    def low(self) -> int:
        """Qn, the smallest code."""
        if self.binary:
            return -1
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """Qp, the largest code."""
        if self.binary:
            return 1
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def offset(self) -> float:
        """Added to a code before it is multiplied by the step."""
        return 0.5 if self.symmetric and not self.binary else 0.0

    @property
    def reach(self) -> float:
        """The largest level, in steps."""
        return self.high + self.offset

    @property
    def codes(self) -> range:
        """Every code, ascending."""
        return range(self.low, self.high + 1, 2 if self.binary else 1)

    @property
    def levels(self) -> list[float]:
        """Every level in steps, ascending."""
        return [code + self.offset for code in self.codes]

    def encode(self, values: Tensor, step: Tensor, *, lower_bound: float = -math.inf) -> Tensor:
        """The code of each value, as floats: ``round(clip(v / step - offset, Qn, Qp))``; binary: the sign, +1 at zero.
        NaN has no code and comes out as NaN.

        Args:
            values: any shape.
            step: a scalar, or a shape that broadcasts against ``values`` (one step per output channel).
            lower_bound: known lower bound of ``values``. From 0 on the lower clamp is skipped.
        """
        if self.binary:
            return torch.where(values >= 0, 1.0, torch.where(values < 0, -1.0, values))
        low = self.low if lower_bound < 0 else None
        return nearest_code(self.ratio(values, step), low, self.high)

    def recompute(
        self,
        values: Tensor,
        step: Tensor,
        *,
        floor: float = -math.inf,
        ceiling: float = math.inf,
    ) -> Recomputed:
        """:meth:`encode` of ``clipped(values, floor, ceiling)`` for a backward pass, with what it needs besides.

        Compiled, the comparisons that clamp here are those of :meth:`where_on_grid` and :func:`where_unclipped`.
        """
        within = clamp(values, None if floor == -math.inf else floor, None if ceiling == math.inf else ceiling)
        ratio = self.ratio(within, step)
        if self.binary:
            return Recomputed(within, ratio, self.encode(within, step))
        return Recomputed(within, ratio, clamp(ratio, None if floor >= 0 else self.low, self.high).round())

    def where_on_grid(self, values: Tensor, ratio: Tensor, *, floor: float, grad_margin: float) -> Tensor:
        """``values`` where a ratio lies between the outermost codes, or beyond by up to ``grad_margin``; else 0."""
        low = -math.inf if floor >= 0 else self.low - grad_margin
        return keep_within(values, ratio, low, self.high + grad_margin)

    def ratio(self, values: Tensor, step: Tensor) -> Tensor:
        """The values on the scale of the codes, not rounded: ``v / step - offset``."""
        ratio = values / positive_step(step)
        return ratio - self.offset if self.offset else ratio

    def in_steps(self, code: Tensor) -> Tensor:
        """The level of each code, in steps: ``code + offset``."""
        return code + self.offset if self.offset else code

    def decode(self, code: Tensor, step: Tensor) -> Tensor:
        """The level of each code: ``(code + offset) * step``."""
        return self.in_steps(code) * positive_step(step)

    def integers(self, code: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Integers and a scale whose product is the level of each code, bit for bit: the codes and the step, or the odd
        integers ``2 * code + 1`` and half the step."""
        return (2 * code + 1, positive_step(step) / 2) if self.offset else (code, positive_step(step))

    def start(self, mean_magnitude: Tensor) -> Tensor:
        """The step to start from, ``2 * mean|v| / sqrt(Qp)`` (LSQ, section 2.1), with the largest level for Qp; binary:
        ``mean|v|``."""
        return mean_magnitude if self.binary else mean_magnitude * (2 / math.sqrt(self.reach))

    def __str__(self) -> str:
        levels = [{0.0: "0", 1.0: "s", -1.0: "-s"}.get(code, f"{code:g}s") for code in self.levels]
        if len(levels) > 8:
            levels = [*levels[:2], "...", *levels[-2:]]
        kind = "unsigned" if not self.signed else "symmetric" if self.offset else "signed"
        return f"{kind} {self.bits}-bit [{', '.join(levels)}]"
