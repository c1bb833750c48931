import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brfx.errors import ConfigError
from brfx.quant.grid import Grid
from brfx.regularizers.bin_regularizer import BinRegularizer, bin_loss, bin_sums, deferred_bin_sums, joint_bin_sums


def published(values: Tensor, step: Tensor, codes: list[int], assign: Tensor, offset: float = 0.0) -> Tensor:
    """The formula as it is printed: a loop over bins, means and (biased) variances."""
    total = torch.zeros((), dtype=values.dtype)
    for k in codes:
        members = values[assign == k]
        if not len(members):
            continue
        total = total + (members.mean() - (k + offset) * step).square()
        if len(members) > 1:
            total = total + members.var(correction=0)
    return total


def case(bits: int, signed: bool) -> tuple[BinRegularizer, Tensor, Tensor]:
    regularizer = BinRegularizer(bits, signed)
    values = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    step = torch.tensor(2.0 / regularizer.grid.high, dtype=torch.float64)
    return regularizer, values if signed else values.relu(), step


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_loss_and_gradients_equal_the_loop_over_bins(bits: int, signed: bool) -> None:
    regularizer, values, step = case(bits, signed)
    assign = regularizer.grid.encode(values, step)
    results = []
    for loss_of in (regularizer, lambda v, s: published(v, s, list(regularizer.grid.codes), assign)):
        v, s = values.clone().requires_grad_(), step.clone().requires_grad_()
        loss = loss_of(v, s)
        loss.backward()
        results.append((loss.detach(), v.grad, s.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("by_row", [False, True])
def test_bins_of_a_symmetric_grid_are_around_its_own_levels(bits: int, by_row: bool) -> None:
    grid = Grid(bits, True, symmetric=True)
    values = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    results = []
    for fast in (True, False):
        v = values.clone().requires_grad_()
        s = torch.tensor(2.0 / grid.reach, dtype=torch.float64, requires_grad=True)
        assign, codes = grid.encode(values, s.detach()), list(grid.codes)
        if not fast:
            parts = zip(v, assign, strict=True) if by_row else [(v, assign)]
            loss = torch.stack([published(part, s, codes, code, 0.5) for part, code in parts]).sum()
        else:
            loss = bin_loss(*bin_sums(v, s, grid, by_row=by_row))
        loss.backward()
        results.append((loss.detach(), v.grad, s.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_late_sums_have_the_same_gradients_and_leave_the_loss_in_backward(bits: int, signed: bool) -> None:
    regularizer, values, step = case(bits, signed)
    v, s = values.clone().requires_grad_(), step.clone().requires_grad_()
    w, r = values.clone().requires_grad_(), step.clone().requires_grad_()
    logged = torch.zeros((), dtype=torch.float64, requires_grad=True)
    expected = regularizer(v, s)
    (0.125 * expected).backward()
    counts, squares, zero = deferred_bin_sums(w, r, regularizer.grid, logged)
    deferred = bin_loss(counts, squares) + zero
    (0.125 * deferred).backward()
    assert deferred == 0
    assert torch.equal(counts, bin_sums(v, s, regularizer.grid)[0])
    assert torch.equal(v.grad, w.grad) and torch.equal(s.grad, r.grad)
    torch.testing.assert_close(logged.grad, expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("floor", "ceiling"), [(0.0, math.inf), (0.0, 6.0), (0.0, 1.1), (-2.0, 2.0)])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_late_sums_clip_as_a_function_before_them_would(bits: int, floor: float, ceiling: float) -> None:
    grid = BinRegularizer(bits, signed=floor < 0 and bits > 1).grid
    values = 3 * torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    values[:4] = torch.tensor([0.0, 6.0, 1.1, -2.0])  # at the bounds
    found = []
    for inside in (True, False):
        v, s = values.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        logged = torch.zeros((), dtype=torch.float64, requires_grad=True)
        bounds = {"floor": floor, "ceiling": ceiling}
        x = v if inside else F.relu(v) if ceiling == math.inf else F.hardtanh(v, floor, ceiling)
        counts, squares, zero = deferred_bin_sums(x, s, grid, logged, **(bounds if inside else {}))
        (bin_loss(counts, squares) + zero).backward()
        found.append((counts, v.grad, s.grad, logged.grad))
    assert all(torch.equal(fused, composed) for fused, composed in zip(*found, strict=True))


def test_late_sums_of_a_loss_without_weight_are_told_as_zero() -> None:
    regularizer, values, step = case(2, False)
    logged = torch.zeros((), requires_grad=True)
    counts, squares, zero = deferred_bin_sums(values.requires_grad_(), step, regularizer.grid, logged)
    (0.0 * (bin_loss(counts, squares) + zero)).backward()
    assert logged.grad == 0 and values.grad.abs().sum() == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_joint_sums_are_each_tensors_own_whatever_its_size(bits: int, per_channel: bool) -> None:
    """Rows of 1,024 are filled up: 432 values leave room in one, 2,048 in none, 2,304 in the last of three."""
    regularizer = BinRegularizer(bits)
    random = torch.Generator().manual_seed(bits)
    shapes = [(16, 3, 3, 3), (2, 1024), (16, 16, 3, 3), (2, 1 << 17)]
    values = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]
    steps = [
        (1 + torch.rand([len(v)] + [1] * (v.dim() - 1) if per_channel else (), dtype=torch.float64, generator=random))
        / regularizer.grid.high
        for v in values
    ]
    found = [[t.clone().requires_grad_() for t in tensors] for tensors in (values, steps)]
    counts, squares = joint_bin_sums(*found, regularizer.grid)
    assert counts.sum(1).tolist() == [v.numel() for v in values]
    factors = torch.arange(1.0, 5.0, dtype=torch.float64)
    torch.stack([f * bin_loss(n, s) for f, n, s in zip(factors, counts, squares, strict=True)]).sum().backward()
    for v, s, factor, count, square, w, r in zip(values, steps, factors, counts, squares, *found, strict=True):
        v.requires_grad_(), s.requires_grad_()
        loss = regularizer(v, s)
        (factor * loss).backward()
        torch.testing.assert_close(bin_loss(count, square), loss, rtol=1e-12, atol=0)
        torch.testing.assert_close((w.grad, r.grad), (v.grad, s.grad), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_nan_comes_out_as_nan(bits: int) -> None:
    values, grid = torch.tensor([0.1, math.nan, 0.3]).requires_grad_(), BinRegularizer(bits).grid
    BinRegularizer(bits)(values, torch.tensor(0.2)).backward()
    assert values.grad.isnan().tolist() == [False, True, False]
    logged = torch.zeros((), requires_grad=True)
    counts, squares, zero = deferred_bin_sums(values, torch.tensor(0.2), grid, logged)
    (bin_loss(counts, squares) + zero).backward()
    assert logged.grad.isnan()
    assert math.isnan(BinRegularizer(bits).diagnose(values, torch.tensor(0.2)).loss)


def test_a_detached_step_gets_no_gradient_and_the_values_the_same_one() -> None:
    regularizer, values, step = case(2, False)
    v, w = values.clone().requires_grad_(), values.clone().requires_grad_()
    s = step.clone().requires_grad_()
    regularizer(v, s.detach()).backward()
    assert s.grad is None
    regularizer(w, s).backward()
    assert s.grad is not None and s.grad != 0
    assert torch.equal(v.grad, w.grad)


def test_values_on_their_levels_cost_nothing() -> None:
    levels = torch.tensor([-2.0, -1, 0, 1]).repeat(10) * 0.3
    assert BinRegularizer(2, True)(levels, torch.tensor(0.3)) == pytest.approx(0, abs=1e-12)


def test_bins_count_equally_whatever_they_hold() -> None:
    """1000 values at distance 0.1 of level 0 weigh as much as one at distance 0.1 of level 1."""
    step = torch.tensor(1.0)
    many, one = torch.full((1000,), 0.1), torch.tensor([0.9])
    loss = BinRegularizer(2, True)
    torch.testing.assert_close(loss(torch.cat([many, one]), step), torch.tensor(0.02))


def test_clamp_lets_outliers_be_and_by_count_is_the_quantization_error() -> None:
    step = torch.tensor(1.0)
    values = torch.tensor([0.2, 5.0]).requires_grad_()
    BinRegularizer(2, True, clamp=True)(values, step).backward()
    assert values.grad.tolist() == pytest.approx([0.4, 0.0])
    plain = torch.randn(1000)
    by_count = BinRegularizer(2, True, by_count=True)
    assert float(by_count(plain, step)) == pytest.approx(by_count.diagnose(plain, step).mse, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_diagnosis_adds_up(bits: int) -> None:
    regularizer, values, step = case(bits, True)
    diagnosis = regularizer.diagnose(values, step)
    assert diagnosis.loss == pytest.approx(float(regularizer(values, step)), rel=1e-9)
    assert diagnosis.num_bins == 2**bits
    assert diagnosis.used_bins == len(regularizer.grid.encode(values, step).unique())
    assert diagnosis.effectiveness < 100
    on_levels = regularizer.grid.encode(values, step) * step
    assert regularizer.diagnose(on_levels, step).effectiveness == pytest.approx(100)


def test_per_channel_steps() -> None:
    values = torch.randn(3, 50, dtype=torch.float64)
    step = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    code = BinRegularizer(2, True).grid.encode(values, step)
    expected = sum((values - code * step)[code == k].square().mean() for k in (-2, -1, 0, 1) if (code == k).any())
    torch.testing.assert_close(BinRegularizer(2, True)(values, step), torch.as_tensor(expected))


@pytest.mark.parametrize("bits", [0, 9, 32])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match="1 to 8"):
        BinRegularizer(bits)


def test_name_and_levels_are_said() -> None:
    text = str(BinRegularizer(num_bits=2, signed=False, name="Activations"))
    assert text == "BinRegularizer (Activations): 4 levels, unsigned 2-bit [0, s, 2s, 3s], tied to LSQ's step"
