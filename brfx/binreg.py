"""Bin regularization: pull the values that share an integer code to that code's level.

Source: Han et al., "Improving Low-Precision Network Quantization via Bin Regularization", ICCV 2021, eq. 5 and 7:

    L_BR = sum over bins of [ (mean(v in bin) - level)^2 + var(v in bin) ],    level = k * step

with the bin of a value given by LSQ's own code k, empty bins skipped, and the biased variance (0 for one element).
A bin's term *is* the mean over the bin of ``(v - k*step)^2``, so that

    L_BR = sum_i (v_i - k_i * step)^2 / n(k_i)

which is what is computed: counts, then one weighted sum. ``tests/test_binreg.py`` holds the two forms equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brfx.errors import ConfigError
from brfx.grid import MIN_STEP, Grid


class _BinLoss(torch.autograd.Function):
    """``(values, step) -> L_BR`` with its gradient written out: forward and backward each recompute the codes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, regularizer: BinRegularizer) -> Tensor:
        code, distance = regularizer.distance(values, step)
        share = regularizer.share(code)
        ctx.save_for_backward(values, step, share)
        ctx.regularizer = regularizer
        return (distance.square() * _look_up(share, code, regularizer.grid)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, step, share = ctx.saved_tensors
        code, distance = ctx.regularizer.distance(values, step)
        grad_values = distance * _look_up(share * (2 * grads[0]), code, ctx.regularizer.grid)
        grad_step = -(code * grad_values).sum_to_size(step.shape) if ctx.needs_input_grad[1] else None
        return grad_values, grad_step, None


#: Up to this many bins a chain of selections, which compiles to one vectorized pass, is faster than a table.
_FEW = 16


def _count(code: Tensor, grid: Grid) -> Tensor:
    """How many values have each code."""
    if len(grid.codes) <= _FEW:
        return torch.stack([(code == k).sum() for k in grid.codes])
    return torch.histc(code.float(), len(grid.codes), grid.low - 0.5, grid.high + 0.5)  # floats: exact up to 2**24


def _look_up(table: Tensor, code: Tensor, grid: Grid) -> Tensor:
    """``table[i]`` for the i-th code of the grid."""
    if len(grid.codes) > _FEW:
        return table[(code - grid.low).int()]
    found = table[0]
    for index, k in enumerate(grid.codes[1:], start=1):
        found = torch.where(code == k, table[index], found)
    return found


@dataclass(frozen=True)
class BinDiagnosis:
    """How values lie in their bins. ``mean_part + variance_part`` is the loss."""

    num_bins: int
    used_bins: int
    mean_part: float  #: sum over bins of (mean - level)^2, in squared units of the values
    variance_part: float  #: sum over bins of the biased variance
    mse: float  #: mean over all values of (v - level)^2, the quantization error
    effectiveness: float  #: 100 * (1 - mean|v - level| / (step / 2)); 100 when every value is on its level

    @property
    def loss(self) -> float:
        return self.mean_part + self.variance_part


class BinRegularizer:
    """L_BR of one tensor.

    Args:
        num_bits: bits of the quantizer, 1 to 8; there are ``2**num_bits`` bins.
        signed: bins of a weight quantizer (``True``) or of a post-ReLU activation (``False``).
        name: what ``str()`` and the logs call it.
        clamp: let values beyond the outermost levels be (they add nothing), as in Nagel et al., ICML 2022; by
            default they are pulled inwards.
        by_count: weight each bin by its share of the values instead of equally: ``mean((v - level)^2)``, the
            dampening loss of Nagel et al. divided by the number of values.

    Raises:
        ConfigError: ``num_bits`` is not 1 to 8.
    """

    def __init__(
        self,
        num_bits: int,
        signed: bool = True,
        name: str = "",
        *,
        clamp: bool = False,
        by_count: bool = False,
    ) -> None:
        if not 1 <= num_bits <= 8:
            raise ConfigError(f"num_bits={num_bits}: bin regularization takes 1 to 8 bits")
        self.grid = Grid(num_bits, signed)
        self.name = name
        self.clamp = clamp
        self.by_count = by_count

    def __call__(self, values: Tensor, step: Tensor) -> Tensor:
        """The loss, a scalar, differentiable in ``values`` and ``step`` (detach ``step`` to leave it alone).

        Args:
            values: the latent weight, or the activation before it is quantized; any shape. Codes are piecewise
                constant, so the gradient to a value is ``2 * (v - k*step) / n(k)``.
            step: the quantizer's step, a scalar or one per output channel in a shape that broadcasts; bins are
                those of the whole tensor in both cases.
        """
        loss: Tensor = _BinLoss.apply(values, step, self)  # type: ignore[no-untyped-call]
        return loss

    def distance(self, values: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Each value's code and its signed distance to that code's level."""
        step = step.clamp(min=MIN_STEP)
        code = self.grid.encode(values, step)
        distance = values - code * step
        if self.clamp:
            beyond = (values < self.grid.low * step) | (values > self.grid.high * step)
            distance = torch.where(beyond, 0.0, distance)
        return code, distance

    def share(self, code: Tensor) -> Tensor:
        """What one value of each bin weighs: ``1 / n(bin)``, by count ``1 / n``."""
        counts = _count(code, self.grid)
        counts = torch.full_like(counts, code.numel()) if self.by_count else counts.clamp(min=1)
        return counts.to(code.dtype if code.dtype == torch.float64 else torch.float32).reciprocal()

    @torch.no_grad()
    def diagnose(self, values: Tensor, step: Tensor) -> BinDiagnosis:
        """Where the loss comes from; the two parts are computed from means and variances, as in the paper."""
        grid, values, step = self.grid, values.double(), step.double()
        code, distance = self.distance(values, step)  # per bin the mean of the distance is mean(v) - level
        index = ((code - grid.low) / grid.codes.step).long().flatten()
        counts = torch.bincount(index, minlength=len(grid.codes))
        used = counts > 0
        total = torch.zeros(len(counts)).to(distance).index_add_(0, index, distance.flatten())
        square = torch.zeros_like(total).index_add_(0, index, distance.square().flatten())
        mean = total[used] / counts[used]
        return BinDiagnosis(
            num_bins=len(grid.codes),
            used_bins=int(used.sum()),
            mean_part=float(mean.square().sum()),
            variance_part=float((square[used] / counts[used] - mean.square()).clamp(min=0).sum()),
            mse=float(distance.square().mean()),
            effectiveness=float(100 * (1 - (distance.abs() / (step / 2)).mean())),
        )

    def __str__(self) -> str:
        return f"BinRegularizer ({self.name}): {len(self.grid.codes)} levels, {self.grid}, tied to LSQ's step"
