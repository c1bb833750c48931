"""Put the branches of residual adds on 8-bit grids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from brfx.config import QATConfig
from brfx.graph.dataflow import Flow, analyse, operation
from brfx.graph.source_rewrite import QuantizedFunction
from brfx.graph.torch_ops import LINEAR, preserves_values
from brfx.graph.utils import free_name, insert_after, scope, set_module, step_node
from brfx.nn import (
    ActivationQuantizer,
    AlignedAdd,
    QuantizedAttention,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    ResidualAdd,
    StreamAdd,
)
from brfx.quant.factory import activation_quantizer
from brfx.quant.quantizer import GRAD_MARGIN_OF_SUMS

_ADDS = ("add", "iadd")
_MULTIPLY = (QuantizedLayer, QuantizedMultiheadAttention, QuantizedAttention, QuantizedFunction)
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm")


@dataclass(frozen=True)
class AlignResiduals:
    """Quantize what a layer sends into an add.

        y = QuantizedClippedReLU(branch + shortcut)  ->  y = QuantizedClippedReLU(AlignedAdd(branch, shortcut, S, s))
        y = StreamQuantizer(branch + shortcut)       ->  y = StreamQuantizer(StreamAdd(branch, shortcut, S))
        y = branch + stream                          ->  y = ActivationQuantizer(branch) + stream

    The first form, exact on integer kernels (:class:`brfx.nn.AlignedAdd`), where a quantized ReLU of at most 4 bits
    takes the sum and the shortcut is on a grid of at most 4 bits or comes from a layer itself; S and s are the steps.
    The second, as exact (:class:`brfx.nn.StreamAdd`), where the sum and the shortcut belong to one stream. In the
    third, whatever else reads the branch reads it quantized.

    Requires: ``QuantizeReLUs``, ``WidenStreams``; before ``InsertObservers``.
    Ensures: every addend that comes from a layer is on a grid; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        flows = analyse(gm)
        changed = 0
        for node in list(gm.graph.nodes):
            if node.op not in ("call_function", "call_method") or operation(gm, node)[0] not in _ADDS:
                continue
            addends = [argument for argument in node.args[:2] if isinstance(argument, Node)]
            if len(addends) == 2 and set(node.kwargs) <= {"other"} and addends[0] is not addends[1]:
                changed += self._add(gm, node, addends, flows)
        return changed

    def _add(self, gm: GraphModule, node: Node, addends: list[Node], flows: dict[Node, Flow]) -> int:
        own = self.config.at(f"{self.scope}{scope(node)}.{node.name}".replace("..", "."), "add")
        branches = [addend for addend in addends if flows[addend].grid is None and _from_layer(gm, addend)]
        constant = any(addend.op == "get_attr" for addend in addends)
        if own is None or own.inner_act_bits is None or own.residual_bits == 32 or not branches or constant:
            return 0
        behind = self._relu_behind(gm, node)
        if behind is not None and own.residual_bits == 8:
            others = [addend for addend in addends if addend not in branches]
            shortcut = self._code(gm, others[0], flows) if others else None
            add = _exact_add(behind, shortcut) if shortcut or len(branches) == 2 else None
            if add is not None:
                source = flows[others[0]].grid if others and isinstance(add, AlignedAdd) else None
                self._align(gm, node, (*branches, *others), source, add)
                behind.grad_margin = GRAD_MARGIN_OF_SUMS
                return 1
        for branch in branches:
            name = free_name(gm, f"{scope(node)}.{node.name}_branch".lstrip("."))
            negative = flows[branch].negative
            reason = f"{flows[branch].source} into a residual add"
            quantizer = activation_quantizer(
                own.residual_bits, signed=negative, regularized=False, reason=reason, method=own.act_quantizer
            )
            quantized = insert_after(gm, branch, name, quantizer)
            flows[quantized] = Flow(quantized, negative, "quantizer")  # a later add may read it
        return 1

    @staticmethod
    def _relu_behind(gm: GraphModule, node: Node) -> ActivationQuantizer | None:
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module":
            module = gm.get_submodule(str(users[0].target))
            return module if isinstance(module, ActivationQuantizer) and module.is_relu else None
        return None

    @staticmethod
    def _code(gm: GraphModule, node: Node, flows: dict[Node, Flow]) -> ActivationQuantizer | None:
        """The unsigned quantizer whose very levels ``node`` holds, not scaled by a dropout or a factor."""
        while node is not flows[node].grid:
            name, args, kwargs = operation(gm, node)
            if not preserves_values(name, args, kwargs) or "drop" in str(name) or "stochastic" in str(name):
                return None
            node = node.all_input_nodes[0]
        module = gm.get_submodule(str(node.target))
        return module if isinstance(module, ActivationQuantizer) and not module.signed else None

    @staticmethod
    def _align(
        gm: GraphModule, node: Node, addends: tuple[Node, ...], source: Node | None, aligned: ResidualAdd
    ) -> None:
        name = free_name(gm, f"{scope(node)}.{node.name}".lstrip("."))
        set_module(gm, name, aligned)
        with gm.graph.inserting_before(node):
            quantizers = [next(iter(node.users)), *([source] if source is not None else [])]
            steps = [step_node(gm, str(quantizer.target)) for quantizer in quantizers]
            new = gm.graph.call_module(name, (*addends, *steps))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _exact_add(behind: ActivationQuantizer, shortcut: ActivationQuantizer | None) -> ResidualAdd | None:
    """The add that integer kernels compute as the quantizer ``behind`` it does; ``shortcut=None`` is a projection."""
    if behind.is_stream:
        return StreamAdd(projection=shortcut is None) if shortcut in (None, behind) else None
    high_in = shortcut.grid.high if shortcut else None
    return AlignedAdd(behind.grid.high, high_in) if AlignedAdd.fits(behind.grid.high, high_in) else None


def _from_layer(gm: GraphModule, node: Node) -> bool:
    """Whether a value is a layer's output, normalized or scaled perhaps, with no other add in between."""
    name, args, kwargs = operation(gm, node)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, (*_MULTIPLY, nn.modules.conv._ConvNd, nn.Linear)):
            return True
    if name is None or name in _ADDS:
        return False
    if name in LINEAR:
        return True
    on_the_way = preserves_values(name, args, kwargs) or name in ("mul", "imul") or name.rstrip("123d") in _NORMS
    return on_the_way and any(_from_layer(gm, argument) for argument in node.all_input_nodes)
