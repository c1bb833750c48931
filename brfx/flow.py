"""Dataflow over a graph: which values already lie on a quantizer's grid, and which may be negative."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from brfx.nn import ActivationObserver, LSQActivationQuantizer, LSQQuantizer, ResidualAdd
from brfx.operators import JOINS, KEEPS_SIGN, LINEAR, NONNEGATIVE, linear_op, name_of, passes, words
from brfx.trace import by_mode

#: Averages of codes over n positions are codes of an n times finer grid.
AVERAGES = words("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean")


@dataclass(frozen=True)
class Flow:
    """What is known of a value.

    Attributes:
        grid: the quantizer's node whose levels these are; ``None`` if they are on no grid.
        negative: whether it may be negative.
        source: torch's name of what made it, such as ``"relu"``.
        from_input: computed from the graph's inputs alone, no layer in between: an image, normalized or not.
        factor: what the grid's levels are multiplied by on the way here.
    """

    grid: Node | None
    negative: bool
    source: str
    from_input: bool = False
    factor: float = 1.0


def analyse(gm: GraphModule) -> dict[Node, Flow]:
    """The :class:`Flow` of every node, in one walk in order of execution."""
    flows: dict[Node, Flow] = {}
    for node in gm.graph.nodes:
        flows[node] = _flow(gm, node, flows)
    return flows


def operation(gm: GraphModule, node: Node) -> tuple[str | None, tuple[Any, ...], dict[str, Any]]:
    """torch's name of what a node does, with its arguments; a module of torch's speaks for its function."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return module_name(module), node.args, dict(node.kwargs) | _settings(module)
    if node.op in ("call_function", "call_method"):
        return name_of(node.target), node.args, dict(node.kwargs)
    return None, node.args, dict(node.kwargs)


def module_name(module: nn.Module) -> str | None:
    """``"max_pool2d"`` for ``nn.MaxPool2d``; ``None`` for a class that is not torch's or torchvision's."""
    if isinstance(module, (ActivationObserver, nn.Identity)):
        return "clone"
    if not type(module).__module__.startswith(("torch.", "torchvision.ops")):
        return None
    name = type(module).__name__
    if name.endswith("Pad1d") or name.endswith("Pad2d") or name.endswith("Pad3d"):
        return "pad"
    if name in _WORDS:
        return _WORDS[name]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


_WORDS = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "PReLU": "prelu",
    "LeakyReLU": "leaky_relu",
    "UpsamplingNearest2d": "clone",
    "Upsample": "interpolate",
}


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module holds that its function takes as an argument, and that matters here."""
    values = {name: getattr(module, name, None) for name in ("value", "mode", "min_val")}
    return {name: value for name, value in values.items() if isinstance(value, (str, float, int))}


def _flow(gm: GraphModule, node: Node, flows: dict[Node, Flow]) -> Flow:
    if node.op == "placeholder":
        return Flow(None, True, "input", from_input=True)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, LSQQuantizer):
            return Flow(node, module.signed, "quantizer")
    name, args, kwargs = operation(gm, node)
    if node.target is by_mode:
        name = "stack"  # one of several
    inputs = [flows[argument] for argument in node.all_input_nodes]
    if name is None or not inputs:
        return Flow(None, True, name or str(node.target), from_input=False)
    from_input = name not in LINEAR and node.op != "call_module" and all(flow.from_input for flow in inputs)
    if passes(name, args, kwargs):
        return replace(inputs[0], from_input=from_input)
    if name == "relu":
        return replace(inputs[0], negative=False, source=name, from_input=from_input)
    factor = _factor(name, args, kwargs)
    if factor is not None:
        negative = inputs[0].negative or factor < 0
        return replace(inputs[0], negative=negative, from_input=from_input, factor=inputs[0].factor * factor)
    if name in JOINS:
        (grid, factor), *others = {(flow.grid, flow.factor) for flow in inputs}
        on_one = grid if not others else None
        return Flow(on_one, _any_negative(inputs), name, from_input, factor if on_one is not None else 1.0)
    return Flow(None, _negative(name, args, kwargs, inputs), name, from_input)


def _factor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The constant that a value is multiplied or divided by; ``None`` for all else, such as ``x * x`` and ``1 / x``."""
    both = [*args, *kwargs.values()]
    constants = [value for value in both if isinstance(value, (int, float))]
    if len(both) != 2 or len(constants) != 1 or constants[0] == 0:
        return None
    if name in ("mul", "imul"):
        return float(constants[0])
    return 1 / constants[0] if name in ("div", "truediv") and both[0] is not constants[0] else None


def commutes_with_rounding(gm: GraphModule, node: Node) -> bool:
    """Whether a node makes of values on a grid the very codes it would make of unrounded ones, rounded afterwards."""
    name, args, kwargs = operation(gm, node)
    return name in JOINS or name == "relu" or passes(name, args, kwargs)


def quantizer_behind(gm: GraphModule, value: Node) -> Node | None:
    """The one quantizer that takes a value, at once or behind what commutes with rounding."""
    while len(value.users) == 1:
        (value,) = value.users
        module = gm.get_submodule(str(value.target)) if value.op == "call_module" else None
        if isinstance(module, (LSQActivationQuantizer, ResidualAdd)):
            return value
        if not commutes_with_rounding(gm, value):
            return None
    return None


def _negative(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Flow]) -> bool:
    if name in NONNEGATIVE:
        return False
    if name in ("clamp", "clip", "clamp_min", "hardtanh"):
        low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
        return not (isinstance(low, (int, float)) and low >= 0)
    scalars = [value for value in (*args, kwargs.get("value")) if isinstance(value, (int, float))]
    return not (name in KEEPS_SIGN and not _any_negative(inputs) and all(value >= 0 for value in scalars))


def _any_negative(inputs: Iterable[Flow]) -> bool:
    return any(flow.negative for flow in inputs)


@dataclass(frozen=True)
class Operand:
    """One operand of a linear-algebra node.

    Attributes:
        node: what is multiplied.
        user: what multiplies it.
        weight: whether it is a weight: by its ``role`` in the function, or because it is a parameter.
        channel_dim: of the output channels, where it has that role.
    """

    node: Node
    user: Node
    weight: bool
    role: bool = False
    channel_dim: int = 0


def operands(gm: GraphModule, node: Node) -> list[Operand]:
    """The operands of a function or method that is linear algebra, else nothing.

    A weight is what stands in a weight's place, or a parameter of the model, read directly or through a reshape.
    """
    if node.op not in ("call_function", "call_method"):
        return []
    op = linear_op(node.target)
    if op is None:
        return []
    found = []
    for index, value in enumerate(op.operands(node.args, node.kwargs)):
        if isinstance(value, Node):
            role = op.weight and index == 1
            found.append(Operand(value, node, role or _parameter(gm, value), role, op.channel_dim))
    return found


def _parameter(gm: GraphModule, node: Node) -> bool:
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        name, args, kwargs = operation(gm, node)
        if not passes(name, args, kwargs):
            return False
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    module = gm.get_submodule(owner)
    return name in module._parameters or name in module._buffers
