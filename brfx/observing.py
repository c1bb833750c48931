"""The second forward of a rewritten model: the same modules, with what the observers saw beside the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import GraphModule

from brfx.graph import module_calls
from brfx.nn import ActivationObserver, LSQActivationQuantizer

#: ``(gm, *inputs) -> (output, {site: activation})``
ObservedForward = Callable[..., tuple[Any, dict[str, Tensor]]]


def observed_sites(qmodel: nn.Module) -> dict[str, LSQActivationQuantizer]:
    """Each observed activation quantizer by its dotted name, in order of execution within each graph."""
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


def observed_forward(qmodel: nn.Module) -> ObservedForward:
    """A function ``(qmodel, *inputs) -> (output, {site: activation})`` that runs ``qmodel``'s own modules.

    The activation is what the site's quantizer quantizes: after ReLU and clip, before the grid; not detached.
    In a whole graph it is a value of the graph and an output of it, never an attribute: compiled code keeps its
    gradient. The islands of a model hand theirs to a collector that is there for the one call; of an island that is
    called more than once the last call counts.
    """
    if isinstance(qmodel, GraphModule):
        return _observed_graph(qmodel)
    parts = {name: _observed_graph(gm) for name, gm in graphs(qmodel).items()}

    def forward(model: nn.Module, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
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
    return observed_forward(qmodel)(qmodel, *inputs)[1]


def _observed_graph(gm: GraphModule) -> ObservedForward:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    seen = {}
    for observer, quantizer in _observations(gm):
        with graph.inserting_after(mapping[observer]):
            module = graph.get_attr(str(quantizer.target))
        with graph.inserting_after(module):
            seen[str(quantizer.target)] = graph.call_method("prepare", (module, mapping[observer]))
    graph.output((output, seen))
    return type(GraphModule(gm, graph)).forward  # the generated function; ``gm`` itself will be its ``self``


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _observations(gm: GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of an observer's node and its quantizer's."""
    return [
        (node, user)
        for node, module in module_calls(gm)
        if isinstance(module, ActivationObserver)
        for user in node.users
        if user.op == "call_module" and isinstance(gm.get_submodule(str(user.target)), LSQActivationQuantizer)
    ]
