"""Give residual streams a grid of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from brfx.config import QATConfig
from brfx.graph.dataflow import operation
from brfx.graph.torch_ops import preserves_values
from brfx.graph.utils import module_calls, set_module
from brfx.nn import ActivationQuantizer
from brfx.quant.factory import stream_quantizer

_ADDS = ("add", "iadd")


@dataclass(frozen=True)
class WidenStreams:
    """Let a residual stream carry ``stream_bits`` where the layers that read it have fewer.

        r = QuantizedClippedReLU(x); y = QuantizedClippedReLU(conv(r) + r)
        ->  r = StreamQuantizer(x); y = StreamQuantizer(conv(r) + r)

    A stream is what a ReLU hands to an add, the ReLU behind that add, and so on: all of them call one module and have
    one step, so that integer kernels add codes. What a layer reads of it is put on the layer's own grid by
    ``QuantizeInputs``. Published few-bit networks keep this stream in floating point.

    Requires: ``QuantizeReLUs``; before ``QuantizeInputs`` and ``AlignResiduals``.
    Ensures: no add reads a ReLU of fewer bits than its stream; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        changed = 0
        for stream in self._streams(gm):
            first = str(stream[0].target)
            relu = gm.get_submodule(first)
            assert isinstance(relu, ActivationQuantizer)
            bits = self._bits(stream[0], relu)
            for node in stream[1:]:
                gm.delete_submodule(str(node.target))
                node.target = first
            set_module(gm, first, stream_quantizer(bits, clip_value=relu.clip_value))
            changed += len(stream)
        return changed

    def _streams(self, gm: GraphModule) -> list[list[Node]]:
        """The ReLUs of each stream in order of execution."""
        relus = {
            node: (self._bits(node, module), module.clip_value)
            for node, module in module_calls(gm)
            if isinstance(module, ActivationQuantizer) and module.is_relu and module.bits < self._bits(node, module)
        }
        streams: dict[Node, list[Node]] = {}  # by each of its ReLUs
        for node, kind in relus.items():
            adds = _adds(gm, node)
            for add in adds:
                behind = next(iter(add.users)) if len(add.users) == 1 else None
                joined = [node, behind] if behind is not None and relus.get(behind) == kind else [node]
                members = list(dict.fromkeys(relu for one in joined for relu in streams.get(one, [one])))
                streams |= {relu: members for relu in members}
        order = {node: place for place, node in enumerate(gm.graph.nodes)}
        found = {id(members): sorted(members, key=order.__getitem__) for members in streams.values()}
        return list(found.values())

    def _bits(self, node: Node, relu: ActivationQuantizer) -> int:
        own = self.config.at(f"{self.scope}{node.target}", "ReLU")
        return relu.bits if own is None or relu.is_stream else own.stream_bits


def _adds(gm: GraphModule, node: Node) -> list[Node]:
    """The adds that read a value, at once or behind what leaves it as it is."""
    found = []
    for user in node.users:
        name, args, kwargs = operation(gm, user)
        if name in _ADDS:
            found.append(user)
        elif preserves_values(name, args, kwargs):
            found += _adds(gm, user)
    return found
