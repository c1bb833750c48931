"""Record the side effects of a symbolic run, or end the trace with the reason.

``torch.fx`` sees a call if one of its arguments stands for a value of the graph. All else is Python that runs once: a
number drawn, a product of buffers, a counter of batches would be what they were in the trace, for ever.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves, tree_map

from brfx.compat import factories_are_overridden, saved_tensors_are_hooked
from brfx.errors import TraceError
from brfx.graph.functionalize import named_in_place
from brfx.graph.torch_ops import words

log = logging.getLogger(__name__)

#: What a tensor of the model says of itself that loading or moving it does not change.
_FIXED = words(
    """
    shape ndim layout requires_grad names is_leaf is_sparse is_quantized is_nested is_meta grad_fn
    __len__ __hash__ __repr__ dim ndimension size numel nelement stride is_contiguous is_floating_point is_complex
    is_tensor
    """
)
#: These make Python numbers and arrays of a tensor's values.
_NUMBERS = words("__int__ __float__ __bool__ __index__ __complex__ __contains__ __array__ numpy is_nonzero")
_REFLECTED = {
    f"__r{name}__": function
    for name, function in {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
        "truediv": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow,
        "matmul": operator.matmul, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    }.items()
}  # fmt: skip

#: Make tensors of numbers alone.
_FACTORIES = words(
    "arange as_tensor empty eye full hann_window linspace logspace normal ones rand randint randn randperm tensor "
    "tril_indices triu_indices zeros"
)
#: These take sizes one by one, as in ``torch.zeros(x.shape[0], 1)``, of which torch looks at none for a traced number.
_OF_SIZES = words("empty ones rand randn zeros")


class _Calls(TorchFunctionMode):
    """Records calls on the model's own tensors, and those that draw random numbers; others run as they are.

    A constant that the graph reads already is such a tensor too: what changes it later must not change it before.
    """

    def __init__(self, tracer: fx.Tracer, root: nn.Module) -> None:
        super().__init__()
        self.tracer = tracer
        self.states = {id(value): name for name, value in (*root.named_parameters(), *root.named_buffers())}
        self.proxies: dict[str, fx.Proxy] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        name = str(getattr(function, "__name__", ""))
        if name in ("__get__", "__set__"):
            name = str(getattr(function.__self__, "__name__", "")) + name.removeprefix("__get__")  # type: ignore[attr-defined]
        if any(isinstance(value, fx.Proxy) for value in leaves):
            return function(*args, **kwargs)
        state = next(filter(None, map(self._name, leaves)), None)
        if state is None:
            return self._constant(function, args, kwargs)
        if name in _FIXED:
            return function(*args, **kwargs)
        if name in _NUMBERS or name.endswith("__set__"):
            what = "takes a number out of" if name in _NUMBERS else "changes an attribute of"
            raise TraceError(f"{what} {state}, which is the model's state")
        return self._recorded(function, name, *tree_map(self._proxy, (args, kwargs)))

    def _name(self, value: Any) -> str | None:
        if not isinstance(value, Tensor):
            return None
        return self.states.get(id(value)) or self.tracer.tensor_attrs.get(value)

    def _proxy(self, value: Any) -> Any:
        name = self._name(value)
        if name is None:
            return value
        if name not in self.proxies:
            self.proxies[name] = self.tracer.create_proxy("get_attr", name, (), {})
        return self.proxies[name]

    def _constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = _torch_generators()
        result = function(*args, **kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise TraceError("draws from a generator of its own, and the draw would be the same in every call")
        if _same(before, _torch_generators()) or not any(isinstance(value, Tensor) for value in tree_leaves(result)):
            return result
        name = str(function.__name__)
        return self._recorded(function, name, args, kwargs)

    def _recorded(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in _REFLECTED:
            return _REFLECTED[name](args[1], args[0])
        if name.startswith("__") and isinstance(args[0], fx.Proxy) and hasattr(operator, name):
            return getattr(operator, name)(*args)
        if function.__name__ == "__get__":
            return getattr(args[0], name)
        if is_tensor_method_or_property(function):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", function, args, kwargs)


class Surroundings:
    """The global modes that a call runs in; they must be the same for every call of a graph."""

    def __init__(self) -> None:
        self.python, self.numpy = random.getstate(), np.random.get_state()

    def require_same(self) -> None:
        """Raise TraceError for what a graph would lose: called where a call is recorded."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise TraceError("runs without gradients (no_grad, inference_mode, autograd.Function), which no graph says")
        if saved_tensors_are_hooked():
            raise TraceError("runs under hooks of saved tensors, which no graph says")
        self.require_no_draws()

    def require_no_draws(self) -> None:
        if random.getstate() != self.python:
            raise TraceError("draws from Python's random before this, and the draw would be the same in every call")
        if not _same(tuple(np.random.get_state())[1:], tuple(self.numpy)[1:]):
            raise TraceError("draws from numpy.random before this, and the draw would be the same in every call")


@contextmanager
def recording(tracer: fx.Tracer, root: nn.Module) -> Iterator[None]:
    """Let ``tracer`` record what ``root`` does with its own state and with random numbers, and refuse what it cannot.

    Raises:
        TraceError: ``forward`` sets attributes or changes containers of its modules, reads numbers out of its state, or
            runs under autocast. ``root`` is as it was then, and so are the random generators always.
    """
    state = _State(root)
    torch_generators, python, numpy = _torch_generators(), random.getstate(), np.random.get_state()
    with ExitStack() as kept:
        kept.callback(random.setstate, python)
        kept.callback(np.random.set_state, numpy)
        kept.callback(torch.set_rng_state, torch_generators[0])
        if len(torch_generators) > 1:
            kept.callback(torch.cuda.set_rng_state_all, list(torch_generators[1:]))
        kept.enter_context(_patched(tracer, root, state))
        try:
            with torch.inference_mode(False), torch.enable_grad(), _Calls(tracer, root):
                yield
        except BaseException:
            state.restore()
            raise
    changed = state.changed()
    if changed is not None:
        state.restore()
        raise TraceError(f"forward changes {changed}, which the next call would read")


def _recording_factory(tracer: fx.Tracer, factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory`` that is recorded where a number is one of the graph's, which torch may refuse."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", factory, args, kwargs)
        return factory(*args, **kwargs)

    return call


@contextmanager
def _patched(tracer: fx.Tracer, root: nn.Module, state: _State) -> Iterator[None]:
    """Let what goes round a symbolic run end it; checkpoints, which save memory alone, are as if they were absent."""
    set_attribute = nn.Module.__setattr__

    def guarded(module: nn.Module, name: str, value: Any) -> None:
        if name.startswith("_tensor_constant") or _unchanged(state.attribute(module, name), value):
            set_attribute(module, name, value)
        elif not _is_itself(tracer, module, name, value):
            raise TraceError(f"sets {type(module).__name__}.{name}, which the next call would read")

    def refused(self: Any) -> Any:
        raise TraceError("runs under autocast of its own, which no graph says")

    checkpoints: list[str] = []

    def reentrant(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        checkpoints.append("reentrant")
        return function(*args)

    def not_reentrant(*args: Any) -> Any:
        checkpoints.append("not reentrant")
        return nullcontext()

    places: list[tuple[Any, str, Any]] = [
        (nn.Module, "__setattr__", guarded),
        (torch.amp.autocast, "__enter__", refused),
        (torch.utils.checkpoint.CheckpointFunction, "apply", staticmethod(reentrant)),
        (torch.utils.checkpoint, "_checkpoint_hook", not_reentrant),
    ]
    names = _OF_SIZES if factories_are_overridden() else _FACTORIES
    places += [(torch, name, _recording_factory(tracer, getattr(torch, name))) for name in sorted(names)]
    with ExitStack() as stack:
        for place, name, new in places:
            stack.enter_context(mock.patch.object(place, name, new))
        yield
    if checkpoints and root.training:
        log.warning(
            "%s: %d calls of torch.utils.checkpoint are gone: the same numbers, but their activations are kept",
            type(root).__name__,
            len(checkpoints),
        )


def _torch_generators() -> tuple[Tensor, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), *devices


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(bool((x == y).all()) if hasattr(x, "all") else x == y for x, y in zip(a, b, strict=True))


def _unchanged(before: Any, value: Any) -> bool:
    plain = (bool, int, float, str, type(None))
    return before is value or (type(before) is type(value) and isinstance(value, plain) and before == value)


def _is_itself(tracer: fx.Tracer, module: nn.Module, name: str, value: Any) -> bool:
    """Whether ``value`` is what ``module.name`` is, changed in place, as after ``self.count += 1``."""
    if not isinstance(value, fx.Proxy):
        return False
    node: Any = value.node
    while isinstance(node, fx.Node) and node.op.startswith("call_") and named_in_place(node):
        node = node.args[0]
    path = f"{tracer.path_of_module(module)}.{name}".lstrip(".")
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == path


_ABSENT = object()


class _State:
    """The state of the modules below ``root``: attributes, and the items of containers and plain objects.

    The globals that their code reads belong to it, as far as they are numbers, tensors and random generators.
    """

    def __init__(self, root: nn.Module) -> None:
        self.kept: dict[int, tuple[str, Any, Any]] = {}
        for name, module in root.named_modules():
            path = f"{type(root).__name__}.{name}" if name else type(root).__name__
            self._keep(path, vars(module))
            code = inspect.unwrap(type(module).forward)
            if not str(code.__module__).startswith("torch."):
                self._keep_globals(str(code.__module__), code.__globals__)

    def _keep_globals(self, path: str, values: dict[str, Any]) -> None:
        if id(values) not in self.kept:
            kinds = (bool, int, float, Tensor, type(None))
            self.kept[id(values)] = path, values, {k: v for k, v in values.items() if isinstance(v, kinds)}
            for name, value in values.items():
                if isinstance(value, _GENERATORS):
                    self._keep(f"{path}.{name}", value)

    def _keep(self, path: str, value: Any) -> None:
        waiting = [(path, value)]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, _GENERATORS):
                self.kept[id(value)] = path, value, _position(value)
            if id(value) in self.kept or not isinstance(value, (dict, list, set, tuple)):
                continue
            copied = value.copy() if not isinstance(value, tuple) else value
            self.kept[id(value)] = path, value, copied
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in list(items):
                waiting.append((f"{path}.{key}".replace("._buffers", "").replace("._parameters", ""), _inside(inner)))

    def attribute(self, module: nn.Module, name: str) -> Any:
        for home in (module._parameters, module._buffers, module._modules, vars(module)):
            if name in home:
                return home[name]
        return _ABSENT

    def changed(self) -> str | None:
        """The first that is not what it was."""
        return next(
            (name for path, value, before in self.kept.values() if (name := _difference(path, value, before))), None
        )

    def restore(self) -> None:
        for _, value, before in self.kept.values():
            if isinstance(value, dict):
                for key in _changed_keys(value, before):
                    if key in before:
                        value[key] = before[key]
                    else:
                        del value[key]
            elif isinstance(value, list):
                value[:] = before
            elif isinstance(value, set):
                value.clear()
                value.update(before)
            elif isinstance(value, _GENERATORS):
                _put_back(value, before)


def _difference(path: str, value: Any, before: Any) -> str | None:
    if isinstance(value, _GENERATORS):
        return path if repr(_position(value)) != repr(before) else None
    if isinstance(value, dict):
        keys = [key for key in _changed_keys(value, before) if not str(key).startswith("_tensor_constant")]
        return f"{path}.{keys[0]}" if keys else None
    same = len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))
    return None if same else path


def _changed_keys(value: dict[Any, Any], before: dict[Any, Any]) -> list[Any]:
    """Of module globals only those that were kept; what ``import`` and ``fx`` put there is no state."""
    new = [] if "__builtins__" in value else [key for key in value if key not in before]
    return new + [key for key in before if value.get(key, _ABSENT) is not before[key]]


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


def _position(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _put_back(generator: Any, position: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(position)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = position
    else:
        generator.set_state(position)


def _inside(value: Any) -> Any:
    """The container of a value's state; a plain object's attributes."""
    own = type(value).__module__.split(".")[0] not in ("torch", "builtins", "numpy", "types", "functools")
    return vars(value) if own and not isinstance(value, (nn.Module, type)) and hasattr(value, "__dict__") else value
