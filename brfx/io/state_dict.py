"""Restore the metadata of state dicts that lost it, such as a class's version."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def versioned(state: Mapping[str, Tensor], module: nn.Module) -> OrderedDict[str, Tensor]:
    """``state`` with the metadata of ``module``'s own state dict where it has none.

    A dictionary that was rebuilt key by key has lost them, and a class that asks for its version (torchvision's
    MNASNet) then refuses its own weights.
    """
    complete: Any = OrderedDict(state)
    complete._metadata = getattr(state, "_metadata", None) or getattr(module.state_dict(), "_metadata", None)
    return complete  # type: ignore[no-any-return]
