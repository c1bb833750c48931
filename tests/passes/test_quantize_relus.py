import pytest
import torch
from torch import nn

import brfx
from brfx.config import QATConfig
from brfx.passes import QuantizeReLUs

from .helpers import assert_rewrites


def test_relu_and_relu6_become_quantized_clipped_relus():
    gm = assert_rewrites(
        nn.Sequential(nn.ReLU(), nn.ReLU6()),
        QuantizeReLUs(QATConfig(act_bits=2)),
        "input_1 = input\n_0 = ReLU(input_1)\n_1 = ReLU6(_0)\nreturn _1",
        "input_1 = input\n_0 = QuantizedClippedReLU(input_1)\n_1 = QuantizedClippedReLU(_0)\nreturn _1",
        sites=2,
    )
    assert [module.clip_value for module in gm.children()] == [None, 6.0]


@pytest.mark.parametrize(("clip", "ceilings"), [(4.0, [4.0, 4.0]), (8.0, [8.0, 6.0]), (None, [None, 6.0])])
def test_the_lower_ceiling_holds(clip, ceilings):
    from brfx.graph.trace import trace

    gm = trace(nn.Sequential(nn.ReLU(), nn.ReLU6()))
    QuantizeReLUs(QATConfig(clip_value=clip))(gm)
    assert [module.clip_value for module in gm.children()] == ceilings


def test_32_bits_and_other_activations_are_declined():
    text = "input_1 = input\n_0 = ReLU(input_1)\nreturn _0"
    assert_rewrites(nn.Sequential(nn.ReLU()), QuantizeReLUs(QATConfig(weight_bits=2, act_bits=32)), text, text, sites=0)
    text = "input_1 = input\n_0 = LeakyReLU(input_1)\nreturn _0"
    assert_rewrites(nn.Sequential(nn.LeakyReLU()), QuantizeReLUs(QATConfig()), text, text, sites=0)


def test_hooks_of_a_relu_run_in_its_place():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval(), torch.randn(2, 3, 4, 4)
    model[1].register_forward_hook(lambda relu, inputs, output: 3 * output)
    qmodel = brfx.prepare_qat(model).eval()
    with brfx.quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
