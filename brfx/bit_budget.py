"""Which layer gets how many bits: the least sum of measured losses that a budget of weights allows, found exactly.

Losses of single layers are added up, as if their errors did not meet. HAWQ-V2 (Dong et al., NeurIPS 2020) and ZeroQ
(Cai et al., CVPR 2020) assume the same. What is left is a multiple-choice knapsack problem: one width of each layer.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from brfx.analysis.sensitivity import LayerSensitivity, weighted_layers
from brfx.config.checks import Override
from brfx.config.qat import QATConfig, matches
from brfx.errors import ConfigError
from brfx.export.integer import integer_model
from brfx.export.layers import FloatLayer, IntegerConv, IntegerLinear
from brfx.export.packing import packed_bytes
from brfx.metadata import metadata_of
from brfx.nn import QuantizedMultiheadAttention, Quantizer, WeightQuantizer


@dataclass(frozen=True)
class Choice:
    """One width that a layer may have: its ``bits``, what it costs of the budget, and the loss that goes with it."""

    bits: int
    cost: int
    loss: float


def knapsack(layers: Sequence[Sequence[Choice]], budget: int) -> list[Choice] | None:
    """One choice a layer, of least total loss at a total cost of at most ``budget``; of equals the cheapest.

    Layer by layer it keeps the partial sums that no other one beats in both cost and loss. It drops those that even the
    linear relaxation of the layers to come cannot bring below a known solution. So it is exact.

    Args:
        layers: the choices of each.
        budget: of costs, whole numbers.

    Returns:
        A choice for each layer, or ``None`` where the cheapest ones cost more than the budget.
    """
    cheapest = [min(choices, key=lambda choice: (choice.cost, choice.loss)) for choices in layers]
    if sum(choice.cost for choice in cheapest) > budget:
        return None
    rest = _relaxations(layers)
    best = _rounded(layers, budget)
    slack = 1e-12 * sum(max(abs(choice.loss) for choice in choices) for choices in layers)  # of the order of summing
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []  # of each sum, the one before and the choice
    for place, choices in enumerate(layers):
        costs = (cost[:, None] + np.array([choice.cost for choice in choices])).ravel()
        losses = (loss[:, None] + np.array([choice.loss for choice in choices])).ravel()
        bound = losses + rest[place + 1].least(budget - costs)
        kept = np.flatnonzero(bound <= best + slack)
        kept = kept[np.lexsort((losses[kept], costs[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(losses[kept])[:-1]])
        kept = kept[losses[kept] < before]
        cost, loss = costs[kept], losses[kept]
        trail.append((kept // len(choices), kept % len(choices)))
    state, chosen = int(np.argmin(loss)), []
    for choices, (previous, choice) in zip(reversed(layers), reversed(trail), strict=True):
        chosen.append(choices[int(choice[state])])
        state = int(previous[state])
    return chosen[::-1]


@dataclass(frozen=True)
class _Relaxation:
    """The least total loss of some layers as a function of their budget, where fractions of choices may be taken."""

    cost: np.ndarray[Any, Any]  #: corners, ascending
    loss: np.ndarray[Any, Any]

    def least(self, budget: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.interp(budget, self.cost, self.loss)
        return np.where(budget < self.cost[0], np.inf, found)


def _relaxations(layers: Sequence[Sequence[Choice]]) -> list[_Relaxation]:
    """For each place the relaxation of the layers from it on: their convex hulls' edges, steepest first."""
    edges: list[tuple[float, int, float]] = []
    cost, loss = 0, 0.0
    found = [_Relaxation(np.zeros(1), np.zeros(1))]
    for choices in reversed(layers):
        hull = _hull(choices)
        cost, loss = cost + hull[0].cost, loss + hull[0].loss
        for a, b in pairwise(hull):
            edges.append(((b.loss - a.loss) / (b.cost - a.cost), b.cost - a.cost, b.loss - a.loss))
        edges.sort()
        steps = np.cumsum([[0.0, 0.0], *([width, drop] for _, width, drop in edges)], axis=0)
        found.append(_Relaxation(cost + steps[:, 0], loss + steps[:, 1]))
    return found[::-1]


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull, by rising cost and falling loss."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and (hull[-1].loss - hull[-2].loss) * (choice.cost - hull[-2].cost) >= (
            choice.loss - hull[-2].loss
        ) * (hull[-1].cost - hull[-2].cost):
            hull.pop()
        hull.append(choice)
    return hull


def _rounded(layers: Sequence[Sequence[Choice]], budget: int) -> float:
    """The loss of a whole solution: up the hulls' edges, steepest first, as far as the budget goes."""
    hulls = [_hull(choices) for choices in layers]
    at = [0] * len(hulls)
    left = budget - sum(hull[0].cost for hull in hulls)
    edges = sorted(
        ((b.loss - a.loss) / (b.cost - a.cost), layer, place)
        for layer, hull in enumerate(hulls)
        for place, (a, b) in enumerate(pairwise(hull))
    )
    for _, layer, place in edges:
        wanted = hulls[layer][place + 1].cost - hulls[layer][place].cost
        if at[layer] == place and wanted <= left:
            at[layer], left = place + 1, left - wanted
    return sum(hull[place].loss for hull, place in zip(hulls, at, strict=True))


def assign_bits(
    qmodel: nn.Module,
    sensitivities: Iterable[LayerSensitivity],
    *,
    mean_bits: float | None = None,
    size: int | None = None,
) -> tuple[Override, ...]:
    """The bits of every layer's weights that lose least within a budget, as overrides for :class:`brfx.QATConfig`.

    A layer whose bits an override of the model's own configuration names keeps them, and what is left of the budget is
    for the others. Bits of activations stay as they are.

    Args:
        qmodel: the model that was measured.
        sensitivities: what :func:`brfx.sensitivity` gave for it; the widths it tried are those that are chosen from.
        mean_bits: a budget in bits, a mean over all quantized weights.
        size: a budget in bytes of an exported file's weights (:func:`weight_bytes`): a code takes 2, 4 or 8 bits there,
            and a weight that stays in FP32 takes 32.

    Returns:
        ``(layer, {"weight_bits": ...})`` for each layer that was free, then the configuration's own overrides.

    Raises:
        ConfigError: not one of the two budgets is given, it is below the least possible, which the message names, a
            layer was not measured, or weights that belong to no layer are quantized, whose bits cannot be set alone.
    """
    if (mean_bits is None) == (size is None):
        raise ConfigError("assign_bits takes one budget, mean_bits= or size=")
    _require_layers_alone(qmodel)
    config = metadata_of(qmodel).config
    found, free = weighted_layers(qmodel), free_layers(qmodel)
    measured = {layer.name: layer.losses for layer in sensitivities if layer.kind == "weights"}
    classes: dict[str, list[Choice]] = {}
    for name, layer in found.items():
        losses = measured.get(name) if name in free else {_bits(layer): 0.0}
        if losses is None:
            raise ConfigError(f"{name}: its sensitivity is missing; give what brfx.sensitivity gave for this model")
        classes[name] = [Choice(bits, _cost(layer, bits, size is not None), loss) for bits, loss in losses.items()]
    count = sum(map(sum, map(_counts, found.values())))
    left_in_float = 4 * _float_weights(qmodel)
    budget = size - left_in_float if size is not None else math.floor((mean_bits or 0) * count + 1e-6)
    chosen = knapsack(list(classes.values()), budget)
    if chosen is None:
        least = sum(min(choice.cost for choice in choices) for choices in classes.values())
        if size is None:
            raise ConfigError(f"{mean_bits:g} bits a weight are too few: widths and overrides take {least / count:.3g}")
        floats = f", {left_in_float:,} of them for weights in FP32" if left_in_float else ""
        raise ConfigError(f"{size:,} bytes are too few: the weights take {least + left_in_float:,}{floats}")
    overrides = [
        (glob.escape(name), _settings(config, choice.bits))
        for name, choice in zip(classes, chosen, strict=True)
        if name in free
    ]
    return (*overrides, *config.overrides)


def layer_bits(qmodel: nn.Module) -> dict[str, int]:
    """The bits of each layer's weights, of those that are quantized."""
    return {name: _bits(layer) for name, layer in weighted_layers(qmodel).items()}


def mean_bits(qmodel: nn.Module) -> float | None:
    """The mean bits of all weights of quantized layers; ``None`` where there are none."""
    pairs = [pair for layer in weighted_layers(qmodel).values() for pair in layer.regularized()]
    count = sum(weight.numel() for weight, _ in pairs)
    return sum(quantizer.bits * weight.numel() for weight, quantizer in pairs) / count if count else None


def free_layers(qmodel: nn.Module) -> list[str]:
    """The layers whose weights' bits no override of the configuration names, so that a budget may."""
    config = metadata_of(qmodel).config
    return [name for name, layer in weighted_layers(qmodel).items() if not _is_fixed(config, name, layer)]


def weight_bytes(qmodel: nn.Module) -> int:
    """Bytes that an exported file has for the weights of a calibrated model, its parameters of two or more dimensions.

    Codes lie in fields of 2, 4 or 8 bits; a weight that stays in FP32 takes four bytes. Scales, biases and the graph
    come on top.

    Raises:
        NotCalibratedError, ExportError: as :func:`brfx.export.integer.integer_model`.
    """
    integer = integer_model(qmodel).model
    total = 4 * _float_weights(integer)
    for module in integer.modules():
        if isinstance(module, (IntegerConv, IntegerLinear, FloatLayer)):
            codes = module.codes if isinstance(module, FloatLayer) else module.weight
            total += packed_bytes(codes.numel(), module.storage.bits)
    left = [pair for layer in weighted_layers(integer).values() for pair in layer.regularized()]
    return total + sum(packed_bytes(weight.numel(), quantizer.bits) for weight, quantizer in left)


def _float_weights(model: nn.Module) -> int:
    """How many weights no quantizer reads."""
    quantized = {id(weight) for layer in weighted_layers(model).values() for weight, _ in layer.regularized()}
    steps = {id(step) for module in model.modules() if isinstance(module, Quantizer) for step in module.parameters()}
    left = [parameter for parameter in model.parameters() if id(parameter) not in quantized | steps]
    return sum(parameter.numel() for parameter in left if parameter.dim() > 1)


def _require_layers_alone(qmodel: nn.Module) -> None:
    own = {id(quantizer) for layer in weighted_layers(qmodel).values() for _, quantizer in layer.regularized()}
    for name, module in qmodel.named_modules():
        if isinstance(module, WeightQuantizer) and id(module) not in own:
            raise ConfigError(f"{name}: a budget gives bits to layers, and this weight belongs to a function; skip it")


def _is_fixed(config: QATConfig, name: str, layer: nn.Module) -> bool:
    """Whether an override of the configuration says how many bits a layer's weights have."""
    kind = type(layer).__name__.removeprefix("Quantized")
    own = [settings for pattern, settings in config.overrides if settings and matches(pattern, name, kind)]
    return any("bits" in settings or "weight_bits" in settings for settings in own)


def _settings(config: QATConfig, bits: int) -> dict[str, Any]:
    return {"weight_bits": bits, "weight_grid": "signed"} if config.symmetric and bits > 4 else {"weight_bits": bits}


def _bits(layer: Any) -> int:
    bits: int = layer.regularized()[0][1].bits
    return bits


def _counts(layer: Any) -> list[int]:
    """How many weights a layer has in each tensor of an exported file."""
    packed = isinstance(layer, QuantizedMultiheadAttention) and layer.packed  # query, key and value in one
    pairs = layer.regularized()
    parts = pairs[0][0].chunk(3) if packed else (pairs[0][0],)
    return [weight.numel() for weight in (*parts, *(weight for weight, _ in pairs[1:]))]


def _cost(layer: Any, bits: int, in_bytes: bool) -> int:
    return sum(packed_bytes(count, bits) if in_bytes else bits * count for count in _counts(layer))
