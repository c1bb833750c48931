"""Mark what the activation bin regularizer is to see."""

from dataclasses import dataclass

from torch.fx import GraphModule

from brfx.graph import free_name, insert_before, module_calls
from brfx.nn import ActivationObserver, QuantizedClippedReLU


@dataclass(frozen=True)
class InsertObservers:
    """Put an observer in front of each quantized ReLU.

        y = QuantizedClippedReLU(x)    ->    h = ActivationObserver(x); y = QuantizedClippedReLU(h)

    Requires: ``QuantizeReLUs`` has run.
    Ensures: each quantized ReLU's input is an observer; a second run changes 0 sites.
    """

    def __call__(self, gm: GraphModule) -> int:
        observed = {node for node, module in module_calls(gm) if isinstance(module, ActivationObserver)}
        sites = [
            node
            for node, module in module_calls(gm)
            if isinstance(module, QuantizedClippedReLU) and node.args[0] not in observed
        ]
        for node in sites:
            insert_before(gm, node, free_name(gm, f"{node.target}_observer"), ActivationObserver())
        return len(sites)
