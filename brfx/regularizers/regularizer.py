"""The regularizer protocol, and several regularizers as one penalty."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brfx.errors import ConfigError
from brfx.kernels.inductor import compiled
from brfx.kernels.training_form import HasTrainingForm


class Regularizer(HasTrainingForm):
    """A module around the trained one, ``penalty(*inputs) -> (output, terms)``, for :func:`brfx.fit`.

    ``terms`` is a named tuple: ``total`` is added to the loss, and :attr:`logged_terms` are written to the log.
    """

    @property
    def logged_terms(self) -> tuple[str, ...]:
        """The fields of ``terms`` that are logged: those that are trained."""
        raise NotImplementedError

    def begin(self) -> None:
        """The warm-up is over."""

    def training_form(self, kernels: bool, *, deferred: bool = True) -> Callable[..., tuple[Any, Any]]:
        """See :class:`~brfx.kernels.training_form.HasTrainingForm`; here the module itself."""
        return self


class WeightTerm(nn.Module):
    """A regularizer that needs the weights alone: calling it gives its loss, a scalar, before lambda.

    Args:
        strength: lambda.

    Raises:
        ConfigError: it is negative.
    """

    name: ClassVar[str]  #: under which its loss is logged
    strength: Tensor

    def __init__(self, strength: float) -> None:
        super().__init__()
        if not strength >= 0:
            raise ConfigError(f"{self.name}={strength!r}: a lambda takes 0 or more")
        self.register_buffer("strength", torch.tensor(float(strength)), persistent=False)

    def forward(self) -> Tensor:
        raise NotImplementedError


class Regularizers(Regularizer):
    """Several regularizers as one penalty.

    ``total`` is that of ``run``, if it is a regularizer, plus ``strength * loss`` of each term; its logged terms and
    each loss, before lambda, are the other fields.

    Args:
        run: the rewritten model, or a regularizer around it such as :class:`brfx.BinPenalty`.
        terms: regularizers of the model's weights.

    Raises:
        ConfigError: two of them have one name.
    """

    def __init__(self, run: nn.Module, *terms: WeightTerm) -> None:
        super().__init__()
        self.run, self._list = run, nn.ModuleList(terms)
        self._list.to(next(run.parameters()).device)
        names = self.logged_terms
        if len(set(names)) < len(names):
            raise ConfigError(f"two regularizers of one name: {', '.join(names)}")
        self._fields = namedtuple("Terms", ("total", *names))  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but a class that is made of the names."""
        return {name: value for name, value in super().__getstate__().items() if name != "_fields"}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._fields = namedtuple("Terms", ("total", *self.logged_terms))  # type: ignore[misc]

    @property
    def terms(self) -> list[WeightTerm]:
        return list(self._list)  # type: ignore[arg-type]

    @property
    def logged_terms(self) -> tuple[str, ...]:
        inner = self.run.logged_terms if isinstance(self.run, Regularizer) else ()
        return (*inner, *(term.name for term in self.terms))

    def begin(self) -> None:
        if isinstance(self.run, Regularizer):
            self.run.begin()

    def forward(self, *inputs: Any) -> tuple[Any, Any]:
        return self._joined(self.run(*inputs), self._losses())

    def training_form(self, kernels: bool, *, deferred: bool = True) -> Callable[..., tuple[Any, Any]]:
        run: Callable[..., Any] = self.run
        if isinstance(self.run, HasTrainingForm):
            run = self.run.training_form(kernels, deferred=deferred)
        losses = compiled(self._losses) if kernels else self._losses
        return lambda *inputs: self._joined(run(*inputs), losses())

    def can_train(self) -> bool:
        return not isinstance(self.run, HasTrainingForm) or self.run.can_train()

    def _losses(self) -> list[Tensor]:
        return [term() for term in self.terms]

    def _joined(self, result: Any, losses: list[Tensor]) -> tuple[Any, Any]:
        total = torch.stack([term.strength * loss for term, loss in zip(self.terms, losses, strict=True)]).sum()
        inner: tuple[Tensor, ...] = ()
        if isinstance(self.run, Regularizer):
            result, terms = result
            total = terms.total + total
            inner = tuple(getattr(terms, name) for name in self.run.logged_terms)
        return result, self._fields(total, *inner, *(loss.detach() for loss in losses))
