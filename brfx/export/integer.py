"""The integer form of a trained model: int8 weights, steps, biases with batch norm folded in, one entry a layer.

Every exporter writes from it. Run in PyTorch it is the reference interpreter: its operators compute in integers
(:mod:`brfx.export.operators`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchvision.ops import StochasticDepth

from brfx.calibration import require_calibrated
from brfx.errors import ExportError
from brfx.export.operators import Codes, convolution, linear, product, requantize
from brfx.flow import analyse, commutes_with_rounding, operands, operation
from brfx.graph import attribute, call_counts, free_name, set_module
from brfx.grid import MIN_STEP
from brfx.nn import (
    ActivationObserver,
    AlignedAdd,
    LSQActivationQuantizer,
    LSQQuantizer,
    LSQWeightQuantizer,
    QuantizedAttention,
    QuantizedClippedReLU,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMultiheadAttention,
)
from brfx.observing import graphs
from brfx.operators import LINEAR
from brfx.python_calls import QuantizedCall
from brfx.trace import pruned

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Kind = TypeVar("_Kind", bound=nn.Module)

#: Matrix products of two activations.
_PRODUCTS = ("matmul", "rmatmul", "mm", "bmm")

#: What lets values through in eval mode.
_IDENTITIES = (ActivationObserver, nn.Identity, nn.modules.dropout._DropoutNd, StochasticDepth)


class Requantize(nn.Module):
    """Puts values on a grid of 8-bit codes; ``site`` names the quantizer of the trained model that it stands for."""

    def __init__(self, codes: Codes, site: str, scale_out: float | None = None) -> None:
        super().__init__()
        self.codes, self.site = codes, site
        self.scale_out = codes.scale if scale_out is None else scale_out

    def forward(self, x: Tensor) -> Tensor:
        return requantize(x, *self.codes, self.scale_out)  # type: ignore[no-any-return]


class IntegerConv(nn.Module):
    """A convolution with int8 weights and an int32 bias, from the grid of its input to the grid of its output."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module, parts: Folded, x: Codes, y: Codes, bits: int, site: str) -> None:
        super().__init__()
        self.register_buffer("weight", parts.weight)
        self.register_buffer("weight_scale", parts.scale)
        self.register_buffer("bias", parts.bias)
        self.x, self.y, self.bits, self.site, self.headroom = x, y, bits, site, parts.headroom
        self.stride, self.dilation, self.groups = list(layer.stride), list(layer.dilation), int(layer.groups)  # type: ignore[arg-type]
        self.padding = list(layer.padding)  # type: ignore[arg-type]
        self.largest_sum = largest_sum(parts.weight, x) + int(parts.bias.abs().max())

    def forward(self, x: Tensor) -> Tensor:
        return convolution(  # type: ignore[no-any-return]
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            self.x.scale,
            self.x.zero_point,
            *self.y,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class IntegerLinear(nn.Module):
    """A linear with int8 weights; sums in 32 bits, then one multiplication and a float bias.

    ``transposed`` is ``weight`` as the matrix product wants it, under a name of its own in exported files.
    """

    weight: Tensor
    transposed: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, x: Codes, bits: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("transposed", weight.t().contiguous(), persistent=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.x, self.bits, self.headroom = x, bits, 1
        self.largest_sum = largest_sum(weight, x)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.transposed, self.scale, self.bias, self.x.scale, self.x.zero_point)  # type: ignore[no-any-return]


class IntegerAttention(QuantizedAttention):
    """Attention with both products in integers; softmax and masks are floats between quantizers."""

    query_quantizer: Requantize
    key_quantizer: Requantize
    value_quantizer: Requantize
    softmax_quantizer: Requantize

    @classmethod
    def of(cls, attention: QuantizedAttention) -> Self | None:
        """``None`` where an operand has no codes."""
        names = [f"{operand}_quantizer" for operand in ("query", "key", "value", "softmax")]
        requantizers = [_requantizer(getattr(attention, name)) for name in names]
        if None in requantizers:
            return None
        new = _adopted(cls, attention)
        for name, requantizer in zip(names, requantizers, strict=True):
            setattr(new, name, requantizer)
        return new

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        left, right = self.query_quantizer.codes, self.key_quantizer.codes
        return product(query, key, left.scale, left.zero_point, right.scale, right.zero_point)  # type: ignore[no-any-return]

    def mixed(self, probabilities: Tensor, value: Tensor) -> Tensor:
        left, right = self.softmax_quantizer.codes, self.value_quantizer.codes
        return product(probabilities, value, left.scale, left.zero_point, right.scale, right.zero_point)  # type: ignore[no-any-return]


class IntegerMultiheadAttention(QuantizedMultiheadAttention):
    """Multi-head attention with its four linears and two products in integers."""

    q: IntegerLinear
    k: IntegerLinear
    v: IntegerLinear
    out: IntegerLinear

    @classmethod
    def of(cls, layer: QuantizedMultiheadAttention) -> Self | None:
        """``None`` where an operand has no codes."""
        attention = IntegerAttention.of(layer.attention)
        source, joined = _requantizer(layer.input_quantizer), _requantizer(layer.output_quantizer)
        if attention is None or source is None or joined is None or not layer.weight_quantizers:
            return None
        names = ["in_proj_weight"] if layer.packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        linears = []
        biases = (None, None, None) if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
        parts = [part for name in names for part in _linear_parts(layer, name, 3 if layer.packed else 1)]
        for (weight, step, bits), bias in zip(parts, biases, strict=True):
            linears.append(_integer_linear(weight, step, bias, source.codes, bits))
        ((weight, step, bits),) = _linear_parts(layer, "out_proj_weight", 1)
        bias = layer.out_proj.bias
        new = _adopted(cls, layer)
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            new._parameters[name] = None
        del new.out_proj, new.weight_quantizers
        new.input_quantizer, new.attention, new.output_quantizer = source, attention, joined
        new.q, new.k, new.v = linears
        new.out = _integer_linear(weight, step, None if bias is None else bias.detach(), joined.codes, bits)
        return new

    def project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(query), self.k(key), self.v(value)

    def project_output(self, x: Tensor) -> Tensor:
        return self.out(x)  # type: ignore[no-any-return]


class IntegerCall(QuantizedCall):
    """A linear or a matrix product in Python code, in integers."""

    left: Requantize  # type: ignore[assignment]
    right: Requantize  # type: ignore[assignment]

    @classmethod
    def of(cls, call: QuantizedCall) -> Self | None:
        """``None`` where an operand has no codes, or the operation has no integer form."""
        left, right = _requantizer(call.left), _requantizer(call.right)
        if left is None or right is None or call.kind not in ("linear", *_PRODUCTS):
            return None
        new = _adopted(cls, call)
        new.left, new.right = left, right
        return new

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left, right = LINEAR[self.kind].operands(args, kwargs)
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return super().call(function, args, kwargs)
        a, b = self.left.codes, self.right.codes
        linear = self.kind == "linear"
        y = product(left, right.t() if linear else right, a.scale, a.zero_point, b.scale, b.zero_point)
        bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if linear else None
        return y if bias is None else y + bias


def _adopted(cls: type[_Kind], module: nn.Module) -> _Kind:
    """A module of this class with all that ``module`` has."""
    new = cls.__new__(cls)
    new.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
    return new


def _requantizer(quantizer: nn.Module | None) -> Requantize | None:
    known = isinstance(quantizer, LSQQuantizer) and quantizer.calibrated and quantizer.step.numel() == 1
    codes = codes_of(quantizer) if known else None  # type: ignore[arg-type]
    return None if codes is None else Requantize(codes, "")


def _linear_parts(layer: QuantizedMultiheadAttention, name: str, parts: int) -> list[tuple[Tensor, Tensor, int]]:
    """Codes, steps (one a row) and bits of a weight of ``layer``, cut into ``parts`` by rows."""
    weight, quantizer = layer.latent_weights()[name].detach(), layer.weight_quantizers[name]
    assert isinstance(quantizer, LSQWeightQuantizer)
    step = quantizer.step.detach().clamp(min=MIN_STEP)
    codes, steps = quantizer.grid.encode(weight, step).to(torch.int8), step.flatten().expand(len(weight))
    return [(c.contiguous(), s, quantizer.bits) for c, s in zip(codes.chunk(parts), steps.chunk(parts), strict=True)]


def _integer_linear(weight: Tensor, step: Tensor, bias: Tensor | None, x: Codes, bits: int) -> IntegerLinear:
    """A linear of codes ``weight``; ``step`` is one, or one a row."""
    scale = (step.flatten() * torch.tensor(x.scale)).float()
    return IntegerLinear(weight, scale, torch.zeros(len(weight)) if bias is None else bias.clone(), x, bits)


class FloatLayer(nn.Module):
    """A convolution or linear that has to stay in floating point; its weight is stored as codes all the same."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer, weight: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.layer, self.bits, self.headroom = layer, bits, 1
        layer.weight_quantizer = None
        del layer._parameters["weight"]

    def forward(self, x: Tensor) -> Tensor:
        vars(self.layer)["weight"] = self.weight.float() * self.scale
        return self.layer(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Folded:
    """A convolution's weight codes times ``headroom``, its scale by channel, and its bias in units of the sums.

    ``snapped`` is the bias that the norm (the layer, if the norm has none) would have if it were that integer exactly;
    ``None`` where neither has a bias.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    headroom: int
    snapped: Tensor | None


@dataclass(frozen=True)
class IntegerModel:
    """The integer form.

    Attributes:
        model: runs in PyTorch, in integers where ``layers`` says so.
        layers: by dotted name.
        float_layers: what stays in floating point, and why.
        biases: parameters of the trained model, and the values of theirs that the integer form has exactly.
    """

    model: nn.Module
    layers: dict[str, IntegerConv | IntegerLinear]
    float_layers: dict[str, str]
    biases: dict[str, Tensor]

    @property
    def largest_sum(self) -> int:
        """The largest magnitude that any accumulator can reach; 32 bits hold less than ``2**31``."""
        return max((layer.largest_sum for layer in self.layers.values()), default=0)


def largest_sum(weight: Tensor, x: Codes) -> int:
    """How far from zero the sum of an output can get, whatever the input."""
    reach = max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    return int(weight.flatten(1).int().abs().sum(1).max()) * reach


@torch.no_grad()
def integer_model(qmodel: nn.Module) -> IntegerModel:
    """The integer form of ``qmodel``, which is left as it was.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: a sum could leave 32 bits; names the layer.
    """
    require_calibrated(qmodel)
    model = copy.deepcopy(qmodel).eval().cpu()
    result = IntegerModel(model, {}, {}, {})
    for prefix, gm in graphs(model).items():
        scope = f"{prefix}." if prefix else ""
        if getattr(gm, "twin", False):
            gm.graph = pruned(gm, False)
        _Rewriting(gm, scope, result).run()
    _modules(result)
    for name, layer in result.layers.items():
        if layer.largest_sum >= 2**31:
            raise ExportError(f"{name}: its sums can reach {layer.largest_sum}, more than 32 bits hold; use fewer bits")
    return result


def _modules(result: IntegerModel) -> None:
    """Give attention, calls in Python code and layers outside every graph their integer forms, or say why not."""
    for name, module in list(result.model.named_modules()):
        if isinstance(module, QuantizedMultiheadAttention):
            continue  # all in it is its own
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if isinstance(child, (QuantizedAttention, QuantizedMultiheadAttention)):
                _attention(result, module, child_name, path)
            elif isinstance(child, QuantizedCall) and child.attention is None:
                call = IntegerCall.of(child)
                if call is not None:
                    setattr(module, child_name, call)
                elif any(isinstance(q, LSQQuantizer) and q.calibrated for q in (child.left, child.right)):
                    result.float_layers[path] = f"Python code calls {child.kind}, which has no integer form here"
            elif isinstance(child, QuantizedLayer) and child.weight_quantizer is not None:
                if not child.weight_quantizer.calibrated:
                    continue
                setattr(module, child_name, _float_layer(child))
                result.float_layers[path] = "called by Python code, outside every graph"


def _attention(result: IntegerModel, parent: nn.Module, name: str, path: str) -> None:
    """Put the integer form in the place of an attention, where it has one."""
    layer = getattr(parent, name)
    if isinstance(layer, (IntegerAttention, IntegerMultiheadAttention)):
        return
    kind = IntegerMultiheadAttention if isinstance(layer, QuantizedMultiheadAttention) else IntegerAttention
    integer = kind.of(layer)
    if integer is None:
        result.float_layers[path] = "an operand of this attention has no codes of 8 bits"
        return
    setattr(parent, name, integer)
    if isinstance(integer, IntegerMultiheadAttention):
        result.layers.update({f"{path}.{part}": getattr(integer, part) for part in ("q", "k", "v", "out")})


@torch.no_grad()
def snap_biases(qmodel: nn.Module) -> None:
    """Move each bias to the nearest value that an integer kernel has, so that the integer form decides what this does.

    A bias, of a batch norm or of a convolution, moves by at most half a unit of the integer sums. To be called when
    training is over, before the model is evaluated and saved; ``brfx quantize`` does.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: a sum could leave 32 bits; names the layer.
    """
    for name, value in integer_model(qmodel).biases.items():
        qmodel.get_parameter(name).copy_(value)


class _Rewriting:
    """One graph on its way to integers."""

    def __init__(self, gm: GraphModule, scope: str, result: IntegerModel) -> None:
        self.gm, self.scope, self.result = gm, scope, result
        self.codes: dict[Node, Codes] = {}  # of quantizers and of what replaced them

    def run(self) -> None:
        for node in list(self.gm.graph.nodes):
            module = self._module(node)
            if isinstance(module, _IDENTITIES):
                node.replace_all_uses_with(node.args[0])
                self.gm.graph.erase_node(node)
        self.flows, self.calls = analyse(self.gm), call_counts(self.gm)
        for node in list(self.gm.graph.nodes):
            module = self._module(node)
            if isinstance(module, AlignedAdd):
                self._aligned_add(node, module)
            elif isinstance(module, LSQActivationQuantizer):
                codes = codes_of(module)
                if codes is not None:
                    self._quantizer(node, codes)
            elif isinstance(module, QuantizedLinear):
                self._linear(node, module)
            elif operation(self.gm, node)[0] in _PRODUCTS:
                self._product(node)
        for node in list(self.gm.graph.nodes):
            module = self._module(node)
            if isinstance(module, QuantizedLayer):
                self._left_in_float(node, module)
        self.gm.graph.lint()
        self.gm.recompile()
        self.gm.delete_all_unused_submodules()

    def _module(self, node: Node) -> nn.Module | None:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _quantizer(self, node: Node, codes: Codes) -> None:
        """A quantizer of the output of a convolution is part of the convolution; else it stands alone."""
        site = f"{self.scope}{node.target}"
        new = self._absorbed(node.args[0], codes, site)
        if new is None:
            self._absorb_parts(node.args[0], codes)
            new = self._call(node, str(node.target), Requantize(codes, site), node.args[0])
        self.codes[new] = codes
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def _aligned_add(self, node: Node, add: AlignedAdd) -> None:
        branch, shortcut, out, *into = node.args
        step_out = float(self._step(out))
        site = f"{self.scope}{node.target}"
        if into:
            step_in = float(self._step(into[0]))
            m, n = (float(part) for part in add.snap(self._step(into[0]).float() / self._step(out).float()))
            assert add.high_in is not None
            unit, zero = step_out / n, int(add.high_in * m)
            addends = [self._branch(node, branch, Codes(unit, zero, 0, 255), f"{site}.branch")]
            codes = Codes(step_in, 0, 0, add.high_in)
            addends.append(
                self._call(node, f"{node.target}_shortcut", Requantize(codes, f"{site}.shortcut", unit * m), shortcut)
            )
        else:
            codes = Codes(step_out / add.unit, 128, 0, 255)
            addends = [
                self._branch(node, branch, codes, f"{site}.branch"),
                self._branch(node, shortcut, codes, f"{site}.projection"),
            ]
        with self.gm.graph.inserting_before(node):
            total = self.gm.graph.call_function(torch.add, tuple(addends))
        node.replace_all_uses_with(total)
        self.gm.graph.erase_node(node)

    def _branch(self, before: Node, value: object, codes: Codes, site: str) -> Node:
        absorbed = self._absorbed(value, codes, site)
        if absorbed is not None:
            return absorbed
        self._absorb_parts(value, codes)
        return self._call(before, f"{before.target}_{site.rpartition('.')[2]}", Requantize(codes, site), value)

    def _absorb_parts(self, value: object, codes: Codes) -> None:
        """Let the convolutions whose outputs a value is joined, pooled or reshaped from write the value's codes."""
        if isinstance(value, Node) and len(value.users) == 1 and commutes_with_rounding(self.gm, value):
            for part in value.all_input_nodes:
                if self._absorbed(part, codes, "") is None:
                    self._absorb_parts(part, codes)

    def _absorbed(self, value: object, codes: Codes, site: str) -> Node | None:
        """The convolution (and batch norm) that made ``value`` for this quantizer alone, as one integer convolution."""
        assert isinstance(value, Node)
        node, norm = value, None
        if isinstance(self._module(node), _BatchNorm) and len(node.users) == 1:
            norm, node = self._module(node), node.args[0]  # type: ignore[assignment]
        layer: Any = self._module(node)
        if not self._has_integer_form(layer) or len(node.users) != 1 or len(value.users) != 1:
            return None
        x = self._input_codes(node)
        if x is None:
            return None
        source = self._on_codes(node, x)
        parts = fold(layer, norm, x)
        integer = IntegerConv(layer, parts, x, codes, layer.weight_quantizer.bits, site)
        new = self._call(value, str(node.target), integer, source)
        self.result.layers[f"{self.scope}{node.target}"] = integer
        owner = node if norm is None or not norm.affine else value
        if parts.snapped is not None and self.calls[str(owner.target)] == 1:
            self.result.biases[f"{self.scope}{owner.target}.bias"] = parts.snapped
        value.replace_all_uses_with(new)
        for dead in dict.fromkeys((value, node)):
            self.gm.graph.erase_node(dead)
        return new

    def _input_codes(self, node: Node) -> Codes | None:
        """The grid that the input of a layer lies on."""
        return self._codes(node.args[0]) if node.args else None

    def _codes(self, value: object) -> Codes | None:
        """The grid that a value lies on: a quantizer's, scaled where a constant factor lies between."""
        factor = 1.0
        while isinstance(value, Node):
            if value in self.codes:
                return _scaled(self.codes[value], factor)
            grid = self.flows[value].grid if value in self.flows else None
            if grid is None:
                return None
            if grid is value:
                module = self._module(value)
                codes = codes_of(module) if isinstance(module, LSQActivationQuantizer) else None
                return _scaled(codes, factor)
            inputs = value.all_input_nodes
            name, args, kwargs = operation(self.gm, value)
            if not commutes_with_rounding(self.gm, value):
                constants = [c for c in (*args, *kwargs.values()) if isinstance(c, (int, float))]
                times = name in ("mul", "imul")
                if len(constants) != 1 or constants[0] <= 0 or not (times or isinstance(args[0], Node)):
                    return None
                factor *= constants[0] if times else 1 / constants[0]
            value = inputs[0] if inputs else None
        return None

    def _on_codes(self, node: Node, codes: Codes) -> object:
        """The input of a layer, as the output of a quantizer: where max-pooling or a reshape lies between, put on
        the grid where it is already."""
        value = node.args[0]
        if value in self.codes:
            return value
        again = self._call(node, f"{node.target}_input_again", Requantize(codes, ""), value)
        self.codes[again] = codes
        return again

    def _linear(self, node: Node, layer: QuantizedLinear) -> None:
        x = self._input_codes(node)
        if x is None or layer.weight_quantizer is None:
            return
        weight, step = codes_of_weight(layer)
        bias = None if layer.bias is None else layer.bias.detach()
        integer = _integer_linear(weight, step, bias, x, layer.weight_quantizer.bits)
        new = self._call(node, str(node.target), integer, self._on_codes(node, x))
        self.result.layers[f"{self.scope}{node.target}"] = integer
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def _product(self, node: Node) -> None:
        """A matrix product of two activations."""
        pair = operands(self.gm, node)
        grids = [self._codes(operand.node) for operand in pair]
        if len(pair) != 2 or grids[0] is None or grids[1] is None:
            return
        zeros = [setting for codes in grids if codes for setting in (codes.scale, codes.zero_point)]
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.call_function(torch.ops.brfx.product.default, (pair[0].node, pair[1].node, *zeros))
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def _left_in_float(self, node: Node, layer: QuantizedLayer) -> None:
        """A layer that no quantizer behind it has made its own."""
        name = f"{self.scope}{node.target}"
        if layer.weight_quantizer is None:
            self.result.float_layers[name] = "its weight is FP32"
            return
        if isinstance(layer, nn.modules.conv._ConvNd) and not self._has_integer_form(layer):
            reason = "transposed convolutions and padding other than with zeros have no integer form"
        elif self._input_codes(node) is None:
            reason = "its input is on no grid: placement='deploy' puts it on one"
        else:
            reason = "no quantizer takes its output alone"
        self.result.float_layers[name] = reason
        set_module(self.gm, str(node.target), _float_layer(layer))

    @staticmethod
    def _has_integer_form(layer: Any) -> bool:
        return (
            isinstance(layer, QuantizedLayer)
            and isinstance(layer, nn.modules.conv._ConvNd)
            and layer.weight_quantizer is not None
            and not layer.transposed
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def _step(self, node: object) -> Tensor:
        """A step that the graph reads."""
        assert isinstance(node, Node)
        step: Tensor = attribute(self.gm, node).detach().clamp(min=MIN_STEP)
        return step

    def _call(self, before: Node, name: str, module: nn.Module, source: object) -> Node:
        replaces = isinstance(module, (IntegerConv, IntegerLinear)) and call_counts(self.gm)[name] == 1
        place = name if replaces or not _taken(self.gm, name) else free_name(self.gm, f"{name}_int")
        set_module(self.gm, place, module)
        with self.gm.graph.inserting_before(before):
            return self.gm.graph.call_module(place, (source,))  # type: ignore[arg-type]


def _taken(gm: GraphModule, name: str) -> bool:
    try:
        gm.get_submodule(name)
    except AttributeError:
        return False
    return True


def _scaled(codes: Codes | None, factor: float) -> Codes | None:
    """The same codes, worth ``factor`` times as much."""
    return codes if codes is None or factor == 1 else codes._replace(scale=codes.scale * factor)


def codes_of(quantizer: LSQQuantizer) -> Codes | None:
    """The uint8 codes of a quantizer of one step; ``None`` for signs, which no clipped rounding makes."""
    grid, step = quantizer.grid, float(quantizer.step.detach().clamp(min=MIN_STEP))
    if grid.binary:
        return None
    high = grid.high
    if isinstance(quantizer, QuantizedClippedReLU) and quantizer.ceiling < math.inf:
        high = min(high, int((torch.tensor(quantizer.ceiling) / step).round()))
    zero = -grid.low
    return Codes(step, zero, 0, high + zero)


def codes_of_weight(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """int8 codes of a weight, and its step: one, or one an output channel in a shape that broadcasts."""
    assert layer.weight_quantizer is not None
    step = layer.weight_quantizer.step.detach().clamp(min=MIN_STEP)
    return layer.weight_quantizer.grid.encode(layer.weight.detach(), step).to(torch.int8), step


def fold(layer: Any, norm: nn.Module | None, x: Codes) -> Folded:
    """A convolution and the batch norm behind it in integers.

    The batch norm's factor goes into the scale, and everything else into the bias, an integer in units of the sums
    (``x.scale * scale``). Codes of few bits are multiplied by a constant into the room that int8 has: the unit gets
    finer, and rounding the bias moves fewer codes of the output.
    """
    codes, step = codes_of_weight(layer)
    channels = len(codes)
    factor, shift = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if layer.bias is not None:
        shift = layer.bias.detach().double()
    if norm is not None:
        assert isinstance(norm, _BatchNorm) and norm.running_var is not None and norm.running_mean is not None
        variance: Tensor = norm.running_var.double()
        factor = torch.rsqrt(variance + norm.eps)
        if norm.affine:
            factor = factor * norm.weight.detach().double()
        shift = (shift - norm.running_mean.double()) * factor
        if norm.affine:
            shift = shift + norm.bias.detach().double()
    reach = max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    headroom = max(1, min(127, 16383 // max(reach, 1)) // max(1, int(codes.abs().max())))  # sums of pairs in int16
    scale = step.double().flatten().expand(channels) * factor / headroom
    vanishing = scale.abs() * x.scale * 2**30 <= shift.abs()  # the weights of such a channel count for nothing
    scale = torch.where(vanishing, (shift.abs() / (x.scale * 2**20)).clamp(min=1e-12), scale)
    codes = torch.where(vanishing.view(-1, *[1] * (codes.dim() - 1)), 0, codes)
    scale = scale.float()
    unit = scale.double() * torch.tensor(x.scale).double()
    bias = (shift / unit).round()
    moved, snapped = bias * unit - shift, None
    if norm is not None and norm.affine:
        snapped = norm.bias.detach() + moved
    elif layer.bias is not None:
        snapped = layer.bias.detach() + moved / factor
    return Folded((codes * headroom).to(torch.int8), scale, bias.to(torch.int32), headroom, snapped)


def _float_layer(layer: QuantizedLayer) -> FloatLayer:
    weight, step = codes_of_weight(layer)
    assert layer.weight_quantizer is not None
    return FloatLayer(layer, weight, step.float(), layer.weight_quantizer.bits)
