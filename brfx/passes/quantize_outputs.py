"""Put the output of a convolution on a grid, so that integer kernels can run it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from brfx.config import QATConfig
from brfx.config.layer_settings import LayerSettings
from brfx.graph.dataflow import Flow, analyse, operation, quantizer_behind
from brfx.graph.utils import free_name, insert_after, module_calls
from brfx.nn.layers import has_integer_form
from brfx.quant.factory import activation_quantizer


@dataclass(frozen=True)
class QuantizeOutputs:
    """Put a quantizer of ``residual_bits`` behind each convolution whose output no quantizer takes alone.

        y = silu(BatchNorm2d(conv(x)))  ->  y = silu(ActivationQuantizer(BatchNorm2d(conv(x))))
        y = conv(x); f(y); g(y)         ->  y = ActivationQuantizer(conv(x)); f(y); g(y)

    An integer kernel writes codes of 8 bits. Most convolutions have a quantizer behind them, directly or behind
    max-pooling, a concatenation and the like, and need no other. A plain ReLU goes before the new one, which is
    unsigned then.

    Requires: ``QuantizeInputs``, ``AlignResiduals``.
    Ensures: every convolution of codes ends in one quantizer; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        flows = analyse(gm)
        changed = 0
        for node, layer in module_calls(gm):
            if not has_integer_form(layer):
                continue
            own = self.config.at(f"{self.scope}{node.target}", type(layer).__name__.removeprefix("Quantized"))
            value = _output(gm, node)
            codes = bool(node.args) and flows[node.args[0]].grid is not None  # type: ignore[index]
            if own is None or own.residual_bits == 32 or not codes or quantizer_behind(gm, value) is not None:
                continue
            _insert(gm, value, f"{node.target}_output", flows[value], own)
            changed += 1
        return changed


def _output(gm: GraphModule, node: Node) -> Node:
    """The last node of a convolution with the batch norm, and behind it the ReLU, that it alone feeds."""
    for name in ("batch_norm", "relu"):
        users = list(node.users)
        if len(users) == 1 and str(operation(gm, users[0])[0]).rstrip("123d") == name:
            (node,) = users
    return node


def _insert(gm: GraphModule, value: Node, name: str, flow: Flow, own: LayerSettings) -> None:
    taken_by = sorted({operation(gm, user)[0] or user.name for user in value.users})
    reason = f"a convolution into {', '.join(taken_by)}"
    quantizer = activation_quantizer(
        own.residual_bits, signed=flow.negative, regularized=False, reason=reason, method=own.act_quantizer
    )
    insert_after(gm, value, free_name(gm, name), quantizer)
