"""Trace a float model into a ``GraphModule``, or into a module with ``GraphModule`` islands: the symbolic runs."""

from __future__ import annotations

import builtins
import contextlib
import inspect
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
from brfx.graph import side_effects, traced_module
from brfx.graph.call_arguments import Arguments, Calls, class_of, require_given, require_held
from brfx.graph.functionalize import functionalize
from brfx.graph.mode_branches import merge
from brfx.graph.side_effects import Surroundings, recording
from brfx.graph.traced_module import TracedModule
from brfx.graph.user_classes import copied
from brfx.kernels.hooks import has_hooks
from brfx.modes import modes_kept
from brfx.nn import QUANTIZED_LAYERS, ActivationObserver, QuantizedLayer, Quantizer

log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=nn.Module)

_LEAVES = (Quantizer, QuantizedLayer, ActivationObserver)


#: Files whose frames are not lines of the user's code.
_NOT_THE_USER_S = (f"{Path(torch.__file__).parent}{os.sep}", __file__, side_effects.__file__, traced_module.__file__)


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

    def __getattr__(self, name: str) -> Any:
        """An input that the example says is a tensor has the attributes of one."""
        self._require_of_tensors(name)
        return super().__getattr__(name)

    @property
    def keys(self) -> Any:
        """A method of every ``fx.Proxy``, by which Python code tells a dict from a tensor."""
        self._require_of_tensors("keys")
        return super().keys

    def _require_of_tensors(self, name: str) -> None:
        node = vars(self)["node"]
        if node.op == "placeholder" and self.tracer.arguments.kinds.get(node.target) is torch.Tensor:
            getattr(torch.Tensor, name)

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
    merge(*graphs)
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
