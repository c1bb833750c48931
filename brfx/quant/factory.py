"""Choose the class of each quantizer from the settings.

A method is one file with its classes, all of the protocol in :mod:`brfx.quant.quantizer`, and one line in a table
below. The functions here alone choose between methods, by the settings of a :class:`~brfx.config.QATConfig`. All other
code asks a quantizer through the protocol, and names no method.

Levels are those of :class:`~brfx.quant.grid.Grid`, evenly spaced: integer kernels multiply them. A method with other
levels, such as powers of two, needs a grid and a storage of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brfx.quant.quantizer import ActivationQuantizer, WeightQuantizer

#: What ``weight_quantizer`` takes: the class, ``(bits, step_shape=, symmetric=)``.
WEIGHT_QUANTIZERS = {"lsq": "brfx.quant.lsq:LSQWeightQuantizer", "dorefa": "brfx.quant.dorefa:DoReFaWeightQuantizer"}

#: What ``act_quantizer`` takes: the class, ``(bits, signed=, regularized=, reason=)``, and that of a ReLU,
#: ``(bits, clip_value=)``. LSQ quantizes what may be negative, whatever is chosen: it has a form for that.
ACT_QUANTIZERS = {
    "lsq": ("brfx.quant.lsq:LSQActivationQuantizer", "brfx.quant.lsq:QuantizedClippedReLU"),
    "pact": ("brfx.quant.pact:PACTQuantizer", "brfx.quant.pact:PACTReLU"),
}


def weight_quantizer(
    bits: int, *, step_shape: tuple[int, ...] = (), symmetric: bool = False, method: str = "lsq"
) -> WeightQuantizer:
    """The quantizer of a weight: one step, or one per output channel in ``step_shape``."""
    made: WeightQuantizer = _class(WEIGHT_QUANTIZERS[method])(bits, step_shape=step_shape, symmetric=symmetric)
    return made


def activation_quantizer(
    bits: int, *, signed: bool | None, regularized: bool = True, reason: str = "", method: str = "lsq"
) -> ActivationQuantizer:
    """The quantizer of an activation; of one that may be negative (``signed`` is not ``False``) LSQ's, whatever the
    ``method``."""
    place = ACT_QUANTIZERS[method if signed is False else "lsq"][0]
    made: ActivationQuantizer = _class(place)(bits, signed=signed, regularized=regularized, reason=reason)
    return made


def relu_quantizer(bits: int, *, clip_value: float | None = None, method: str = "lsq") -> ActivationQuantizer:
    """The quantized form of a ReLU, or of one with a ceiling."""
    made: ActivationQuantizer = _class(ACT_QUANTIZERS[method][1])(bits, clip_value=clip_value)
    return made


def stream_quantizer(bits: int, *, clip_value: float | None = None) -> ActivationQuantizer:
    """The quantizer of a residual stream, LSQ's whatever the method: a stream has one step for several ReLUs."""
    made: ActivationQuantizer = _class("brfx.quant.lsq:StreamQuantizer")(bits, clip_value=clip_value)
    return made


def about_weights(method: str) -> str:
    """A phrase on how a method sets the levels of weights."""
    return str(_class(WEIGHT_QUANTIZERS[method]).about)


def about_activations(method: str) -> str:
    """A phrase on how a method sets the levels of activations."""
    return str(_class(ACT_QUANTIZERS[method][0]).about)


def _class(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
