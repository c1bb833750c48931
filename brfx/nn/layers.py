"""Convolutions and linears whose weight is quantized on its way into the operation."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from brfx.nn.lsq import LSQWeightQuantizer


class QuantizedLayer(nn.Module):
    """Mixed into a float layer: the layer keeps its parameters and their names, and gains a ``weight_quantizer``."""

    weight: Any  # the float layer's own Parameter
    weight_quantizer: LSQWeightQuantizer
    channel_dim = 0  # of the output channels in ``weight``

    @classmethod
    def from_float(cls, layer: nn.Module, bits: int, *, per_channel: bool = False) -> Self:
        """A quantized layer that adopts the very parameters, settings and hooks of ``layer``."""
        new = cls.__new__(cls)
        new.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(layer).items()}
        shape = [1] * new.weight.dim()
        shape[cls.channel_dim] = new.weight.shape[cls.channel_dim]
        new.weight_quantizer = LSQWeightQuantizer(bits, step_shape=tuple(shape) if per_channel else ())
        new.weight_quantizer.to(new.weight.device).train(layer.training)
        return new

    def quantized_weight(self) -> Tensor:
        """The weight as the operation sees it: a code times the step."""
        return self.weight_quantizer(self.weight)  # type: ignore[no-any-return]


class _QuantizedConv(QuantizedLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore[operator, no-any-return]


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` with an LSQ-quantized weight."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` with an LSQ-quantized weight."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` with an LSQ-quantized weight."""


class _QuantizedConvTranspose(QuantizedLayer):
    channel_dim = 1

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims: int = self.weight.dim() - 2
        layer: Any = self
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        operation = getattr(nn.functional, f"conv_transpose{dims}d")
        return operation(  # type: ignore[no-any-return]
            x, self.quantized_weight(), layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with an LSQ-quantized weight."""


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with an LSQ-quantized weight."""


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with an LSQ-quantized weight."""


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with an LSQ-quantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantized_weight(), self.bias)


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
