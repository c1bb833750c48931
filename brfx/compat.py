"""What not every Python, torch or operating system has, asked for by what is there and not by version.

All such questions are asked in this file. Nothing here imports torch before it is called.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "factories_are_overridden",
    "float64_device",
    "in_float64",
    "memory_bytes",
    "recompilations",
    "saved_tensors_are_hooked",
    "tomllib",
]

#: What the memory is taken to be where the system does not tell.
_ASSUMED_MEMORY = 8 << 30


def memory_bytes() -> int:
    """The machine's memory in bytes; 8 GiB where the system does not tell, as Windows does not."""
    try:
        size, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such call, no such name, no answer
        return _ASSUMED_MEMORY
    return size * pages if min(size, pages) > 0 else _ASSUMED_MEMORY


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums over values on ``device`` are kept: there, but for MPS, which has no float64."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def in_float64(values: Tensor) -> Tensor:
    """``values`` in float64, on the CPU where their device has none."""
    return values.to(float64_device(values.device)).double()


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves goes through hooks, such as ``torch.autograd.graph.save_on_cpu``; gradients are on.

    Older versions of torch do not tell, but a saved tensor takes hooks once. Hooks see that one tensor.
    """
    import torch

    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return top(True) is not None
    with torch._C.DisableTorchFunction():
        node: Any = torch.ones((), requires_grad=True).exp().grad_fn
        try:
            node._raw_saved_result.register_hooks(lambda saved: saved, lambda packed: packed)
        except RuntimeError:
            return True
    return False


def recompilations(most: int) -> AbstractContextManager[Any]:
    """Let ``torch.compile`` compile one code so many times; torch 2.6 has the setting under another name."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return config.patch(**{name: most})  # type: ignore[no-any-return]


@cache
def factories_are_overridden() -> bool:
    """Whether ``torch.arange(size)`` and the like ask ``size.__torch_function__``, as torch 2.6 does not."""
    import torch

    class Number:
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> bool:
            return True

    try:
        return torch.arange(Number()) is True  # type: ignore[call-overload, comparison-overlap]
    except TypeError:
        return False
