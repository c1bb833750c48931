"""Turn ReLUs that are written as functions or methods into modules."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from brfx.graph.utils import free_name, replace_with_module, scope

_FUNCTIONS: dict[object, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.relu_: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
}
_METHODS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu_": nn.ReLU}


@dataclass(frozen=True)
class ReLUToModule:
    """Give each functional or method ReLU a module of its own, named after the scope that calls it.

        y = F.relu(x)    ->    y = ReLU(x)

    Requires: nothing.
    Ensures: every ReLU and ReLU6 of the graph is a ``call_module``; a second run changes 0 sites.
    """

    def __call__(self, gm: GraphModule) -> int:
        sites = [(node, kind) for node in gm.graph.nodes if (kind := _relu_type(node))]
        for node, kind in sites:
            name = free_name(gm, f"{scope(node)}.relu".lstrip("."))
            replace_with_module(gm, node, name, kind())
        return len(sites)


def _relu_type(node: Node) -> type[nn.Module] | None:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return None
