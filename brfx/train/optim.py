"""Parameter groups, the optimizer, and the schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from brfx.config import TrainConfig


def parameter_groups(
    model: nn.Module, lr: float, step_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` in groups for an optimizer, those that are empty left out.

    Weights of two or more dimensions decay; biases and norms do not. Parameters that a module names in its class
    attribute ``own_rate``, as quantizers name their steps, have a rate of their own and do not decay either.

    Args:
        model: any module, such as what :func:`brfx.prepare_qat` returned.
        lr: learning rate of weights, biases and norms.
        step_lr: of the quantizers' steps; default ``lr``.
        weight_decay: of the first group.
    """
    own = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "own_rate", ())
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = [parameter for parameter in trained if id(parameter) not in own]
    step_lr = lr if step_lr is None else step_lr
    groups: list[dict[str, Any]] = [
        {"params": [p for p in common if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in common if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in own], "lr": step_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over :func:`parameter_groups`.

    Both are fused: one kernel over all parameters, which does nothing where a flag on their device, ``found_inf``, says
    so.
    """
    groups = parameter_groups(model, config.lr, config.step_lr, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    momentum = config.momentum
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum > 0:  # a first update that found_inf stops would leave memory that nobody wrote as the momentum
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def rate_factor(iteration: int, total: int, rise: float) -> float:
    """The factor of the peak rate at ``iteration`` of ``total``: a linear rise, then half a cosine down to 0."""
    rising = math.ceil(rise * total)
    if iteration < rising:
        return (iteration + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (iteration - rising) / max(1, total - rising)))
