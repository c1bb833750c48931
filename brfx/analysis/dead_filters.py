"""Find filters that let nothing pass, and revive them or leave them out of the step's fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm

from brfx.analysis.observe import graphs
from brfx.errors import ConfigError
from brfx.graph.torch_ops import name_of
from brfx.graph.utils import call_counts, module_calls
from brfx.nn import ActivationObserver, ActivationQuantizer, QuantizedLayer
from brfx.quant.step_init import STEP_INIT_RULES

#: No value is expected so many deviations above a mean; of a normal's values a share of 3e-7 is.
_DEVIATIONS = 5.0

#: ``{layer: output channels}``
Filters = dict[str, list[int]]


def dead_filters(qmodel: nn.Module) -> dict[str, list[int]]:
    """The output channels of quantized convolutions and linears that let nothing of their input pass.

    Either all weights of the filter are quantized to 0. Or there is a batch norm behind it, in front of a ReLU, whose
    shift is so far below 0 that five deviations do not reach it (``bias <= -5 * |weight|``): no value passes the ReLU,
    and no gradient comes back.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned, calibrated; a layer without a step yet has no codes.

    Returns:
        ``{layer: channels}``, of layers that have such filters.
    """
    return _found(qmodel, lambda layer: layer.weight_quantizer.step if layer.weight_quantizer.calibrated else None)


def dead_at_start(qmodel: nn.Module, start: str) -> Filters:
    """:func:`dead_filters` at the steps that a start rule gives the weights."""

    def step(layer: Any) -> Tensor:
        quantizer = layer.weight_quantizer
        first: Tensor = quantizer.first_step(layer.weight.detach(), STEP_INIT_RULES[start])
        return first

    return _found(qmodel, step)


@torch.no_grad()
def revive(qmodel: nn.Module, dead: Filters, seed: int) -> None:
    """Give filters new weights: normal, with the root mean square of the layer's others, or He's where none is left.

    A batch norm behind gets the mean magnitude of its other weights, the shift 0, and the statistics of such an input,
    so that half of the values pass a ReLU. A bias becomes 0.

    Raises:
        ConfigError: a layer computes its weight; names it, and nothing has been changed.
    """
    norms, random = _norms(qmodel), torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {name: qmodel.get_submodule(name) for name in dead}
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ConfigError(
                f"dead_filters='revive': {name} computes its weight, which cannot be set: 'keep', 'ignore'"
            )
    for name, layer in layers.items():
        gone = _mask(layer, dead[name])
        weight, mask = layer.weight, _spread(layer, gone)
        others, fan_in = weight[~mask], weight.numel() // len(gone)
        deviation = others.square().mean().sqrt() if len(others) else weight.new_tensor((2 / fan_in) ** 0.5)
        weight.copy_(torch.where(mask, torch.randn(weight.shape, generator=random).to(weight) * deviation, weight))
        if layer.bias is not None:
            layer.bias[gone] = 0.0
        norm = norms.get(name, (None, False))[0]
        if norm is not None:
            _open(norm, gone)


def _open(norm: Any, gone: Tensor) -> None:
    """Let the channels ``gone`` of a batch norm be like the others, with no shift."""
    for values, value in ((norm.weight, None), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, None)):
        if values is not None:
            others = values[~gone].abs()
            values[gone] = value if value is not None else float(others.mean()) if len(others) else 1.0


def leave_out(qmodel: nn.Module, dead: Filters) -> None:
    """Let calibration fit the layers' steps to their other filters; where a layer has one step for all, and others."""
    for name, channels in dead.items():
        layer: Any = qmodel.get_submodule(name)
        mask = _spread(layer, _mask(layer, channels))
        if layer.weight_quantizer.step.numel() == 1 and not bool(mask.all()):
            layer.weight_quantizer.left_out = mask


def described(dead: Filters, most: int = 20) -> str:
    """``conv1 5, 6; conv2 0``, of the first layers."""
    parts = [f"{name} {', '.join(map(str, channels))}" for name, channels in dead.items()]
    more = f"; and of {len(parts) - most} more layers" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


@torch.no_grad()
def _found(qmodel: nn.Module, step_of: Callable[[Any], Tensor | None]) -> Filters:
    norms, found = _norms(qmodel), Filters()
    for name, layer in _layers(qmodel).items():
        step = step_of(layer)
        dead = torch.zeros(_filters(layer, layer.weight).shape[0], dtype=torch.bool, device=layer.weight.device)
        if step is not None:
            quantizer = layer.weight_quantizer
            dead |= (_filters(layer, quantizer.grid.in_steps(quantizer.encode(layer.weight, step))) == 0).all(1)
        norm, closes = norms.get(name, (None, False))
        if norm is not None and closes and norm.affine:
            dead |= norm.bias <= -_DEVIATIONS * norm.weight.abs()
        if bool(dead.any()):
            found[name] = dead.nonzero().flatten().tolist()
    return found


def _layers(qmodel: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None
    }


def _norms(qmodel: nn.Module) -> dict[str, tuple[AnyBatchNorm, bool]]:
    """The batch norm that alone reads a layer's output, and whether only ReLUs read what it writes; by layer."""
    found = {}
    for prefix, gm in graphs(qmodel).items():
        counts = call_counts(gm)
        for node, layer in module_calls(gm):
            if isinstance(layer, QuantizedLayer) and counts[str(node.target)] == 1 and len(node.users) == 1:
                (reader,) = node.users
                norm = _module(gm, reader)
                if isinstance(norm, AnyBatchNorm) and counts[str(reader.target)] == 1:
                    name = f"{prefix}.{node.target}" if prefix else str(node.target)
                    found[name] = norm, all(_is_relu(gm, user) for user in reader.users)
    return found


def _is_relu(gm: GraphModule, node: Node) -> bool:
    """Whether nothing below 0 passes a node, or any of its readers where it is an observer."""
    module = _module(gm, node)
    if isinstance(module, ActivationObserver):
        return all(_is_relu(gm, user) for user in node.users)
    if isinstance(module, ActivationQuantizer):
        return module.is_relu
    return isinstance(module, (nn.ReLU, nn.ReLU6)) or (module is None and name_of(node.target) in ("relu", "relu6"))


def _module(gm: GraphModule, node: Node) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def _filters(layer: Any, weight: Tensor) -> Tensor:
    """``weight`` with a row for each output channel."""
    if layer.channel_dim:
        weight = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _mask(layer: Any, channels: list[int]) -> Tensor:
    """True at these of the output channels."""
    mask = torch.zeros(len(_filters(layer, layer.weight)), dtype=torch.bool, device=layer.weight.device)
    mask[channels] = True
    return mask


def _spread(layer: Any, mask: Tensor) -> Tensor:
    """A mask of output channels as one of weights."""
    weight = layer.weight
    if layer.channel_dim:
        mask = mask.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1).flatten(0, 1)
    return mask.view(mask.shape + (1,) * (weight.dim() - mask.dim())).expand_as(weight)
