"""The modules that a rewritten graph is made of."""

from brfx.nn.attention import QuantizedAttention, QuantizedMultiheadAttention
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
from brfx.nn.observer import ActivationObserver
from brfx.nn.residual import AlignedAdd, ResidualAdd, StreamAdd
from brfx.quant.lsq import (
    LSQActivationQuantizer,
    LSQQuantizer,
    LSQWeightQuantizer,
    QuantizedClippedReLU,
    StreamQuantizer,
    lsq_quantize,
)
from brfx.quant.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer

__all__ = [
    "QUANTIZED_LAYERS",
    "ActivationObserver",
    "ActivationQuantizer",
    "AlignedAdd",
    "LSQActivationQuantizer",
    "LSQQuantizer",
    "LSQWeightQuantizer",
    "QuantizedAttention",
    "QuantizedClippedReLU",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "Quantizer",
    "ResidualAdd",
    "StreamAdd",
    "StreamQuantizer",
    "WeightQuantizer",
    "lsq_quantize",
]
