"""Convolutions and linears whose weight is quantized on its way into the operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from brfx.quant.factory import weight_quantizer
from brfx.quant.quantizer import ActivationQuantizer, WeightQuantizer

_Kind = TypeVar("_Kind", bound=nn.Module)


def adopted(kind: type[_Kind], module: nn.Module) -> _Kind:
    """A module of class ``kind`` with the very parameters, buffers, submodules, settings and hooks of ``module``."""
    new = kind.__new__(kind)
    new.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
    return new


def _made_class(cls: type, kind: type) -> type:
    """``cls``, or a subclass of it and ``kind``: that may have what the parameters depend on, as weight norm's has."""
    if kind in cls.__mro__:
        return cls
    return type(f"Quantized{kind.__name__}", (cls, kind), {"__module__": __name__, "_made_from": (cls, kind)})


_layer_class: Callable[[type, type], type] = cache(_made_class)


def _blank(cls: type, kind: type) -> Any:
    return object.__new__(_layer_class(cls, kind))


class QuantizedLayer(nn.Module):
    """Mixed into a float layer: the layer keeps its parameters and their names, and gains a ``weight_quantizer``.

    Its input is quantized before it arrives, by a node of the graph; outside every graph, where Python code calls the
    layer, by an ``input_quantizer`` of its own.
    """

    weight: Any  # the float layer's own Parameter
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    channel_dim = 0  # of the output channels in ``weight``

    @classmethod
    def adopt(cls, layer: nn.Module) -> Self:
        """A layer of this class, and of ``layer``'s own, with the very parameters, settings and hooks of ``layer``."""
        kind: type[Self] = _layer_class(cls, type(layer))
        return adopted(kind, layer)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        bits: int | None,
        *,
        per_channel: bool = False,
        symmetric: bool = False,
        method: str = "lsq",
    ) -> Self:
        """The quantized form of ``layer``; ``bits=None`` leaves its weight in FP32, ``symmetric`` is the grid's,
        ``method`` one of :data:`brfx.quant.factory.WEIGHT_QUANTIZERS`."""
        new = cls.adopt(layer)
        new.weight_quantizer = new.input_quantizer = None
        if bits is not None:
            weight = new.eval().weight.detach()  # in training reading it would be a step of spectral norm
            new.train(layer.training)
            shape = [1] * weight.dim()
            shape[cls.channel_dim] = weight.shape[cls.channel_dim]
            step_shape = tuple(shape) if per_channel else ()
            new.weight_quantizer = weight_quantizer(bits, step_shape=step_shape, symmetric=symmetric, method=method)
            new.weight_quantizer.to(weight.device).train(layer.training)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = vars(type(self)).get("_made_from")
        return super().__reduce_ex__(protocol) if made is None else (_blank, made, self.__getstate__())  # type: ignore[no-untyped-call]

    def quantized_weight(self) -> Tensor:
        """The weight as the operation sees it: a code times the step."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)  # type: ignore[no-any-return]

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)  # type: ignore[no-any-return]

    def regularized(self) -> list[tuple[Tensor, WeightQuantizer]]:
        """Each latent weight with its quantizer, for the bin regularizer."""
        return [] if self.weight_quantizer is None else [(self.weight, self.weight_quantizer)]


def has_integer_form(layer: Any) -> bool:
    """Whether integer kernels compute this layer: a quantized convolution, not transposed, padded with zeros."""
    return (
        isinstance(layer, QuantizedLayer)
        and isinstance(layer, nn.modules.conv._ConvNd)
        and layer.weight_quantizer is not None
        and not layer.transposed
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


class _QuantizedConv(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)  # type: ignore[operator, no-any-return]


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` with a quantized weight."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` with a quantized weight."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` with a quantized weight."""


class _QuantizedConvTranspose(QuantizedLayer):
    channel_dim = 1

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims: int = self.weight.dim() - 2
        x = self.quantized_input(input)
        layer: Any = self
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        operation = getattr(nn.functional, f"conv_transpose{dims}d")
        return operation(  # type: ignore[no-any-return]
            x, self.quantized_weight(), layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a quantized weight."""


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a quantized weight."""


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a quantized weight."""


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with a quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


#: Float layer -> its quantized form.
QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
}
