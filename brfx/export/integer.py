"""The integer form of a trained model: int8 weights, steps, biases with batch norm folded in, one entry a layer.

Every exporter writes from it. Run in PyTorch it is the reference interpreter: its operators compute in integers
(:mod:`brfx.export.operators`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchvision.ops import StochasticDepth

from brfx.analysis.observe import graphs
from brfx.calibration import require_calibrated
from brfx.errors import ExportError
from brfx.export.attention import PRODUCTS, IntegerAttention, IntegerCall, IntegerMultiheadAttention, as_matmul
from brfx.export.layers import (
    IntegerConv,
    IntegerLinear,
    IntegerProduct,
    Recode,
    Requantize,
    can_fold,
    codes_of,
    codes_of_weight,
    float_layer,
    fold,
    integer_linear,
    store_transformed_weights,
)
from brfx.export.operators import QuantParams
from brfx.graph.dataflow import analyse, commutes_with_rounding, operands, operation
from brfx.graph.functionalize import detach_data
from brfx.graph.mode_branches import pruned
from brfx.graph.source_rewrite import QuantizedCall
from brfx.graph.torch_ops import LINEAR, is_attention
from brfx.graph.utils import attribute, call_counts, call_sites, free_name, set_module, step_read
from brfx.nn import (
    ActivationObserver,
    ActivationQuantizer,
    QuantizedAttention,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    Quantizer,
    ResidualAdd,
)
from brfx.nn.layers import has_integer_form
from brfx.nn.residual import LEVELS
from brfx.quant.grid import positive_step

_BatchNorm = nn.modules.batchnorm._BatchNorm

#: Float layers that multiply.
_MULTIPLY = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.RNNBase,
    nn.modules.rnn.RNNCellBase,
    nn.MultiheadAttention,
)

#: What lets values through in eval mode.
_IDENTITIES = (ActivationObserver, nn.Identity, nn.modules.dropout._DropoutNd, StochasticDepth)


@dataclass(frozen=True)
class IntegerModel:
    """The integer form.

    Attributes:
        model: runs in PyTorch, in integers where ``layers`` says so.
        layers: by dotted name.
        float_layers: layers, and products written as functions, that stay in floating point, and why.
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


@torch.no_grad()
def integer_model(qmodel: nn.Module) -> IntegerModel:
    """The integer form of ``qmodel``, which is left as it was.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: a sum could leave 32 bits, or a module has hooks, which no integer form runs; names it.
    """
    require_calibrated(qmodel)
    _require_no_hooks(qmodel)
    model = copy.deepcopy(qmodel).eval().cpu()
    result = IntegerModel(model, {}, {}, {})
    for prefix, gm in graphs(model).items():
        scope = f"{prefix}." if prefix else ""
        if getattr(gm, "has_mode_branches", False):
            gm.graph = pruned(gm, False)
        detach_data(gm.graph)
        _Rewriting(gm, scope, result).run()
    _modules(result)
    for name, layer in result.layers.items():
        if layer.largest_sum >= 2**31:
            raise ExportError(f"{name}: its sums can reach {layer.largest_sum}, more than 32 bits hold; use fewer bits")
    return result


def _require_no_hooks(qmodel: nn.Module) -> None:
    for name, module in qmodel.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ExportError(
                f"{name or type(qmodel).__name__} has a hook, which no integers in a file would run: remove it by the "
                "handle that it was given with, or write what it does into the model; export_torch runs hooks"
            )


def _modules(result: IntegerModel) -> None:
    """Give attention, calls in Python code and layers outside every graph their integer forms, or say why not."""
    for name, module in list(result.model.named_modules()):
        if isinstance(module, (QuantizedMultiheadAttention, nn.MultiheadAttention)):
            continue  # all in it is its own
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if isinstance(child, (QuantizedAttention, QuantizedMultiheadAttention)):
                _attention(result, module, child_name, path)
            elif isinstance(child, QuantizedCall) and child.attention is None:
                call = IntegerCall.of(child)
                if call is not None:
                    setattr(module, child_name, call)
                elif any(isinstance(q, Quantizer) and q.calibrated for q in (child.left, child.right)):
                    result.float_layers[path] = f"Python code calls {child.kind}, which has no integer form here"
            elif isinstance(child, QuantizedLayer) and child.weight_quantizer is not None:
                if not child.weight_quantizer.calibrated:
                    continue
                setattr(module, child_name, float_layer(child))
                result.float_layers[path] = "called by Python code, outside every graph"
            elif isinstance(child, _MULTIPLY) and not isinstance(child, QuantizedLayer):
                result.float_layers[path] = "it is not quantized"


def _attention(result: IntegerModel, parent: nn.Module, name: str, path: str) -> None:
    """Put the integer form in the place of an attention, where it has one."""
    layer = getattr(parent, name)
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
        self.codes: dict[Node, QuantParams] = {}  # of quantizers and of what replaced them
        self.again: dict[Node, Node] = {}  # of values on a grid, the quantizers that say so

    def run(self) -> None:
        for node in list(self.gm.graph.nodes):
            module = self._module(node)
            if isinstance(module, _IDENTITIES):
                node.replace_all_uses_with(node.args[0])
                self.gm.graph.erase_node(node)
        _keep_what_is_read(self.gm)
        store_transformed_weights(self.gm)
        self.flows, self.calls = analyse(self.gm), call_counts(self.gm)
        self.sites = {node: f"{self.scope}{site}" for node, site in call_sites(self.gm.graph).items()}
        for node in list(self.gm.graph.nodes):
            module = self._module(node)
            if isinstance(module, ResidualAdd):
                self._residual_add(node, module)
            elif isinstance(module, ActivationQuantizer):
                codes = codes_of(module)
                if codes is not None:
                    self._quantizer(node, codes)
            elif isinstance(module, QuantizedLinear):
                self._linear(node, module)
            elif operation(self.gm, node)[0] in (*PRODUCTS, "einsum"):
                self._product(node)
        for node in list(self.gm.graph.nodes):
            module = self._module(node)
            if isinstance(module, QuantizedLayer):
                self._left_in_float(node, module)
            elif node.op in ("call_function", "call_method"):
                self._function(node)
        self.gm.graph.lint()
        self.gm.recompile()
        self.gm.delete_all_unused_submodules()

    def _module(self, node: Node) -> nn.Module | None:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _quantizer(self, node: Node, codes: QuantParams) -> None:
        """A quantizer of the output of a convolution is part of the convolution; else it stands alone."""
        site = self.sites[node]
        new = self._absorbed(node.args[0], codes, site)
        source = None if new is not None else self._codes(node.args[0])
        if source is not None and source.zero_point == 0:
            new = self._call(node, str(node.target), Recode(codes, site), self._on_codes(node.args[0], source))
        elif new is None:
            self._absorb_parts(node.args[0], codes)
            new = self._call(node, str(node.target), Requantize(codes, site), node.args[0])
        self.codes[node] = self.codes[new] = codes
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def _residual_add(self, node: Node, add: ResidualAdd) -> None:
        """The addends as codes of one unit, see :meth:`brfx.nn.ResidualAdd.units`."""
        branch, shortcut, *read = node.args
        out, *into = (self._step(step).float() for step in read)
        unit, zero_point, multiple = add.units(out, into[0] if into else None)
        codes = QuantParams(float(unit), int(zero_point), 0, LEVELS)
        site = self.sites[node]
        addends = [self._branch(node, branch, codes, f"{site}.branch")]
        if multiple is None:
            addends.append(self._branch(node, shortcut, codes, f"{site}.projection"))
        else:
            grid = self._codes(shortcut)
            assert grid is not None and grid.zero_point == 0
            worth = Requantize(grid, f"{site}.shortcut", float(unit * multiple))
            source = self._on_codes(shortcut, grid)
            addends.append(self._call(node, f"{node.target}_shortcut", worth, source))
        with self.gm.graph.inserting_before(node):
            total = self.gm.graph.call_function(torch.add, tuple(addends))
        node.replace_all_uses_with(total)
        self.gm.graph.erase_node(node)

    def _branch(self, before: Node, value: object, codes: QuantParams, site: str) -> Node:
        absorbed = self._absorbed(value, codes, site)
        if absorbed is not None:
            return absorbed
        self._absorb_parts(value, codes)
        return self._call(before, f"{before.target}_{site.rpartition('.')[2]}", Requantize(codes, site), value)

    def _absorb_parts(self, value: object, codes: QuantParams) -> None:
        """Let the convolutions whose outputs a value is joined, pooled or reshaped from write the value's codes."""
        if isinstance(value, Node) and len(value.users) == 1 and commutes_with_rounding(self.gm, value):
            for part in value.all_input_nodes:
                if self._absorbed(part, codes, "") is None:
                    self._absorb_parts(part, codes)

    def _absorbed(self, value: object, codes: QuantParams, site: str) -> Node | None:
        """The convolution (and batch norm) that made ``value`` for this quantizer alone, as one integer convolution."""
        assert isinstance(value, Node)
        node, norm = value, None
        if isinstance(self._module(node), _BatchNorm) and len(node.users) == 1:
            norm, node = self._module(node), node.args[0]  # type: ignore[assignment]
        layer: Any = self._module(node)
        if norm is not None and not can_fold(norm):
            return None
        if not has_integer_form(layer) or len(node.users) != 1 or len(value.users) != 1:
            return None
        x = self._input_codes(node)
        if x is None:
            return None
        source = self._on_codes(node.args[0], x)
        parts = fold(layer, norm, x)
        integer = IntegerConv(layer, parts, x, codes, site)
        owner = node if norm is None or not norm.affine else value
        is_parameter = "bias" in self.gm.get_submodule(str(owner.target))._parameters  # not one that is computed
        new = self._call(value, str(node.target), integer, source)
        self.result.layers[f"{self.scope}{node.target}"] = integer
        if parts.snapped is not None and is_parameter and self.calls[str(owner.target)] == 1:
            self.result.biases[f"{self.scope}{owner.target}.bias"] = parts.snapped
        value.replace_all_uses_with(new)
        for dead in dict.fromkeys((value, node)):
            self.gm.graph.erase_node(dead)
        return new

    def _input_codes(self, node: Node) -> QuantParams | None:
        """The grid that the input of a layer lies on."""
        return self._codes(node.args[0]) if node.args else None

    def _codes(self, value: object) -> QuantParams | None:
        """The grid that a value lies on: a quantizer's, scaled where a constant factor lies between."""
        if not isinstance(value, Node):
            return None
        if value in self.codes:
            return self.codes[value]
        flow = self.flows.get(value)
        codes = self.codes.get(flow.grid) if flow and flow.grid else None
        if flow is None or codes is None or flow.factor <= 0:
            return None
        return codes._replace(scale=codes.scale * flow.factor)

    def _on_codes(self, value: object, codes: QuantParams) -> Node:
        """A value on a grid, as the output of a quantizer: where max-pooling or a reshape lies between, put on the grid
        where it is already, once for all that read it."""
        assert isinstance(value, Node)
        if value in self.codes:
            return value
        if value not in self.again:
            self.again[value] = again = self._call(value.next, f"{value.name}_again", Requantize(codes, ""), value)
            self.codes[again] = codes
        return self.again[value]

    def _linear(self, node: Node, layer: QuantizedLinear) -> None:
        x = self._input_codes(node)
        if x is None or layer.weight_quantizer is None:
            return
        weight, scale = codes_of_weight(layer)
        bias = None if layer.bias is None else layer.bias.detach()
        integer = integer_linear(weight, scale, bias, x, layer.weight_quantizer.grid)
        new = self._call(node, str(node.target), integer, self._on_codes(node.args[0], x))
        self.result.layers[f"{self.scope}{node.target}"] = integer
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def _product(self, node: Node) -> None:
        """A matrix product of two activations."""
        pair = [operand.node for operand in operands(self.gm, node)]
        grids = [codes for value in pair if (codes := self._codes(value))]
        einsum = operation(self.gm, node)[0] == "einsum"
        permuted = as_matmul(str(node.args[0])) if einsum else None
        if len(grids) != 2 or (einsum and permuted is None):
            return
        name = free_name(self.gm, f"{node.name}_int")
        set_module(self.gm, name, IntegerProduct(*grids))
        graph = self.gm.graph
        with graph.inserting_before(node):
            if permuted:
                pair = [graph.call_method("permute", (pair[side], permuted[side])) for side in (0, 1)]
            new = graph.call_module(name, tuple(pair))
            if permuted:
                new = graph.call_method("permute", (new, permuted[2]))
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def _left_in_float(self, node: Node, layer: QuantizedLayer) -> None:
        """A layer that no quantizer behind it has made its own."""
        name = f"{self.scope}{node.target}"
        if layer.weight_quantizer is None:
            self.result.float_layers[name] = "its weight is FP32"
            return
        if isinstance(layer, nn.modules.conv._ConvNd) and not has_integer_form(layer):
            reason = "transposed convolutions and padding other than with zeros have no integer form"
        elif self._input_codes(node) is None:
            reason = "its input is on no grid: placement='deploy' puts it on one"
        elif any(isinstance(norm := self._module(user), _BatchNorm) and not can_fold(norm) for user in node.users):
            reason = "the batch norm behind it has no running statistics to fold"
        else:
            reason = "no quantizer takes its output alone"
        self.result.float_layers[name] = reason
        set_module(self.gm, str(node.target), float_layer(layer))

    def _function(self, node: Node) -> None:
        """A product that is left as a function."""
        name = operation(self.gm, node)[0]
        if name in (*PRODUCTS, "einsum"):
            self.result.float_layers[f"{self.scope}{node.name}"] = "an operand of this product is on no grid"
        elif name in LINEAR or is_attention(node.target):
            self.result.float_layers[f"{self.scope}{node.name}"] = "a function, and layers alone have an integer form"

    def _step(self, node: object) -> Tensor:
        """A step that the graph reads."""
        assert isinstance(node, Node)
        return positive_step(step_read(self.gm, node))

    def _call(self, before: Node, name: str, module: nn.Module, source: object) -> Node:
        replaces = isinstance(module, (IntegerConv, IntegerLinear)) and call_counts(self.gm)[name] == 1
        place = name if replaces or not _taken(self.gm, name) else free_name(self.gm, f"{name}_int")
        set_module(self.gm, place, module)
        with self.gm.graph.inserting_before(before):
            return self.gm.graph.call_module(place, (source,))  # type: ignore[arg-type]


def _keep_what_is_read(gm: GraphModule) -> None:
    """Give the graph, where it reads a parameter of a layer (``conv.weight.abs().mean()``), a float copy of its own:
    the layer's becomes integers."""
    for node in gm.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or not owner or isinstance(gm.get_submodule(owner), Quantizer):
            continue
        value = attribute(gm, node)
        if isinstance(value, Tensor):
            node.target = free_name(gm, f"{owner.replace('.', '_')}_{name}")
            gm.register_buffer(node.target, value.detach().clone())


def _taken(gm: GraphModule, name: str) -> bool:
    try:
        gm.get_submodule(name)
    except AttributeError:
        return False
    return True
