"""A map's values in the order in which they lie in memory, so that one long loop reads them without a copy."""

from __future__ import annotations

from torch import Tensor


def in_memory_order(values: Tensor) -> Tensor:
    """``values`` as one row, a view where they lie without gaps; maps of one layout get one order."""
    return values.permute(_order(values)).reshape(-1)


def from_memory_order(row: Tensor, like: Tensor) -> Tensor:
    """What :func:`in_memory_order` made a row of, in the shape and layout of ``like``."""
    order = _order(like)
    return row.view([like.shape[dim] for dim in order]).permute(sorted(range(like.dim()), key=order.__getitem__))


def _order(values: Tensor) -> list[int]:
    return sorted(range(values.dim()), key=values.stride, reverse=True)
