"""``torch.compile`` of functions that many models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from brfx.compat import recompilations

#: Of inductor's own choices, those that cost training time here.
_OPTIONS = {
    # When a value that several kernels read is written to memory instead of being made again in each. A batch norm's
    # output counts five reads, one more than inductor's limit, and a quantizer with its bins some 60 operations:
    # written out, none of it fuses with the reductions over it. Ten are what the bins' own gradient reads behind 2
    # bits: a map and its batch norm's three rows, a shortcut, the step, and 1/n of four bins. It is sensitive: of
    # ResNet-20's backward pass all that is not written over in place is 32 MB of maps at ten, 50 at eleven, 86 at
    # twelve, 98 at eight and 104 at nine (added up from TORCH_LOGS=output_code), and times go with it.
    "realize_reads_threshold": 10,
    "realize_opcount_threshold": 100,
    # Convolutions are channels-last in graphs that have one, but a backward graph has none: there what a depthwise
    # convolution reads was copied into the order that its weight's strides suggest (docs/benchmarks.md, MobileNetV2,
    # "FP32 in brfx.fit").
    "force_layout_optimization": True,
}


def compiled(
    function: Callable[..., Any], *, dynamic: bool = False, fullgraph: bool = False, **options: Any
) -> Callable[..., Any]:
    """``function`` through ``torch.compile``, for the shapes that it meets; ``options`` are inductor's.

    torch counts compilations by code, not by closure, and gives up after eight: the ninth model of a process, or the
    ninth shape of a chain, would run uncompiled or fail. Here there is room for 256.
    """
    inner = torch.compile(function, dynamic=dynamic, fullgraph=fullgraph, options=_OPTIONS | options)

    def run(*args: Any, **keywords: Any) -> Any:
        with recompilations(256):
            return inner(*args, **keywords)

    return run
