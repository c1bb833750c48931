"""Modules with a second form of their forward pass, which trains faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from brfx.kernels.hooks import has_hooks


class HasTrainingForm(nn.Module):
    """A module with a form that trains faster and computes the same.

    ``brfx.fit`` uses the form by itself. In a training loop of one's own :meth:`compile` lets calls use it.
    """

    def training_form(self, kernels: bool, *, deferred: bool = True) -> Callable[..., Any]:
        """A function that computes in training what calling this computes.

        Args:
            kernels: compile its pieces, for use without ``torch.compile`` around the whole.
            deferred: terms of the loss may come out of backward. They have their gradient in ``total`` and no value.
        """
        raise NotImplementedError

    def can_train(self) -> bool:
        """Whether the form would compute what a call computes now: it has no other mode."""
        return True

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let calls in training mode run the form that trains fastest, with its pieces compiled at the first call.

        It takes the place of ``torch.nn.Module.compile`` and no arguments; where there is no such form, it is that.
        Calls in eval mode, without gradients, with keyword arguments or with hooks run as before; of the hooks inside,
        those that were registered since.
        """
        if args or kwargs:
            raise TypeError("compile() takes no arguments here; torch.compile(module, ...) takes them")
        form = self.training_form(kernels=True, deferred=False)
        if form is self:
            super().compile()
            return

        known = {module for module in self.modules() if module is not self and has_hooks(module)}  # the form calls them

        def call(*inputs: Any, **keywords: Any) -> Any:
            trains = self.training and torch.is_grad_enabled() and self.can_train()
            if keywords or not trains or any(has_hooks(module) and module not in known for module in self.modules()):
                return self._call_impl(*inputs, **keywords)  # type: ignore[no-untyped-call]
            return form(*inputs)

        self._compiled_call_impl = call
