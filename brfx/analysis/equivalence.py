"""Compare the rewritten model, quantizers off, with the float model: outputs and gradients."""

from __future__ import annotations

import inspect
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from brfx.analysis.observe import graphs
from brfx.calibration import quantization_disabled
from brfx.compat import in_float64
from brfx.errors import RewriteError, first_line
from brfx.graph.mode_branches import select_by_mode
from brfx.graph.user_classes import copied
from brfx.graph.utils import module_calls
from brfx.nn import ActivationObserver, ActivationQuantizer

log = logging.getLogger(__name__)

#: Of the largest value: decomposed attention differs by a tenth of this, a wrong value by a hundred times as much.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Run:
    """The results of one run.

    Attributes:
        outputs: every tensor of the output.
        buffers: as they are after it, by name.
        gradients: by the parameter's name; ``None`` where backward does not run.
    """

    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor] | None


def prove(model: nn.Module, rewritten: nn.Module, inputs: tuple[Any, ...], concrete_args: Mapping[str, Any]) -> None:
    """Compare outputs, buffers and gradients of the two, in training and in eval.

    Each is run twice in either mode: as it is, and with other inputs after its parameters and buffers were changed
    through the state dict; once in either with gradients. Random parts draw from the same seed. A mode in which the
    float model itself does not run is left out, and the log says so.

    Args:
        model: the float model. It is left as it is, and so are all random generators.
        rewritten: what it was rewritten to; it is changed, so give a copy.
        inputs: the float model's.
        concrete_args: inputs that were held fixed in the trace, by name.

    Raises:
        RewriteError: they differ; names the first value that does, with its line.
    """
    model = copied(model)
    with _generators_kept(), torch.inference_mode(False), torch.enable_grad(), quantization_disabled(rewritten):
        inputs = inspect.signature(model.forward).bind(*inputs, **missing(model, inputs, concrete_args)).args
        for changed in (False, True):
            if changed:
                inputs = tree_map(_shuffled, inputs)
                state = model.state_dict()  # kept as it is but for the values: some models read its version
                state.update({name: _changed(value) for name, value in state.items()})
                model.load_state_dict(state)
                rewritten.load_state_dict(state)
            for training in (True, False):
                _Comparison(model.train(training), rewritten.train(training), inputs, changed).require_equal()


@dataclass(frozen=True)
class _Comparison:
    """The two models in one mode, on the same inputs."""

    model: nn.Module
    rewritten: nn.Module
    inputs: tuple[Any, ...]
    changed: bool

    @property
    def mode(self) -> str:
        return "training" if self.model.training else "eval"

    def require_equal(self) -> None:
        before = [(value, value.clone()) for both in (self.model, self.rewritten) for value in both.buffers()]
        try:
            wanted = self._run(self.model)
        except Exception as error:  # whatever the user's model raises
            _put_back(before)
            log.info("%s mode was not compared: the model does not run (%s)", self.mode, first_line(error))
            return
        if _problem(wanted, self._found(wanted)) is None:
            return
        with _NoiseOfAnyLayout():  # type: ignore[no-untyped-call]  # the same draws on tensors of other strides are other numbers
            _put_back(before)
            wanted = self._run(self.model)
            found = self._found(wanted)
            problem = _problem(wanted, found)
            _put_back(before)
            if problem is None:
                return
            if _problem(wanted, self._run(self.model)) is not None:
                log.warning("%s mode was not compared: the float model differs from run to run", self.mode)
                return
            _put_back(before)
            if _types(wanted) == _types(found) and self._equal_in_float64():
                log.info("%s mode: the two differ by rounding, and not in float64", self.mode)
                return
            after = ", after its parameters and buffers were changed" if self.changed else ""
            what = f"does not compute what the float model does in {self.mode} mode{after}"
            raise self._error(what, self._place(*problem))

    def _equal_in_float64(self) -> bool:
        """Whether the difference goes away there: a deep network can make a thousand times as much of the last bit, in
        which a sum in another order differs.

        It goes away for other reasons where a value is cast: autocast leaves float64 alone, and ``x.float()`` is ``x``
        itself in FP32 and a copy in float64. So no cast is allowed in either model.
        """
        models = [copied(model).double() for model in (self.model, self.rewritten)]
        exact = _Comparison(models[0], models[1], tree_map(_double, self.inputs), self.changed)
        try:
            if any(run._casts(model) for run in (self, exact) for model in (run.model, run.rewritten)):
                return False
            wanted = exact._run(exact.model)
            return _problem(wanted, exact._run(exact.rewritten, wanted)) is None
        except Exception:  # the model is not for float64
            return False

    def _casts(self, model: nn.Module) -> bool:
        """Whether ``model`` makes floating-point values of one type out of those of another; it is left as it is."""
        model, casts = copied(model), _Casts()  # type: ignore[no-untyped-call]
        with torch.no_grad(), casts:
            _seed(self.changed)
            model(*tree_map(_cloned, self.inputs))
        return casts.seen

    def _found(self, wanted: _Run) -> _Run:
        try:
            return self._run(self.rewritten, wanted)
        except Exception as error:
            what = f"does not run in {self.mode} mode, where the float model does"
            raise self._error(what, first_line(error)) from error

    def _run(self, model: nn.Module, like: _Run | None = None) -> _Run:
        """With gradients once in either mode; they cost twice what the outputs do."""
        _seed(self.changed)
        parameters = dict(self.model.named_parameters())
        model.zero_grad()
        gradients: dict[str, Tensor] | None = None
        with torch.set_grad_enabled(self.model.training != self.changed):
            outputs = _tensors(model(*tree_map(_cloned, self.inputs)))
            loss = [_weighted(value) for value in outputs if value.requires_grad and value.is_floating_point()]
        if like is None or like.gradients is not None:
            gradients = self._gradients(loss, raising=like is not None) if loss else {}
            if gradients is not None:
                named = [(name, value.grad) for name, value in model.named_parameters() if name in parameters]
                gradients = {name: grad for name, grad in named if grad is not None}
        model.zero_grad()
        known = {name for name, _ in self.model.named_buffers()}
        buffers = {name: value.clone() for name, value in model.named_buffers() if name in known}
        return _Run([value.detach() for value in outputs], buffers, gradients)

    @staticmethod
    def _gradients(loss: list[Tensor], *, raising: bool) -> dict[str, Tensor] | None:
        try:
            sum(in_float64(value) for value in loss).backward()  # type: ignore[union-attr]
        except RuntimeError as error:
            if raising:
                raise
            log.info("gradients were not compared: the model's backward does not run (%s)", first_line(error))
            return None
        return {}

    def _place(self, what: str, name: str) -> str:
        """The first value that differs, as ``"first at add_1, net.py:12"``."""
        if what == "output":
            return f"first at {self._first_different()}"
        node = self._calls().get(name.rpartition(".")[0])
        return f"the {what} {name}" + (f", of {_said(node)}," if node is not None else "") + " differs"

    def _error(self, what: str, where: str) -> RewriteError:
        return RewriteError(
            f"the rewritten {type(self.model).__name__} {what}: {where}; "
            "keep the module that does this out of the graph with leaf_modules=, or write it otherwise"
        )

    def _calls(self) -> dict[str, Node]:
        """The first call of each module, by the module's name in the whole model."""
        found: dict[str, Node] = {}
        for prefix, gm in graphs(self.rewritten).items():
            for node, _ in module_calls(gm):
                found.setdefault(f"{prefix}.{node.target}".lstrip("."), node)
        return found

    def _first_different(self) -> str:
        """The first node whose value differs, by what goes into and comes out of the modules that both models call."""
        wanted, found, calls = self._watched(self.model), self._watched(self.rewritten), self._calls()
        of_float = {(name, call): values for name, call, *values in wanted}
        equal: set[Node | None] = set()
        for name, call, into, out in found:
            if (name, call) not in of_float:
                continue
            float_into, float_out = of_float[name, call]
            node = calls.get(name)
            if len(float_into) == len(into) and _different(float_into, into):
                maker = self._maker(node.all_input_nodes[0]) if node is not None else None
                return f"what goes into {_said(node) if node else name}" if maker in equal | {None} else _said(maker)
            if _different(float_out, out) and name:
                return _said(node) if node is not None else name
            equal.add(node)
        if not isinstance(self.rewritten, GraphModule):
            return "the output"
        output = next(node for node in self.rewritten.graph.nodes if node.op == "output")
        return _said(self._maker(next(iter(output.all_input_nodes), output)))

    def _watched(self, model: nn.Module) -> list[tuple[str, int, list[Tensor], list[Tensor]]]:
        """Name, number of the call, tensors in and tensors out, of every call of a module, in order."""
        seen: list[tuple[str, int, list[Tensor], list[Tensor]]] = []
        counts: Counter[str] = Counter()
        into: list[list[Tensor]] = []
        handles = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            into.append([_cloned(value) for value in _tensors((args, kwargs))])  # it may be changed in place

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen.append((name, counts[name], into.pop(), [_cloned(value) for value in _tensors(output)]))
                counts[name] += 1

            return hook

        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        try:
            with torch.no_grad():
                _seed(self.changed)
                model(*tree_map(_cloned, self.inputs))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _maker(self, node: Node) -> Node:
        """The node of the float model's own operation behind quantizers that were put in."""
        modules = {node: module for gm in graphs(self.rewritten).values() for node, module in module_calls(gm)}
        while True:
            chosen = node.args[not self.model.training] if node.target is select_by_mode else None
            if isinstance(chosen, Node):
                node = chosen
            elif isinstance(module := modules.get(node), _INSERTED) and not getattr(module, "is_relu", False):
                node = node.all_input_nodes[0]
            else:
                return node


def _said(node: Node | None) -> str:
    assert node is not None
    return f"{node.name}, {node.meta['source_line']}" if "source_line" in node.meta else node.name


def _put_back(values: list[tuple[Tensor, Tensor]]) -> None:
    for value, before in values:
        value.data.copy_(before)


class _NoiseOfAnyLayout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random numbers go to the same elements whatever the strides of a tensor are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        random_ = torch.Tag.nondeterministic_seeded in func.tags
        if not random_ or not isinstance(first, Tensor) or first.is_contiguous():
            return func(*args, **(kwargs or {}))
        out = func(first.contiguous(), *args[1:], **(kwargs or {}))
        return first.copy_(out) if func._schema.is_mutable else out


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether an operation gave a floating-point type that none of its operands has."""

    seen: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {value.dtype for value in _tensors((args, kwargs)) if value.is_floating_point()}
        made = {value.dtype for value in _tensors(out) if value.is_floating_point()}
        self.seen |= bool(given) and not made <= given
        return out


_INSERTED = (ActivationQuantizer, ActivationObserver)


def _problem(wanted: _Run, found: _Run) -> tuple[str, str] | None:
    """The kind of value that differs, and its parameter or buffer; ``None``: nothing differs."""
    if _different(wanted.outputs, found.outputs):
        return "output", ""
    for name, value in wanted.buffers.items():
        if name in found.buffers and _different([value], [found.buffers[name]]):
            return "buffer", name
    if wanted.gradients is None or found.gradients is None:
        return None
    scale = max((float(value.abs().max()) for value in wanted.gradients.values() if value.numel()), default=0.0)
    for name in dict.fromkeys((*wanted.gradients, *found.gradients)):
        a, b = wanted.gradients.get(name), found.gradients.get(name)
        if a is None or b is None or _different([a], [b], 10 * TOLERANCE, TOLERANCE * scale):
            return "gradient", name
    return None


def _types(run: _Run) -> list[torch.dtype]:
    return [value.dtype for value in (*run.outputs, *run.buffers.values(), *(run.gradients or {}).values())]


def _different(wanted: list[Tensor], found: list[Tensor], relative: float = TOLERANCE, least: float = 0.0) -> bool:
    if len(wanted) != len(found):
        return True
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return True
        if torch.equal(a, b):
            continue
        if not a.is_floating_point():
            return True
        unequal = ~((a == b) | (a.isnan() & b.isnan()))
        gap = (a - b).abs()[unequal].nan_to_num(torch.inf).max() if unequal.any() else 0.0
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        if float(gap) > max(relative, 16 * torch.finfo(a.dtype).eps) * scale + least:
            return True
    return False


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shuffled(value: Any) -> Any:
    """The same numbers in other places."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(1))
    return value.flatten()[order.to(value.device)].view(value.shape)


def _changed(value: Any) -> Any:
    """A state's value with every element changed in its own way, by a fifth at most; variances stay positive."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    each = torch.arange(value.numel(), device=value.device).cos().view(value.shape).to(value.dtype)
    return value * (1 + 0.2 * each) + 0.01


def _weighted(value: Tensor) -> Tensor:
    """A sum to which every element adds in its own way."""
    weights = torch.arange(value.numel(), device=value.device).cos().to(value.dtype)
    return (value.flatten() * weights).sum()


def missing(model: nn.Module, inputs: tuple[Any, ...], concrete_args: Mapping[str, Any]) -> dict[str, Any]:
    """The fixed arguments that are not among the inputs."""
    given = inspect.signature(model.forward).bind_partial(*inputs).arguments
    return {name: value for name, value in concrete_args.items() if name not in given}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's generators as they were; of devices only those that are in use."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
