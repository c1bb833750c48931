"""The second forward of a rewritten model, which returns the observed activations beside the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import GraphModule

from brfx.graph.mode_branches import pruned
from brfx.graph.traced_module import generated
from brfx.nn import ActivationObserver, ActivationQuantizer, Quantizer, WeightQuantizer

#: ``(gm, *inputs) -> (output, {site: what was seen})``
ObservedForward = Callable[..., tuple[Any, dict[str, Any]]]

#: What is made of a site's values before they are quantized; a function of a module, so that a graph can call it.
ObserveFn = Callable[[Quantizer, Tensor], Any]


def prepared(quantizer: Quantizer, values: Tensor) -> Tensor:
    """The values themselves, after ReLU and clip."""
    return quantizer.prepare(values)


def observed_sites(qmodel: nn.Module) -> dict[str, Quantizer]:
    """Each observed quantizer by its dotted name, in order of execution within each graph: the activations', and those
    of weights that are read by functions."""
    sites = {}
    for prefix, gm in graphs(qmodel).items():
        for _, user in _observations(gm):
            name = _join(prefix, str(user.target))
            sites[name] = qmodel.get_submodule(name)
    return sites  # type: ignore[return-value]


def graphs(qmodel: nn.Module) -> dict[str, GraphModule]:
    """The graphs of a rewritten model by name: ``{"": qmodel}``, or its islands."""
    if isinstance(qmodel, GraphModule):
        return {"": qmodel}
    return {name: module for name, module in qmodel.named_modules() if isinstance(module, GraphModule)}


def observed_forward(qmodel: nn.Module, observe_fn: ObserveFn = prepared) -> ObservedForward:
    """A function ``(qmodel, *inputs) -> (output, {site: seen})`` that runs ``qmodel``'s own modules.

    What is seen is ``observe_fn(quantizer, values)`` with the values that the site's quantizer is given, not detached.
    In a whole graph it is a value of the graph and an output of it, never an attribute: compiled code keeps its
    gradient. The islands of a model hand theirs to a collector that is there for the one call; of an island that is
    called more than once the last call counts.
    """
    if isinstance(qmodel, GraphModule):
        return _observed_graph(qmodel, observe_fn)
    parts = {name: _observed_graph(gm, observe_fn) for name, gm in graphs(qmodel).items()}

    def forward(model: nn.Module, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        seen: dict[str, Any] = {}
        islands = {name: model.get_submodule(name) for name in parts}

        def collecting(name: str) -> Callable[..., Any]:
            def island_forward(*args: Any, **kwargs: Any) -> Any:
                output, found = parts[name](islands[name], *args, **kwargs)
                seen.update({_join(name, site): values for site, values in found.items()})
                return output

            return island_forward

        try:
            for name, island in islands.items():
                vars(island)["forward"] = collecting(name)
            return model(*inputs), seen
        finally:
            for island in islands.values():
                vars(island).pop("forward", None)

    return forward


def observe(qmodel: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Run the model once and return the activation that each observed quantizer was given.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned, calibrated.
        inputs: the model's inputs.

    Returns:
        ``{site: activation}``, after ReLU and clip and before quantization, shape ``(batch, ...)``, not detached.
    """
    sites = observed_sites(qmodel)
    seen = observed_forward(qmodel)(qmodel, *inputs)[1]
    return {site: values for site, values in seen.items() if isinstance(sites[site], ActivationQuantizer)}


def _observed_graph(gm: GraphModule, observe_fn: ObserveFn) -> ObservedForward:
    modes = (True, False) if getattr(gm, "has_mode_branches", False) else (True,)
    forwards = {training: generated(gm, watched(gm, training, observe_fn)) for training in modes}
    if len(modes) == 1:
        return forwards[True]  # type: ignore[no-any-return]
    return lambda self, *args, **kwargs: forwards[self.training](self, *args, **kwargs)


def watched(gm: GraphModule, training: bool, observe_fn: ObserveFn) -> fx.Graph:
    """The graph in one mode, with ``{site: observe_fn(quantizer, values)}`` beside its output."""
    graph = pruned(gm, training)
    output = next(node for node in graph.nodes if node.op == "output")
    seen = {}
    for observed, quantizer in _observations(gm, graph):
        with graph.inserting_before(quantizer):
            module = graph.get_attr(str(quantizer.target))
            seen[str(quantizer.target)] = graph.call_function(observe_fn, (module, observed))
    output.args = ((output.args[0], seen),)
    return graph


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _observations(gm: GraphModule, graph: fx.Graph | None = None) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of an observed value's node and its quantizer's: behind an observer, and the weights of functions."""
    calls = [node for node in (graph or gm.graph).nodes if node.op == "call_module"]
    modules = {node: gm.get_submodule(str(node.target)) for node in calls}
    found = []
    for node, module in modules.items():
        value = node.args[0] if node.args else None
        behind = isinstance(value, fx.Node) and isinstance(modules.get(value), ActivationObserver)
        if isinstance(module, WeightQuantizer) or (isinstance(module, ActivationQuantizer) and behind):
            assert isinstance(value, fx.Node)
            found.append((value, node))
    return found
