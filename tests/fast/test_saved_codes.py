"""Layers that keep codes compute what calling them computes, whatever of them is trained."""

import pytest
import torch
from torch import nn

from brfx.fast.saved_codes import apply_with_codes, takes_codes, weight_with_codes, with_codes, without_codes
from brfx.nn import LSQActivationQuantizer
from brfx.nn.layers import QuantizedConv2d, QuantizedConvTranspose2d, QuantizedLayer, QuantizedLinear

PARTS = ("x", "step", "weight", "weight_step", "bias")


def quantized_pair(kind: str) -> tuple[LSQActivationQuantizer, QuantizedLayer, torch.Tensor]:
    """A quantizer with its step, the layer behind it, and what both were calibrated on."""
    torch.manual_seed(0)
    layer = (
        QuantizedLinear.from_float(nn.Linear(6, 4), 2)
        if kind == "linear"
        else QuantizedConv2d.from_float(nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=2, groups=2), 2)
    )
    x, quantizer = torch.randn(3, 4, 7, 6, dtype=torch.float64), LSQActivationQuantizer(2, signed=True)
    pair = nn.ModuleList([quantizer, layer]).double()
    for module in (quantizer, layer.weight_quantizer):
        module.begin_calibration()
    layer(quantizer(x))
    for module in (quantizer, layer.weight_quantizer):
        module.mode = "quantize"
    assert len(list(pair.parameters())) == 4
    return quantizer, layer, x


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("trained", [*({part} for part in PARTS), *({*PARTS} - {part} for part in PARTS)])
def test_what_is_frozen_has_no_gradient_and_the_rest_has_its_own(kind: str, trained: set[str], codes: bool) -> None:
    quantizer, layer, x = quantized_pair(kind)
    tensors = [x, quantizer.step, layer.weight, layer.weight_quantizer.step, layer.bias]
    for name, tensor in zip(PARTS, tensors, strict=True):
        tensor.requires_grad_(name in trained)
    found = []
    for plain in (True, False):
        for tensor in tensors:
            tensor.grad = None
        if plain:
            y = layer(quantizer(x))
        else:
            y = apply_with_codes(layer, with_codes(quantizer, x) if codes else without_codes(quantizer(x)))
        upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
        y.backward(upstream)
        found.append([y.detach(), *(tensor.grad for tensor in tensors)])
    assert {name for name, grad in zip(PARTS, found[0][1:], strict=True) if grad is not None} == trained
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_codes_outlive_a_change_of_the_step() -> None:
    """Backward may run after an optimizer changed the parameters: a step that is kept is no part of them."""
    quantizer, layer, x = quantized_pair("conv")
    kept, weight = with_codes(quantizer, x), weight_with_codes(layer)
    for module in (quantizer, layer.weight_quantizer):
        module.step.data.mul_(2)
    for one in (kept, weight):
        assert torch.equal(one.code * one.step, one.values)


class Own(QuantizedConv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), True),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), False),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(4, 4, 3, padding="same"), False),
        (nn.ConvTranspose2d(4, 4, 3), False),
        (nn.Linear(4, 4), True),
    ],
)
def test_layers_that_codes_are_kept_of(layer: nn.Module, taken: bool) -> None:
    kinds = {nn.Conv2d: QuantizedConv2d, nn.ConvTranspose2d: QuantizedConvTranspose2d, nn.Linear: QuantizedLinear}
    assert not takes_codes(layer)
    quantized = kinds[type(layer)].from_float(layer, 2)
    assert takes_codes(quantized) == taken
    quantized.register_forward_hook(lambda layer, inputs, output: None)
    assert not takes_codes(quantized)


def test_a_layer_with_arithmetic_or_an_input_quantizer_of_its_own_is_called() -> None:
    assert not takes_codes(Own.from_float(nn.Conv2d(4, 4, 3), 2))
    layer = QuantizedLinear.from_float(nn.Linear(4, 4), 2)
    layer.input_quantizer = LSQActivationQuantizer(2)
    assert not takes_codes(layer)
