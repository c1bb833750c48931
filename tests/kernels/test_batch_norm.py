import pytest
import torch
from torch import nn

import brfx.kernels.batch_norm as norms
from brfx.kernels.batch_norm import batch_norm, can_tile
from brfx.kernels.channel_sums import sum_by_channel

SHAPES = [(5, 16), (4, 16, 6), (4, 16, 5, 6), (4, 6, 5, 6), (2, 16, 4, 3, 2)]
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.fixture
def as_compiled(monkeypatch):
    """The form that compiled code takes, run eagerly."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def pair(shape, **options):
    torch.manual_seed(0)
    norm = KINDS[len(shape)](shape[1], **options).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    other = KINDS[len(shape)](shape[1], **options).double()
    other.load_state_dict(norm.state_dict())
    return norm, other, torch.randn(shape, dtype=torch.float64) * 3 + 5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_channels(shape):
    values = torch.randn(shape, dtype=torch.float64)
    expected = values.transpose(0, 1).reshape(shape[1], -1).sum(1)
    torch.testing.assert_close(sum_by_channel(values), expected)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_what_the_module_computes(as_compiled, shape, options):
    """Values, all gradients, and the running statistics after two batches."""
    norm, other, values = pair(shape, **options)
    upstream = torch.randn(shape, dtype=torch.float64)
    found = []
    for module, run in ((norm, norm), (other, lambda x: batch_norm(other, x))):
        x = values.clone().requires_grad_()
        run(x * 2)
        result = run(x)
        found.append([result, *torch.autograd.grad(result, [x, module.weight, module.bias], upstream)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dict(other.named_buffers()), dict(norm.named_buffers()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_summed_line_by_line(as_compiled, shape):
    """Maps whose channels are a multiple of 16; the rest is PyTorch's own."""
    _, norm, values = pair(shape)
    assert ("_Normalized" in type(batch_norm(norm, values).grad_fn).__name__) == (len(shape) > 2 and shape[1] == 16)


def test_gradients_are_those_of_finite_differences():
    _, norm, values = pair((2, 4, 2, 2))
    arguments = (values.requires_grad_(), norm.weight, norm.bias)
    torch.autograd.gradcheck(lambda *args: norms._Normalized.apply(*args, norm.eps)[0], arguments)


def test_a_far_mean_costs_no_digits(as_compiled):
    """A variance from sums of squares would have none left."""
    values = (torch.randn(8, 16, 16, 16, dtype=torch.float64) + 1e4).float()
    norm = nn.BatchNorm2d(16)
    variance = torch.var(values.double(), (0, 2, 3), correction=0)
    mean = values.double().mean((0, 2, 3))
    scale = torch.rsqrt(variance + norm.eps)[:, None, None]
    expected = (values.double() - mean[:, None, None]) * scale
    torch.testing.assert_close(batch_norm(norm, values).double(), expected, atol=2e-3, rtol=0)


def test_a_line_may_begin_with_its_farthest_value():
    """Its moments are taken from differences to that value: as squares these are up to as many times the variance as
    the line has values, and are rounded some nine times (twice by the difference, once each by square and mean, and so
    again for the square of the mean)."""
    values = torch.randn(4, 16, 8, 64)
    values[..., 0] = 1e4
    exact = values.double().movedim(1, -1)
    variance, mean = (part.flatten(0, -2) for part in torch.var_mean(exact, -2, correction=0))
    means, variances = norms._lines(values)
    rounding = 64 * 2.0**-24
    assert ((means - mean).abs() <= rounding * variance.sqrt()).all()
    assert ((variances - variance).abs() <= 9 * rounding * variance).all()


def test_half_precision_is_normalized_in_full(as_compiled):
    values = torch.randn(4, 16, 8, 8).bfloat16()
    norm, other = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
    result = batch_norm(norm, values)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), other(values.float()), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("training, shape", [(False, (4, 16, 5, 6)), (True, (1, 16, 1, 1))])
def test_what_has_no_statistics_of_a_batch_goes_to_the_module(as_compiled, training, shape):
    norm = nn.BatchNorm2d(16).train(training)
    if training:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            batch_norm(norm, torch.randn(shape))
    else:
        x = torch.randn(shape)
        assert torch.equal(batch_norm(norm, x), norm(x))


def test_norms_with_code_of_their_own_are_called():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    hooked = nn.BatchNorm2d(3)
    hooked.register_forward_hook(lambda *_: None)
    assert can_tile(nn.BatchNorm2d(3))
    for norm in (Own(3), hooked, nn.SyncBatchNorm(3), nn.BatchNorm2d(3, affine=False), nn.GroupNorm(3, 3), nn.ReLU()):
        assert not can_tile(norm)
