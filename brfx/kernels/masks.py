"""Clamping, and zeros outside an interval, each in the form that runs fast where it runs.

Compiled code has ``torch.where`` and a comparison nearly free. PyTorch's own kernel for ``torch.where`` on CPUs is not
vectorized: it takes as long as ten kernels that are, such as ``hardtanh_backward`` and ``clamp``.
"""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import Tensor


def _hardtanh_backward(values: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """It lies in memory as ``x`` does: the gradient behind a pooling does not, and batch norms are slow at it."""
    out = torch.empty_like(x)
    return torch.ops.aten.hardtanh_backward.grad_input(values, x, low, high, grad_input=out)  # type: ignore[no-any-return]


def clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """``x.clamp(low, high)``, without what a clamp that hands on NaN costs compiled code; ``None`` is no bound."""
    if not torch.compiler.is_compiling():
        return x if low is None and high is None else x.clamp(low, high)
    if high is not None:
        x = torch.where(x > high, high, x)
    return x if low is None else torch.where(x < low, low, x)


def keep_between(values: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``values`` where ``low < x < high``, else 0; either where ``x`` is NaN or infinite."""
    if not torch.compiler.is_compiling():
        return _hardtanh_backward(values, x, low, high)
    return _zero_where(values, [x <= low] * (low > -torch.inf) + [x >= high] * (high < torch.inf))


def keep_within(values: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``values`` where ``low <= x <= high``, else 0; either where ``x`` is NaN or infinite."""
    if not torch.compiler.is_compiling():
        return _hardtanh_backward(values, x, *_just_outside(low, high, x.dtype))
    return _zero_where(values, [x < low] * (low > -torch.inf) + [x > high] * (high < torch.inf))


def _zero_where(values: Tensor, masks: list[Tensor]) -> Tensor:
    return torch.where(reduce(torch.logical_or, masks), 0.0, values) if masks else values


@cache
def _just_outside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number below ``low`` and the smallest above ``high``."""
    bounds = torch.tensor([low, high], dtype=dtype)
    ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    below, above = torch.nextafter(bounds, ends).tolist()
    return below, above


def zero_for_nan(x: Tensor) -> Tensor:
    """``x`` with 0 for NaN."""
    if not torch.compiler.is_compiling():
        return x.nan_to_num(0.0, torch.inf, -torch.inf)
    return torch.where(x == x, x, 0.0)  # it compiles to vectors, which nan_to_num does not
