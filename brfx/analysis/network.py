"""A model's graph as plain data for a picture: what is called, by what it is followed, in how many bits, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import GraphModule, Node

from brfx.analysis.audit import Audit, LayerAudit
from brfx.analysis.observe import graphs
from brfx.graph.mode_branches import pruned
from brfx.graph.torch_ops import linear_op, name_of
from brfx.graph.utils import call_sites
from brfx.nn import (
    QUANTIZED_LAYERS,
    ActivationObserver,
    QuantizedAttention,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    Quantizer,
    WeightQuantizer,
)
from brfx.nn.residual import ResidualAdd

_MULTIPLIES = (QuantizedLayer, QuantizedMultiheadAttention, QuantizedAttention, nn.MultiheadAttention)


@dataclass(frozen=True)
class Place:
    """One call in a graph, in order of execution.

    Attributes:
        id: unique in the network.
        name: dotted name of the module, ``name#2`` from its second call on; of a function its name.
        kind: the module's type, or ``"function"``.
        role: ``"input"``, ``"output"``, ``"layer"`` (it multiplies), ``"quantizer"``, ``"observer"``, ``"add"`` or
            ``"other"``.
        inputs: ids of the places whose values it takes.
        weight_bits, act_bits: of a layer's operands, of a quantizer its own; ``None``: FP32, or no operand.
        quantized: whether all that a layer multiplies is on a grid; ``None`` where nobody looked.
        macs: multiply-accumulates of an example; 0 for functions, whose calls are counted together.
        reason: why an operand is in FP32, or why a quantizer is there.
        relu: whether a quantizer stands for a ReLU as well.
    """

    id: str
    name: str
    kind: str
    role: str
    inputs: tuple[str, ...] = ()
    weight_bits: int | None = None
    act_bits: int | None = None
    quantized: bool | None = None
    macs: int = 0
    reason: str = ""
    relu: bool = False


@dataclass
class _Audited:
    """The rows of an audit, and which of them have found their place."""

    rows: tuple[LayerAudit, ...] = ()
    placed: set[int] = field(default_factory=set)

    def of_module(self, name: str) -> list[LayerAudit]:
        """What a module and those inside of it multiplied."""
        return self._take(lambda row: row.macs > 0 and (row.name == name or row.name.startswith(f"{name}.")))

    def of_function(self, scope: str, op: str) -> list[LayerAudit]:
        """What the calls of a function multiplied in one graph."""
        return self._take(lambda row: row.macs > 0 and row.name == scope and row.type == op)

    def rest(self) -> list[LayerAudit]:
        """What was multiplied elsewhere."""
        return [row for index, row in enumerate(self.rows) if row.macs and index not in self.placed]

    def _take(self, wanted: Any) -> list[LayerAudit]:
        found = {index: row for index, row in enumerate(self.rows) if wanted(row)}
        self.placed |= set(found)
        return list(found.values())


def network(model: nn.Module, audit: Audit | None = None) -> list[Place]:
    """The places of a traced model as it runs in eval mode.

    Args:
        model: what :func:`brfx.prepare_qat` returned, or a float model that was traced. Of one that could not be traced
            whole it has the islands, and behind them what ``audit`` saw between them.
        audit: of the same model; without it no layer has bits.
    """
    audited = _Audited(audit.layers if audit else ())
    places = [place for prefix, gm in graphs(model).items() for place in _of_graph(prefix, gm, audited)]
    return [*places, *(_loose(row) for row in audited.rest())]


def _of_graph(prefix: str, gm: GraphModule, audited: _Audited) -> Iterator[Place]:
    scope = f"{prefix}." if prefix else ""
    graph = pruned(gm, training=False) if getattr(gm, "has_mode_branches", False) else gm.graph
    sites = call_sites(graph)
    shown = {node for node in graph.nodes if _is_shown(gm, node)}
    for node in graph.nodes:
        if node in shown:
            module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            inputs = tuple(f"{scope}{source.name}" for source in node.all_input_nodes if source in shown)
            own = {"id": f"{scope}{node.name}", "inputs": inputs}
            if module is not None:
                yield _of_module(own, scope + sites[node], f"{scope}{node.target}", module, audited)
            else:
                yield _of_node(own, node, prefix, audited)


def _is_shown(gm: GraphModule, node: Node) -> bool:
    """Values are shown, constants and what quantizes them are not."""
    if node.op == "get_attr":
        return False
    return node.op in ("placeholder", "output") or any(_is_value(source) for source in _sources(node))


def _sources(node: Node) -> set[fx.Node]:
    """The nodes that ``node`` is computed from in the end."""
    ends, seen, waiting = set(), set(), [node]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            waiting.extend(part.all_input_nodes)
            if not part.all_input_nodes:
                ends.add(part)
    return ends


def _is_value(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _of_module(own: dict[str, Any], site: str, name: str, module: nn.Module, audited: _Audited) -> Place:
    kind = type(module).__name__
    if isinstance(module, ActivationObserver):
        return Place(name=site, kind=kind, role="observer", **own)
    if isinstance(module, Quantizer):
        bits: dict[str, Any] = {"weight_bits" if isinstance(module, WeightQuantizer) else "act_bits": module.bits}
        about: dict[str, Any] = {"reason": getattr(module, "reason", ""), "relu": getattr(module, "is_relu", False)}
        return Place(name=site, kind=kind, role="quantizer", **about, **bits, **own)
    if isinstance(module, ResidualAdd):
        return Place(name=site, kind=kind, role="add", **own)
    rows = audited.of_module(name)
    if rows or isinstance(module, (*_MULTIPLIES, *QUANTIZED_LAYERS)):
        return Place(name=site, kind=kind, role="layer", **_multiplied(rows), **own)
    return Place(name=site, kind=kind, role="other", **own)


def _of_node(own: dict[str, Any], node: Node, prefix: str, audited: _Audited) -> Place:
    if node.op in ("placeholder", "output"):
        return Place(name=str(node.target), kind="", role="input" if node.op == "placeholder" else "output", **own)
    name = str(name_of(node.target) or getattr(node.target, "__name__", str(node.target)))
    if linear_op(node.target) is not None:
        found = _multiplied(audited.of_function(prefix, name)) | {"macs": 0}
        return Place(name=name, kind="function", role="layer", **found, **own)
    is_add = name in ("add", "iadd") and len(own["inputs"]) == 2
    return Place(name=name, kind="function", role="add" if is_add else "other", **own)


def _multiplied(rows: list[LayerAudit]) -> dict[str, Any]:
    """The operands' bits where the rows agree, their largest where not; FP32 where one is."""
    if not rows:
        return {}

    def bits(name: str) -> int | None:
        found = [value for row in rows if (value := getattr(row, name)) is not None]
        return max(found, default=None)

    return {
        "weight_bits": bits("weight_bits"),
        "act_bits": bits("act_bits"),
        "quantized": all(row.quantized_macs == row.macs for row in rows),
        "macs": sum(row.macs for row in rows),
        "reason": "; ".join(dict.fromkeys(row.reason for row in rows if row.reason)),
    }


def _loose(row: LayerAudit) -> Place:
    name = row.name or row.type
    return Place(id=f"{name}:{row.type}", name=name, kind=row.type, role="layer", **_multiplied([row]))
