"""Save codes for backward instead of floats: one byte for each value of a quantized activation.

``v^ = code * step`` can be made again from the code bit for bit, so that keeping the code loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brfx.kernels.hooks import has_hooks
from brfx.nn.layers import QuantizedLayer
from brfx.quant.quantizer import Quantizer

#: ``(code, step, dtype) -> values``
Decode = Callable[[Tensor, Tensor, torch.dtype], Tensor]


class CodedTensor(NamedTuple):
    """An activation or weight with what it can be made from again, ``values == code * step``, if it is quantized."""

    values: Tensor
    code: Tensor | None  #: uint8 where the grid is unsigned, else int8
    step: Tensor | None  #: as it was in this forward; an optimizer may change the parameter before backward


def with_codes(quantizer: Quantizer, x: Tensor) -> CodedTensor:
    """``quantizer(x)`` with its codes."""
    return CodedTensor(quantizer(x), *quantizer.integers(x.detach()))


def without_codes(values: Tensor) -> CodedTensor:
    """``values`` that no quantizer made; they are kept as they are."""
    return CodedTensor(values, None, None)


def weight_with_codes(layer: QuantizedLayer) -> CodedTensor:
    """A layer's weight, with its codes if it is quantized."""
    return (
        without_codes(layer.weight)
        if layer.weight_quantizer is None
        else with_codes(layer.weight_quantizer, layer.weight)
    )


def decode(code: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that a code and a step stand for."""
    return (code.to(torch.promote_types(dtype, step.dtype)) * step).to(dtype)


def dequantized(coded: CodedTensor) -> Tensor:
    """``coded.values``, read from their code: compiled code then has no reason to keep the floats for backward."""
    return _Dequantized.apply(*coded)  # type: ignore[no-any-return, no-untyped-call]


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, code: Tensor, step: Tensor) -> Tensor:
        return decode(code, step, values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Convolution(torch.autograd.Function):
    """A convolution that keeps the codes of its input and of its weight for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        code: Tensor | None,
        step: Tensor | None,
        weight: Tensor,
        weight_code: Tensor | None,
        weight_step: Tensor | None,
        bias: Tensor | None,
        settings: Any,
        decode: Decode,
    ) -> Tensor:
        ctx.save_for_backward(
            values if code is None else code, step, weight if weight_code is None else weight_code, weight_step
        )
        ctx.settings, ctx.biased, ctx.dtype = settings, None if bias is None else list(bias.shape), values.dtype
        ctx.decode = decode
        return torch.ops.aten.convolution(values, weight, bias, *settings)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = _decoded(ctx)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.biased is not None and ctx.needs_input_grad[6]]
        grad_values, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grads[0], values, weight, ctx.biased, *ctx.settings, wanted
        )
        return grad_values, None, None, grad_weight, None, None, grad_bias, None, None


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` that keeps the codes of its input and of its weight for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        code: Tensor | None,
        step: Tensor | None,
        weight: Tensor,
        weight_code: Tensor | None,
        weight_step: Tensor | None,
        bias: Tensor | None,
        decode: Decode,
    ) -> Tensor:
        ctx.save_for_backward(
            values if code is None else code, step, weight if weight_code is None else weight_code, weight_step
        )
        ctx.biased, ctx.dtype, ctx.decode = bias is not None, values.dtype, decode
        return nn.functional.linear(values, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = _decoded(ctx)
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_values = (grad @ weight).view_as(values) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ values.reshape(-1, values.shape[-1]) if ctx.needs_input_grad[3] else None
        grad_bias = grad.sum(0) if ctx.biased and ctx.needs_input_grad[6] else None
        return grad_values, None, None, grad_weight, None, None, grad_bias, None


def _decoded(ctx: Any) -> tuple[Tensor, Tensor]:
    """Input and weight of a layer, from what its forward kept."""
    kept, step, weight, weight_step = ctx.saved_tensors
    values = kept if step is None else ctx.decode(kept, step, ctx.dtype)
    return values, weight if weight_step is None else ctx.decode(weight, weight_step, ctx.dtype)


def takes_codes(layer: nn.Module) -> bool:
    """Whether :func:`apply_with_codes` computes what calling this layer computes: hooks and code of the user's own are
    reached by calls alone."""
    if not isinstance(layer, QuantizedLayer) or layer.input_quantizer is not None or has_hooks(layer):
        return False
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        own = type(layer)._conv_forward in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)
        return own and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def apply_with_codes(
    layer: Any, coded: CodedTensor, weight: CodedTensor | None = None, decode: Decode = decode
) -> Tensor:
    """``layer(coded.values)``, with codes kept instead of floats; under autocast in its type.

    Args:
        layer: one that :func:`takes_codes`.
        coded: its input, :func:`without_codes` where no quantizer made it.
        weight: its :func:`weight_with_codes`, where that is there already.
        decode: what makes floats of codes in backward.
    """
    values, code, step = coded
    w, w_code, w_step = weight or weight_with_codes(layer)
    bias = layer.bias
    if torch.is_autocast_enabled(values.device.type):
        dtype = torch.get_autocast_dtype(values.device.type)
        values, w, bias = values.to(dtype), w.to(dtype), bias if bias is None else bias.to(dtype)
    if isinstance(layer, nn.Linear):
        return _Linear.apply(values, code, step, w, w_code, w_step, bias, decode)  # type: ignore[no-any-return, no-untyped-call]
    none = (0,) * len(layer.stride)
    settings = (layer.stride, layer.padding, layer.dilation, False, none, layer.groups)
    return _Convolution.apply(values, code, step, w, w_code, w_step, bias, settings, decode)  # type: ignore[no-any-return, no-untyped-call]
