"""The second forward of a rewritten model: the same modules, with what the observers saw beside the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx import GraphModule

from brfx.graph import module_calls
from brfx.nn import ActivationObserver, LSQActivationQuantizer

#: ``(gm, *inputs) -> (output, {site: activation})``
ObservedForward = Callable[..., tuple[Any, dict[str, Tensor]]]


def observed_sites(gm: GraphModule) -> dict[str, LSQActivationQuantizer]:
    """Each observed activation quantizer by its dotted name, in order of execution."""
    return {str(user.target): gm.get_submodule(str(user.target)) for _, user in _observations(gm.graph, gm)}  # type: ignore[misc]


def observed_forward(gm: GraphModule) -> ObservedForward:
    """A function ``(gm, *inputs) -> (output, {site: activation})`` that runs ``gm``'s own modules.

    The activation is what the site's quantizer quantizes: after ReLU and clip, before the grid; not detached.
    It is a value of the graph and an output of it, never an attribute: compiled code keeps its gradient.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    seen = {}
    for observer, quantizer in _observations(gm.graph, gm):
        with graph.inserting_after(mapping[observer]):
            module = graph.get_attr(str(quantizer.target))
        with graph.inserting_after(module):
            seen[str(quantizer.target)] = graph.call_method("prepare", (module, mapping[observer]))
    graph.output((output, seen))
    return type(GraphModule(gm, graph)).forward  # the generated function; ``gm`` itself will be its ``self``


def observe(gm: GraphModule, *inputs: Any) -> dict[str, Tensor]:
    """Run the model once and return the activation that each observed quantizer was given.

    Args:
        gm: what :func:`brfx.prepare_qat` returned, calibrated.
        inputs: the model's inputs.

    Returns:
        ``{site: activation}``, after ReLU and clip and before quantization, shape ``(batch, ...)``, not detached.
    """
    return observed_forward(gm)(gm, *inputs)[1]


def _observations(graph: fx.Graph, gm: GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of an observer's node and its quantizer's."""
    return [
        (node, user)
        for node, module in module_calls(gm)
        if isinstance(module, ActivationObserver)
        for user in node.users
        if user.op == "call_module" and isinstance(gm.get_submodule(str(user.target)), LSQActivationQuantizer)
    ]
