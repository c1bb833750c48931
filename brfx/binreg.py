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

import torch
from torch import Tensor

from brfx.errors import ConfigError
from brfx.grid import MIN_STEP, Grid


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
        clamp: take values out of the grid's range as if they lay on its edge (they then add nothing), as in
            Nagel et al., ICML 2022; by default they are pulled inwards.
        by_count: weight each bin by its share of the values instead of equally: the dampening loss
            ``mean((v - level)^2)`` times the number of used bins' normaliser left out, i.e. the quantization MSE.

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
        code = self.grid.encode(values.detach(), step.detach())
        step = step.clamp(min=MIN_STEP)
        if self.clamp:
            values = torch.minimum(torch.maximum(values, self.grid.low * step), self.grid.high * step)
        squared = (values - code * step).square()
        if self.by_count:
            return squared.mean()
        index = self._index(code)
        share = self._counts(code).clamp(min=1).reciprocal()
        return (squared * share.to(squared.dtype)[index]).sum()

    @torch.no_grad()
    def diagnose(self, values: Tensor, step: Tensor) -> BinDiagnosis:
        """Where the loss comes from; the two parts are computed from means and variances, as in the paper."""
        grid, values, step = self.grid, values.double(), step.double().clamp(min=MIN_STEP)
        code = grid.encode(values, step)
        if self.clamp:
            values = torch.minimum(torch.maximum(values, grid.low * step), grid.high * step)
        distance = values - code * step  # equals v - level; per bin its mean is mean(v) - level
        index, counts = self._index(code).flatten(), self._counts(code).double()
        used = counts > 0
        total = torch.zeros_like(counts).index_add_(0, index, distance.flatten())
        square = torch.zeros_like(counts).index_add_(0, index, distance.square().flatten())
        mean = total[used] / counts[used]
        return BinDiagnosis(
            num_bins=len(grid.codes),
            used_bins=int(used.sum()),
            mean_part=float(mean.square().sum()),
            variance_part=float((square[used] / counts[used] - mean.square()).clamp(min=0).sum()),
            mse=float(distance.square().mean()),
            effectiveness=float(100 * (1 - (distance.abs() / (step / 2)).mean())),
        )

    def _index(self, code: Tensor) -> Tensor:
        """The position of a code in ``grid.codes``."""
        return ((code - self.grid.low) / self.grid.codes.step).long()

    def _counts(self, code: Tensor) -> Tensor:
        """How many values each bin holds, as floats (exact up to 2**24)."""
        half = self.grid.codes.step / 2
        return torch.histc(code.float(), len(self.grid.codes), self.grid.low - half, self.grid.high + half)

    def __str__(self) -> str:
        return f"BinRegularizer ({self.name}): {len(self.grid.codes)} levels, {self.grid}, tied to LSQ's step"
