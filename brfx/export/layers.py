"""Modules of the integer form: quantizers, convolutions and linears from codes to codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from brfx.export.operators import QuantParams, convolution, linear, product, recode, requantize
from brfx.graph.utils import attribute, free_name, module_calls
from brfx.nn import QuantizedLayer, Quantizer, WeightQuantizer
from brfx.quant.grid import Grid, positive_step

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Requantize(nn.Module):
    """Puts values on a grid of 8-bit codes; ``site`` names the quantizer of the trained model that it stands for."""

    def __init__(self, codes: QuantParams, site: str, scale_out: float | None = None) -> None:
        super().__init__()
        self.codes, self.site = codes, site
        self.scale_out = codes.scale if scale_out is None else scale_out

    def forward(self, x: Tensor) -> Tensor:
        return requantize(x, *self.codes, self.scale_out)  # type: ignore[no-any-return]


class Recode(Requantize):
    """A :class:`Requantize` of what lies on another grid already, and is never negative there."""

    def forward(self, x: Tensor) -> Tensor:
        return recode(x, *self.codes, self.scale_out)  # type: ignore[no-any-return]


class IntegerConv(nn.Module):
    """A convolution with int8 weights and an int32 bias, from the grid of its input to the grid of its output."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module, parts: Folded, x: QuantParams, y: QuantParams, site: str) -> None:
        super().__init__()
        self.register_buffer("weight", parts.weight)
        self.register_buffer("weight_scale", parts.scale)
        self.register_buffer("bias", parts.bias)
        self.x, self.y, self.site, self.headroom, self.storage = x, y, site, parts.headroom, parts.storage
        self.stride, self.dilation, self.groups = list(layer.stride), list(layer.dilation), int(layer.groups)  # type: ignore[arg-type]
        self.padding = list(layer.padding)  # type: ignore[arg-type]
        self.largest_sum = largest_sum(parts.weight, x) + int(parts.bias.abs().max())
        self.saturates = saturates(parts.weight, x)

    def forward(self, x: Tensor) -> Tensor:
        return convolution(  # type: ignore[no-any-return]
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            self.x.scale,
            self.x.zero_point,
            *self.y,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class IntegerLinear(nn.Module):
    """A linear with int8 weights; sums in 32 bits, then one multiplication and a float bias.

    ``transposed`` is ``weight`` as the matrix product wants it, under a name of its own in exported files.
    """

    weight: Tensor
    transposed: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, x: QuantParams, storage: Storage) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("transposed", weight.t().contiguous(), persistent=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.x, self.storage, self.headroom = x, storage, 1
        self.largest_sum, self.saturates = largest_sum(weight, x), saturates(weight, x)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.transposed, self.scale, self.bias, self.x.scale, self.x.zero_point)  # type: ignore[no-any-return]


class IntegerProduct(nn.Module):
    """``a @ b`` of two activations, each given by the grid that it lies on; sums in 32 bits, one multiplication."""

    def __init__(self, left: QuantParams, right: QuantParams) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.left, self.right
        return product(a, b, left.scale, left.zero_point, right.scale, right.zero_point)  # type: ignore[no-any-return]


class FloatLayer(nn.Module):
    """A convolution or linear that has to stay in floating point; its weight is stored as codes all the same.

    Python code around it reads what it reads of the layer: ``weight``, in floating point, and its settings.
    """

    scale: Tensor

    def __init__(self, layer: QuantizedLayer, weight: Tensor, scale: Tensor, storage: Storage) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.layer, self.storage, self.headroom = layer, storage, 1
        layer.weight_quantizer = None
        del layer._parameters["weight"]

    @property
    def codes(self) -> Tensor:
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "scale" in self._buffers:
            return self.codes.float() * self.scale
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vars(self.layer)["weight"] = self.weight
        return self.layer(x, *args, **kwargs)  # type: ignore[no-any-return]


def codes_of(quantizer: Quantizer) -> QuantParams | None:
    """The uint8 codes of a quantizer of one step; ``None`` for what no clipped rounding makes, such as signs."""
    grid, step = quantizer.grid, float(positive_step(quantizer.step.detach()))
    if grid.binary or not quantizer.only_clips:
        return None
    high = grid.high
    if quantizer.ceiling < math.inf:
        high = min(high, int((torch.tensor(quantizer.ceiling) / step).round()))
    zero = -grid.low
    return QuantParams(step, zero, 0, high + zero)


def codes_of_weight(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """A weight as int8 integers, and what each is worth: one scale, or one an output channel in a shape that
    broadcasts (:meth:`brfx.nn.Quantizer.integers`)."""
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer.integers(layer.weight.detach())


@torch.no_grad()
def store_transformed_weights(gm: GraphModule) -> None:
    """Where the weight of a function is a transformed parameter (by a tanh, say), store the transformed values as a
    constant, since another runtime's tanh could round to another code.

    y = F.linear(x, quantizer(weight))  ->  y = F.linear(x, quantizer(prepared))
    """
    for node, module in module_calls(gm):
        source = node.args[0] if node.args else None
        if not isinstance(module, WeightQuantizer) or module.only_clips or not isinstance(source, Node):
            continue
        if module.calibrated and source.op == "get_attr":
            name = free_name(gm, f"{node.target}_prepared".replace(".", "_"))
            gm.register_buffer(name, module.prepare(attribute(gm, source).detach()))
            with gm.graph.inserting_before(node):
                node.replace_input_with(source, gm.graph.get_attr(name))
            module.prepared = True
            if not source.users:
                gm.graph.erase_node(source)


class Storage(NamedTuple):
    """The storage of a layer's integers (less their headroom): themselves, or as codes of ``2 * code + 1``."""

    bits: int
    odd: bool = False

    @staticmethod
    def of(grid: Grid, integers: Tensor) -> Storage:
        """The storage of fewest bits for integers of a grid; a symmetric grid's may have been set to 0."""
        if not grid.offset:
            return Storage(grid.bits)
        return Storage(grid.bits, odd=True) if bool((integers != 0).all()) else Storage(grid.bits + 1)

    def stored(self, integers: Any) -> Any:
        """The stored form of ``integers``, a tensor or an array."""
        return (integers - 1) // 2 if self.odd else integers


def largest_sum(weight: Tensor, x: QuantParams) -> int:
    """The largest magnitude of an output's sum over all inputs."""
    reach = max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    return int(weight.flatten(1).int().abs().sum(1).max()) * reach


def saturates(weight: Tensor, x: QuantParams) -> bool:
    """Whether a sum of two products can leave 16 bits, in which x86 kernels without VNNI keep it; the input's codes are
    multiplied as they are stored, with the zero point in them."""
    pairs = weight.flatten(1).int()
    pairs = torch.cat([pairs.clamp(min=0), -pairs.clamp(max=0)])  # two of one sign reach farthest
    largest = pairs.topk(min(2, pairs.shape[1]), dim=1).values.sum(1).max()
    return int(largest) * x.high > 2**15 - 1


def integer_linear(weight: Tensor, scale: Tensor, bias: Tensor | None, x: QuantParams, grid: Grid) -> IntegerLinear:
    """A linear of integers ``weight`` from ``grid``; ``scale`` is one, or one a row."""
    scale = (scale.flatten() * torch.tensor(x.scale)).float()
    bias = torch.zeros(len(weight)) if bias is None else bias.clone()
    return IntegerLinear(weight, scale, bias, x, Storage.of(grid, weight))


def float_layer(layer: QuantizedLayer) -> FloatLayer:
    weight, scale = codes_of_weight(layer)
    assert layer.weight_quantizer is not None
    return FloatLayer(layer, weight, scale.float(), Storage.of(layer.weight_quantizer.grid, weight))


@dataclass(frozen=True)
class Folded:
    """A convolution's weight codes times ``headroom``, its scale by channel, and its bias in units of the sums.

    ``snapped`` is the bias that the norm (the layer, if the norm has none) would have if it were that integer exactly;
    ``None`` where neither has a bias.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    headroom: int
    storage: Storage
    snapped: Tensor | None


def can_fold(norm: nn.Module) -> bool:
    """Whether a batch norm is a factor and a shift in eval mode, not the statistics of the batch at hand."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None


def fold(layer: Any, norm: nn.Module | None, x: QuantParams) -> Folded:
    """A convolution and the batch norm behind it in integers.

    The batch norm's factor goes into the scale, and everything else into the bias, an integer in units of the sums
    (``x.scale * scale``). Codes of few bits are multiplied by a constant into the room that int8 has: the unit gets
    finer, and rounding the bias moves fewer codes of the output.
    """
    codes, step = codes_of_weight(layer)
    channels = len(codes)
    factor, shift = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if layer.bias is not None:
        shift = layer.bias.detach().double()
    if norm is not None:
        assert isinstance(norm, _BatchNorm) and norm.running_var is not None and norm.running_mean is not None
        variance: Tensor = norm.running_var.double()
        factor = torch.rsqrt(variance + norm.eps)
        if norm.affine:
            factor = factor * norm.weight.detach().double()
        shift = (shift - norm.running_mean.double()) * factor
        if norm.affine:
            shift = shift + norm.bias.detach().double()
    # Kernels without VNNI sum pairs of products in int16, of the codes as they are stored, with the zero point in them.
    headroom = max(1, min(127, 16383 // max(x.high, 1)) // max(1, int(codes.abs().max())))
    scale = step.double().flatten().expand(channels) * factor / headroom
    vanishing = scale.abs() * x.scale * 2**30 <= shift.abs()  # the weights of such a channel count for nothing
    scale = torch.where(vanishing, (shift.abs() / (x.scale * 2**20)).clamp(min=1e-12), scale)
    codes = torch.where(vanishing.view(-1, *[1] * (codes.dim() - 1)), 0, codes)
    scale = scale.float()
    unit = scale.double() * torch.tensor(x.scale).double()
    bias = (shift / unit).round()
    moved, snapped = bias * unit - shift, None
    if norm is not None and norm.affine:
        snapped = norm.bias.detach() + moved
    elif layer.bias is not None:
        snapped = layer.bias.detach() + moved / factor
    storage = Storage.of(layer.weight_quantizer.grid, codes)
    return Folded((codes * headroom).to(torch.int8), scale, bias.to(torch.int32), headroom, storage, snapped)
