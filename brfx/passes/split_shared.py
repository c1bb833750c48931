"""Give each call site a module of its own."""

import copy
from collections import Counter
from dataclasses import dataclass

from torch.fx import GraphModule

from brfx.graph.utils import call_counts, free_name, module_calls, set_module


@dataclass(frozen=True)
class SplitShared:
    """Give every further call of a module without parameters or buffers a copy of its own.

        a = relu(x); b = relu(y)    ->    a = relu(x); b = relu_1(y)

    torchvision's blocks reuse one ``relu`` at several sites, and each site needs its own step. A module with
    parameters is left shared: its weight is one weight, and has one step.

    Requires: nothing.
    Ensures: every parameter-free module has one call site; a second run changes 0 sites.
    """

    def __call__(self, gm: GraphModule) -> int:
        counts = call_counts(gm)
        seen: Counter[str] = Counter()
        changed = 0
        for node, module in module_calls(gm):
            name = str(node.target)
            seen[name] += 1
            stateless = not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
            if counts[name] > 1 and seen[name] > 1 and stateless:
                node.target = free_name(gm, name)
                set_module(gm, node.target, copy.deepcopy(module))
                changed += 1
        return changed
