import torch
from torch import nn
from torch.nn import functional as F

from brfx.config import QATConfig
from brfx.graph.source_rewrite import QuantizedFunction
from brfx.graph.trace import trace
from brfx.nn import QuantizedAttention
from brfx.passes import QuantizeFunctions

from .helpers import assert_rewrites

CONFIG = QATConfig(bits=2)


def by_shape(x, w):
    return F.linear(x, w) if x.shape[0] > 1 else x


torch.fx.wrap("by_shape")


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def test_a_weight_is_quantized_on_its_way_into_a_function():
    gm = assert_rewrites(
        Net(lambda x, w: F.linear(x, w)),
        QuantizeFunctions(CONFIG),
        "x = input\nweight = weight()\nlinear = linear(x, weight)\nreturn linear",
        "x = input\nweight = weight()\nlinear_weight = LSQWeightQuantizer(weight)\n"
        "linear = linear(x, linear_weight)\nreturn linear",
        sites=1,
    )
    assert gm.linear_weight.bits == 2


def test_a_parameter_in_a_product_is_a_weight_through_a_transpose():
    gm = trace(Net(lambda x, w: x @ w.t()))
    assert QuantizeFunctions(CONFIG)(gm) == 1


def test_attention_and_opaque_functions_become_modules():
    gm = trace(Net(lambda x, w: F.scaled_dot_product_attention(x, x, x)))
    assert QuantizeFunctions(CONFIG)(gm) == 1
    assert any(isinstance(module, QuantizedAttention) for module in gm.modules())
    gm = trace(Net(lambda x, w: by_shape(x, w)))
    assert QuantizeFunctions(CONFIG)(gm) == 1
    assert any(isinstance(module, QuantizedFunction) for module in gm.modules())


def test_other_functions_and_fp32_are_declined():
    assert QuantizeFunctions(CONFIG)(trace(Net(lambda x, w: F.relu(x) + 1))) == 0
    assert QuantizeFunctions(QATConfig(weight_bits=32, act_bits=2))(trace(Net(lambda x, w: F.linear(x, w)))) == 0


def test_per_channel_steps_where_the_shape_is_known():
    gm = trace(Net(lambda x, w: F.linear(x, w) + F.linear(x, w.t())))
    assert QuantizeFunctions(QATConfig(bits=2, per_channel=True))(gm) == 2
    assert sorted(tuple(module.step.shape) for module in gm.modules() if hasattr(module, "step")) == [(), (4, 1)]
