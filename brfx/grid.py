"""The integer grid of a quantizer: which codes it has, and which code a value gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: A step is never taken as smaller than this, so that it cannot reach zero or change its sign.
MIN_STEP = 1e-8


def in_full(values: Tensor) -> Tensor:
    """``values`` in float32 at least: the 8 bits of a bfloat16 do not tell neighbouring codes apart."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True)
class Grid:
    """The codes of a ``bits``-bit quantizer; a level is ``code * step`` (LSQ, Esser et al., ICLR 2020, eq. 1-2).

    Signed: ``-2**(bits-1) .. 2**(bits-1) - 1``. Unsigned: ``0 .. 2**bits - 1``. Signed with one bit is binary: the
    codes are ``-1`` and ``+1`` and there is no zero, since LSQ's Qp would be 0.
    """

    bits: int
    signed: bool

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
    def codes(self) -> range:
        """Every code, ascending."""
        return range(self.low, self.high + 1, 2 if self.binary else 1)

    def encode(self, values: Tensor, step: Tensor, *, least: float = -math.inf) -> Tensor:
        """The code of each value, as floats: ``round(clip(v / step, Qn, Qp))``; binary: the sign, with +1 at zero.
        NaN has no code and comes out as NaN.

        Args:
            values: any shape.
            step: a scalar, or a shape that broadcasts against ``values`` (one step per output channel).
            least: no value is below it. From 0 on none is below the grid, and nothing is compared there.
        """
        if self.binary:
            return torch.where(values >= 0, 1.0, torch.where(values < 0, -1.0, values))
        low = self.low if least < 0 else None
        return (values / step.clamp(min=MIN_STEP)).clamp(low, self.high).round()

    def start(self, mean_magnitude: Tensor) -> Tensor:
        """The step to start from, ``2 * mean|v| / sqrt(Qp)`` (LSQ, section 2.1); binary: ``mean|v|``."""
        return mean_magnitude if self.binary else mean_magnitude * (2 / math.sqrt(self.high))

    def __str__(self) -> str:
        levels = [{0: "0", 1: "s", -1: "-s"}.get(code, f"{code}s") for code in self.codes]
        if len(levels) > 8:
            levels = [*levels[:2], "...", *levels[-2:]]
        return f"{'signed' if self.signed else 'unsigned'} {self.bits}-bit [{', '.join(levels)}]"
