import copy

import pytest
import torch
from torch import nn

import brfx
from brfx.nn import AlignedAdd, ResidualAdd, StreamAdd


@pytest.mark.parametrize("bits", [pytest.param(1, marks=pytest.mark.slow), 2, 3, 4])
def test_snap_is_the_nearest_odd_fraction_that_fits(bits):
    high = 2**bits - 1
    add = AlignedAdd(high, high)
    for ratio in torch.linspace(0.4, 2.5, 97):
        m, n = add.snap(ratio)
        fits = [
            (a / b, a, b)
            for b in range(1, 256, 2)
            for a in range(1, 256)
            if high * a + (high - 0.5) * b <= 255
        ]  # fmt: skip
        best = min(abs(value - ratio) for value, _, _ in fits)
        assert n % 2 == 1 and high * m + (high - 0.5) * n <= 255
        assert abs(m / n - ratio) <= best + 1e-6


def test_at_two_bits_the_snapped_ratio_is_off_by_little_on_average():
    add = AlignedAdd(3, 3)
    ratios = torch.linspace(0.4, 2.5, 500)
    errors = torch.stack([(torch.div(*add.snap(ratio)) - ratio).abs() / ratio for ratio in ratios])
    assert errors.mean() < 0.002


def test_gradients_pass_inside_the_range_and_not_to_the_steps():
    add = AlignedAdd(3, 3)
    branch = torch.tensor([-1000.0, 0.3, 1000.0], requires_grad=True)
    shortcut = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    steps = [torch.tensor(1.0, requires_grad=True) for _ in range(2)]
    add(branch, shortcut, *steps).sum().backward()
    assert branch.grad.tolist() == [0, 1, 0]
    torch.testing.assert_close(shortcut.grad, torch.ones(3))
    assert steps[0].grad is None and steps[1].grad is None


def test_a_projection_is_rounded_on_both_sides():
    add = AlignedAdd(3, None)
    a, b = torch.randn(2, 100)
    total = add(a, b, torch.tensor(1.0))
    expected = (a * 31).round() / 31 + (b * 31).round() / 31
    torch.testing.assert_close(total, expected)
    add.mode = "pass"
    assert torch.equal(add(a, b, torch.tensor(1.0)), a + b)


def test_more_than_four_bits_do_not_fit():
    assert AlignedAdd.fits(15, 15) and AlignedAdd.fits(15, None)
    assert not AlignedAdd.fits(31, 3) and not AlignedAdd.fits(3, 31)


def test_within_a_stream_the_branch_is_rounded_to_int8_codes_and_the_shortcut_is_let_through():
    add, step = StreamAdd(projection=False), torch.tensor(0.5)
    shortcut = torch.tensor([0.0, 3.5, 127.5, 10.0, 0.0])
    branch = torch.tensor([0.3, -0.8, 1000.0, -1000.0, 63.4])
    assert add(branch, shortcut, step).tolist() == [0.5, 2.5, 127.5 + 63.5, 10 - 64.0, 63.5]
    add.mode = "pass"
    assert torch.equal(add(branch, shortcut, step), branch + shortcut)


def test_a_projection_of_a_stream_is_rounded_too():
    add, step = StreamAdd(projection=True), torch.tensor(0.25)
    a, b = torch.randn(2, 100)
    torch.testing.assert_close(add(a, b, step), ((a / step).round() + (b / step).round()) * step)


@pytest.mark.parametrize("projection", [False, True])
def test_the_step_of_a_stream_learns_from_its_adds_as_lsq_does(projection):
    torch.manual_seed(0)
    branch, upstream = 40 * torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    shortcut = torch.randint(0, 255, branch.shape).double() * 0.2
    step = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    add = StreamAdd(projection=projection)
    (add(branch.requires_grad_(), shortcut, step) * upstream).sum().backward()

    def reference(values, s):
        ratio = (values / s).clamp(-128, 127)
        return (ratio + (ratio.round() - ratio).detach()) * s

    s, values = step.detach().clone().requires_grad_(), branch.detach().clone().requires_grad_()
    total = reference(values, s) + (reference(shortcut, s) if projection else shortcut)
    (total * upstream).sum().backward()
    torch.testing.assert_close(branch.grad, values.grad)
    torch.testing.assert_close(step.grad, s.grad / (255 * 100) ** 0.5)
    assert (branch.grad == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_model_in_half_precision_stays_in_it(dtype, bits):
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.relu = nn.ReLU()

        def forward(self, x):
            x = self.relu(self.first(x))
            x = self.relu(self.conv(x) + x)
            return self.relu(self.last(x) + x)

    model = Residual()
    x = torch.randn(4, 3, 8, 8)
    for stream_bits in (bits, 8):
        config = brfx.QATConfig(weight_bits=bits, act_bits=bits, stream_bits=stream_bits)
        outputs = []
        for kind in (torch.float32, dtype):
            qmodel = brfx.prepare_qat(copy.deepcopy(model).to(kind), config, x.to(kind))
            assert any(isinstance(module, ResidualAdd) for module in qmodel.modules())
            brfx.calibrate(qmodel, [x.to(kind)])
            outputs.append(qmodel(x.to(kind)))
            outputs[-1].sum().backward()
        full, half = outputs
        assert half.dtype == dtype
        assert (half.float() - full).norm() < 0.25 * full.norm()
