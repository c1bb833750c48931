"""Put the inputs of convolutions, linears and matrix products on a grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from brfx.config import QATConfig
from brfx.config.layer_settings import LayerSettings
from brfx.graph.dataflow import AVERAGES, Flow, Operand, analyse, operands
from brfx.graph.utils import free_name, module_calls, scope, set_module
from brfx.nn import QUANTIZED_LAYERS, ActivationQuantizer, QuantizedLayer
from brfx.quant.factory import activation_quantizer


@dataclass(frozen=True)
class QuantizeInputs:
    """Put a quantizer in front of each operand that is not on a grid already.

        y = QuantizedConv2d(x)    ->    q = ActivationQuantizer(x); y = QuantizedConv2d(q)
        y = matmul(a, b)          ->    qa = ActivationQuantizer(a); qb = ...; y = matmul(qa, qb)

    A stream that is wider than the layer's inputs (``WidenStreams``) is no grid that the layer may read.
    A value on a grid stays on it through max-pooling, reshapes, dropout, the concatenation of one grid and the like
    (:mod:`brfx.graph.dataflow`). The quantizer is unsigned where the value cannot be negative. What comes from the
    graph's inputs alone gets ``input_bits``, an average ``residual_bits``, all else the layer's ``act_bits``. Operands
    of one value share a quantizer if they have the same bits.

    Requires: ``QuantizeLayers``, ``QuantizeFunctions``, ``QuantizeReLUs``.
    Ensures: every operand of a layer that is to be quantized is on a grid; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        flows = analyse(gm)
        made: dict[tuple[Node, int], Node] = {}
        for operand, own, name in self._sites(gm):
            flow = flows[operand.node]
            if operand.weight or own.act_bits is None or (flow.grid is not None and not _wide(gm, flow, own)):
                continue
            bits = self._bits(flow, own)
            key = (operand.node, bits)
            if key not in made:
                made[key] = _insert(gm, operand.node, free_name(gm, f"{name}_input"), flow, bits, own)
            operand.user.replace_input_with(operand.node, made[key])
        return len(made)

    def _sites(self, gm: GraphModule) -> list[tuple[Operand, LayerSettings, str]]:
        found: list[tuple[Operand, LayerSettings, str]] = []
        for node, module in module_calls(gm):
            kind = type(module).__name__.removeprefix("Quantized")
            own = self.config.at(f"{self.scope}{node.target}", kind)
            if own is not None and isinstance(module, (QuantizedLayer, *QUANTIZED_LAYERS)):
                value = node.args[0] if node.args else node.kwargs.get("input")
                if isinstance(value, Node):
                    found.append((Operand(value, node, False), own, str(node.target)))
        for node in gm.graph.nodes:
            name = f"{scope(node)}.{node.name}".lstrip(".")
            own = self.config.at(f"{self.scope}{name}", "function")
            if own is not None:
                found += [(operand, own, name) for operand in operands(gm, node)]
        return found

    def _bits(self, flow: Flow, own: LayerSettings) -> int:
        assert own.act_bits is not None
        if flow.from_input:
            return max(own.input_bits, own.act_bits)
        return max(own.residual_bits, own.act_bits) if flow.source in AVERAGES else own.act_bits


def _wide(gm: GraphModule, flow: Flow, own: LayerSettings) -> bool:
    """Whether a value lies on the grid of a residual stream, and that has more bits than the layer reads."""
    stream = None if flow.grid is None else gm.get_submodule(str(flow.grid.target))
    assert own.act_bits is not None
    return isinstance(stream, ActivationQuantizer) and stream.is_stream and stream.bits > own.act_bits


def _insert(gm: GraphModule, value: Node, name: str, flow: Flow, bits: int, own: LayerSettings) -> Node:
    sign = "may be negative" if flow.negative else "is never negative"
    regularized = not flow.from_input and bits == own.act_bits and flow.source not in AVERAGES
    reason = "a residual stream" if flow.source == "quantizer" else f"{flow.source} {sign}"
    quantizer = activation_quantizer(
        bits, signed=flow.negative, regularized=regularized, reason=reason, method=own.act_quantizer
    )
    set_module(gm, name, quantizer)
    with gm.graph.inserting_after(value):
        node = gm.graph.call_module(name, (value,))
    node.meta = dict(value.meta)
    return node
