"""Dataflow over a graph: which values lie on a quantizer's grid, and which may be negative."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import nn
from torch.fx import GraphModule, Node

from brfx.graph.mode_branches import select_by_mode
from brfx.graph.torch_ops import (
    JOINS,
    KEEPS_SIGN,
    LINEAR,
    NONNEGATIVE,
    linear_op,
    name_of,
    named,
    preserves_values,
    words,
)
from brfx.nn import ActivationObserver, ActivationQuantizer, Quantizer, ResidualAdd

#: Averages of codes over n positions are codes of an n times finer grid.
AVERAGES = words("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean")


@dataclass(frozen=True)
class Flow:
    """Known properties of a value.

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
        args = node.args
        if node.op == "call_method" and node.target == "where" and len(args) > 1:  # x.where(condition, y)
            args = (args[1], args[0], *args[2:])
        return name_of(node.target), args, dict(node.kwargs)
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
    """The module's attributes that its function takes as arguments, as far as they matter here."""
    names = ("value", "mode", "min_val", "max_val", "threshold", "alpha", "beta")
    values = {name: getattr(module, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, (str, float, int))}


def _flow(gm: GraphModule, node: Node, flows: dict[Node, Flow]) -> Flow:
    if node.op == "placeholder":
        return Flow(None, True, "input", from_input=True)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            return Flow(node, module.signed, "quantizer")
    if node.op == "get_attr":
        return Flow(None, _constant_negative(gm, node), str(node.target))
    name, args, kwargs = operation(gm, node)
    if node.target is select_by_mode:
        name = "stack"  # one of several
    inputs = [flows[argument] for argument in node.all_input_nodes]
    if name is None or not inputs:
        return Flow(None, True, name or str(node.target), from_input=False)
    from_input = name not in LINEAR and node.op != "call_module" and all(flow.from_input for flow in inputs)
    first = args[0] if args else kwargs.get("input")
    value = flows[first] if isinstance(first, Node) else None
    if value is not None and preserves_values(name, args, kwargs):
        return replace(value, from_input=from_input)
    if value is not None and name == "relu":
        return replace(value, negative=False, source=name, from_input=from_input)
    factor = _factor(name, args, kwargs)
    if factor is not None:
        negative = inputs[0].negative or factor < 0
        return replace(inputs[0], negative=negative, from_input=from_input, factor=inputs[0].factor * factor)
    if name in JOINS:
        (grid, factor), *others = {(flow.grid, flow.factor) for flow in inputs}
        on_one = grid if not others else None
        return Flow(on_one, _any_negative(inputs), name, from_input, factor if on_one is not None else 1.0)
    return Flow(None, _negative(gm, name, named(name, args, kwargs), flows), name, from_input)


def _factor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The constant that a value is multiplied or divided by; ``None`` for all else, such as ``x * x`` and ``1 / x``."""
    if name not in _PRODUCTS | _QUOTIENTS:
        return None
    arguments = named(name, args, kwargs) or {}
    value, other = arguments.get("input"), arguments.get("other")
    if name in _PRODUCTS and _is_number(value):
        value, other = other, value
    if not isinstance(value, Node) or not _is_number(other) or other == 0 or arguments.get("rounding_mode"):
        return None
    return float(other) if name in _PRODUCTS else 1 / other


def commutes_with_rounding(gm: GraphModule, node: Node) -> bool:
    """Whether a node makes of values on a grid the very codes it would make of unrounded ones, rounded afterwards."""
    name, args, kwargs = operation(gm, node)
    return name in JOINS or name == "relu" or preserves_values(name, args, kwargs)


def quantizer_behind(gm: GraphModule, value: Node) -> Node | None:
    """The one quantizer that takes a value, at once or behind what commutes with rounding."""
    while len(value.users) == 1:
        (value,) = value.users
        module = gm.get_submodule(str(value.target)) if value.op == "call_module" else None
        if isinstance(module, (ActivationQuantizer, ResidualAdd)):
            return value
        if not commutes_with_rounding(gm, value):
            return None
    return None


def _constant_negative(gm: GraphModule, node: Node) -> bool:
    """Of a tensor that ``forward`` makes of constants; parameters and buffers may change."""
    owner, _, name = str(node.target).rpartition(".")
    constant = name.startswith("_tensor_constant")
    return not constant or bool((getattr(gm.get_submodule(owner), name) < 0).any())


def _negative(gm: GraphModule, name: str, arguments: dict[str, Any] | None, flows: dict[Node, Flow]) -> bool:
    """Whether what a call returns may be negative; what is not known may be."""
    if name in NONNEGATIVE:
        return False
    if arguments is None:
        return True
    call = _Call(gm, flows, arguments)
    if name in KEEPS_SIGN:
        return call.negative("input")
    return _SIGNS[name](call) if name in _SIGNS else True


@dataclass(frozen=True)
class _Call:
    """A call whose arguments are known by their names."""

    gm: GraphModule
    flows: dict[Node, Flow]
    arguments: dict[str, Any]

    def negative(self, *names: str) -> bool:
        """Whether one of these may be negative; of those that are not given none is."""
        return any(self._lowest(self.arguments.get(name)) < 0 for name in names)

    def above(self, name: str, low: float) -> bool:
        """Whether an argument is given as a number of at least ``low``."""
        value = self.arguments.get(name)
        return _is_number(value) and value >= low

    def negative_sum(self) -> bool:
        """Of ``input + alpha * other``: ``elu(x) + 1`` is none."""
        lowest = [self._lowest(self.arguments.get(name)) for name in ("input", "other")]
        return (
            sum(lowest) < 0
            if "alpha" not in self.arguments
            else min(*lowest, self._lowest(self.arguments["alpha"])) < 0
        )

    def negative_difference(self) -> bool:
        """Of ``input - alpha * other``, where one of the two factors is a number."""
        other, alpha = self.arguments.get("other"), self.arguments.get("alpha", 1)
        if not _is_number(alpha):
            return True
        taken = other * alpha <= 0 if _is_number(other) else alpha <= 0 and not self.negative("other")
        return not taken or self.negative("input")

    def negative_filled(self) -> bool:
        """Of ``input.masked_fill(mask, value)``: ``x.masked_fill(x < 0, 0)`` is none."""
        value, mask = self.arguments.get("input"), self.arguments.get("mask")
        kept = self._lowest(value) < 0 and not self._is_above(mask, value, below=True)
        return kept or self.negative("value")

    def negative_product(self) -> bool:
        """Of ``input * other``: a square is never negative, nor is ``x * (x > 0)``."""
        a, b = self.arguments.get("input"), self.arguments.get("other")
        masked = self._is_above(a, b) or self._is_above(b, a)
        return not masked and a is not b and self.negative("input", "other")

    def negative_choice(self) -> bool:
        """Of ``where(condition, input, other)``, or of one of them where the condition leaves only the other."""
        condition, value, other = (self.arguments.get(name) for name in ("condition", "input", "other"))
        low = self._lowest(value) < 0 and not self._is_above(condition, value)
        return low or (self._lowest(other) < 0 and not self._is_above(condition, other, below=True))

    def negative_power(self) -> bool:
        exponent = self.arguments.get("exponent")
        if _is_number(exponent) and (exponent % 2 == 0 or exponent % 1 != 0):
            return False  # of a negative value a broken power is NaN
        return self.negative("input")

    def negative_clamp(self, low: str, high: str) -> bool:
        if self.above(low, 0):
            return self.negative(high)
        given = self.arguments.get(low)
        if isinstance(given, Node) and not self.negative(low) and not self.negative(high):
            return False
        return self.negative("input", high)

    def negative_mean(self) -> bool:
        """Of ``lerp``, which is between the two for weights from 0 to 1."""
        weight = self.arguments.get("weight")
        return not _is_number(weight) or not 0 <= weight <= 1 or self.negative("input", "end")

    def _is_above(self, mask: Any, value: Any, *, below: bool = False) -> bool:
        """Whether ``mask`` is true only where ``value`` is at least 0; or with ``below`` false only there."""
        while isinstance(mask, Node):
            name, args, kwargs = operation(self.gm, mask)
            if name in ("to", "float", "type_as", "half"):
                mask = args[0] if args else None
                continue
            arguments = named(name, args, kwargs) if name in (("lt", "le") if below else ("gt", "ge")) else None
            bound = (arguments or {}).get("other")
            return arguments is not None and arguments["input"] is value and _is_number(bound) and bound >= 0
        return False

    def _lowest(self, value: Any) -> float:
        """A lower bound of the values; minus infinity where none is known."""
        if value is None:
            return 0.0
        if not isinstance(value, Node):
            return float(value) if _is_number(value) else -math.inf
        if not self.flows[value].negative:
            return 0.0
        name, args, kwargs = operation(self.gm, value)
        if name in ("elu", "celu"):
            alpha = (named(name, args, kwargs) or {"alpha": math.inf}).get("alpha", 1.0)
            return -abs(alpha) if _is_number(alpha) else -math.inf
        return _LOWEST.get(str(name), -math.inf)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float))


_PRODUCTS = words("mul imul multiply")
_QUOTIENTS = words("div truediv itruediv divide true_divide")
#: Below the least value of functions that have one.
_LOWEST = {"tanh": -1.0, "sin": -1.0, "cos": -1.0, "erf": -1.0, "softsign": -1.0, "selu": -1.7581} | {
    "silu": -0.2785,
    "gelu": -0.1701,  # of the tanh form, which is below the exact one's
    "mish": -0.3089,
    "hardswish": -0.375,
}
#: Name -> whether its result may be negative.
_SIGNS: dict[str, Callable[[_Call], bool]] = {
    **dict.fromkeys(("add", "iadd"), _Call.negative_sum),
    **dict.fromkeys(("sub", "isub", "subtract"), _Call.negative_difference),
    "masked_fill": _Call.negative_filled,
    "softplus": lambda call: not call.above("beta", 0) and "beta" in call.arguments,
    **dict.fromkeys(_PRODUCTS, _Call.negative_product),
    **dict.fromkeys(_QUOTIENTS, lambda call: call.negative("input", "other")),
    **dict.fromkeys(("maximum", "fmax"), lambda call: call.negative("input") and call.negative("other")),
    **dict.fromkeys(("minimum", "fmin"), lambda call: call.negative("input", "other")),
    "max": lambda call: (
        call.negative("input") and (not isinstance(call.arguments.get("other"), Node) or call.negative("other"))
    ),
    "min": lambda call: (
        call.negative("input") or (isinstance(call.arguments.get("other"), Node) and call.negative("other"))
    ),
    "where": _Call.negative_choice,
    "threshold": lambda call: call.negative("value") or not (call.above("threshold", 0) or not call.negative("input")),
    **dict.fromkeys(("pow", "ipow"), _Call.negative_power),
    **dict.fromkeys(("clamp", "clip", "clamp_min"), lambda call: call.negative_clamp("min", "max")),
    "hardtanh": lambda call: call.negative_clamp("min_val", "max_val"),
    **dict.fromkeys(
        ("interpolate", "upsample"),
        lambda call: call.negative("input") or call.arguments.get("mode") == "bicubic",  # which overshoots
    ),
    "pad": lambda call: call.negative("input", "value"),
    "lerp": _Call.negative_mean,
    **dict.fromkeys(("addcmul", "addcdiv"), lambda call: call.negative("input", "tensor1", "tensor2", "value")),
}


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
        if not preserves_values(name, args, kwargs):
            return False
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    module = gm.get_submodule(owner)
    return name in module._parameters or name in module._buffers
