"""``torch.compile`` of functions that many models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: When inductor writes a value to memory that several kernels read, instead of making it again in each. A batch norm's
#: output counts five reads, one more than inductor's own limit, and a quantizer with its bins some 60 operations:
#: written out, none of it fuses with the reductions over it (docs/benchmarks.md: a step took 15 % longer).
_REMAKE = {"realize_reads_threshold": 8, "realize_opcount_threshold": 100}


def compiled(
    function: Callable[..., Any], *, dynamic: bool = False, fullgraph: bool = False, **options: Any
) -> Callable[..., Any]:
    """``function`` through ``torch.compile``, for the shapes that it meets; ``options`` are inductor's.

    torch counts compilations by code, not by closure, and gives up after eight: the ninth model of a process, or the
    ninth shape of a chain, would run uncompiled or fail. Here there is room for 256.
    """
    inner = torch.compile(function, dynamic=dynamic, fullgraph=fullgraph, options=_REMAKE | options)

    def run(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=256):
            return inner(*args)

    return run
