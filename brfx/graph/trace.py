"""Trace a float model into a ``GraphModule``, or into a module with ``GraphModule`` islands."""

from __future__ import annotations

import builtins
import contextlib
import copy
import inspect
import itertools
import logging
import operator
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar
from unittest import mock

import torch
from torch import fx, nn
from torch.fx import Node

from brfx.errors import TraceError
from brfx.graph import side_effects
from brfx.graph.call_arguments import Arguments, Calls, class_of, require_given, require_held
from brfx.graph.functionalize import _named_in_place, functionalize
from brfx.graph.side_effects import Surroundings, recording
from brfx.graph.user_classes import Derived, copied, derived, detached
from brfx.kernels.hooks import has_hooks
from brfx.modes import modes_kept
from brfx.nn import QUANTIZED_LAYERS, ActivationObserver, QuantizedLayer, Quantizer

log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=nn.Module)

_LEAVES = (Quantizer, QuantizedLayer, ActivationObserver)


#: Files whose frames are not lines of the user's code.
_NOT_THE_USER_S = (f"{Path(torch.__file__).parent}{os.sep}", __file__, side_effects.__file__)


def is_plain(value: Any) -> bool:
    """Whether a value is fixed by what it equals, not by what it is made of."""
    return value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class Tracing:
    """The user's settings of the trace.

    Attributes:
        concrete_args: inputs of ``forward`` to hold fixed, by name, as in ``torch.fx.symbolic_trace``.
        leaf_modules: types that are not entered: they stay as they are, and nothing in them is quantized.
        calls: how the model's modules are called, where it was run.
    """

    concrete_args: Mapping[str, Any] | None = None
    leaf_modules: tuple[type[nn.Module], ...] = ()
    calls: Calls = field(default_factory=Calls)

    def arguments_of(self, name: str, forward: Any) -> Arguments:
        """The arguments of the module ``name`` in the trace, the user's ``concrete_args`` first."""
        found, concrete = self.calls.arguments_of(name, forward), self.concrete_args or {}
        found.given[:] = [each for each in found.given if each not in concrete]
        found.held.update({each: value for each, value in concrete.items() if is_plain(value)})
        return found


class _Value(fx.Proxy):
    """A proxy that records ``x += y`` and ``x[i] = y``, which fx takes for ``x = x + y`` and refuses."""

    tracer: Tracer

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self) and "node" in vars(self):
            raise TraceError(f"sets the attribute {name} of a tensor")
        fx.Proxy.__setattr__(self, name, value)


@contextmanager
def _tensors_to_isinstance() -> Iterator[None]:
    """Tell the user's code that traced values are tensors: it may branch on ``isinstance(x, Tensor)``.

    Python's own ``isinstance`` is replaced, and not ``__class__`` of the values overridden: torch's C++ asks for that
    too, and then reads a proxy as the tensor that it claims to be.
    """
    real = builtins.isinstance

    def answered(value: Any, kinds: Any, /) -> bool:
        if type(value) is not _Value:
            return real(value, kinds)
        code = sys._getframe(1).f_code
        if real(value, kinds) or (code.co_filename.startswith(_NOT_THE_USER_S) and code.co_name != "is_tensor"):
            return real(value, kinds)
        return issubclass(class_of(value.node, value.tracer.root, value.tracer.arguments.kinds), kinds)

    with mock.patch.object(builtins, "isinstance", answered):
        yield


def _in_place(name: str) -> Any:
    function = getattr(operator, f"i{name}")
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {}, name=name)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(_Value, f"__i{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """``fx.Tracer`` that does not enter what it could only get wrong.

    A module like stochastic depth reads ``self.training`` in its ``forward``; with parameters or children of its own it
    is entered all the same: there may be something to quantize in it. A layer whose ``forward`` is inherited from one
    that brfx quantizes is that layer, wherever its class is defined.
    """

    def __init__(self, tracing: Tracing, arguments: Arguments | None = None) -> None:
        super().__init__()
        self.leaf_modules = tracing.leaf_modules
        self.arguments = arguments or Arguments({}, [], {})
        self.surroundings = Surroundings()

    def record(self, root: nn.Module, concrete_args: Mapping[str, Any] | None) -> fx.Graph:
        """The graph of one symbolic run of ``root``, in the mode that it is in."""
        with recording(self, root), _tensors_to_isinstance():
            graph = self.trace(root, concrete_args=concrete_args)  # type: ignore[arg-type]
            self.surroundings.require_no_draws()
        return graph

    def create_proxy(self, kind: str, target: Any, args: Any, *others: Any, **more: Any) -> Any:
        """A placeholder of an argument that is held fixed is not seen by ``forward``, which gets the value.

        The value is also the default of an argument that had one: callers may leave it out.
        """
        held = self.arguments.held if kind == "placeholder" else {}
        default = (held[target],) if args and target in held else args
        proxy = super().create_proxy(kind, target, default, *others, **more)
        return held.get(target, proxy)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        """A node that knows its line of the user's code, as ``"net.py:12"``; fx's own record is the whole stack."""
        if kind.startswith("call_"):
            self.surroundings.require_same()
        node = super().create_node(kind, *args, **kwargs)
        frame = sys._getframe(1) if kind.startswith("call_") else None
        while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER_S):
            frame = frame.f_back
        if frame is not None:
            node.meta["source_line"] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return node

    def proxy(self, node: Node) -> fx.Proxy:
        return _Value(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``conv(input=x)`` is recorded as ``conv(x)``: passes replace modules by ones with other parameter names."""
        if has_hooks(m) and not self.is_leaf_module(m, self.path_of_module(m)):
            raise TraceError(f"{self.path_of_module(m)} has hooks, which would run in the trace and never again")
        return super().call_module(m, forward, *_by_position(m, args, kwargs))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*_LEAVES, *self.leaf_modules)) or is_plain_layer(m):
            return True
        code = getattr(type(m).forward, "__code__", None)
        if code is not None and "training" in code.co_names and not list(m.children()) and not list(m.parameters()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def _by_position(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        bound = inspect.signature(m.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the call itself says what is wrong
        return args, kwargs
    return bound.args, bound.kwargs


def is_plain_layer(m: nn.Module) -> bool:
    """Whether the arithmetic of ``m`` is that of a float layer with a quantized form."""
    return any(computes_as(m, kind) for kind in QUANTIZED_LAYERS)


def computes_as(m: nn.Module, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether ``m`` is a ``kind`` that no subclass, and no method put on the instance, makes compute something else."""
    return isinstance(m, kind) and all(
        getattr(type(m), name, None) is getattr(kind, name, None) and name not in vars(m)
        for name in ("__call__", "forward", "_conv_forward", "_output_padding")
    )


def select_by_mode(training: Any, evaluation: Any) -> Any:
    """A node of this function is one value in training and another in eval; see :func:`pruned`."""
    raise RuntimeError("a marker in graphs, resolved before they run")


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
            type(self).forward = lambda self, *args, **kwargs: modes[self.training](self, *args, **kwargs)  # type: ignore[method-assign]
        return code


#: What a GraphModule has of its own; all else in a module's ``vars`` is the traced module's.
_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))


def _own_names(cls: type) -> set[str]:
    """Public names that every ``cls`` has and a plain module has not."""
    return {name for name in {*dir(cls), "meta"} - {*dir(nn.Module)} if not name.startswith("_")}


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


def generated(gm: nn.Module, graph: fx.Graph) -> Any:
    """The Python function that a graph over the modules of ``gm`` compiles to; ``gm`` is its ``self``."""
    return type(fx.GraphModule(gm, graph)).forward


def pruned(gm: fx.GraphModule, training: bool) -> fx.Graph:
    """A copy of the graph as it is in one mode: its values instead of ``select_by_mode``, and without what only led to
    others.

    A node that nothing uses, such as an operation in place, is kept unless it belongs to the other mode.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    rejected: set[Node] = set()
    changes: set[Node] = set()
    for node in list(graph.nodes):
        if node.target is select_by_mode:
            chosen, other = node.args if training else node.args[::-1]
            changes |= {other} if not node.users and isinstance(other, Node) else set()
            rejected |= _ancestors(other)
            for user in list(node.users):
                user.args = _replaced(user.args, node, chosen)
                user.kwargs = _replaced(user.kwargs, node, chosen)
            graph.erase_node(node)
    ends = [node for node in graph.nodes if node.op in ("output", "placeholder") or _changes_state(node)]
    rejected -= _ancestors([node for node in ends if node not in changes])
    for node in graph.nodes:
        if node.op != "output" and rejected.intersection(node.all_input_nodes):
            rejected.add(node)
    for node in reversed(graph.nodes):
        if node in rejected:
            graph.erase_node(node)
    return graph


def _changes_state(node: Node) -> bool:
    """Whether a node changes something in place: in a graph without such operations, the model's state."""
    return node.op.startswith("call_") and node.op != "call_module" and _named_in_place(node)


def _replaced(arguments: Any, old: Node, new: Any) -> Any:
    return fx.node.map_arg(arguments, lambda node: new if node is old else node)


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
    """The result of a trace.

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
    return _trace(copied(model), tracing or Tracing())


def trace_islands(model: nn.Module, tracing: Tracing | None = None) -> Traced:
    """Trace a copy of ``model`` whole if that is possible, else the largest submodules that can be.

    An island takes the place of the module that it was traced from, with its parameters, their names, and its plain
    attributes; the Python code around it stays and calls it. A leaf of ``torch.nn`` outside every island stays as it
    is, and so does a submodule with no parameters: there is nothing to quantize in it.

    Args:
        model: any float module; it is left as it is and shares nothing with the result.
    """
    tracing = tracing or Tracing()
    model = copied(model)
    try:
        whole = _trace(model, tracing)
        return Traced(whole, {"": whole})
    except TraceError as error:
        traced = Traced(model, {}, {"": str(error)})
    _place_islands(model, "", traced, replace(tracing, concrete_args=None))
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
            if path in tracing.calls.opened:
                raise TraceError(f"cannot trace {type(child).__name__}: its parts are called from outside it")
            island = _trace(child, tracing, path, write_back=True)
        except TraceError as error:
            traced.stopped[path] = str(error)
            _place_islands(child, f"{path}.", traced, tracing)
            continue
        setattr(parent, name, island)
        traced.islands[path] = island


def _trace(model: nn.Module, tracing: Tracing, name: str = "", *, write_back: bool = False) -> TracedModule:
    graphs = []
    own = [name for name in ("train", "eval") if name in vars(model)]
    if own or (type(model).eval is not nn.Module.eval and not isinstance(model, fx.GraphModule)):
        raise TraceError(f"cannot trace {type(model).__name__}: it has {own[0] if own else 'eval'}() of its own")
    try:
        arguments = tracing.arguments_of(name, model.forward)
    except TraceError as error:
        raise TraceError(f"cannot trace {type(model).__name__}: {error}") from error
    left = {each: value for each, value in (tracing.concrete_args or {}).items() if not is_plain(value)}
    with modes_kept(model):
        for training in (True, False):
            model.train(training)
            try:
                graphs.append(Tracer(tracing, arguments).record(model, left or None))
            except Exception as error:  # whatever the user's forward raises when fed with proxies
                raise TraceError(f"cannot trace {type(model).__name__}: {_where(error)}: {error}") from error
    changed = functionalize(graphs, model, write_back=write_back)
    if changed:
        log.debug("%s: %d operations in place made new values", type(model).__name__, changed)
    for graph in graphs:
        _check_arguments(graph, arguments)
    _merge(*graphs)
    return TracedModule.of(model, graphs[0])


def _check_arguments(graph: fx.Graph, arguments: Arguments) -> None:
    """Let the graph refuse an argument that would have taken another branch.

    forward(x, labels)  ->  forward(x, labels): require_held(labels, "labels", None)
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        with graph.inserting_after(inputs[-1]):
            if node.target in arguments.held:
                graph.call_function(require_held, (node, node.target, arguments.held[str(node.target)]))
            elif node.target in arguments.given:
                graph.call_function(require_given, (node, node.target))


def _merge(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Add to ``train`` what ``evaluation`` does differently.

    y = dropout(x, 0.5, True) / y = dropout(x, 0.5, False)  ->  t = by_mode(True, False); y = dropout(x, 0.5, t)
    return pair(y, aux)       / return y                    ->  return by_mode(pair(y, aux), y)
    c = add_(count, 1)        /                             ->  c = add_(count, 1); by_mode(c, None)
    """
    merge = _Merge(train)
    for node in evaluation.nodes:
        merge.take(node)
    merge.mark_changes()


class _Merge:
    """Match each node of the eval graph with its node in the training graph.

    A node that is nowhere in the training graph is paired with the next one there that calls the same thing, on
    arguments that go by the mode, so that both have one quantizer; if there is none it is added.
    """

    def __init__(self, train: fx.Graph) -> None:
        self.train = train
        self.order = {node: (place, 0) for place, node in enumerate(train.nodes)}
        self.unclaimed: dict[tuple[str, str], list[Node]] = {}
        for node in train.nodes:
            self.unclaimed.setdefault((node.op, str(node.target)), []).append(node)
        self.mapping: dict[Node, Node] = {}
        self.added: list[Node] = []
        self.last = next(iter(train.nodes))

    def take(self, node: Node) -> None:
        candidates = self.unclaimed.get((node.op, str(node.target)), [])
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: self.mapping[other])
        found = next((other for other in candidates if _equal((other.args, other.kwargs), arguments)), None)
        if found is None and node.op in ("call_module", "call_function", "call_method", "output"):
            found = next((other for other in candidates if self._pair(other, arguments)), None)
        if found is None:
            with self.train.inserting_after(self.last):
                found = self.train.node_copy(node, lambda other: self.mapping[other])
            self.added.append(found)
            place, added = self.order[self.last]
            self.order[found] = (place, added + 1)
        else:
            candidates.remove(found)
        self.mapping[node] = found
        self.last = max(self.last, found, key=lambda other: self.order[other])

    def mark_changes(self) -> None:
        """A change of the model's state that is in one mode alone gets a node that says so, which nothing uses."""
        for node in self.added + list(itertools.chain(*self.unclaimed.values())):
            if _changes_state(node):
                with self.train.inserting_after(node):
                    self.train.call_function(select_by_mode, (None, node) if node in self.added else (node, None))

    def _pair(self, candidate: Node, arguments: Any) -> bool:
        """Make ``candidate`` take ``arguments`` in eval, if it comes late enough for them."""
        inputs: list[Node] = []
        fx.node.map_arg(arguments, lambda node: inputs.append(node))
        own = (candidate.args, candidate.kwargs)
        whole = candidate.op == "output"
        if any(self.order[node] >= self.order[candidate] for node in inputs) or not (whole or _alike(own, arguments)):
            return False

        def choose(a: Any, b: Any) -> Any:
            if _equal(a, b):
                return a
            if isinstance(a, (tuple, list)) and _alike(a, b):
                return type(a)(map(choose, a, b))
            if isinstance(a, dict) and _alike(a, b):
                return {key: choose(a[key], b[key]) for key in a}
            with self.train.inserting_before(candidate):
                chosen = self.train.call_function(select_by_mode, (a, b))
            self.order[chosen] = self.order[candidate]
            return chosen

        if whole:
            candidate.args = (choose(own[0][0], arguments[0][0]),)
        else:
            candidate.args = tuple(map(choose, own[0], arguments[0]))
            candidate.kwargs = {key: choose(value, arguments[1][key]) for key, value in own[1].items()}
        return True


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return a is b or (not isinstance(a, Node) and type(a) is type(b) and bool(a == b))


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments are of one shape: as long, and with the same keys."""
    if type(a) is type(b) and isinstance(a, (tuple, list)) and not hasattr(a, "_fields"):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    return not isinstance(a, (tuple, list, dict, slice)) and not isinstance(b, (tuple, list, dict, slice))


def _where(error: BaseException) -> str:
    """File and line of the innermost frame that is the model's own code."""
    place = "its forward"
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(_NOT_THE_USER_S) and file != contextlib.__file__:
            place = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place
