"""A float model becomes a ``GraphModule``, or a module with ``GraphModule`` islands in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import fx, nn

from brfx.errors import TraceError
from brfx.nn import ActivationObserver, LSQQuantizer, QuantizedLayer

_LEAVES = (LSQQuantizer, QuantizedLayer, ActivationObserver)


class Tracer(fx.Tracer):
    """``fx.Tracer`` that does not enter modules like stochastic depth, which differ between training and eval.

    Such a module reads ``self.training`` in its ``forward``; a trace through it would bake the value of the moment in.
    With parameters or children of its own it is entered all the same: there may be something to quantize in it.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _LEAVES):
            return True
        code = getattr(type(m).forward, "__code__", None)
        if code is not None and "training" in code.co_names and not list(m.children()) and not list(m.parameters()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


class Island(fx.GraphModule):
    """A graph amid Python code, which may read plain attributes of the module that it stands for: these stay with it.

    (RAFT asks its update block for ``hidden_state_size``.) A ``GraphModule`` loses such attributes in a deepcopy.
    """

    def adopt(self, module: nn.Module) -> None:
        """Take over the attributes of ``module`` that this graph has no value of its own for."""
        vars(self).update({name: value for name, value in vars(module).items() if name not in vars(self)})

    def __deepcopy__(self, memo: dict[int, object]) -> Island:
        new = super().__deepcopy__(memo)
        assert isinstance(new, Island)
        for name in vars(self).keys() - vars(new).keys():
            vars(new)[name] = copy.deepcopy(vars(self)[name], memo)
        return new


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


def trace(model: nn.Module) -> fx.GraphModule:
    """Record one symbolic run of a copy of ``model``.

    Args:
        model: any float module; it is left as it is and shares nothing with the result.

    Raises:
        TraceError: the model's ``forward`` does something that a symbolic run cannot follow; names the line.
    """
    return _trace(copy.deepcopy(model))


def trace_islands(model: nn.Module) -> Traced:
    """Trace a copy of ``model`` whole if that is possible, else the largest submodules that can be.

    An island takes the place of the module that it was traced from, with its parameters, their names, and its plain
    attributes; the Python code around it stays and calls it. A leaf of ``torch.nn`` outside every island stays as it
    is, and so does a submodule with no parameters: there is nothing to quantize in it.

    Args:
        model: any float module; it is left as it is and shares nothing with the result.
    """
    model = copy.deepcopy(model)
    try:
        whole = _trace(model)
        return Traced(whole, {"": whole})
    except TraceError as error:
        traced = Traced(model, {}, {"": str(error)})
    _place_islands(model, "", traced)
    return traced


def _place_islands(parent: nn.Module, prefix: str, traced: Traced) -> None:
    for name, child in list(parent.named_children()):
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # has no forward
            _place_islands(child, f"{path}.", traced)
            continue
        if Tracer().is_leaf_module(child, path) or not any(True for _ in child.parameters()):
            continue
        try:
            island = _trace(child, Island)
        except TraceError as error:
            traced.stopped[path] = str(error)
            _place_islands(child, f"{path}.", traced)
            continue
        assert isinstance(island, Island)
        island.adopt(child)
        setattr(parent, name, island)
        traced.islands[path] = island


def _trace(model: nn.Module, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the user's forward raises when fed with proxies
        raise TraceError(f"cannot trace {type(model).__name__}: {_where(error)}: {error}") from error
    return kind(tracer.root, graph, type(model).__name__)


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
