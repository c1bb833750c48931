import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.errors import NotCalibratedError
from brfx.nn import (
    LSQActivationQuantizer,
    LSQWeightQuantizer,
    QuantizedClippedReLU,
    StreamQuantizer,
    lsq_quantize,
)
from brfx.quant.grid import Grid
from brfx.quant.lsq import GRAD_MARGIN_OF_SUMS


def reference(v: Tensor, s: Tensor, low: int, high: int, g: float) -> Tensor:
    """LSQ as its authors' pseudo-code writes it: straight-through by detach, gradients by autograd."""
    s = s * g + (s - s * g).detach()
    v = (v / s).clamp(low, high)
    return (v + (v.round() - v).detach()) * s


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    output = function(*inputs)
    upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    output.backward(upstream)
    return [output.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("step_shape", [(), (6, 1, 1, 1)])
def test_forward_and_both_gradients_equal_a_straight_through_reference(
    bits: int, signed: bool, step_shape: tuple[int, ...]
) -> None:
    grid = Grid(bits, signed)
    if grid.binary:
        pytest.skip("binary has its own definition, below")
    v = torch.randn(6, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.full(step_shape, 3.0 / grid.high, dtype=torch.float64) * 0.7
    found = gradients(lambda v, s: lsq_quantize(v, s, grid, gradient_scale=0.3), v, s)
    expected = gradients(lambda v, s: reference(v, s, grid.low, grid.high, 0.3), v, s)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ceiling", [math.inf, 6.0, 0.9])
def test_relu_and_clip_fused_equal_relu_and_clip_composed(ceiling: float) -> None:
    v = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    v[0, :5] = torch.tensor([0.0, 6.0, 0.9, -1.0, 100.0], dtype=torch.float64)
    s = torch.tensor(0.7, dtype=torch.float64)
    grid = Grid(2, False)

    def composed(v: Tensor, s: Tensor) -> Tensor:
        clipped = F.relu(v) if ceiling == math.inf else F.hardtanh(v, 0.0, ceiling)
        return reference(clipped, s, 0, 3, 0.5)

    found = gradients(lambda v, s: lsq_quantize(v, s, grid, gradient_scale=0.5, floor=0.0, ceiling=ceiling), v, s)
    for a, b in zip(found, gradients(composed, v, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_bit_weights_are_plus_and_minus_step_with_the_gradient_of_a_sign() -> None:
    v = torch.tensor([-2.0, -0.1, 0.0, 0.1, 3.0])
    output, grad_v, grad_s = gradients(
        lambda v, s: lsq_quantize(v, s, Grid(1, True), gradient_scale=0.5), v, torch.tensor(0.4)
    )
    assert output.tolist() == pytest.approx([-0.4, -0.4, 0.4, 0.4, 0.4])
    upstream = torch.randn(5, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(grad_v, upstream)
    torch.testing.assert_close(grad_s, (upstream * torch.tensor([-1.0, -1, 1, 1, 1])).sum() * 0.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("step_shape", [(), (6, 1, 1, 1)])
def test_symmetric_weights_are_lsq_with_levels_half_a_step_off(bits: int, step_shape: tuple[int, ...]) -> None:
    grid = Grid(bits, True, symmetric=True)
    v = torch.randn(6, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.full(step_shape, 2.0 / grid.reach, dtype=torch.float64) * 0.7

    def shifted(v: Tensor, s: Tensor) -> Tensor:
        s = s * 0.3 + (s - s * 0.3).detach()
        code = (v / s - 0.5).clamp(grid.low, grid.high)
        return (code + (code.round() - code).detach() + 0.5) * s

    found = gradients(lambda v, s: lsq_quantize(v, s, grid, gradient_scale=0.3), v, s)
    for a, b in zip(found, gradients(shifted, v, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len((found[0] / s).unique()) == 2**bits and (found[1] == 0).any()


def test_symmetric_weights_start_by_their_largest_level() -> None:
    weight = torch.randn(8, 3, 3, 3)
    quantizer = calibrated(LSQWeightQuantizer(2, symmetric=True), weight)
    torch.testing.assert_close(quantizer.step.data, 2 * weight.abs().mean() / 1.5**0.5)
    quantizer(weight).backward(torch.ones_like(weight))
    plain = gradients(lambda v, s: lsq_quantize(v, s, quantizer.grid, gradient_scale=1.0).sum(), weight, quantizer.step)
    scale = torch.randn((), generator=torch.Generator().manual_seed(7)) * (weight.numel() * 1.5) ** 0.5
    torch.testing.assert_close(quantizer.step.grad, plain[2] / scale)


def test_weight_start_and_gradient_scale_use_qp() -> None:
    weight = torch.randn(8, 3, 3, 3)
    quantizer = LSQWeightQuantizer(2)
    quantizer.begin_calibration()
    quantizer(weight)
    quantizer.mode = "quantize"
    torch.testing.assert_close(quantizer.step.data, 2 * weight.abs().mean())  # sqrt(Qp) = 1
    step = quantizer.step.detach()
    expected = gradients(lambda v, s: reference(v, s, -2, 1, 1 / math.sqrt(weight.numel() * 1)), weight, step)
    quantizer(weight).backward(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    torch.testing.assert_close(quantizer.step.grad, expected[2])


def test_activation_gradient_scale_does_not_depend_on_the_batch() -> None:
    one = torch.rand(1, 4, 6, 6)
    grads = []
    for batch in (1, 16):
        quantizer = calibrated(LSQActivationQuantizer(2), one)
        quantizer(one.expand(batch, -1, -1, -1)).sum().div(batch).backward()
        grads.append(quantizer.step.grad)
    torch.testing.assert_close(*grads)
    plain = gradients(lambda v, s: reference(v, s, 0, 3, 1 / math.sqrt(4 * 6 * 6 * 3)).sum(), one, quantizer.step)
    torch.testing.assert_close(grads[0], plain[2] / torch.randn((), generator=torch.Generator().manual_seed(7)))


def calibrated(quantizer, values: Tensor):
    quantizer.begin_calibration()
    quantizer(values)
    quantizer.mode = "quantize"
    return quantizer


def test_eval_is_quantized_too() -> None:
    x = torch.randn(4, 3, 8, 8)
    for quantizer in (calibrated(QuantizedClippedReLU(2), x), calibrated(LSQWeightQuantizer(2), x)):
        assert len(quantizer.eval()(x).unique()) <= 4
        assert torch.equal(quantizer.eval()(x), quantizer.train()(x))


def test_eight_bits_reach_both_ends() -> None:
    quantizer = calibrated(LSQWeightQuantizer(8), torch.linspace(-1, 1, 1001))
    quantizer.step.data.fill_(1 / 127)
    codes = (quantizer(torch.linspace(-2, 2, 10_001)) / quantizer.step).round().unique()
    assert (codes.min(), codes.max(), len(codes)) == (-128, 127, 256)


def test_clip_value_bounds_the_output() -> None:
    x = torch.linspace(-5, 50, 1000)[None]
    open_, clipped = (calibrated(QuantizedClippedReLU(4, clip_value=c), x) for c in (None, 6.0))
    open_.step.data.fill_(2.0)
    clipped.step.data.fill_(2.0)
    assert open_(x).max() == 30
    assert clipped(x).max() == 6


def test_per_channel_steps_are_those_of_each_channel() -> None:
    weight = torch.randn(5, 4, 3, 3) * torch.arange(1.0, 6).view(5, 1, 1, 1)
    quantizer = calibrated(LSQWeightQuantizer(2, step_shape=(5, 1, 1, 1)), weight)
    torch.testing.assert_close(quantizer.step.data.flatten(), 2 * weight.abs().mean((1, 2, 3)))


def test_an_uncalibrated_quantizer_refuses_and_says_so() -> None:
    with pytest.raises(NotCalibratedError, match=r"brfx\.calibrate"):
        LSQWeightQuantizer(2)(torch.ones(3))


def test_the_fp32_state_dict_leaves_a_quantizer_uncalibrated() -> None:
    quantizer = calibrated(LSQWeightQuantizer(2), torch.randn(10))
    holder = nn.Module()
    holder.q = quantizer
    state = {key: value.clone() for key, value in holder.state_dict().items()}
    holder.load_state_dict({})
    assert not quantizer.calibrated
    holder.load_state_dict(state)
    assert quantizer.calibrated


def test_calibration_on_nan_is_refused() -> None:
    quantizer = LSQActivationQuantizer(2)
    quantizer.begin_calibration()
    with pytest.raises(NotCalibratedError, match="NaN"):
        quantizer(torch.tensor([[1.0, math.nan]]))


def test_an_empty_tensor_passes_and_sets_no_step():
    quantizer = LSQActivationQuantizer(2)
    quantizer.begin_calibration("mse")
    assert quantizer(torch.empty(0, 3)).shape == (0, 3)
    quantizer.mode = "quantize"
    assert not quantizer.calibrated
    with pytest.raises(NotCalibratedError, match="calibrate"):
        quantizer(torch.ones(1, 3))


@pytest.mark.parametrize("negative", [False, True])
def test_a_sign_that_no_graph_tells_is_found_by_calibration_and_kept(negative):
    quantizer = LSQActivationQuantizer(2, signed=None)
    first, second = torch.rand(50), torch.rand(50) - (0.5 if negative else 0)
    quantizer.begin_calibration("mse")
    for values in (first, second):
        quantizer(values)
    quantizer.mode = "quantize"
    assert quantizer.signed == negative
    other = LSQActivationQuantizer(2, signed=None)
    other.load_state_dict(quantizer.state_dict())
    assert other.signed == negative and torch.equal(other(second), quantizer(second))


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("step_shape", [(), (2, 1)])
def test_a_nan_weight_stays_nan_with_its_gradient_to_the_step(bits: int, step_shape: tuple[int, ...]) -> None:
    quantizer = LSQWeightQuantizer(bits, step_shape=step_shape)
    quantizer.step.data.fill_(0.5)
    quantizer.calibrated = True
    values = torch.tensor([[math.nan, 0.0, -0.3], [0.6, -0.6, 0.0]])
    output = quantizer(values)
    assert output.isnan().nonzero().tolist() == [[0, 0]]
    output.sum().backward()
    assert quantizer.step.grad.flatten().isnan().tolist() == ([True] if step_shape == () else [True, False])


@pytest.mark.parametrize("signed", [True, False])
def test_values_exactly_at_the_ends_are_inside_and_the_next_floats_outside(signed: bool) -> None:
    grid, s = Grid(2, signed), torch.tensor(0.5)
    low, high = grid.low * 0.5, grid.high * 0.5
    v = torch.tensor([low, high, math.nextafter(low - 1e-6, -9), high + 1e-6]).requires_grad_()
    s = s.requires_grad_()
    out = lsq_quantize(v, s, grid, gradient_scale=1.0)
    assert out.tolist() == [low, high, low, high]
    for place, (to_value, to_step) in enumerate([(1, 0), (1, 0), (0, grid.low), (0, grid.high)]):
        grad_v, grad_s = torch.autograd.grad(out[place], (v, s), retain_graph=True)
        assert (float(grad_v[place]), float(grad_s)) == (to_value, to_step)


def test_at_a_floor_and_at_a_ceiling_no_gradient_reaches_the_values() -> None:
    v, s = torch.tensor([0.0, 1e-6, 1.0, 1.0 - 1e-6]).requires_grad_(), torch.tensor(0.5)
    lsq_quantize(v, s, Grid(2, False), gradient_scale=1.0, floor=0.0, ceiling=1.0).sum().backward()
    assert v.grad is not None and v.grad.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("start", ["lsq", "mse"])
def test_zeros_alone_start_at_one_and_so_does_a_channel_of_zeros(start: str) -> None:
    whole, channels = LSQWeightQuantizer(2), LSQWeightQuantizer(2, step_shape=(2, 1))
    for quantizer, weight in ((whole, torch.zeros(2, 5)), (channels, torch.tensor([[0.0] * 5, [3.0] * 5]))):
        quantizer.begin_calibration(start)
        quantizer(weight)
        assert quantizer.calibrated
    assert whole.step.item() == 1.0 and channels.step[0].item() == 1.0 != channels.step[1].item()


def test_when_the_sign_turns_out_negative_what_was_estimated_without_it_is_forgotten() -> None:
    quantizer, alone = (LSQActivationQuantizer(2, signed=None) for _ in range(2))
    first, second = 100 * torch.rand(50), torch.randn(50)
    for one, batches in ((quantizer, (first, second)), (alone, (second,))):
        one.begin_calibration()
        for values in batches:
            one(values)
    assert quantizer.signed and torch.equal(quantizer.step, alone.step) and quantizer.batches_seen == 1
    quantizer.begin_calibration()
    quantizer(first)
    assert not quantizer.signed and not quantizer.negative


@pytest.mark.parametrize("kind", [StreamQuantizer, QuantizedClippedReLU])
def test_a_sum_of_codes_that_is_the_last_level_passes_its_gradient_however_it_is_rounded(kind):
    quantizer = calibrated(kind(6), torch.rand(4, 50))
    quantizer.grad_margin = GRAD_MARGIN_OF_SUMS
    high, parts = quantizer.grid.high, torch.arange(64.0)
    for step in torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.01:
        quantizer.step.data.copy_(step)
        quantizer.step.grad = None
        values = (parts * step + (high - parts) * step)[None].requires_grad_()
        quantizer(values).sum().backward()
        assert (values.grad == 1).all() and quantizer.step.grad.abs() < 1e-3
    beyond = ((high + 0.01) * step)[None, None].requires_grad_()
    quantizer(beyond).sum().backward()
    assert beyond.grad == 0
    assert StreamQuantizer(8).grad_margin == GRAD_MARGIN_OF_SUMS and QuantizedClippedReLU(2).grad_margin == 0
