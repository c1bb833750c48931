"""Find the origin of a loss or gradient that is not finite."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from brfx.distributed import world_size
from brfx.modes import eval_mode


def culprit(model: nn.Module, images: Tensor, loss: Tensor) -> str:
    """What is not finite first: an image, a weight, a layer's output, the loss, or a layer's gradient.

    Buffers are not looked at: running statistics have taken in by now whatever a layer before them put out.

    Args:
        model: with its gradients as backward left them.
        images: the batch, ``(batch, ...)``; forward may run on it once more, which moves batch norms' running
            statistics, in eval mode where several ranks train: there not all of them come here.
        loss: of the batch.
    """
    bad = (~torch.isfinite(images.flatten(1)).all(1)).nonzero().flatten().tolist()
    if bad:
        return f"image {bad[0]} of the batch holds NaN or infinity"
    for name, value in model.named_parameters():
        if value.requires_grad and not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinity"
    if not bool(torch.isfinite(loss)):
        layer = _first_layer(model, images)
        return f"the output of {layer} is not finite" if layer else f"the loss is {float(loss.detach())}"
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if names:
        return f"the gradient of {names[-1]} is not finite"
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    if bool(torch.isfinite(norm)):
        return "its loss or gradient was not finite, but is when run once more"
    return "the gradient's norm overflows"


@torch.no_grad()
def _first_layer(model: nn.Module, images: Tensor) -> str | None:
    found: list[str] = []
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Any:
        def sync(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return sync

    for name, module in model.named_modules():
        if name:  # of a module inside another the inner one is done first
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with nullcontext() if world_size() == 1 else eval_mode(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
