import pytest
import torch
from torch import nn
from torch.nn import functional as F

from brfx.flow import analyse
from brfx.nn import LSQActivationQuantizer
from brfx.trace import trace


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.q, self.other = LSQActivationQuantizer(2), LSQActivationQuantizer(2, signed=True)
        self.silu, self.pool, self.average = nn.SiLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.dropout, self.pad = nn.Dropout(0.1), nn.ConstantPad2d(1, 0.5)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


#: (function, on a grid, may be negative)
CASES = {
    "quantizer": (lambda m, x: m.q(x), True, False),
    "signed quantizer": (lambda m, x: m.other(x), True, True),
    "max-pool, flatten": (lambda m, x: m.pool(m.q(x)).flatten(1), True, False),
    "reshape, permute": (lambda m, x: m.q(x).reshape(1, -1, 4).permute(0, 2, 1), True, False),
    "dropout": (lambda m, x: F.dropout(m.dropout(m.q(x)), 0.5, m.training), True, False),
    "chunk": (lambda m, x: m.q(x).chunk(2, 1)[0], True, False),
    "channel shuffle": (lambda m, x: m.q(x).view(1, 2, 2, 8, 8).transpose(1, 2).flatten(1, 2), True, False),
    "zero padding": (lambda m, x: F.pad(m.q(x), (1, 1)), True, False),
    "other padding": (lambda m, x: F.pad(m.q(x), (1, 1), value=0.3), False, False),
    "padding module": (lambda m, x: m.pad(m.q(x)), False, False),
    "a factor": (lambda m, x: m.q(x) * 0.125, True, False),
    "a negative factor": (lambda m, x: m.q(x) * -1, True, True),
    "a square": (lambda m, x: (lambda q: q * q)(m.q(x)), False, False),
    "a reciprocal": (lambda m, x: 1 / m.q(x), False, False),
    "cat of two factors": (lambda m, x: (lambda q: torch.cat([q, 0.5 * q], 1))(m.q(x)), False, False),
    "cat of one factor": (lambda m, x: (lambda q: torch.cat([q / 2, 0.5 * q], 1))(m.q(x)), True, False),
    "relu of a signed grid": (lambda m, x: torch.relu(m.other(x)), True, False),
    "cat of one grid": (lambda m, x: (lambda q: torch.cat([q, q], 1))(m.q(x)), True, False),
    "cat of two grids": (lambda m, x: torch.cat([m.q(x), m.other(x)], 1), False, True),
    "average": (lambda m, x: m.average(m.q(x)), False, False),
    "sum": (lambda m, x: m.q(x) + m.q(x).flatten(1).mean(), False, False),
    "silu": (lambda m, x: m.silu(x), False, True),
    "sigmoid gate": (lambda m, x: m.q(x) * torch.sigmoid(x), False, False),
    "softmax": (lambda m, x: x.softmax(-1), False, False),
    "clamp": (lambda m, x: x.clamp(min=0), False, False),
    "clamp below": (lambda m, x: x.clamp(-1, 1), False, True),
    "nearest": (lambda m, x: F.interpolate(m.q(x), scale_factor=2), True, False),
    "bilinear": (lambda m, x: F.interpolate(m.q(x), scale_factor=2, mode="bilinear"), False, False),
    "image": (lambda m, x: (x - 0.5) / 0.2, False, True),
}


@pytest.mark.parametrize("name", CASES)
def test_grid_and_sign(name):
    function, on_grid, negative = CASES[name]
    gm = trace(Net(function))
    output = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    flow = analyse(gm)[output]
    assert (flow.grid is not None) == on_grid
    assert flow.negative == negative


def test_what_comes_from_the_input_alone_is_known():
    gm = trace(Net(lambda m, x: (m.silu((x - 0.5) / 0.2), torch.stack([x[:, 0], x[:, 1]]))))
    silu, stacked = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    flows = analyse(gm)
    assert flows[stacked].from_input and not flows[silu].from_input


def test_constant_factors_multiply():
    gm = trace(Net(lambda m, x: torch.relu(0.5 * m.q(x).flatten(1)) / -4))
    output = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    assert analyse(gm)[output].factor == -0.125
