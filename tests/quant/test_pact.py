import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brfx.quant.grid import Grid
from brfx.quant.pact import PACTQuantizer, PACTReLU


def published(x: Tensor, alpha: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and its derivatives by x and by alpha: Choi et al., 2018, eq. 1 to 3."""
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    levels = 2**bits - 1
    quantized = (y * (levels / alpha)).round() * (alpha / levels)
    return quantized, ((x > 0) & (x < alpha)).to(x), (x >= alpha).to(x)


def calibrated(quantizer: PACTQuantizer, alpha: float) -> PACTQuantizer:
    quantizer.double().alpha.data.fill_(alpha)
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", [PACTReLU, PACTQuantizer])
@pytest.mark.parametrize("alpha", [0.7, 1.0, 5.3])
def test_output_and_gradients_are_the_paper_s(bits: int, kind: type[PACTQuantizer], alpha: float) -> None:
    quantizer = calibrated(kind(bits), alpha)
    x = torch.cat([3 * torch.randn(2000, dtype=torch.float64), torch.tensor([0.0, alpha, -1.0, 2 * alpha])])
    if kind is PACTQuantizer:
        x = x.abs() + 1e-9  # what cannot be negative
    x.requires_grad_()
    weights = torch.randn(len(x), dtype=torch.float64)
    output = quantizer(x)
    wanted, by_x, by_alpha = published(x.detach(), quantizer.alpha.detach(), bits)
    torch.testing.assert_close(output.detach(), wanted)
    (output * weights).sum().backward()
    assert torch.equal(x.grad, weights * by_x)
    torch.testing.assert_close(quantizer.alpha.grad, (weights * by_alpha).sum())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_what_comes_out_is_an_unsigned_integer_times_the_step(bits: int) -> None:
    quantizer = calibrated(PACTReLU(bits), 2.3).float()
    x = 3 * torch.randn(4, 5, 6)
    integers, scale = quantizer.integers(x)
    assert integers.dtype == torch.uint8 and quantizer.grid == Grid(bits, signed=False)
    assert torch.equal(integers * scale, quantizer(x).detach())
    assert float(integers.max()) == quantizer.grid.high and scale == quantizer.alpha.detach() / quantizer.grid.high


def test_a_fixed_ceiling_is_kept_too() -> None:
    quantizer = calibrated(PACTReLU(8, clip_value=6.0), 10.2)
    x = torch.tensor([5.0, 6.0, 9.0, 11.0], dtype=torch.float64, requires_grad=True)
    output = quantizer(x)
    assert output.max().item() == pytest.approx(6) and quantizer.clip_value == 6
    output.sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 0] and quantizer.alpha.grad == 0


def test_a_sum_of_codes_that_is_alpha_counts_as_inside() -> None:
    quantizer = calibrated(PACTReLU(2), 3.0)
    quantizer.grad_margin = 1e-4
    x = torch.tensor([3.0, 3.0 + 1e-7, 3.1], dtype=torch.float64, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0] and quantizer.alpha.grad == 1


def test_calibration_sets_alpha_by_the_start_rule() -> None:
    quantizer, x = PACTReLU(2), torch.randn(64, 8)
    assert quantizer.alpha.isnan()
    quantizer.begin_calibration("lsq")
    quantizer(x)
    quantizer.end_calibration()
    step = 2 * F.relu(x).mean() / math.sqrt(3)
    torch.testing.assert_close(quantizer.alpha.detach(), 3 * step)
    assert quantizer.own_rate == ("alpha",) and quantizer.alpha.requires_grad


def test_an_fp32_state_dict_leaves_it_without_alpha() -> None:
    quantizer = calibrated(PACTReLU(2), 3.0)
    quantizer.load_state_dict({}, strict=False)
    assert not quantizer.has_step() and quantizer.alpha.isnan()
    quantizer.load_state_dict({"alpha": torch.tensor(2.0)})
    assert quantizer.calibrated and quantizer.step == 2 / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_full(dtype: torch.dtype) -> None:
    quantizer = calibrated(PACTReLU(8), 4.0).float()
    x = torch.randn(100).to(dtype).requires_grad_()
    output = quantizer(x)
    assert output.dtype == dtype and torch.equal(output, quantizer(x.detach().float()).to(dtype))
    output.sum().backward()
    assert x.grad.dtype == dtype
