"""Initial step sizes: two rules from values to a first step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from brfx.quant.grid import Grid

#: ``(grid, values, step_shape) -> step``
StepInitRule = Callable[[Grid, Tensor, tuple[int, ...]], Tensor]

_SAMPLE = 2**16  # values per step, about, that the search looks at
_CANDIDATES = 64


def lsq_step_init(grid: Grid, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``2 * mean|v| / sqrt(Qp)`` (Esser et al., ICLR 2020, section 2.1); binary: ``mean|v|``."""
    return grid.start(_rows(values, shape).abs().mean(dim=1)).reshape(shape)


def mse_step_init(grid: Grid, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The step of least mean squared quantization error, searched between 1/64 and all of ``max|v| / Qp``.

    At 2 bits LSQ's formula gives weights 1.4 times, and heavy-tailed activations less than half, of this step; from
    this one a network is trained faster (docs/results.md).
    """
    rows = _rows(values, shape)
    rows = rows[:, :: _stride(rows.shape[1])]
    if grid.binary:
        return rows.abs().mean(dim=1).reshape(shape)  # the least-squares scale of a sign
    largest = rows.abs().amax(dim=1, keepdim=True) / grid.reach
    best, lower_bound = largest, torch.full_like(largest, torch.inf)
    for share in torch.logspace(-6, 0, _CANDIDATES, base=2.0).tolist():
        step = largest * share
        error = (rows - grid.decode(grid.encode(rows, step), step)).square().mean(dim=1, keepdim=True)
        best, lower_bound = torch.where(error < lower_bound, step, best), torch.minimum(error, lower_bound)
    return best.reshape(shape)


def _stride(count: int) -> int:
    """The stride by which to sample ``count`` values: the least that has no divisor in common with ``count``.

    Then it has none in common with any dimension of the tensor either, so the sample goes through every column, row and
    channel alike. A stride that divides the width would look at some columns only, the padded border perhaps.
    """
    stride = max(1, count // _SAMPLE)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


STEP_INIT_RULES: dict[str, StepInitRule] = {"lsq": lsq_step_init, "mse": mse_step_init}


def _rows(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values that share a step as one row each: ``(number of steps, values a step)``."""
    channel = next((dim for dim, size in enumerate(shape) if size != 1), None)
    return values.reshape(1, -1) if channel is None else values.movedim(channel, 0).flatten(1)
