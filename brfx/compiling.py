"""``torch.compile`` of functions that many models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` through ``torch.compile``, for the shapes that it meets; ``options`` are torch's.

    torch counts compilations by code, not by closure, and gives up after eight: the ninth model of a process, or the
    ninth shape of a chain, would run uncompiled or fail. Here there is room for 256.
    """
    inner = torch.compile(function, **({"dynamic": False} | options))

    def run(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=256):
            return inner(*args)

    return run
