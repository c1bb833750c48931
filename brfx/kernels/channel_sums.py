"""Sums by channel that compiled code on CPUs takes in one reading of a map.

A reduction over all but the channels of a channels-last map becomes a loop over groups of 8 or 16 channels around one
over all pixels: the map goes through the cache once for each group. The tiles here, a line of the image each, stay in
the cache meanwhile. And what is the same for all pixels of a channel, such as the root of its variance, is computed
again for each pixel there, and once here (``python benchmarks/tiles.py`` compares).
"""

from __future__ import annotations

from torch import Tensor

#: Channels must be a multiple: inductor's reduction over a line that it reads in two layouts at once stores a whole
#: vector of channels even where fewer are left, over what lies behind (seen in torch 2.14).
_VECTOR = 16


def in_lines(values: Tensor) -> bool:
    """Whether sums over ``values (batch, channels, ...)`` are to be made line by line."""
    return values.dim() > 2 and values.shape[1] % _VECTOR == 0 and values.device.type == "cpu"


def sum_by_channel(values: Tensor) -> Tensor:
    """``values (batch, channels, ...)`` summed over all but the channels, ``(channels,)``."""
    if in_lines(values):
        return values.movedim(1, -1).sum(-2).flatten(0, -2).sum(0)
    return values.sum([dim for dim in range(values.dim()) if dim != 1])


def once(row: Tensor) -> Tensor:
    """``row (n,)``, which inductor then computes once instead of inside the loop that reads it: it inlines all but
    reductions, and takes reductions of few values apart."""
    return row.expand(_VECTOR, -1).amax(0)
