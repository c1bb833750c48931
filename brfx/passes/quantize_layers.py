"""Convolutions and linears get quantized weights."""

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from brfx.config import QATConfig
from brfx.graph import module_calls, set_module
from brfx.nn import QUANTIZED_LAYERS, QuantizedLayer


@dataclass(frozen=True)
class QuantizeLayers:
    """Swap each convolution and linear, first and last included, for its LSQ-quantized form.

        y = Conv2d(x)    ->    y = QuantizedConv2d(x)

    The quantized layer adopts the float one's parameters, so FP32 keys stay. A subclass with a ``forward`` of its
    own is declined: its arithmetic is not the parent's.

    Requires: nothing.
    Ensures: no swappable layer remains in FP32; a second run changes 0 sites.
    """

    config: QATConfig

    def __call__(self, gm: GraphModule) -> int:
        assert self.config.weight_bits is not None
        if self.config.weight_bits == 32:
            return 0
        layers = {str(node.target): module for node, module in module_calls(gm)}
        swaps = {name: kind for name, module in layers.items() if (kind := quantized_form(module))}
        for name, kind in swaps.items():
            quantized = kind.from_float(layers[name], self.config.weight_bits, per_channel=self.config.per_channel)
            set_module(gm, name, quantized)
        return len(swaps)


def quantized_form(module: nn.Module) -> type[QuantizedLayer] | None:
    """The quantized class of a float layer whose arithmetic is torch's own, else ``None``."""
    if isinstance(module, QuantizedLayer):
        return None
    for float_type, quantized_type in QUANTIZED_LAYERS.items():
        if isinstance(module, float_type) and type(module).forward is float_type.forward:
            return quantized_type
    return None
