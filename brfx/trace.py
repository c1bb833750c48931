"""A float model becomes a ``GraphModule``."""

from __future__ import annotations

import copy

from torch import fx, nn

from brfx.errors import TraceError
from brfx.nn import ActivationObserver, LSQQuantizer, QuantizedLayer

_LEAVES = (LSQQuantizer, QuantizedLayer, ActivationObserver)


class Tracer(fx.Tracer):
    """``fx.Tracer`` that also leaves whole what depends on ``training`` when it runs, so that one graph serves both.

    torchvision's own operators (``StochasticDepth``, ``ConvNormActivation`` is a container and is entered) read
    ``self.training`` inside; a trace through them would bake its value in.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _LEAVES):
            return True
        if type(m).__module__.startswith("torchvision.ops") and not isinstance(m, nn.Sequential):
            return not list(m.children())
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Record one symbolic run of a copy of ``model``.

    Args:
        model: any float module; it is left as it is and shares nothing with the result.

    Raises:
        TraceError: the model's ``forward`` does something that a symbolic run cannot follow; names the line.
    """
    model = copy.deepcopy(model)
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the user's forward raises when fed with proxies
        raise TraceError(f"cannot trace {type(model).__name__}: {_where(error)}: {error}") from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


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
