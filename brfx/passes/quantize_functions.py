"""Quantize linear algebra that is written as functions."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from brfx.config import QATConfig
from brfx.config.layer_settings import LayerSettings
from brfx.graph.dataflow import Operand, operands
from brfx.graph.source_rewrite import QuantizedFunction
from brfx.graph.torch_ops import is_attention
from brfx.graph.utils import free_name, scope, set_module
from brfx.nn import QuantizedAttention, WeightQuantizer
from brfx.quant.factory import weight_quantizer


@dataclass(frozen=True)
class QuantizeFunctions:
    """Quantize weights on their way into a function, and what a graph cannot see into.

        y = F.linear(x, w)                       ->  q = WeightQuantizer(w); y = F.linear(x, q)
        y = F.scaled_dot_product_attention(...)  ->  y = QuantizedAttention(...)
        y = shifted_window_attention(...)        ->  y = QuantizedFunction(...)

    The last is any Python function that was kept whole by ``torch.fx.wrap`` and multiplies matrices inside: its source
    is rewritten, see :mod:`brfx.graph.source_rewrite`.

    Requires: nothing.
    Ensures: every weight operand of a function comes out of a quantizer; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        return sum(
            self._rewrite(gm, node) for node in list(gm.graph.nodes) if node.op in ("call_function", "call_method")
        )

    def _rewrite(self, gm: GraphModule, node: Node) -> int:
        name = f"{scope(node)}.{node.name}".lstrip(".")
        own = self.config.at(f"{self.scope}{name}", "function")
        if own is None:
            return 0
        if node.op == "call_function" and is_attention(node.target):
            if own.inner_act_bits is None:
                return 0
            self._replace(gm, node, free_name(gm, f"{name}_attention"), QuantizedAttention(own.inner_act_bits))
            return 1
        if node.op == "call_function":
            function = QuantizedFunction.of(node.target, own.weight_bits, own.inner_act_bits, **own.weight_method)
            if function is not None:
                self._replace(gm, node, free_name(gm, f"{name}_calls"), function)
                return 1
        return self._quantize_weights(gm, node, name, own)

    def _quantize_weights(self, gm: GraphModule, node: Node, name: str, own: LayerSettings) -> int:
        weights = [
            operand
            for operand in operands(gm, node)
            if operand.weight and own.weight_bits and not self._quantized(gm, operand.node)
        ]
        for operand in weights:
            assert own.weight_bits is not None
            path = free_name(gm, f"{name}_weight")
            shape = self._step_shape(gm, operand) if own.per_channel else ()
            set_module(gm, path, weight_quantizer(own.weight_bits, step_shape=shape, **own.weight_method))
            with gm.graph.inserting_after(operand.node):
                quantized = gm.graph.call_module(path, (operand.node,))
            node.replace_input_with(operand.node, quantized)
        return len(weights)

    @staticmethod
    def _step_shape(gm: GraphModule, operand: Operand) -> tuple[int, ...]:
        """One step an output channel where the shape is known: of a parameter that is read directly."""
        if operand.node.op != "get_attr" or not operand.role:
            return ()
        owner, _, name = str(operand.node.target).rpartition(".")
        shape = [1] * getattr(gm.get_submodule(owner), name).dim()
        shape[operand.channel_dim] = getattr(gm.get_submodule(owner), name).shape[operand.channel_dim]
        return tuple(shape)

    @staticmethod
    def _quantized(gm: GraphModule, node: Node) -> bool:
        return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), WeightQuantizer)

    @staticmethod
    def _replace(gm: GraphModule, node: Node, name: str, module: QuantizedAttention | QuantizedFunction) -> None:
        set_module(gm, name, module)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(name, node.args, node.kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
