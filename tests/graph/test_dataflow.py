from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.graph.dataflow import analyse
from brfx.graph.trace import trace
from brfx.nn import LSQActivationQuantizer


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.q, self.other = LSQActivationQuantizer(2), LSQActivationQuantizer(2, signed=True)
        self.silu, self.pool, self.average = nn.SiLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.bicubic, self.threshold = nn.Upsample(scale_factor=2, mode="bicubic"), nn.Threshold(0.1, 0.0)
        self.elu, self.elu2 = nn.ELU(), nn.ELU(2.0)
        self.softplus, self.softplus2 = nn.Softplus(), nn.Softplus(beta=-1.0)
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
    "bicubic module": (lambda m, x: m.bicubic(m.q(x)), False, True),
    "threshold module": (lambda m, x: m.threshold(x), False, False),
    "softplus module": (lambda m, x: m.softplus(x), False, False),
    "softplus module, negative beta": (lambda m, x: m.softplus2(x), False, True),
    "elu module": (lambda m, x: 1 + m.elu(x), False, False),
    "larger elu module": (lambda m, x: 1 + m.elu2(x), False, True),
    "image": (lambda m, x: (x - 0.5) / 0.2, False, True),
}


def relus(m, x):
    return torch.relu(x), m.silu(x).relu()


#: (function of two values that are never negative and one that may be, may be negative)
SIGNS = {
    "add": (lambda p, q, x: torch.add(p, q), False),
    "add, alpha": (lambda p, q, x: torch.add(p, q, alpha=-1), True),
    "add, positive alpha": (lambda p, q, x: torch.add(p, q, alpha=2), False),
    "add, method and alpha": (lambda p, q, x: p.add(q, alpha=-2), True),
    "add, keyword": (lambda p, q, x: torch.add(p, other=-0.5), True),
    "add, keywords": (lambda p, q, x: torch.add(input=p, other=q), False),
    "add, other signed": (lambda p, q, x: torch.add(p, other=x), True),
    "add_, alpha": (lambda p, q, x: p.add_(q, alpha=-1), True),
    "subtract": (lambda p, q, x: p - q, True),
    "sub, a negative number": (lambda p, q, x: torch.sub(p, -1), False),
    "sub, a negative alpha": (lambda p, q, x: torch.sub(p, q, alpha=-1), False),
    "sub, two negatives": (lambda p, q, x: torch.sub(p, -1, alpha=-1), True),
    "sub of signed, a negative alpha": (lambda p, q, x: p.sub(x, alpha=-1), True),
    "masked_fill": (lambda p, q, x: x.masked_fill(x < 0, 0.0), False),
    "masked_fill, wrong way": (lambda p, q, x: x.masked_fill(x > 0, 0.0), True),
    "masked_fill, negative": (lambda p, q, x: p.masked_fill(p < 0.1, value=-1.0), True),
    "softplus": (lambda p, q, x: F.softplus(x, 2.0), False),
    "softplus, negative beta": (lambda p, q, x: F.softplus(x, beta=-1.0), True),
    "log1p": (lambda p, q, x: torch.log1p(p), False),
    "expm1": (lambda p, q, x: torch.expm1(p).cumsum(1).floor(), False),
    "tanh of relu": (lambda p, q, x: p.tanh().erf(), False),
    "log1p, signed": (lambda p, q, x: torch.log1p(x), True),
    "a mask as numbers": (lambda p, q, x: (x > 0).float(), False),
    "signed as numbers": (lambda p, q, x: x.float(), True),
    "topk": (lambda p, q, x: p.topk(2, -1)[0], False),
    "normalized": (lambda p, q, x: F.normalize(p, dim=1), False),
    "hypot": (lambda p, q, x: torch.hypot(x, x), False),
    "norm": (lambda p, q, x: torch.linalg.vector_norm(x, dim=1), False),
    "rsub": (lambda p, q, x: torch.rsub(p, 1), True),
    "mul, keyword": (lambda p, q, x: torch.mul(p, other=-2), True),
    "mul, two": (lambda p, q, x: torch.mul(input=p, other=q), False),
    "div, keyword": (lambda p, q, x: torch.div(p, other=-0.5, rounding_mode=None), True),
    "div, rounded": (lambda p, q, x: torch.div(p, 0.5, rounding_mode="floor"), False),
    "div, rounded and negative": (lambda p, q, x: torch.div(p, -0.5, rounding_mode="floor"), True),
    "bicubic": (lambda p, q, x: F.interpolate(p, scale_factor=2, mode="bicubic"), True),
    "bicubic by position": (lambda p, q, x: F.interpolate(p, None, 2, "bicubic"), True),
    "bilinear": (lambda p, q, x: F.interpolate(input=p, scale_factor=2, mode="bilinear"), False),
    "lerp": (lambda p, q, x: torch.lerp(p, q, 0.5), False),
    "lerp beyond": (lambda p, q, x: torch.lerp(p, q, weight=1.5), True),
    "lerp by a tensor": (lambda p, q, x: torch.lerp(p, q, q), True),
    "addcmul": (lambda p, q, x: torch.addcmul(p, q, q), False),
    "addcmul, value": (lambda p, q, x: torch.addcmul(p, q, q, value=-1), True),
    "addcdiv": (lambda p, q, x: torch.addcdiv(p, tensor1=x, tensor2=q), True),
    "pad": (lambda p, q, x: F.pad(p, (1, 1), value=-1.0), True),
    "pad by position": (lambda p, q, x: F.pad(p, (1, 1), "constant", -1.0), True),
    "mean of the last": (lambda p, q, x: p.mean(-1), False),
    "sum of the last": (lambda p, q, x: torch.sum(dim=-1, input=p), False),
    "max of the last": (lambda p, q, x: torch.amax(p, -1), False),
    "gather": (lambda p, q, x: torch.gather(index=q.long(), dim=1, input=x), True),
    "maximum of one": (lambda p, q, x: torch.maximum(x, p), False),
    "maximum of none": (lambda p, q, x: torch.maximum(x, x.tanh()), True),
    "maximum with zeros": (lambda p, q, x: torch.maximum(x, torch.zeros_like(x)), False),
    "maximum with a constant": (lambda p, q, x: torch.maximum(x, torch.zeros(1)), False),
    "maximum with less": (lambda p, q, x: torch.maximum(x, -torch.ones(1)), True),
    "max of two": (lambda p, q, x: torch.max(x, p), False),
    "minimum": (lambda p, q, x: torch.minimum(p, q), False),
    "minimum with signed": (lambda p, q, x: torch.minimum(p, x), True),
    "masked": (lambda p, q, x: x * (x > 0), False),
    "masked, converted": (lambda p, q, x: (x >= 0).float() * x, False),
    "masked below": (lambda p, q, x: x * (x < 0), True),
    "masked by another": (lambda p, q, x: x * (p > 0), True),
    "masked above less": (lambda p, q, x: x * (x > -1), True),
    "square": (lambda p, q, x: x**2, False),
    "product with itself": (lambda p, q, x: x * x, False),
    "cube": (lambda p, q, x: x**3, True),
    "cube of relu": (lambda p, q, x: torch.pow(p, exponent=3), False),
    "root": (lambda p, q, x: x.sqrt(), False),
    "where": (lambda p, q, x: torch.where(x > 0, x, 0), False),
    "where below": (lambda p, q, x: torch.where(x < 0, 0.0, x), False),
    "where, method": (lambda p, q, x: x.where(x > 0, p), False),
    "where, signed": (lambda p, q, x: torch.where(p > 0, p, x), True),
    "where, wrong way": (lambda p, q, x: torch.where(x > 0, 0.0, x), True),
    "where, negative": (lambda p, q, x: torch.where(x > 0, x, -1.0), True),
    "threshold": (lambda p, q, x: F.threshold(x, 0.1, 0.0), False),
    "threshold below": (lambda p, q, x: F.threshold(x, -0.1, 0.0), True),
    "threshold to less": (lambda p, q, x: F.threshold(x, 0.1, value=-1.0), True),
    "elu + 1": (lambda p, q, x: F.elu(x) + 1, False),
    "elu + 1, larger": (lambda p, q, x: F.elu(x, alpha=2.0) + 1, True),
    "elu + 1/2": (lambda p, q, x: F.elu(x) + 0.5, True),
    "tanh + 1": (lambda p, q, x: x.tanh() + 1, False),
    "tanh - 1": (lambda p, q, x: torch.add(x.tanh(), 1, alpha=-1), True),
    "clamp from above": (lambda p, q, x: p.clamp(max=1), False),
    "clamp to below": (lambda p, q, x: p.clamp(max=-1), True),
    "clamp crossed": (lambda p, q, x: x.clamp(min=0, max=-1), True),
    "clamp by two": (lambda p, q, x: torch.clamp(x, min=p, max=x), True),
    "clamp by a value": (lambda p, q, x: torch.clamp(x, p), False),
    "hardtanh": (lambda p, q, x: F.hardtanh(p), False),
    "hardtanh, signed": (lambda p, q, x: F.hardtanh(x), True),
    "not known": (lambda p, q, x: torch.special.airy_ai(p), True),
}


@pytest.mark.parametrize("name", SIGNS)
def test_sign_by_the_names_of_arguments(name):
    function, negative = SIGNS[name]
    gm = trace(Net(lambda m, x: function(*relus(m, x), x)))
    output = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    assert analyse(gm)[output].negative == negative
    torch.manual_seed(0)
    found = gm(torch.randn(4, 4, 4, 4))
    assert negative or not (found < 0).any()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu by tanh", "mish", "hardswish", "selu", "tanh"])
def test_an_activation_and_the_least_that_makes_it_never_negative(name):
    function = partial(F.gelu, approximate="tanh") if name == "gelu by tanh" else getattr(F, name)
    least = float(function(torch.linspace(-20, 20, 400_001, dtype=torch.float64)).min())
    for bound, negative in ((0.9999 * least, True), (1.001 * least, False)):
        gm = trace(Net(lambda m, x, bound=bound: function(x) + -bound))
        output = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        assert analyse(gm)[output].negative == negative


def test_integers_are_on_no_grid():
    gm = trace(Net(lambda m, x: (m.q(x).to(torch.int32), m.q(x).to(torch.float64))))
    whole, double = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    assert analyse(gm)[whole].grid is None and analyse(gm)[double].grid is not None


@pytest.mark.parametrize(
    "join",
    [
        lambda p, q: torch.add(p, q, alpha=-1),
        lambda p, q: torch.add(p, other=-0.5),
        lambda p, q: p.add(q, alpha=-2),
        lambda p, q: torch.div(p, other=-0.5, rounding_mode=None),
        lambda p, q: F.interpolate(p, scale_factor=2, mode="bicubic"),
    ],
)
def test_eight_bits_keep_the_signal_behind_it(join):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 3, 8))

        def forward(self, x):
            return self.c(join(self.a(x).relu(), self.b(x).relu()))

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(4, 3, 8, 8)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=8)).eval()
    brfx.calibrate(qmodel, [x], start="mse")
    with torch.no_grad():
        signal, noise = model(x), qmodel(x) - model(x)
    assert 10 * torch.log10(signal.square().sum() / noise.square().sum()) > 25


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
