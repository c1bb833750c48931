"""Record how a float model's modules are called, which a symbolic trace cannot see."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from brfx.errors import ConfigError, TraceError

#: The kind of an argument that a call leaves at its default.
ABSENT = "absent"
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Tensor, dict, list, tuple, bool, int, float, str)}
_NONE = type(None).__name__


@dataclass(frozen=True)
class Calls:
    """The recorded calls of one run; plain data, so that a file can hold it.

    Attributes:
        arguments: for each module with submodules, by its name, the kinds that each argument of its ``forward`` had.
        opened: modules that have a submodule which was called from outside their ``forward``: their parts are
            iterated, or another of their methods was called.
    """

    arguments: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def arguments_of(self, name: str, forward: Callable[..., Any]) -> Arguments:
        """The recorded arguments of the module ``name``.

        Raises:
            TraceError: an argument is sometimes None, or nobody knows.
        """
        known, found = self.arguments.get(name), Arguments({}, [], {})
        for place, parameter in enumerate(_parameters(forward)):
            if known is None:
                _unseen(parameter, found, is_whole=not name, is_first=place == 0)
            else:
                _seen(parameter, set(known.get(parameter.name, ["Tensor"])), found)
        return found


@dataclass(frozen=True)
class Arguments:
    """The arguments of a ``forward`` in the trace.

    Attributes:
        held: those that have one value in the trace, with the value.
        given: those that are None by default and are not None in the trace.
        kinds: of those that ``isinstance`` may be asked about; of others it says that they are tensors.
    """

    held: dict[str, Any]
    given: list[str]
    kinds: dict[str, type]


def _seen(parameter: inspect.Parameter, kinds: set[str], found: Arguments) -> None:
    default = parameter.default
    if ABSENT in kinds and default is None:
        kinds = kinds - {ABSENT} | {_NONE}
    if _NONE in kinds:
        if kinds != {_NONE}:
            raise TraceError(f"its argument {parameter.name} is None in some calls and not in others")
        found.held[parameter.name] = None
    elif kinds == {ABSENT} and isinstance(default, (bool, str)):
        found.held[parameter.name] = default
    elif default is None:
        found.given.append(parameter.name)
    kind = _KINDS.get(next(iter(kinds))) if len(kinds) == 1 else None
    if kind is not None:
        found.kinds[parameter.name] = kind


def _unseen(parameter: inspect.Parameter, found: Arguments, *, is_whole: bool, is_first: bool) -> None:
    if parameter.default is not None:
        return
    if is_first:
        found.given.append(parameter.name)
    elif is_whole:
        found.held[parameter.name] = None
    else:
        raise TraceError(f"its argument {parameter.name} may be None: example_inputs= would tell")


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in inspect.signature(forward).parameters.values() if each.kind not in various]


def require_held(value: Any, name: str, held: Any) -> None:
    """Raise ConfigError for an argument that has another value than the one in the trace."""
    if value is not held and (type(value) is not type(held) or value != held):
        other = f"a {type(value).__name__}" if held is None else repr(value)
        raise ConfigError(
            f"forward was traced with {name}={held!r} and is called with {other}: prepare the model with the {name} it "
            "is to have, in example_inputs= or concrete_args="
        )


def require_given(value: Any, name: str) -> None:
    """Raise ConfigError for an argument that is None and was not in the trace."""
    if value is None:
        raise ConfigError(
            f"forward was traced with a {name} and is called without one: prepare the model with example_inputs= that "
            f"lack it, or concrete_args={{{name!r}: None}}"
        )


class CallRecorder:
    """Watches a model while it runs, between ``with`` and its end; :attr:`calls` is what it saw."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, Calls()
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> CallRecorder:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
            for parent in parents:
                if parent not in self._running and parent not in self.calls.opened:
                    self.calls.opened.append(parent)
            self._running.append(name)
            if any(True for _ in module.children()):
                self._note(name, module, args, kwargs)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        known = self.calls.arguments.setdefault(name, {})
        for parameter in _parameters(module.forward):
            kind = _kind(given[parameter.name]) if parameter.name in given else ABSENT
            kinds = known.setdefault(parameter.name, [])
            if kind not in kinds:
                kinds.append(kind)


def _kind(value: Any) -> str:
    return _NONE if value is None else next((n for n, kind in _KINDS.items() if isinstance(value, kind)), "other")


#: Operations whose value is no tensor, or not always one.
_SEVERAL = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "max", "min", "median", "mode",
                      "topk", "sort", "kthvalue", "size", "dim", "unsafe_chunk", "unsafe_split", "meshgrid", "unique",
                      "std_mean", "var_mean", "frexp", "getattr", "item", "tolist", "numel"})  # fmt: skip
_SEVERAL_MODULES = (nn.MultiheadAttention, nn.RNNBase, nn.LSTMCell)


def class_of(node: torch.fx.Node, root: nn.Module, kinds: dict[str, type]) -> type:
    """The type that ``isinstance`` assumes for a traced value.

    Raises:
        TraceError: a trace does not know.
    """
    if node.op == "placeholder":
        return kinds.get(str(node.target), Tensor)
    if node.op == "call_module":
        several = isinstance(root.get_submodule(str(node.target)), _SEVERAL_MODULES)
    else:
        name = getattr(node.target, "__name__", str(node.target))
        several = name in _SEVERAL or (
            name == "getitem" and class_of(node.all_input_nodes[0], root, kinds) is not Tensor
        )
    if several:
        raise TraceError(f"asks for the type of {node.name}, which a trace does not know")
    return Tensor
