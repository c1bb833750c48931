"""A float model becomes a ``GraphModule``, or a module with ``GraphModule`` islands in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import Node

from brfx.errors import TraceError
from brfx.nn import QUANTIZED_LAYERS, ActivationObserver, LSQQuantizer, QuantizedLayer

_LEAVES = (LSQQuantizer, QuantizedLayer, ActivationObserver)


@dataclass(frozen=True)
class Tracing:
    """What the user may say about tracing.

    Attributes:
        concrete_args: inputs of ``forward`` to hold fixed, by name, as in ``torch.fx.symbolic_trace``.
        leaf_modules: types that are not entered: they stay as they are, and nothing in them is quantized.
    """

    concrete_args: Mapping[str, Any] | None = None
    leaf_modules: tuple[type[nn.Module], ...] = ()


class Tracer(fx.Tracer):
    """``fx.Tracer`` that does not enter what it could only get wrong.

    A module like stochastic depth reads ``self.training`` in its ``forward``; with parameters or children of its own it
    is entered all the same: there may be something to quantize in it. A layer whose ``forward`` is inherited from one
    that brfx quantizes is that layer, wherever its class is defined.
    """

    def __init__(self, tracing: Tracing) -> None:
        super().__init__()
        self.leaf_modules = tracing.leaf_modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*_LEAVES, *self.leaf_modules)) or is_plain_layer(m):
            return True
        code = getattr(type(m).forward, "__code__", None)
        if code is not None and "training" in code.co_names and not list(m.children()) and not list(m.parameters()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def is_plain_layer(m: nn.Module) -> bool:
    """Whether the arithmetic of ``m`` is that of a float layer with a quantized form."""
    return any(isinstance(m, kind) and type(m).forward is kind.forward for kind in QUANTIZED_LAYERS)


class TrainingFlag(nn.Module):
    """``self.training`` as a node: what a trace would bake in, as in ``F.dropout(x, p, self.training)``."""

    def forward(self) -> bool:
        return self.training


class TracedModule(fx.GraphModule):
    """A ``GraphModule`` that stands for the whole of the module it was traced from.

    ``fx.GraphModule`` keeps only what its graph calls. This one keeps every submodule, parameter, buffer, hook and
    plain attribute under its name (RAFT asks its update block for ``hidden_state_size``; MaxViT has buffers that its
    ``forward`` never reads), so that state dicts have the float model's keys in their order.

    Where ``forward`` does one thing in training and another in eval (auxiliary heads), the graph holds both: ``twin``
    is set, and the graph's output is the pair of the two results. Running it computes the one that is wanted.
    """

    twin: bool = False

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph, *, twin: bool) -> TracedModule:
        new = cls(root, graph, type(root).__name__)
        new._adopt(vars(root))
        new.twin = twin
        new.recompile()
        return new

    def _adopt(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            if name not in _GRAPH_STATE:
                vars(self)[name] = value

    def __deepcopy__(self, memo: dict[int, object]) -> TracedModule:
        new = super().__deepcopy__(memo)
        assert isinstance(new, TracedModule)
        new._adopt(copy.deepcopy(vars(self), memo))
        new.recompile()
        return new

    def recompile(self) -> Any:
        code = super().recompile()
        if self.twin:
            modes = {training: generated(self, pruned(self, training)) for training in (True, False)}
            type(self).forward = lambda self, *args, **kwargs: modes[self.training](self, *args, **kwargs)  # type: ignore[method-assign]
        return code


#: What a GraphModule has of its own; all else in a module's ``vars`` is the traced module's.
_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))


def generated(gm: fx.GraphModule, graph: fx.Graph) -> Any:
    """The Python function that a graph over the modules of ``gm`` compiles to; ``gm`` is its ``self``."""
    return type(fx.GraphModule(gm, graph)).forward


def pruned(gm: fx.GraphModule, training: bool) -> fx.Graph:
    """A copy of the graph with only the output, and what leads to it, of one mode; of a graph with one output all."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    if getattr(gm, "twin", False):
        wanted, other = output if training else output[::-1]  # type: ignore[index, misc]
        graph.output(wanted)
        unwanted = _ancestors(other) - _ancestors(wanted)
        for node in reversed(graph.nodes):
            if node in unwanted and node.op != "placeholder":
                graph.erase_node(node)
    else:
        graph.output(output)
    return graph


def _ancestors(value: Any) -> set[Node]:
    found: set[Node] = set()
    waiting: list[Node] = []
    fx.node.map_arg(value, lambda node: waiting.append(node))
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


@dataclass(frozen=True)
class Traced:
    """What tracing came to.

    Attributes:
        model: a ``GraphModule``; or, where the model cannot be traced whole, a copy of it in which the largest
            submodules that can be are ``GraphModule`` islands.
        islands: each ``GraphModule`` by its dotted name; ``{"": model}`` for a whole trace.
        stopped: for each module that could not be traced, the line and the reason; empty for a whole trace.
    """

    model: nn.Module
    islands: dict[str, fx.GraphModule]
    stopped: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, tracing: Tracing | None = None) -> fx.GraphModule:
    """Record symbolic runs of a copy of ``model``, one in training and one in eval, as one graph that is right in both.

    Args:
        model: any float module; it is left as it is and shares nothing with the result.

    Raises:
        TraceError: the model's ``forward`` does something that a symbolic run cannot follow; names the line.
    """
    return _trace(copy.deepcopy(model), tracing or Tracing())


def trace_islands(model: nn.Module, tracing: Tracing | None = None) -> Traced:
    """Trace a copy of ``model`` whole if that is possible, else the largest submodules that can be.

    An island takes the place of the module that it was traced from, with its parameters, their names, and its plain
    attributes; the Python code around it stays and calls it. A leaf of ``torch.nn`` outside every island stays as it
    is, and so does a submodule with no parameters: there is nothing to quantize in it.

    Args:
        model: any float module; it is left as it is and shares nothing with the result.
    """
    tracing = tracing or Tracing()
    model = copy.deepcopy(model)
    try:
        whole = _trace(model, tracing)
        return Traced(whole, {"": whole})
    except TraceError as error:
        traced = Traced(model, {}, {"": str(error)})
    _place_islands(model, "", traced, Tracing(None, tracing.leaf_modules))
    return traced


def _place_islands(parent: nn.Module, prefix: str, traced: Traced, tracing: Tracing) -> None:
    for name, child in list(parent.named_children()):
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # has no forward
            _place_islands(child, f"{path}.", traced, tracing)
            continue
        if Tracer(tracing).is_leaf_module(child, path) or not any(True for _ in child.parameters()):
            continue
        try:
            island = _trace(child, tracing)
        except TraceError as error:
            traced.stopped[path] = str(error)
            _place_islands(child, f"{path}.", traced, tracing)
            continue
        setattr(parent, name, island)
        traced.islands[path] = island


def _trace(model: nn.Module, tracing: Tracing) -> TracedModule:
    graphs = []
    with _modes_kept(model):
        for training in (True, False):
            model.train(training)
            try:
                graphs.append(Tracer(tracing).trace(model, concrete_args=tracing.concrete_args))  # type: ignore[arg-type]
            except Exception as error:  # whatever the user's forward raises when fed with proxies
                raise TraceError(f"cannot trace {type(model).__name__}: {_where(error)}: {error}") from error
    twin = _merge(model, *graphs)
    return TracedModule.of(model, graphs[0], twin=twin)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _merge(root: nn.Module, train: fx.Graph, evaluation: fx.Graph) -> bool:
    """Add to ``train`` what only ``evaluation`` does; whether there was anything: then the output is the pair of both.

    y = dropout(x, 0.5, True) / y = dropout(x, 0.5, False)  ->  t = TrainingFlag(); y = dropout(x, 0.5, t)
    return pair(y, aux)       / return y                    ->  return (pair(y, aux), y)
    """
    merge = _Merge(train)
    for node in list(evaluation.nodes):
        if node.op != "output":
            merge.take(node)
    own, other = (next(node for node in graph.nodes if node.op == "output") for graph in (train, evaluation))
    if merge.flagged:
        root.add_module("training_flag", TrainingFlag().train(root.training))
        first = next(node for node in train.nodes if node.op != "placeholder")
        with train.inserting_before(first):
            flag = train.call_module("training_flag")
        for node in merge.flagged:
            counterpart = next(b for b, a in merge.mapping.items() if a is node)
            node.args = _with_flag(node.args, counterpart.args, flag)
            node.kwargs = _with_flag(node.kwargs, counterpart.kwargs, flag)
    output = fx.node.map_arg(other.args[0], lambda node: merge.mapping[node])
    if not merge.added and _same(own.args[0], other.args[0], merge.mapping) is not None:
        return False
    own.args = ((own.args[0], output),)
    return True


class _Merge:
    """Which node of the training graph each node of the eval graph is."""

    def __init__(self, train: fx.Graph) -> None:
        self.train = train
        self.unclaimed: dict[tuple[str, str], list[Node]] = {}
        for node in train.nodes:
            self.unclaimed.setdefault((node.op, str(node.target)), []).append(node)
        self.mapping: dict[Node, Node] = {}
        self.flagged: list[Node] = []
        self.added = 0
        self.last = next(iter(train.nodes))

    def take(self, node: Node) -> None:
        candidates = self.unclaimed.get((node.op, str(node.target)), [])
        for candidate in candidates:
            flags = _same((candidate.args, candidate.kwargs), (node.args, node.kwargs), self.mapping)
            if flags is not None:
                candidates.remove(candidate)
                self.mapping[node] = candidate
                if flags:
                    self.flagged.append(candidate)
                break
        else:
            with self.train.inserting_after(self.last):
                self.mapping[node] = self.train.node_copy(node, lambda other: self.mapping[other])
            self.added += 1
        self.last = self.mapping[node]


def _same(a: Any, b: Any, mapping: dict[Node, Node]) -> int | None:
    """Whether ``a`` of the training graph is ``b`` of the eval graph: in how many places by True for False, or None."""
    if isinstance(b, Node):
        return 0 if mapping.get(b) is a else None
    if isinstance(b, (tuple, list)) and isinstance(a, (tuple, list)) and len(a) == len(b):
        parts = [_same(x, y, mapping) for x, y in zip(a, b, strict=True)]
    elif isinstance(b, dict) and isinstance(a, dict) and a.keys() == b.keys():
        parts = [_same(a[key], b[key], mapping) for key in b]
    elif isinstance(b, slice) and isinstance(a, slice):
        parts = [_same(getattr(a, part), getattr(b, part), mapping) for part in ("start", "stop", "step")]
    elif a is True and b is False:
        return 1
    else:
        return 0 if type(a) is type(b) and (a is b or bool(a == b)) else None
    return None if any(part is None for part in parts) else sum(part for part in parts if part)


def _with_flag(a: Any, b: Any, flag: Node) -> Any:
    """``a`` with ``flag`` where it has True and ``b`` has False."""
    if isinstance(a, (tuple, list)):
        return type(a)(_with_flag(x, y, flag) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return {key: _with_flag(a[key], b[key], flag) for key in a}
    return flag if a is True and b is False else a


def _where(error: BaseException) -> str:
    """File and line of the innermost frame that is the model's own code."""
    place = "its forward"
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if "torch/fx" not in file and "torch/nn/modules/module.py" not in file and file != __file__:
            place = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place
