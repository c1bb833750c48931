"""Bin regularization: pull the values that share an integer code to that code's level.

Source: Han et al., "Improving Low-Precision Network Quantization via Bin Regularization", ICCV 2021, eq. 5 and 7:

    L_BR = sum over bins of [ (mean(v in bin) - level)^2 + var(v in bin) ],    level = k * step

with the bin of a value given by LSQ's own code k, empty bins skipped, and the biased variance (0 for one element).
A bin's term *is* the mean over the bin of ``(v - k*step)^2``, so that

    L_BR = sum_i (v_i - k_i * step)^2 / n(k_i) = sum_k S_k / n_k,    S_k = sum of (v_i - k*step)^2 in bin k

which is what is computed: n and S of every bin in one pass over the values, then a sum over bins.
``tests/regularizers/test_bin_regularizer.py`` holds the two forms equal.

A second form divides each bin's S by 2 instead, whatever the bin holds (:func:`per_value_divisors`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brfx.compat import in_float64
from brfx.errors import ConfigError
from brfx.kernels.channel_sums import once, sum_by_channel
from brfx.kernels.masks import zero_for_nan
from brfx.kernels.memory_order import from_memory_order, in_memory_order
from brfx.kernels.precision import at_least_float32
from brfx.quant.grid import Grid, clipped, where_unclipped

#: Up to this many bins, masked sums that compile to one vectorized pass are faster than scattering.
_FEW = 16


class _BinSums(torch.autograd.Function):
    """``(values, step) -> (count, sum of squared distances)`` of each bin; backward recomputes the codes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, grid: Grid, clamp: bool, by_row: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, step)
        ctx.settings = (grid, clamp, by_row)
        code, distance = distances(values, step, grid, clamp=clamp)
        counts, squares = _reduce(code, distance.square(), grid, by_row)
        ctx.mark_non_differentiable(counts)
        return counts, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, step = ctx.saved_tensors
        grid, clamp, by_row = ctx.settings
        code, distance = distances(values, step, grid, clamp=clamp)
        if by_row:  # rows may be filled up with NaN
            code, distance = zero_for_nan(code), zero_for_nan(distance)
        return (
            *_bin_gradients(code, distance, step if ctx.needs_input_grad[1] else None, grads[1], grid),
            None,
            None,
            None,
        )


class _DeferredBinSums(torch.autograd.Function):
    """``(values, step, logged) -> (count, 0, 0)``, of each bin and once; see :func:`deferred_bin_sums`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, logged: Tensor, grid: Grid, floor: float, ceiling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(values, step)
        ctx.settings, ctx.dtype = (grid, floor, ceiling), logged.dtype
        code = grid.encode(clipped(values, floor, ceiling), step, lower_bound=floor)
        counts = _count(code, grid).to(_sums_dtype(values))
        ctx.mark_non_differentiable(counts)
        return counts, torch.zeros_like(counts), counts.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, step = ctx.saved_tensors
        grid, floor, ceiling = ctx.settings
        _, of_squares, of_loss = grads
        seen = grid.recompute(values, step, floor=floor, ceiling=ceiling)
        distance = seen.within - grid.decode(seen.code, step)
        pull, of_step = _bin_gradients(seen.code, distance, step if ctx.needs_input_grad[1] else None, of_squares, grid)
        loss = sum_by_channel(distance * pull).sum() / (2 * of_loss)
        logged = torch.where(of_loss == 0, 0.0, loss).to(ctx.dtype)
        of_values = where_unclipped(pull, values, floor, ceiling)
        return of_values, of_step, logged, None, None, None


def bin_sums(
    values: Tensor, step: Tensor, grid: Grid, *, clamp: bool = False, by_row: bool = False
) -> tuple[Tensor, Tensor]:
    """The parts of L_BR: of each bin, the number of its values and the sum of their squared distances to its level.

    Both are sums, so that those of the parts of a batch, or of ranks, add up to those of the whole.

    Args:
        values: any shape; NaN is in no bin.
        step: a scalar, or a shape that broadcasts.
        grid: the codes; K of them.
        clamp: values beyond the outermost levels have no distance.
        by_row: bins of each row of ``values (rows, columns)`` instead of the whole tensor's.

    Returns:
        Counts and sums, ``(K,)`` or ``(rows, K)``, float32 (float64 for such values). The sums are differentiable.
    """
    sums: tuple[Tensor, Tensor] = _BinSums.apply(at_least_float32(values), step, grid, clamp, by_row)  # type: ignore[no-untyped-call]
    return sums


def deferred_bin_sums(
    values: Tensor, step: Tensor, grid: Grid, logged: Tensor, *, floor: float = -math.inf, ceiling: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`bin_sums` of ``clip(values, floor, ceiling)`` whose squared distances are summed during backward, where
    they are nearly free: a value's term of the loss is its distance times its gradient, up to a factor.

    Args:
        values, step, grid: as for :func:`bin_sums`; NaN may be in any bin.
        logged: a scalar that requires grad. What it gets as its gradient is :func:`bin_loss` of these values (0 where
            that has no part in what is differentiated: its factor is 0).
        floor, ceiling: those of :func:`brfx.quant.lsq.lsq_quantize`, with whose backward compiled code shares its own.

    Returns:
        Counts; zeros whose gradient is that of the sums of squares; and a zero scalar to add to :func:`bin_loss`,
        through which backward learns the loss's factor.
    """
    deferred: tuple[Tensor, Tensor, Tensor] = _DeferredBinSums.apply(
        at_least_float32(values), step, logged, grid, floor, ceiling
    )  # type: ignore[no-untyped-call]
    return deferred


def bin_loss(counts: Tensor, squares: Tensor) -> Tensor:
    """L_BR of tensors given by their bins' ``counts`` and sums of ``squares``, shape ``(..., K)``; summed over all."""
    return (squares / counts.clamp(min=1)).sum()


def per_value_divisors(counts: Tensor, samples: int = 1) -> Tensor:
    """Divisors of the bins' squares in the place of their ``counts``, so that :func:`bin_loss` is

        sum_i (v_i - k_i * step)^2 / (2 * samples)

    and its gradient to each value ``(v - k*step) / samples``, however many values are in the bin and the tensor.
    """
    return torch.full_like(counts, 2 * samples)


#: Tensors of up to so many values are laid out in one array of rows; larger ones are worth kernels of their own.
_SMALL, _COLUMNS = 1 << 17, 1024


def joint_bin_sums(values: Sequence[Tensor], steps: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """:func:`bin_sums` of many tensors on one grid, each with its own bins, in a few kernels for all of them.

    Args:
        values: L tensors of any shapes, such as the weights of a network.
        steps: the step of each, a scalar or a shape that broadcasts.
        grid: the codes; K of them.

    Returns:
        Counts and sums, ``(L, K)``; tensors of up to 131,072 values come first.
    """
    small = [pair for pair in zip(values, steps, strict=True) if pair[0].numel() <= _SMALL]
    large = [pair for pair in zip(values, steps, strict=True) if pair[0].numel() > _SMALL]
    parts = [bin_sums(value, step, grid) for value, step in large]
    counts, squares = [counts for counts, _ in parts], [squares for _, squares in parts]
    if small:
        rows = [-(-value.numel() // _COLUMNS) for value, _ in small]
        if all(step.numel() == 1 for _, step in small):
            row_steps = torch.cat([step.reshape(1).expand(n) for (_, step), n in zip(small, rows, strict=True)])[
                :, None
            ]
        else:
            row_steps = _rows([step.expand_as(value) for value, step in small], rows, 1.0)
        sums = bin_sums(_rows([value for value, _ in small], rows, math.nan), row_steps, grid, by_row=True)
        counts = [part.sum(0) for part in torch.split(sums[0], rows)] + counts
        squares = [part.sum(0) for part in torch.split(sums[1], rows)] + squares
    return torch.stack(counts), torch.stack(squares)


def _rows(tensors: list[Tensor], rows: list[int], fill: float) -> Tensor:
    """The values of each tensor in rows of their own, the last one filled up."""
    flat: list[Tensor] = []
    for tensor, count in zip(tensors, rows, strict=True):
        flat += [tensor.reshape(-1), tensor.new_full((count * _COLUMNS - tensor.numel(),), fill)]
    return torch.cat(flat).view(-1, _COLUMNS)


def distances(values: Tensor, step: Tensor, grid: Grid, *, clamp: bool = False) -> tuple[Tensor, Tensor]:
    """Each value's code, and its signed distance to that code's level, 0 beyond the outermost levels with ``clamp``."""
    code = grid.encode(values, step)
    distance = values - grid.decode(code, step)
    if clamp:
        ratio = grid.ratio(values, step)
        distance = torch.where((ratio < grid.low) | (ratio > grid.high), 0.0, distance)
    return code, distance


def _bin_gradients(
    code: Tensor, distance: Tensor, step: Tensor | None, of_squares: Tensor, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """The gradients of values and step from those of the bins' squares."""
    pull = once(2 * of_squares) if of_squares.dim() == 1 else 2 * of_squares
    grad_values = distance * _look_up(pull, code, grid).to(distance.dtype)
    return grad_values, None if step is None else -(grid.in_steps(code) * grad_values).sum_to_size(step.shape)


def _sums_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _count(code: Tensor, grid: Grid) -> Tensor:
    """The number of values in each bin. For few bins, count how often each subset of the index's bits is set, then
    recover the bins by inclusion and exclusion; this compiles to plain sums."""
    if len(grid.codes) > _FEW:
        index = _index(code, grid).flatten()
        none = torch.zeros(len(grid.codes), dtype=torch.int32, device=code.device)
        return none.scatter_add(0, index, torch.ones_like(index, dtype=torch.int32))
    index = ((code - grid.low) / grid.codes.step).int()
    sets: list[Tensor] = []
    for bit in range(grid.bits):
        one = (index >> bit) & 1
        sets += [one, *(ones & one for ones in sets)]
    counts = torch.stack([index.new_full((), index.numel()), *(ones.sum(dtype=torch.int32) for ones in sets)])
    for bit in range(grid.bits):
        without, having = counts.view(-1, 2, 1 << bit).unbind(1)
        counts = torch.stack([without - having, having], 1).flatten()
    return counts


def _index(code: Tensor, grid: Grid) -> Tensor:
    """The index of each code among many; NaN has the first, so that it comes out as NaN and not as an error."""
    return (zero_for_nan(code - grid.low) / grid.codes.step).long()


def _by_index(code: Tensor) -> bool:
    """Whether bins are told apart by their index: in PyTorch's own kernels on CPUs, which are slow at masks."""
    return code.device.type == "cpu" and not torch.compiler.is_compiling()


def _flat_index(code: Tensor, grid: Grid, by_row: bool) -> Tensor:
    """The index of each value's bin among those of all rows, in memory order; each row has one bin more, for NaN."""
    count = len(grid.codes)
    index = code - grid.low
    index = (index if grid.codes.step == 1 else index.div_(grid.codes.step)).nan_to_num_(count).int()
    if by_row:
        index += (count + 1) * torch.arange(len(code), dtype=torch.int32)[:, None]
    return in_memory_order(index)


def _reduce(code: Tensor, squares: Tensor, grid: Grid, by_row: bool) -> tuple[Tensor, Tensor]:
    dtype = _sums_dtype(squares)
    squares = squares.to(dtype)
    if _by_index(code):
        index = _flat_index(code, grid, by_row)
        shape = (len(code) if by_row else 1, len(grid.codes) + 1)
        both = [torch.bincount(index, w, math.prod(shape)).view(shape) for w in (None, in_memory_order(squares))]
        counts, sums = ((part if by_row else part[0])[..., :-1].to(dtype) for part in both)
        return counts, sums
    if len(grid.codes) <= _FEW:
        members = [code == k for k in grid.codes]
        dim = -1 if by_row else tuple(range(code.dim()))
        counts = torch.stack([member.sum(dim, dtype=torch.int32) for member in members], -1)
        return counts.to(dtype), torch.stack([torch.where(member, squares, 0.0).sum(dim) for member in members], -1)
    if not by_row:
        code, squares = code.reshape(-1), squares.reshape(-1)
    inside, index = ~code.isnan(), _index(code, grid)
    bins = torch.zeros(*code.shape[:-1], len(grid.codes), dtype=dtype, device=code.device)
    counts = bins.int().scatter_add(-1, index, inside.int())  # in integers: floats stop at 2**24
    return counts.to(dtype), bins.scatter_add(-1, index, torch.where(inside, squares, 0.0))


def _look_up(table: Tensor, code: Tensor, grid: Grid) -> Tensor:
    """``table[..., i]`` for the i-th code of the grid; a table ``(rows, K)`` has one for each row of ``code``."""
    if _by_index(code):
        index = _flat_index(code, grid, by_row=table.dim() > 1)
        return from_memory_order(nn.functional.pad(table, (0, 1)).flatten().index_select(0, index), code)
    if len(grid.codes) > _FEW:
        index = _index(code, grid)
        return table[index] if table.dim() == 1 else table.gather(-1, index)
    columns = [column.unsqueeze(-1) for column in table.unbind(-1)]
    found = columns[0]
    for k, column in zip(grid.codes[1:], columns[1:], strict=True):
        found = torch.where(code == k, column, found)
    return found


@dataclass(frozen=True)
class BinDiagnosis:
    """The distribution of values in their bins. ``mean_part + variance_part`` is the loss."""

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
        counts, squares = bin_sums(values, step, self.grid, clamp=self.clamp)
        return squares.sum() / values.numel() if self.by_count else bin_loss(counts, squares)

    @torch.no_grad()
    def diagnose(self, values: Tensor, step: Tensor) -> BinDiagnosis:
        """The loss in two parts, computed from means and variances as in the paper."""
        grid, values, step = self.grid, in_float64(values), in_float64(step)
        code, distance = distances(values, step, grid, clamp=self.clamp)
        index = _index(code, grid).flatten()
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
