"""Insert observers for the activation bin regularizer."""

from dataclasses import dataclass

from torch.fx import GraphModule

from brfx.graph.utils import free_name, insert_before, module_calls
from brfx.nn import ActivationObserver, ActivationQuantizer


@dataclass(frozen=True)
class InsertObservers:
    """Put an observer in front of each activation quantizer that is to be regularized.

        y = ActivationQuantizer(x)    ->    h = ActivationObserver(x); y = ActivationQuantizer(h)

    Requires: the quantizers are in place.
    Ensures: each such quantizer's input is an observer; a second run changes 0 sites.
    """

    def __call__(self, gm: GraphModule) -> int:
        observed = {node for node, module in module_calls(gm) if isinstance(module, ActivationObserver)}
        sites = [
            node
            for node, module in module_calls(gm)
            if isinstance(module, ActivationQuantizer) and module.regularized and node.args[0] not in observed
        ]
        for node in sites:
            insert_before(gm, node, free_name(gm, f"{node.target}_observer"), ActivationObserver())
        return len(sites)
