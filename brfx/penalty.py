"""The bin regularizers of a whole rewritten model, as a module that wraps it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brfx.binreg import BinRegularizer
from brfx.calibration import quantizers
from brfx.errors import ConfigError
from brfx.nn import LSQWeightQuantizer, QuantizedLayer, QuantizedMultiheadAttention
from brfx.observing import observed_forward, observed_sites


class BinLoss(NamedTuple):
    """``total`` is what to add to the task's loss; ``weight`` and ``act`` are L_BR before lambda."""

    total: Tensor
    weight: Tensor
    act: Tensor


class BinPenalty(nn.Module):
    """Wraps a rewritten model: ``output, br = BinPenalty(qmodel)(x)``; add ``br.total`` to the loss.

    Wrap *this* in DDP or ``torch.compile``, not the model inside it: the penalty reads the model's parameters, and a
    wrapper that does not see it gives every rank its own gradient.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned.
        weight: lambda of the weights' regularizer (``--lambda-br``); its gradient reaches the weight steps.
        act: lambda of the activations' regularizer (``--lambda-br-act``); its gradient reaches the layers above.
        act_gradient_to_step: let the activations' regularizer train the activation steps too
            (``--br-backprop-to-alpha-act``).
        freeze_weight_steps, freeze_act_steps: what :meth:`begin` freezes.

    Raises:
        ConfigError: a lambda is negative.
    """

    def __init__(
        self,
        qmodel: nn.Module,
        weight: float = 1.0,
        act: float = 1.0,
        *,
        act_gradient_to_step: bool = False,
        freeze_weight_steps: bool = False,
        freeze_act_steps: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("act", act)):
            if not value >= 0:
                raise ConfigError(f"{name}={value!r}: a lambda takes 0 or more")
        self.model = qmodel
        self.weight, self.act = float(weight), float(act)
        self.act_gradient_to_step = act_gradient_to_step
        self.freeze_weight_steps, self.freeze_act_steps = freeze_weight_steps, freeze_act_steps
        self._observed_forward = observed_forward(qmodel)
        self._sites = observed_sites(qmodel)
        self._layers = [
            module for module in qmodel.modules() if isinstance(module, (QuantizedLayer, QuantizedMultiheadAttention))
        ]

    def begin(self) -> None:
        """The warm-up is over: freeze the steps that were to be frozen when regularization starts."""
        for quantizer in quantizers(self.model).values():
            weight = isinstance(quantizer, LSQWeightQuantizer)
            if self.freeze_weight_steps if weight else self.freeze_act_steps:
                quantizer.step.requires_grad_(False)

    def forward(self, *inputs: Any) -> tuple[Any, BinLoss]:
        output, seen = self._observed_forward(self.model, *inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
            weight = self.weight_loss(seen)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.act > 0):
            act = self.act_loss(seen)
        return output, BinLoss(self.weight * weight + self.act * act, weight.detach(), act.detach())

    def weight_loss(self, seen: dict[str, Tensor]) -> Tensor:
        """L_BR summed over the quantized weights, those of layers and those that functions read; 0 without any."""
        pairs = [pair for layer in self._layers for pair in layer.regularized()]
        for site, values in seen.items():
            quantizer = self._sites[site]
            if isinstance(quantizer, LSQWeightQuantizer):
                pairs.append((values, quantizer))
        losses = [BinRegularizer(quantizer.bits, signed=True)(weight, quantizer.step) for weight, quantizer in pairs]
        return _total(losses, self.model)

    def act_loss(self, seen: dict[str, Tensor]) -> Tensor:
        """L_BR summed over what the observers saw; 0 if there are none."""
        losses = []
        for site, values in seen.items():
            quantizer = self._sites[site]
            if isinstance(quantizer, LSQWeightQuantizer):
                continue
            step = quantizer.step if self.act_gradient_to_step else quantizer.step.detach()
            losses.append(BinRegularizer(quantizer.bits, signed=quantizer.signed)(values, step))
        return _total(losses, self.model)


def _total(losses: list[Tensor], model: nn.Module) -> Tensor:
    if losses:
        return torch.stack(losses).sum()
    return torch.zeros((), device=next(model.parameters()).device)
