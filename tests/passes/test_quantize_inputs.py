import torch
from torch import nn

from brfx.config import QATConfig
from brfx.graph.dataflow import analyse
from brfx.graph.trace import trace
from brfx.passes import QuantizeInputs, QuantizeLayers, QuantizeReLUs
from brfx.prepare import apply

from .helpers import assert_rewrites

CONFIG = QATConfig(bits=2)


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.act, self.project = nn.Conv2d(3, 6, 1), nn.SiLU(), nn.Conv2d(6, 3, 1)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.project(self.act(self.expand(x)))
        return self.a(x), self.b(x)


def test_each_operand_gets_a_quantizer_and_two_layers_of_one_value_share_it():
    gm = assert_rewrites(
        Bottleneck(),
        QuantizeInputs(CONFIG),
        """
        x = input
        expand = Conv2d(x)
        act = SiLU(expand)
        project = Conv2d(act)
        a = Conv2d(project)
        b = Conv2d(project)
        return a, b
        """,
        """
        x = input
        expand_input = LSQActivationQuantizer(x)
        expand = Conv2d(expand_input)
        act = SiLU(expand)
        project_input = LSQActivationQuantizer(act)
        project = Conv2d(project_input)
        a_input = LSQActivationQuantizer(project)
        a = Conv2d(a_input)
        b = Conv2d(a_input)
        return a, b
        """,
        sites=3,
    )
    assert (gm.expand_input.bits, gm.project_input.bits, gm.a_input.bits) == (8, 2, 2)
    assert gm.project_input.signed and gm.a_input.signed
    assert (gm.expand_input.regularized, gm.project_input.regularized) == (False, True)
    assert gm.project_input.reason == "silu may be negative"


def test_what_is_on_a_grid_is_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.pool, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(16, 2)

        def forward(self, x):
            return self.fc(self.pool(self.relu(x)).flatten(1))

    gm = trace(Net())
    assert QuantizeReLUs(CONFIG)(gm) == 1
    assert QuantizeInputs(CONFIG)(gm) == 0


def test_matrix_products_have_two_operands_and_softmax_is_unsigned():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return (q * 0.5 @ k.transpose(-2, -1)).softmax(-1).matmul(v)

    gm = trace(Attention())
    assert QuantizeInputs(QATConfig(bits=2, input_bits=4))(gm) == 4
    apply(gm, [])
    flows = analyse(gm)
    signs = [flows[node].negative for node in gm.graph.nodes if flows[node].grid is node]
    assert sorted(signs) == [False, True, True, True]


def test_skipped_and_32_bit_layers_are_left():
    for config in (QATConfig(act_bits=32), QATConfig(skip=("*",))):
        gm = trace(Bottleneck())
        assert QuantizeInputs(config)(gm) == 0


def test_concatenated_relus_are_quantized_as_one():
    class Fire(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
            self.ra, self.rb = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.head(torch.cat([self.ra(self.a(x)), self.rb(self.b(x))], 1))

    gm = trace(Fire())
    for rewrite, sites in ((QuantizeLayers(CONFIG), 3), (QuantizeReLUs(CONFIG), 0), (QuantizeInputs(CONFIG), 2)):
        assert rewrite(gm) == sites
    assert not gm.head_input.signed and gm.head_input.bits == 2
    assert QuantizeReLUs(QATConfig(placement="paper"))(trace(Fire())) == 2


def test_the_image_and_averages_have_no_fewer_bits_than_the_layer_and_are_not_regularized():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.pool = nn.Conv2d(3, 4, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
            self.middle, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.pool(self.middle(self.act(self.conv(x)))).flatten(1))

    for bits, image, average, expected in ((8, 4, 4, (8, 8, 8)), (8, 8, 8, (8, 8, 8)), (2, 4, 3, (4, 2, 3))):
        gm = trace(Head())
        config = QATConfig(bits=bits, input_bits=image, residual_bits=average)
        QuantizeLayers(config)(gm)
        assert QuantizeInputs(config)(gm) == 3
        assert (gm.conv_input.bits, gm.middle_input.bits, gm.fc_input.bits) == expected
        assert [q.regularized for q in (gm.conv_input, gm.middle_input, gm.fc_input)] == [False, True, False]
