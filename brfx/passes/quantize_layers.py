"""Give convolutions and linears quantized weights."""

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from brfx.config import QATConfig
from brfx.graph.trace import computes_as
from brfx.graph.utils import module_calls, set_module
from brfx.nn import QUANTIZED_LAYERS, QuantizedLayer, QuantizedMultiheadAttention


@dataclass(frozen=True)
class QuantizeLayers:
    """Swap each convolution and linear, first and last included, for its quantized form.

        y = Conv2d(x)                      ->    y = QuantizedConv2d(x)
        y, p = MultiheadAttention(q, k, v) ->    y, p = QuantizedMultiheadAttention(q, k, v)

    The quantized layer adopts the float one's parameters, so FP32 keys stay. A subclass with a ``forward`` or
    ``_conv_forward`` of its own is declined: its arithmetic is not the parent's.

    Requires: nothing.
    Ensures: no swappable layer remains in FP32; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        layers = {str(node.target): module for node, module in module_calls(gm)}
        swaps = {
            name: new
            for name, layer in layers.items()
            if (new := quantized_layer(layer, self.config, self.scope + name))
        }
        for name, quantized in swaps.items():
            set_module(gm, name, quantized)
        return len(swaps)


def quantized_layer(layer: nn.Module, config: QATConfig, name: str) -> nn.Module | None:
    """The quantized form of a float layer whose arithmetic is torch's own, else ``None``."""
    own = config.at(name, type(layer).__name__)
    if own is None or isinstance(layer, (QuantizedLayer, QuantizedMultiheadAttention)):
        return None
    bits = own.weight_bits
    if computes_as(layer, nn.MultiheadAttention):
        if bits is None and own.inner_act_bits is None:
            return None
        return QuantizedMultiheadAttention.from_float(layer, bits, own.inner_act_bits, **own.weight_settings)
    for float_type, quantized_type in QUANTIZED_LAYERS.items():
        if bits is not None and computes_as(layer, float_type):
            return quantized_type.from_float(layer, bits, **own.weight_settings)
    return None
