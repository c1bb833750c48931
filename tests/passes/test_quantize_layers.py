import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from brfx import audit, calibrate, prepare_qat, quantization_disabled
from brfx.config import QATConfig
from brfx.graph.trace import is_plain_layer, trace
from brfx.nn import QUANTIZED_LAYERS, LSQWeightQuantizer, QuantizedLayer
from brfx.passes import QuantizeLayers
from brfx.passes.quantize_layers import quantized_layer

from .helpers import assert_rewrites


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_first_and_last_layer_are_swapped():
    gm = assert_rewrites(
        Net(),
        QuantizeLayers(QATConfig(bits=2)),
        "x = input\nconv = Conv2d(x)\nmean = mean(conv)\nfc = Linear(mean)\nreturn fc",
        "x = input\nconv = QuantizedConv2d(x)\nmean = mean(conv)\nfc = QuantizedLinear(mean)\nreturn fc",
        sites=2,
    )
    assert gm.conv.weight_quantizer.bits == 2
    assert set(Net().state_dict()) <= set(gm.state_dict())


def test_a_layer_with_a_forward_of_its_own_is_declined():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Scaled(3, 3, 1)

        def forward(self, x):
            return self.conv(x)

    gm = trace(Odd())
    before = [type(m) for m in gm.modules()]
    assert QuantizeLayers(QATConfig(bits=2))(gm) == 0
    assert [type(m) for m in gm.modules()] == before


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Doubled(nn.Conv2d):
    def __call__(self, input):
        return super().__call__(input) * 2


def halved():
    layer = nn.Conv2d(3, 3, 1)
    layer.forward = lambda x: nn.Conv2d.forward(layer, x) / 2
    return layer


@pytest.mark.parametrize("layer", [Standardized(3, 3, 1), Doubled(3, 3, 1), halved(), nn.Conv2d(3, 3, 1)])
def test_what_changes_the_arithmetic_of_a_layer_keeps_it_from_being_swapped(layer):
    changed = type(layer) is not nn.Conv2d or "forward" in vars(layer)
    assert (quantized_layer(layer, QATConfig(bits=2), "layer") is None) == changed
    assert is_plain_layer(layer) != changed


def test_a_layer_with_its_own_use_of_the_weight_is_quantized_there():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Standardized(3, 3, 3)).eval()
    qmodel = prepare_qat(model, QATConfig(bits=8)).eval()
    x = torch.randn(2, 3, 8, 8)
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    calibrate(qmodel, [x], start="mse")
    weights = [module for module in qmodel.modules() if isinstance(module, LSQWeightQuantizer)]
    assert len(weights) == 2 and not torch.equal(qmodel(x), model(x))
    signal = model(x)
    assert 10 * torch.log10(signal.square().sum() / (qmodel(x) - signal).square().sum()) > 25


@pytest.mark.parametrize("whole", [True, False])
def test_layers_called_by_keyword(whole):
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.up = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2)
            self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.norm(input=self.relu(input=self.conv(input=x)))
            x = self.up(input=x, output_size=[12, 12]) if whole or x.mean() < 100 else x
            return self.fc(input=nn.functional.relu(input=x).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Keywords(), torch.randn(2, 3, 8, 8)
    qmodel = prepare_qat(model)
    assert isinstance(qmodel, GraphModule) == whole
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    calibrate(qmodel, [x])
    qmodel(x).sum().backward()
    assert audit(qmodel, x).mac_share == 1.0


def test_32_bits_leave_every_layer():
    text = "x = input\nconv = Conv2d(x)\nmean = mean(conv)\nfc = Linear(mean)\nreturn fc"
    assert_rewrites(Net(), QuantizeLayers(QATConfig(weight_bits=32, act_bits=2)), text, text, sites=0)


LAYERS = [
    (nn.Conv1d(4, 6, 3, groups=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=2), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9, 9)),
    (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 9, 9)),
    (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    (nn.Linear(4, 6), (2, 7, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "")
@pytest.mark.parametrize("per_channel", [False, True])
def test_each_kind_computes_the_layer_with_its_levels_as_weights(layer: nn.Module, shape, per_channel: bool) -> None:
    kind = QUANTIZED_LAYERS[type(layer)]
    quantized = kind.from_float(layer, 2, per_channel=per_channel)
    assert isinstance(quantized, QuantizedLayer)
    assert quantized.weight is layer.weight
    quantizer = quantized.weight_quantizer
    assert isinstance(quantizer, LSQWeightQuantizer)
    quantizer.begin_calibration()
    x = torch.randn(shape)
    quantized(x)
    quantizer.mode = "pass"
    assert torch.equal(quantized(x), layer(x))
    quantizer.mode = "quantize"
    levels = quantized.quantized_weight().detach()
    steps = quantizer.step.numel()
    assert steps == (6 if per_channel else 1) or (per_channel and steps in (3, 6))  # groups of a transposed conv
    assert len((levels / quantizer.step).round().unique()) <= 4
    expected = type(layer).forward
    with torch.no_grad():
        kept = layer.weight.clone()
        layer.weight.copy_(levels)
        y = expected(layer, x)
        layer.weight.copy_(kept)
    torch.testing.assert_close(quantized(x), y)
