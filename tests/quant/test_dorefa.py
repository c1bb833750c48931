import math

import pytest
import torch
from torch import Tensor

from brfx.quant.dorefa import DoReFaWeightQuantizer


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.round()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


def published(w: Tensor, bits: int) -> Tensor:
    """Zhou et al., 2016, eq. 5 and 9, with the gradient straight through the rounding."""
    squashed = torch.tanh(w)
    levels = 2**bits - 1
    return 2 * _Round.apply((squashed / (2 * squashed.abs().max()) + 0.5) * levels) / levels - 1


def signed(w: Tensor, bits: int) -> Tensor:
    """The same on the grid with a zero."""
    squashed, high = torch.tanh(w), max(1, 2 ** (bits - 1) - 1)
    return _Round.apply(squashed / squashed.abs().max() * high) / high


def calibrated(quantizer: DoReFaWeightQuantizer, w: Tensor) -> DoReFaWeightQuantizer:
    quantizer.to(w.dtype).begin_calibration("mse")
    quantizer(w)
    quantizer.end_calibration()
    return quantizer


@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (2, True), (3, True), (4, True), (2, False), (8, False)])
@pytest.mark.parametrize("size", [1.0, None])
def test_output_and_gradient_are_the_paper_s(bits: int, symmetric: bool, size: float | None) -> None:
    w = (0.3 * torch.randn(6, 5, 3, 3, dtype=torch.float64)).requires_grad_()
    quantizer = calibrated(DoReFaWeightQuantizer(bits, symmetric=symmetric), w)
    largest = float(torch.tanh(w.detach()).abs().max())
    torch.testing.assert_close(float(quantizer.step * quantizer.grid.reach), largest)
    if size is not None:
        quantizer.step.fill_(size / quantizer.grid.reach)  # the paper's levels, from -1 to 1
    pull = torch.randn_like(w)
    output = quantizer(w)
    (output * pull).sum().backward()
    again = w.detach().clone().requires_grad_()
    wanted = (size or largest) * (published if symmetric else signed)(again, bits)
    (wanted * pull).sum().backward()
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(w.grad, again.grad)


@pytest.mark.parametrize(("bits", "symmetric"), [(1, False), (2, True), (4, True), (2, False), (8, False)])
@pytest.mark.parametrize("shape", [(), (6, 1, 1, 1)])
def test_what_comes_out_is_an_integer_times_a_scale(bits: int, symmetric: bool, shape: tuple[int, ...]) -> None:
    w = torch.randn(6, 5, 3, 3) * torch.rand(6, 1, 1, 1)
    quantizer = calibrated(DoReFaWeightQuantizer(bits, symmetric=symmetric, step_shape=shape), w)
    integers, scale = quantizer.integers(w)
    assert integers.dtype == torch.int8 and scale.shape == shape
    assert torch.equal(integers * scale, quantizer(w))
    if shape:  # each channel is normalized on its own
        ends = integers.flatten(1).abs().amax(1)
        assert torch.equal(ends, ends.max().expand(6))


def test_one_bit_signed_is_the_sign() -> None:
    w = torch.randn(4, 9)
    quantizer = calibrated(DoReFaWeightQuantizer(1), w)
    assert torch.equal(quantizer(w) > 0, w >= 0)


def test_zeros_have_levels_and_no_parameter_is_trained() -> None:
    quantizer = calibrated(DoReFaWeightQuantizer(2), torch.zeros(3, 3))
    assert quantizer(torch.zeros(3, 3)).tolist() == torch.zeros(3, 3).tolist()
    assert not list(quantizer.parameters()) and quantizer.own_rate == ()


def test_codes_at_another_step_do_not_depend_on_it_and_an_fp32_state_dict_leaves_it_without_one() -> None:
    w = torch.randn(8, 8)
    quantizer = DoReFaWeightQuantizer(2)
    assert not quantizer.has_step()
    first = quantizer.encode(w, quantizer.first_step(w, lambda *args: torch.tensor(0.0)))
    calibrated(quantizer, w)
    assert torch.equal(first, quantizer.encode(w))
    quantizer.load_state_dict({}, strict=False)
    assert math.isnan(quantizer.step) and not quantizer.calibrated
