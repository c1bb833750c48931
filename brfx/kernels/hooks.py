"""Hooks of a module are reached by calling it alone, not by computing what it computes."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs code that somebody registered."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def give_hooks(module: nn.Module, new: nn.Module) -> None:
    """Let calls of ``new``, which takes the place of ``module``, run what was registered there."""
    for name, value in vars(module).items():
        if name.startswith(("_forward_", "_backward_", "_is_full_backward_hook")):
            vars(new)[name] = value.copy() if isinstance(value, dict) else value
