"""The modules that a rewritten graph is made of."""

from brfx.nn.layers import (
    QUANTIZED_LAYERS,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedLayer,
    QuantizedLinear,
)
from brfx.nn.lsq import (
    LSQActivationQuantizer,
    LSQQuantizer,
    LSQWeightQuantizer,
    QuantizedClippedReLU,
    lsq_quantize,
)
from brfx.nn.observer import ActivationObserver

__all__ = [
    "QUANTIZED_LAYERS",
    "ActivationObserver",
    "LSQActivationQuantizer",
    "LSQQuantizer",
    "LSQWeightQuantizer",
    "QuantizedClippedReLU",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedLayer",
    "QuantizedLinear",
    "lsq_quantize",
]
