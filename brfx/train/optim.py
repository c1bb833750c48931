"""Which parameter gets which rate and decay, and how the rate runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from brfx.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over three groups: decayed weights, undecayed vectors, and parameters with a rate of their own.

    A module names the last kind in a class attribute ``own_rate``; the trainer need not know what they are.
    Both are fused: one kernel over all parameters, which does nothing where a flag on their device, ``found_inf``, says
    so.
    """
    own = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "own_rate", ())
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = [parameter for parameter in trained if id(parameter) not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in common if p.dim() > 1], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in common if p.dim() <= 1], "lr": config.lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in own], "lr": config.step_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    momentum = config.momentum
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum > 0:  # a first update that found_inf stops would leave memory that nobody wrote as the momentum
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def rate_factor(iteration: int, total: int, rise: float) -> float:
    """What multiplies the peak rate at ``iteration`` of ``total``: a linear rise, then half a cosine down to 0."""
    rising = math.ceil(rise * total)
    if iteration < rising:
        return (iteration + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (iteration - rising) / max(1, total - rising)))
