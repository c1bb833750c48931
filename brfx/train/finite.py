"""Find the origin of a loss or gradient that is not finite."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path
from torch.utils.hooks import RemovableHandle

from brfx.distributed import world_size
from brfx.modes import eval_mode
from brfx.train.tasks import call


def culprit(model: nn.Module, inputs: Any, loss: Tensor, targets: Any = None) -> str:
    """What is not finite first: an input, a target, a weight, a layer's output, the loss, or a layer's gradient.

    Buffers are not looked at: running statistics have taken in by now whatever a layer before them put out.

    Args:
        model: with its gradients as backward left them.
        inputs: of the batch, images ``(batch, ...)`` or what the task has; forward may run on them once more, which
            moves batch norms' running statistics, in eval mode where several ranks train: there not all of them come
            here.
        loss: of the batch.
        targets: of the batch.
    """
    bad = _first_bad_value("image" if isinstance(inputs, Tensor) else "input", inputs) or _first_bad_value(
        "target", targets
    )
    if bad:
        return f"{bad} of the batch holds NaN or infinity"
    for name, value in model.named_parameters():
        if value.requires_grad and not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinity"
    if not bool(torch.isfinite(loss)):
        layer = _first_layer(model, inputs)
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


def _first_bad_value(what: str, values: Any) -> str | None:
    """Where in ``values`` there is the first tensor that is not finite: ``"image 3"``, ``"input ['x'] 0"``."""
    for path, value in tree_leaves_with_path(values):
        if not isinstance(value, Tensor) or _finite(value):
            continue
        rows = ~torch.isfinite(value.reshape(len(value) if value.dim() else 1, -1)).all(1)
        return f"{what} {keystr(path)} {int(rows.nonzero()[0])}".replace("  ", " ")
    return None


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


@torch.no_grad()
def _first_layer(model: nn.Module, inputs: Any) -> str | None:
    found: list[str] = []
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(map(_finite, tree_leaves(output))):
                found.append(name)

        return check

    for name, module in model.named_modules():
        if name:  # of a module inside another the inner one is done first
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with nullcontext() if world_size() == 1 else eval_mode(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
