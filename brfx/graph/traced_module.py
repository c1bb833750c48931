"""The ``GraphModule`` that stands for a traced module: of its class, with its names and attributes, pickled whole."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx import Node

from brfx.errors import TraceError
from brfx.graph.mode_branches import pruned, select_by_mode
from brfx.graph.user_classes import Derived, derived, detached


class TracedModule(Derived, fx.GraphModule):
    """A ``GraphModule`` that stands for the whole of the module it was traced from.

    ``fx.GraphModule`` keeps only what its graph calls. This one keeps every submodule, parameter, buffer, hook and
    plain attribute under its name (RAFT asks its update block for ``hidden_state_size``; MaxViT has buffers that its
    ``forward`` never reads), so that state dicts have the float model's keys in their order. It is of the float
    model's class, whose methods and properties are there; only ``forward`` is the graph's.

    Where ``forward`` does one thing in training and another in eval (dropout written as a function, auxiliary heads),
    the graph has nodes of :func:`select_by_mode`; ``has_mode_branches`` says so. Only the values of the module's mode
    are computed.
    """

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph) -> TracedModule:
        """Raises:
        TraceError: the class has a name that is one of a ``GraphModule``'s own.
        """
        kind = root.user_class if isinstance(root, Derived) else type(root)
        if issubclass(kind, fx.GraphModule):
            kind = nn.Module
        users = {*dir(kind), *vars(root), *root._modules, *root._parameters, *root._buffers}
        taken = sorted(_own_names(cls) & users) if kind is type(root) else []
        if taken:
            raise TraceError(f"cannot trace {kind.__name__}: it has a {taken[0]!r}, and so does every GraphModule")
        new = cls(root, graph, kind.__name__)
        new._adopt(vars(root))
        new.__class__ = derived(cls, kind)
        new.recompile()
        return new

    @property
    def has_mode_branches(self) -> bool:
        return any(node.target is select_by_mode for node in self.graph.nodes)

    def _adopt(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            if name not in _GRAPH_STATE:
                vars(self)[name] = value

    def __deepcopy__(self, memo: dict[int, object]) -> TracedModule:
        new: TracedModule = object.__new__(derived(*self._bases))
        memo[id(self)] = new
        memo.update(detached(self))
        state = {name: value for name, value in vars(self).items() if name != "_compiled_call_impl"}  # calls this one
        vars(new).update(copy.deepcopy(state, memo))
        new.graph = new._graph
        return new

    def __copy__(self) -> TracedModule:
        new: TracedModule = object.__new__(derived(*self._bases))
        new.__setstate__(self.__getstate__())
        return new

    def __getstate__(self) -> dict[str, Any]:
        compiled = (
            "_code",
            "_compiled_call_impl",
            "_lineno_map",
            "_prologue_start",
            "_tracer_cls",
            "_tracer_extras",
        )
        state = {name: value for name, value in vars(self).items() if name not in compiled}
        return {**state, "_graph": packed(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _tracer_cls=None, _tracer_extras={})
        self.graph = unpacked(state["_graph"])

    def recompile(self) -> Any:
        code = super().recompile()
        if self.has_mode_branches:
            modes = {training: generated(self, pruned(self, training)) for training in (True, False)}

            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                return modes[self.training](self, *args, **kwargs)

            forward.__signature__ = inspect.signature(modes[True])  # type: ignore[attr-defined]
            type(self).forward = forward  # type: ignore[method-assign]
        return code


#: What a GraphModule has of its own; all else in a module's ``vars`` is the traced module's.
_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))


def _own_names(cls: type) -> set[str]:
    """Public names that every ``cls`` has and a plain module has not."""
    return {name for name in {*dir(cls), "meta"} - {*dir(nn.Module)} if not name.startswith("_")}


def generated(gm: nn.Module, graph: fx.Graph) -> Any:
    """The Python function that a graph over the modules of ``gm`` compiles to; ``gm`` is its ``self``."""
    return type(fx.GraphModule(gm, graph)).forward


@dataclass(frozen=True)
class _Named:
    """The place of a node in a packed graph."""

    name: str


def _named(node: Node) -> Any:
    return _Named(node.name)


def packed(graph: fx.Graph) -> tuple[Any, ...]:
    """A graph as plain values that refer to nodes by name: pickle follows links between nodes until it overflows."""
    nodes = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _named)
        meta = {key: node.meta[key] for key in ("nn_module_stack", "source_line") if key in node.meta}
        nodes.append((node.op, node.target, args, kwargs, node.name, meta))
    return nodes, graph._codegen


def unpacked(content: tuple[Any, ...]) -> fx.Graph:
    """The graph that :func:`packed` made plain."""
    graph, made = fx.Graph(), dict[str, Node]()
    graph.set_codegen(content[1])

    def named(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Named) else value

    for op, target, args, kwargs, name, meta in content[0]:
        args, kwargs = fx.node.map_aggregate((args, kwargs), named)  # type: ignore[misc]
        made[name] = graph.create_node(op, target, args, kwargs, name)
        made[name].meta.update(meta)
    return graph
