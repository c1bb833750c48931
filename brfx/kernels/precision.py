"""Floats of enough digits."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32 at least: the 8 bits of a bfloat16 do not tell neighbouring codes apart."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
