import pytest
import torch
from torch import nn

import brfx
from brfx.config import QATConfig
from brfx.graph.trace import trace
from brfx.graph.utils import dump
from brfx.nn import AlignedAdd, LSQActivationQuantizer, StreamAdd
from brfx.passes import AlignResiduals, QuantizeLayers, QuantizeReLUs, ReLUToModule, WidenStreams
from brfx.quant.lsq import GRAD_MARGIN_OF_SUMS


class Block(nn.Module):
    def __init__(self, project=False, relu=True, again=False):
        super().__init__()
        self.again = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if again else None
        self.first, self.conv, self.bn = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.project = nn.Conv2d(4, 4, 1) if project else nn.Identity()
        self.last = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        x = self.first(x)
        x = self.last(self.bn(self.conv(x)) + self.project(x))
        return x if self.again is None else torch.relu(self.again(x) + x)


def rewritten(config=None, **kind):
    config = config or QATConfig(bits=2)
    gm = trace(Block(**kind))
    QuantizeLayers(config)(gm)
    QuantizeReLUs(config)(gm)
    sites = AlignResiduals(config)(gm)
    assert AlignResiduals(config)(gm) == 0
    gm.recompile()
    return gm, sites


def test_a_shortcut_on_a_grid_is_aligned():
    gm, sites = rewritten()
    assert sites == 1
    assert dump(gm).splitlines()[-5:-1] == [
        "last_step = last.step()",
        "first_step = first.step()",
        "add_1 = AlignedAdd(bn, project, last_step, first_step)",
        "last = QuantizedClippedReLU(add_1)",
    ]


def test_a_projection_is_aligned_with_the_branch():
    gm, sites = rewritten(project=True)
    assert sites == 1
    (aligned,) = (module for module in gm.modules() if isinstance(module, AlignedAdd))
    assert aligned.high_in is None and aligned.unit == 31


@pytest.mark.parametrize("project", [False, True])
def test_an_add_within_a_stream_is_an_add_of_its_codes(project):
    config, gm = QATConfig(bits=2), trace(Block(project=project, again=True))
    for rewrite in (ReLUToModule(), QuantizeLayers(config), QuantizeReLUs(config), WidenStreams(config)):
        rewrite(gm)
    assert AlignResiduals(config)(gm) == 2 and AlignResiduals(config)(gm) == 0
    adds = [module for module in gm.modules() if isinstance(module, StreamAdd)]
    assert [add.projection for add in adds] == [project, False]
    assert len({str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}) == 1


def test_without_a_relu_behind_or_above_4_bits_each_branch_has_an_8_bit_quantizer():
    for config, kind in ((QATConfig(bits=2), {"relu": False}), (QATConfig(bits=8), {})):
        gm, sites = rewritten(config, **kind)
        assert sites == 1
        branches = [m for n, m in gm.named_modules() if isinstance(m, LSQActivationQuantizer) and n.endswith("_branch")]
        assert [(branch.bits, branch.signed, branch.regularized) for branch in branches] == [(8, True, False)]


def test_declines_constants_32_bits_and_sums_of_sums():
    for config in (QATConfig(residual_bits=32), QATConfig(act_bits=32), QATConfig(placement="paper")):
        assert rewritten(config)[1] == 0

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.positions = nn.Conv2d(4, 4, 1), nn.Parameter(torch.zeros(1, 4, 1, 1))

        def forward(self, x):
            return self.conv(x) + self.positions

    assert AlignResiduals(QATConfig())(trace(Positions())) == 0


class TwoAdds(nn.Module):
    """A value that two adds read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        v = self.a(x)
        return self.b(v + self.b(v)) + (v + self.c(v))


def test_a_branch_that_two_adds_read_is_quantized_once():
    config = QATConfig(bits=2)
    gm = trace(TwoAdds())
    QuantizeLayers(config)(gm)
    assert AlignResiduals(config)(gm) == 3 and AlignResiduals(config)(gm) == 0
    a = next(node for node in gm.graph.nodes if str(node.target) == "a")
    (user,) = a.users
    assert isinstance(gm.get_submodule(str(user.target)), LSQActivationQuantizer)


def test_rounding_the_branch_moves_no_final_code():
    """The codes behind the add are those of the unrounded branch and the snapped shortcut."""
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Block().eval(), QATConfig(bits=2, stream_bits=2))
    x = torch.randn(16, 4, 16, 16)
    brfx.calibrate(qmodel, [x])
    (aligned,) = (module for module in qmodel.modules() if isinstance(module, AlignedAdd))
    step_out, step_in = qmodel.last.step.detach(), qmodel.first.step.detach()
    m, n = aligned.snap(step_in / step_out)
    k = (qmodel.first(x) / step_in).round().detach()
    branch = qmodel.bn(qmodel.conv(k * step_in)).detach()
    expected = (branch.double() / step_out + k.double() * (m / n).double()).round().clamp(0, 3)
    assert qmodel.last.grad_margin == GRAD_MARGIN_OF_SUMS and qmodel.first.grad_margin == 0
    assert n % 2 == 1 and abs(m / n - step_in / step_out) < 0.05 * step_in / step_out
    found = (qmodel(x) / step_out).round()
    assert (found != expected).double().mean() < 1e-4  # float32 on a boundary


class Variant(nn.Module):
    """``how(self, x)`` of an ``x`` on a grid."""

    def __init__(self, how):
        super().__init__()
        self.first, self.conv, self.last = nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()
        self.drop, self.how = nn.Dropout(), how
        self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))

    def forward(self, x):
        return self.how(self, self.first(x))


def same_twice(m, x):
    y = m.conv(x)
    return m.last(y + y)


def two_readers(m, x):
    y = m.conv(x) + x
    return m.last(y), y


VARIANTS = {  # what is in the graph: an add in integers, a quantizer of the branch or neither
    "plain": (lambda m, x: m.last(m.conv(x) + x), "add"),
    "the other way round": (lambda m, x: m.last(x + m.conv(x)), "add"),
    "in place": (lambda m, x: m.last(m.conv(x).add_(x)), "add"),
    "scaled": (lambda m, x: m.last(m.conv(x) * m.scale + x), "add"),
    "dropped out": (lambda m, x: m.last(m.drop(m.conv(x)) + x), "add"),
    "a shortcut that is scaled": (lambda m, x: m.last(m.conv(x) + x * m.scale), "branch"),
    "a shortcut that is dropped out": (lambda m, x: m.last(m.conv(x) + m.drop(x)), "branch"),
    "a factor of torch.add": (lambda m, x: m.last(torch.add(m.conv(x), x, alpha=2)), ""),
    "itself": (same_twice, ""),
    "two readers": (two_readers, "branch"),
    "no relu": (lambda m, x: (m.conv(x) + x) * 2, "branch"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_an_add_is_made_of(name):
    how, expected = VARIANTS[name]
    torch.manual_seed(0)
    model, x = Variant(how), torch.randn(4, 4, 6, 6)
    gm = trace(model)
    config = QATConfig(bits=2)
    QuantizeLayers(config)(gm), QuantizeReLUs(config)(gm)
    assert AlignResiduals(config)(gm) == bool(expected)
    aligned = any(isinstance(module, AlignedAdd) for module in gm.modules())
    branch = [n for n, m in gm.named_modules() if isinstance(m, LSQActivationQuantizer) and n.endswith("_branch")]
    assert (aligned, len(branch)) == (expected == "add", expected == "branch")
    qmodel = brfx.prepare_qat(model, QATConfig(bits=8), x).eval()
    output = model.eval()(x)
    with brfx.quantization_disabled(qmodel):
        assert torch.equal(*(torch.cat(y) if isinstance(y, tuple) else y for y in (qmodel(x), output)))
    brfx.calibrate(qmodel, [x])
    found, output = (torch.cat(y) if isinstance(y, tuple) else y for y in (qmodel(x), output))
    assert 10 * torch.log10(output.square().sum() / (found - output).square().sum()) > 25


def test_a_shortcut_on_a_signed_grid_is_not_aligned():
    model = Variant(VARIANTS["plain"][0])
    model.first = LSQActivationQuantizer(2, signed=True)
    gm = trace(model)
    QuantizeLayers(QATConfig(bits=2))(gm), QuantizeReLUs(QATConfig(bits=2))(gm)
    assert AlignResiduals(QATConfig(bits=2))(gm) == 1
    assert not any(isinstance(module, AlignedAdd) for module in gm.modules())
