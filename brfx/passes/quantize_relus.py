"""ReLUs become quantized clipped ReLUs."""

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from brfx.config import QATConfig
from brfx.graph import module_calls, set_module
from brfx.nn import QuantizedClippedReLU


@dataclass(frozen=True)
class QuantizeReLUs:
    """Swap each ReLU or ReLU6 for a quantized clipped one.

        y = ReLU(x)    ->    y = QuantizedClippedReLU(x)

    Requires: one call site per ReLU (``SplitShared``).
    Ensures: no ReLU module remains in FP32; a second run changes 0 sites.
    """

    config: QATConfig

    def __call__(self, gm: GraphModule) -> int:
        assert self.config.act_bits is not None
        if self.config.act_bits == 32:
            return 0
        sites = [(node, module) for node, module in module_calls(gm) if type(module) in (nn.ReLU, nn.ReLU6)]
        for node, module in sites:
            ceilings = [c for c in (self.config.clip_value, 6.0 if type(module) is nn.ReLU6 else None) if c is not None]
            quantized = QuantizedClippedReLU(self.config.act_bits, clip_value=min(ceilings, default=None))
            set_module(gm, str(node.target), quantized)
        return len(sites)
