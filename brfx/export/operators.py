"""The quantized operators of an exported model: what each computes in integers, and how it is written in ONNX.

They stand in the graph for the export alone. Values between them are floats that lie on a grid, ``code * scale``;
inside they are integers, computed as ONNX Runtime's kernels compute them, so that running the graph in PyTorch is the
reference that an exported file is held to, bit for bit.

``code`` is ``stored - zero_point``, with ``stored`` a byte from ``low`` to ``high`` (:class:`QuantParams`). ``round``
is half to even; sums are exact up to 32 bits.

============  ==========================================================================================================
operator      what it computes
============  ==========================================================================================================
requantize    ``clip(round(x / scale), low - zero_point, high - zero_point) * scale_out``
recode        :func:`requantize` of what lies on a grid and is never negative: a table of 256 bytes in a runtime
convolution   ``clip(round((sum(weight * code) + bias) * x_scale * weight_scale / y_scale), ...) * y_scale``, with int8
              weights, one ``weight_scale`` a channel, an int32 bias, and the bounds of ``y``
linear        ``float(code @ weight) * scale + bias``, with int8 weights, one ``scale`` or one a column, a float bias
product       ``float(left_code @ right_code) * (left_scale * right_scale)``, of two activations
============  ==========================================================================================================

What else a graph of the integer form calls is torch's, in floating point: adds of values on one unit, pooling,
reshapes, softmax. A new operator needs a line here, a ``custom_op`` with its shape, a translation to ONNX
(:func:`translations`) and a node in docs/packed-format.md; ``tests/export/test_operators.py`` holds them together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence  # noqa: UP035 (torch before 2.7 takes typing's alone in an operator)

import torch
from torch import Tensor

from brfx.quant.grid import nearest_code

_DIMS = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}


class QuantParams(NamedTuple):
    """An 8-bit grid of codes: ``value = (stored - zero_point) * scale`` with ``low <= stored <= high``, uint8."""

    scale: float
    zero_point: int
    low: int
    high: int


def _requantized(ratio: Tensor, zero_point: int, low: int, high: int, scale_out: float) -> Tensor:
    """QuantizeLinear, Clip and DequantizeLinear of ``x / scale``: its codes, worth ``scale_out`` each."""
    stored = nearest_code(ratio, low - zero_point, high - zero_point) + zero_point
    return (stored - zero_point) * _f32(scale_out)


def _integers(x: Tensor, scale: float) -> Tensor:
    """The integers, in float64, that ``x`` is ``scale`` times of: it lies on that grid already."""
    return nearest_code(x / _f32(scale), None, math.inf).double()


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@torch.library.custom_op("brfx::requantize", mutates_args=())
def requantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Tensor:
    """Put ``x`` on the grid of ``scale``; its codes are then worth ``scale_out`` each."""
    return _requantized(x / _f32(scale), zero_point, low, high, scale_out)


@requantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("brfx::recode", mutates_args=())
def recode(x: Tensor, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Tensor:
    """:func:`requantize` of codes that are never negative: a table of 256 entries in the runtime."""
    return _requantized(x / _f32(scale), zero_point, low, high, scale_out)


@recode.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("brfx::convolution", mutates_args=())
def convolution(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    x_scale: float,
    x_zero_point: int,
    y_scale: float,
    y_zero_point: int,
    y_low: int,
    y_high: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution of codes with int8 weights and an int32 bias into 32 bits, requantized to the grid of ``y``."""
    codes = _integers(x, x_scale)
    total = _DIMS[x.dim()](codes, weight.double(), None, stride, padding, dilation, groups)
    shape = (1, -1, *[1] * (x.dim() - 2))
    total = total + bias.double().view(shape)
    factor = (_f32(x_scale) * weight_scale / _f32(y_scale)).view(shape)
    return _requantized(total.float() * factor, y_zero_point, max(y_low, 0), min(y_high, 255), y_scale)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    stride, padding, dilation, groups = args[-4:]
    return _DIMS[x.dim()](x, torch.empty_like(weight, dtype=x.dtype), None, stride, padding, dilation, groups)


@torch.library.custom_op("brfx::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, x_scale: float, x_zero_point: int) -> Tensor:
    """``x @ weight`` in integers, times ``scale`` (one or one a column of ``weight``), plus a float bias."""
    codes = _integers(x, x_scale)
    return (codes @ weight.double()).float() * scale + bias


@linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, x_scale: float, x_zero_point: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("brfx::product", mutates_args=())
def product(
    left: Tensor, right: Tensor, left_scale: float, left_zero_point: int, right_scale: float, right_zero_point: int
) -> Tensor:
    """``left @ right`` of two activations in integers; zero points are those that their codes are stored with."""
    total = _integers(left, left_scale) @ _integers(right, right_scale)
    return total.float() * (_f32(left_scale) * _f32(right_scale))


@product.register_fake
def _(left: Tensor, right: Tensor, *args: Any) -> Tensor:
    return left @ right


def constant(value: float, kind: type) -> Any:
    """A number of this NumPy type in an ONNX graph that onnxscript traces."""
    import numpy as np
    import onnx
    from onnxscript import opset21 as op

    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype=kind)))


def translations() -> dict[Any, Any]:
    """The translations of the operators above for torch's exporter: ``custom_translation_table``."""
    import numpy as np
    import onnx
    from onnxscript import opset21 as op

    def clipped(codes: Any, low: int, high: int) -> Any:
        if (low, high) == (0, 255):
            return codes
        return op.Clip(codes, constant(low, np.uint8), constant(high, np.uint8))

    def onnx_requantize(x: Any, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Any:
        zero = constant(zero_point, np.uint8)
        codes = clipped(op.QuantizeLinear(x, constant(scale, np.float32), zero), low, high)
        return op.DequantizeLinear(codes, constant(scale_out, np.float32), zero)

    def onnx_recode(x: Any, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Any:
        # ONNX Runtime makes DequantizeLinear -> LeakyRelu -> QuantizeLinear one look-up that keeps the layout of the
        # convolutions around it. Without an operator between the two it runs them one by one, in another layout.
        return onnx_requantize(op.LeakyRelu(x, alpha=0.5), scale, zero_point, low, high, scale_out)

    def onnx_convolution(
        x: Any,
        weight: Any,
        weight_scale: Any,
        bias: Any,
        x_scale: float,
        x_zero_point: int,
        y_scale: float,
        y_zero_point: int,
        y_low: int,
        y_high: int,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Any:
        x_unit, x_zero = constant(x_scale, np.float32), constant(x_zero_point, np.uint8)
        y_unit, y_zero = constant(y_scale, np.float32), constant(y_zero_point, np.uint8)
        codes = op.QLinearConv(
            op.QuantizeLinear(x, x_unit, x_zero),
            x_unit,
            x_zero,
            weight,
            weight_scale,
            constant(0, np.int8),
            y_unit,
            y_zero,
            bias,
            strides=list(stride),
            pads=list(padding) * 2,
            dilations=list(dilation),
            group=groups,
        )
        return op.DequantizeLinear(clipped(codes, y_low, y_high), y_unit, y_zero)

    def onnx_linear(x: Any, weight: Any, scale: Any, bias: Any, x_scale: float, x_zero_point: int) -> Any:
        x_zero = constant(x_zero_point, np.uint8)
        codes = op.QuantizeLinear(x, constant(x_scale, np.float32), x_zero)
        total = op.MatMulInteger(codes, weight, x_zero)
        return op.Add(op.Mul(op.Cast(total, to=onnx.TensorProto.FLOAT), scale), bias)

    def onnx_product(
        left: Any, right: Any, left_scale: float, left_zero_point: int, right_scale: float, right_zero_point: int
    ) -> Any:
        zeros = constant(left_zero_point, np.uint8), constant(right_zero_point, np.uint8)
        left = op.QuantizeLinear(left, constant(left_scale, np.float32), zeros[0])
        right = op.QuantizeLinear(right, constant(right_scale, np.float32), zeros[1])
        total = op.Cast(op.MatMulInteger(left, right, *zeros), to=onnx.TensorProto.FLOAT)
        return op.Mul(total, constant(float(_f32(left_scale) * _f32(right_scale)), np.float32))

    return {
        torch.ops.brfx.requantize.default: onnx_requantize,
        torch.ops.brfx.recode.default: onnx_recode,
        torch.ops.brfx.convolution.default: onnx_convolution,
        torch.ops.brfx.linear.default: onnx_linear,
        torch.ops.brfx.product.default: onnx_product,
    }
