"""The profiles ``qdq`` and ``qdq-int4``: ordinary operators between QuantizeLinear and DequantizeLinear.

    convolution   x -> Conv(DequantizeLinear(weight), bias) -> Clip -> QuantizeLinear -> DequantizeLinear
    linear        x -> MatMul(DequantizeLinear(weight)) -> Add(bias)
    requantize    x -> Clip -> QuantizeLinear -> DequantizeLinear

Codes are int8 with the zero point 0 where they fit, else uint8. Weights have a scale for each channel. Sums are in
floating point unless a runtime fuses them. A sum beside a rounding threshold can then get the other code, so that the
file is close to the integer form, and not it bit for bit.

``qdq`` has INT8 weights, and biases in floating point. Each bias is a multiple of its input's scale times its weight's:
runtimes round it to one. ``qdq-int4`` has INT4 weights where they fit. Their scale is coarser, by the headroom of INT8.
Its biases are therefore INT32 with a scale of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from brfx.export.integer import IntegerModel
from brfx.export.operators import constant
from brfx.export.packing import CONTAINERS, pack


def qdq_translations(*, integer_bias: bool) -> dict[Any, Any]:
    """The translations of the operators of :mod:`brfx.export.operators`: ``custom_translation_table``."""
    import onnx
    from onnxscript import opset21 as op

    def unit(value: float) -> Any:
        return constant(value, np.float32)

    def requantize(x: Any, scale: float, zero_point: int, low: int, high: int, scale_out: float) -> Any:
        low, high = max(low, 0) - zero_point, min(high, 255) - zero_point
        signed = low >= -128 and high <= 127
        if (low, high) != ((-128, 127) if signed else (-zero_point, 255 - zero_point)):
            x = op.Clip(x, unit(scale * low), unit(scale * high))
        zero = constant(0, np.int8) if signed else constant(zero_point, np.uint8)
        return op.DequantizeLinear(op.QuantizeLinear(x, unit(scale), zero), unit(scale_out), zero)

    def convolution(x: Any, weight: Any, weight_scale: Any, bias: Any, x_scale: float, *rest: Any) -> Any:
        _, y_scale, y_zero_point, y_low, y_high, stride, padding, dilation, groups = rest
        levels = op.DequantizeLinear(weight, weight_scale, axis=0)
        worth = op.Mul(weight_scale, unit(x_scale))
        if integer_bias:
            shift = op.DequantizeLinear(bias, worth, axis=0)
        else:
            shift = op.Mul(op.Cast(bias, to=onnx.TensorProto.FLOAT), worth)
        sums = op.Conv(
            *(x, levels, shift), strides=list(stride), pads=list(padding) * 2, dilations=list(dilation), group=groups
        )
        return requantize(sums, y_scale, y_zero_point, y_low, y_high, y_scale)

    def linear(x: Any, weight: Any, scale: Any, bias: Any, x_scale: float, x_zero_point: int) -> Any:
        return op.Add(op.MatMul(x, op.DequantizeLinear(weight, op.Div(scale, unit(x_scale)), axis=1)), bias)

    def product(left: Any, right: Any, *grids: Any) -> Any:
        return op.MatMul(left, right)

    return {
        torch.ops.brfx.requantize.default: requantize,
        torch.ops.brfx.recode.default: requantize,
        torch.ops.brfx.convolution.default: convolution,
        torch.ops.brfx.linear.default: linear,
        torch.ops.brfx.product.default: product,
    }


def fold_constants(proto: Any) -> None:
    """Compute products and quotients of constants, which torch's exporter leaves where they are large.

    a (constant), b (constant) -> Mul -> c    =>    c (constant)
    """
    from onnx import numpy_helper

    compute: dict[str, Any] = {"Mul": np.multiply, "Div": np.divide, "Cast": lambda value: value.astype(np.float32)}
    known = {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type in compute and all(name in known for name in node.input):
            if node.op_type == "Cast" and node.attribute[0].i != 1:  # to FLOAT
                continue
            value = compute[node.op_type](*(known[name] for name in node.input))
            known[node.output[0]] = value
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), node.output[0]))
            proto.graph.node.remove(node)


def store_qdq_weights(proto: Any, integer: IntegerModel, narrowest: int) -> None:
    """Give each weight a scale a channel, and store its codes without their headroom where INT4 holds them.

    w (INT8, codes * headroom), s    =>    codes (INT4), s * headroom    or    w (INT8), s

    Args:
        narrowest: 4, or 8 to leave all in INT8.
    """
    import onnx

    layers = {
        f"{name}.{part}": layer
        for name, layer in integer.model.named_modules()
        for part in ("weight", "transposed")
        if hasattr(layer, "headroom") and part in layer._buffers
    }
    values = {value.name: value for value in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in layers:
            continue
        layer: Any = layers[node.input[0]]
        weight, scale = values[node.input[0]], onnx.numpy_helper.to_array(values[node.input[1]])
        codes = onnx.numpy_helper.to_array(weight) // np.int8(layer.headroom)
        channels = codes.shape[next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)]
        if narrowest == 4 and codes.min() >= -8 and codes.max() <= 7:
            scale = scale * np.float32(layer.headroom)
            weight.CopyFrom(
                onnx.TensorProto(name=weight.name, data_type=CONTAINERS[4], dims=codes.shape, raw_data=pack(codes, 4))
            )
        elif layer.saturates:  # ONNX Runtime rewrites these weights and their zero points where its kernels saturate
            node.input.append(f"{weight.name}.zero")
            proto.graph.initializer.append(
                onnx.numpy_helper.from_array(np.zeros(channels, np.int8), f"{weight.name}.zero")
            )
        node.input[1] = f"{weight.name}.scale"
        scale = np.broadcast_to(scale.reshape(-1), channels).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, node.input[1]))
