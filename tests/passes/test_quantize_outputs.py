import torch
from torch import nn

from brfx.config import QATConfig
from brfx.graph.trace import trace
from brfx.passes import AlignResiduals, QuantizeInputs, QuantizeLayers, QuantizeOutputs, QuantizeReLUs
from brfx.prepare import apply

CONFIG = QATConfig(bits=2)


def rewritten(model, config=CONFIG):
    """The graph after the pass, and how many sites it changed."""
    gm = trace(model)
    apply(gm, [each(config) for each in (QuantizeLayers, QuantizeReLUs, QuantizeInputs, AlignResiduals)])
    sites = QuantizeOutputs(config)(gm)
    apply(gm, [])
    assert QuantizeOutputs(config)(gm) == 0
    return gm, sites


class Swish(nn.Module):
    """A convolution into a SiLU, and one that is the output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.act(self.bn(self.conv(x))))


def test_what_no_quantizer_takes_gets_one_of_8_bits_behind_the_batch_norm():
    gm, sites = rewritten(Swish())
    assert sites == 2
    assert [(node.name, str(node.args[0])) for node in gm.graph.nodes if node.name.endswith("_output")] == [
        ("conv_output", "bn"),
        ("last_output", "last"),
    ]
    assert (gm.conv_output.bits, gm.conv_output.signed, gm.conv_output.regularized) == (8, True, False)
    assert gm.conv_output.reason == "a convolution into silu"


class Fork(nn.Module):
    """A stream that a ReLU begins and two convolutions read, as a list of features or a linear bottleneck does."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.a, self.b, self.pool = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)

    def forward(self, x):
        x = self.relu(self.conv(x))
        both = torch.cat([x, self.pool(x).repeat(1, 1, 2, 2)], 1)
        return (self.a(both) + self.b(x)).mean((2, 3))


def test_a_value_of_several_readers_has_one_grid_for_all():
    config = QATConfig(bits=2, overrides=(("relu", {"act_bits": 32}),))
    gm, _ = rewritten(Fork(), config)
    assert not gm.conv_output.signed and gm.conv_output.bits == 8
    assert str(next(iter(node for node in gm.graph.nodes if node.name == "conv_output")).args[0]) == "relu"
    assert {user.name for node in gm.graph.nodes if node.name == "relu" for user in node.users} == {"conv_output"}


class Fire(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.last(self.pool(x)).relu()


def test_a_quantizer_behind_a_concatenation_and_max_pooling_is_enough():
    gm, sites = rewritten(Fire())
    names = {name for name, _ in gm.named_modules() if name.endswith("_output")}
    assert names == {"last_output"} and sites == 1  # a ReLU in a method's form is no module yet


def test_declines_32_bits_and_what_is_on_no_grid():
    assert rewritten(Swish(), QATConfig(bits=2, residual_bits=32))[1] == 0
    assert rewritten(Swish(), QATConfig(bits=2, act_bits=32))[1] == 0


def test_a_transposed_convolution_has_no_integer_form_and_is_left():
    assert rewritten(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)))[1] == 0


def test_a_batch_norm_behind_the_relu_is_no_part_of_the_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1))
    gm, _ = rewritten(model, QATConfig(bits=2, overrides=(("1", {"act_bits": 32}),)))
    before = next(node for node in gm.graph.nodes if node.name == "_0_output").args[0]
    assert isinstance(gm.get_submodule(str(before.target)), nn.ReLU)


def test_what_only_a_string_or_a_reflection_pads_is_left():
    for padding in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        assert rewritten(nn.Sequential(nn.Conv2d(3, 4, 3, **padding), nn.SiLU()))[1] == 0
