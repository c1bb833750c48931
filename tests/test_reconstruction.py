import copy
import itertools

import pytest
import torch
from torch import nn

import brfx
from brfx.calibration import quantization_disabled, run_first
from brfx.errors import ConfigError, DataError, NotCalibratedError
from brfx.nn import QuantizedLinear
from brfx.quant.grid import Grid
from brfx.reconstruction import (
    Moments,
    _best_step,
    _gptq,
    _inputs,
    _moments,
    _round,
    least_squares_levels,
    patches,
    reconstruct,
)


def spd(groups, size, seed=0):
    """Positive definite, far from diagonal."""
    root = torch.randn(groups, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def error(levels, target, h):
    return ((levels - target) @ h * (levels - target)).sum(2)


@pytest.mark.parametrize("grid", [Grid(2, True), Grid(2, True, True), Grid(1, True), Grid(4, True)], ids=str)
def test_no_single_code_can_be_bettered_and_rounding_to_the_nearest_is(grid):
    torch.manual_seed(0)
    h, target = spd(2, 6), torch.randn(2, 5, 6, dtype=torch.float64)
    step = torch.rand(2, 5, 1, dtype=torch.float64) + 0.3
    levels = least_squares_levels(target, h, step, grid)
    codes = ((levels / step) - grid.offset).round()
    assert set(codes.flatten().int().tolist()) <= set(grid.codes)
    torch.testing.assert_close(grid.decode(codes, step), levels)
    found = error(levels, target, h)
    for column, code in itertools.product(range(6), grid.codes):
        changed = levels.clone()
        changed[..., column] = grid.decode(torch.full((2, 5), float(code), dtype=torch.float64), step[..., 0])
        assert (error(changed, target, h) >= found - 1e-9).all()
    nearest = grid.decode(grid.encode(target, step), step)
    assert found.sum() < error(nearest, target, h).sum()


def test_where_inputs_are_uncorrelated_codes_are_the_nearest():
    grid, step = Grid(3, True), torch.full((1, 4, 1), 0.2, dtype=torch.float64)
    target = torch.randn(1, 4, 7, dtype=torch.float64)
    h = torch.diag_embed(torch.rand(1, 7, dtype=torch.float64) + 0.1)
    levels = least_squares_levels(target, h, step, grid)
    torch.testing.assert_close(levels, grid.decode(grid.encode(target, step), step))


def test_codes_are_near_the_best_of_all():
    """On average within 5 % of the least error of all 4^5 choices; rounding to the nearest is many times that."""
    grid, step = Grid(2, True), torch.full((1, 20, 1), 0.5, dtype=torch.float64)
    target, h = torch.randn(1, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), spd(1, 5, 3)
    all_codes = torch.tensor(list(itertools.product(grid.codes, repeat=5)), dtype=torch.float64) * 0.5
    best = error(all_codes[None].expand(20, -1, -1), target[0][:, None], h.expand(20, -1, -1)).amin(1)
    found = error(least_squares_levels(target, h, step, grid), target, h)[0]
    assert (found >= best - 1e-9).all() and found.sum() < 1.1 * best.sum()


def test_the_error_of_a_rounding_is_made_up_for_by_the_columns_that_are_left():
    """0.4 becomes 0. Of two inputs correlated by 0.9 the second then stands for 0.4 + 0.9 * 0.4 and becomes 1."""
    h = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)
    target, step = torch.full((1, 1, 2), 0.4, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    assert _gptq(target, h, step, Grid(3, True)).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("shared", [True, False])
def test_the_step_is_the_one_of_least_error(shared):
    h, grid = spd(2, 5), Grid(2, True)
    target = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = torch.full((2, 6, 1), 0.9, dtype=torch.float64)
    found, levels = _best_step(target, h, step, grid, shared=shared)
    errors = torch.stack(
        [
            error(least_squares_levels(target, h, step * share, grid), target, h)
            for share in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
        ]
    )
    least = errors.sum((1, 2)).min() if shared else errors.amin(0).sum()
    torch.testing.assert_close(error(levels, target, h).sum(), least)
    assert len(found.unique()) == 1 if shared else len(found.unique()) > 2


def rounded(x, y, bits=8):
    """A linear that is rounded for these inputs in the two networks."""
    torch.manual_seed(0)
    layer = QuantizedLinear.from_float(nn.Linear(x.shape[1], 3), bits)
    layer.weight_quantizer.begin_calibration("mse")
    layer.weight_quantizer(layer.weight)
    layer.weight_quantizer.end_calibration()
    x, y = x.double(), y.double()
    count = len(x)
    with torch.no_grad():
        _round(layer, Moments((y.T @ y / count)[None], (x.T @ y / count)[None], x.mean(0)[None], y.mean(0)[None]), None)
    return layer


def test_a_layer_undoes_what_the_layers_before_it_lost():
    torch.manual_seed(1)
    x = torch.randn(500, 4)
    y = x + 0.15 * x.flip(1)
    expected = nn.Linear(4, 3).requires_grad_(False)
    layer = rounded(x, y)
    torch.manual_seed(0)
    expected.reset_parameters()
    lost = (expected(y) - expected(x)).square().mean()
    assert (layer(y) - expected(x)).square().mean() < lost / 50  # 8 bits and the damping are what is left


def test_a_constant_that_the_bias_takes_up_changes_no_code():
    torch.manual_seed(1)
    x = torch.randn(500, 20)
    plain, shifted = rounded(x, x, bits=3), rounded(x + 50, x + 50, bits=3)
    torch.testing.assert_close(shifted.weight, plain.weight, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    torch.testing.assert_close(shifted(x + 50).mean(0), nn.Linear(20, 3)(x + 50).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, (3, 2), padding=(1, 0), dilation=(2, 1), groups=4),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Conv3d(4, 6, 2),
        nn.Linear(5, 3),
    ],
    ids=str,
)
def test_rows_of_patches_times_the_weight_are_the_layer(layer):
    dims = layer.weight.dim() - 2
    x = torch.randn(2, 4, *[6] * max(dims, 0)) if dims > 0 else torch.randn(2, 4, 5)
    expected = layer(x)
    rows = patches(layer, x)
    weight = layer.weight.reshape(len(rows), -1, rows.shape[-1])
    out = rows @ weight.mT  # (groups, positions, out)
    out = out.reshape(len(rows), len(x), -1, weight.shape[1]).permute(1, 0, 3, 2).flatten(1, 2)
    if dims > 0:
        found = out.reshape(expected.shape) + layer.bias.reshape(-1, *[1] * dims)
    else:
        found = out.mT.reshape(expected.shape) + layer.bias
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.bn(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


def prepared(example, **settings):
    model = Net().train()
    model(example)  # statistics that are not 0 and 1
    qmodel = brfx.prepare_qat(model.eval(), brfx.QATConfig(**settings), example)
    brfx.calibrate(qmodel, [example])
    return qmodel


@pytest.mark.parametrize(
    "settings",
    [{"bits": 2}, {"bits": 3, "per_channel": True}, {"bits": 2, "weight_grid": "symmetric"}, {"weight_bits": 1}],
    ids=str,
)
def test_outputs_come_nearer_to_the_float_networks(images, settings):
    qmodel = prepared(images, **settings)
    with torch.no_grad(), quantization_disabled(qmodel):
        expected = qmodel(images)
    before = (qmodel(images) - expected).square().mean()
    assert reconstruct(qmodel, [images[:4], images[4:]]) == ["stem", "depthwise", "fc"]
    after = (qmodel(images) - expected).square().mean()
    assert after < before / 2
    for layer in (qmodel.stem, qmodel.depthwise, qmodel.fc):  # the weights are their levels
        torch.testing.assert_close(layer.weight, layer.weight_quantizer(layer.weight), rtol=1e-6, atol=1e-7)


def test_the_mean_of_each_output_is_that_of_the_float_network(images):
    """Of the linear's output bit by bit: its bias takes up the error; and of what enters the first batch norm."""
    qmodel = prepared(images, bits=2)
    before = copy.deepcopy(qmodel)
    reconstruct(qmodel, [images])
    with torch.no_grad(), quantization_disabled(before):
        expected, stem = before(images).mean(0), before.stem(images).mean((0, 2, 3)) - before.bn.running_mean
    torch.testing.assert_close(qmodel(images).mean(0), expected, rtol=1e-4, atol=1e-5)
    image = qmodel.get_submodule("stem_input")(images)
    torch.testing.assert_close(qmodel.stem(image).mean((0, 2, 3)) - qmodel.bn.running_mean, stem, rtol=1e-3, atol=1e-4)


def test_dead_inputs_keep_their_weights(images):
    """H is singular there, and what is not seen says nothing of a weight."""
    images = images.clone()
    images[:, 1] = 0.0
    qmodel = prepared(images, bits=8)
    weight = qmodel.stem.weight.detach().clone()
    reconstruct(qmodel, [images])
    torch.testing.assert_close(
        qmodel.stem.weight[:, 1], weight[:, 1], rtol=0, atol=qmodel.stem.weight_quantizer.step.item()
    )


def test_what_is_not_rounded_and_what_is_refused(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3))
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=3), images)
    with pytest.raises(NotCalibratedError):
        reconstruct(qmodel, [images])
    brfx.calibrate(qmodel, [images])
    kept = qmodel.get_submodule("2").weight.detach().clone()
    assert reconstruct(qmodel, [images]) == ["0"]
    assert torch.equal(qmodel.get_submodule("2").weight, kept)
    with pytest.raises(DataError, match="no batch"):
        reconstruct(qmodel, [])
    with pytest.raises(ConfigError, match="stem: a DoReFaWeightQuantizer does not round weights as they are"):
        reconstruct(prepared(images, bits=3, weight_quantizer="dorefa"), [images])


def test_what_is_looked_at_of_large_images_is_bounded(monkeypatch):
    monkeypatch.setattr("brfx.reconstruction.POSITIONS", 100)
    seen = []
    monkeypatch.setattr("brfx.reconstruction.patches", lambda layer, x: seen.append(len(x)) or patches(layer, x))
    images = torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    qmodel = prepared(images, bits=4)
    reconstruct(qmodel, [images])
    assert set(seen) == {1, 2, 3, 64}  # 18 * 18 positions, 16 * 16, and 1


class Shared(nn.Module):
    """One batch norm behind two convolutions, and two behind one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.shared, self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.shared(self.a(x))) + torch.relu(self.shared(self.b(x)))
        return self.second(self.twice(torch.relu(self.first(self.twice(x)))))


def test_a_norm_of_several_layers_and_one_of_several_calls_are_left_alone(images):
    """A bias takes up the error of its layer; a norm's mean would be shifted for the other one too."""
    qmodel = brfx.prepare_qat(Shared().eval(), brfx.QATConfig(bits=2), images)
    brfx.calibrate(qmodel, [images])
    means = {name: value.clone() for name, value in qmodel.named_buffers() if name.endswith("running_mean")}
    image = qmodel.get_submodule("a_input")(images)
    with torch.no_grad(), quantization_disabled(qmodel):
        expected = qmodel.a(images).mean((0, 2, 3))
    reconstruct(qmodel, [images])
    left = dict(qmodel.named_buffers())
    assert len(means) == 3 and all(torch.equal(left[name], mean) for name, mean in means.items())
    torch.testing.assert_close(qmodel.a(image).mean((0, 2, 3)), expected, rtol=1e-3, atol=1e-4)


def test_moments_of_bfloat16_are_no_bfloat16(images):
    half = prepared(images, bits=8).bfloat16()
    moments = _moments("stem", half, half, [images.bfloat16()], run_first)
    rows = _inputs(half, "stem", images.bfloat16(), run_first).double()
    torch.testing.assert_close(moments.h, rows.mT @ rows / rows.shape[1], rtol=1e-5, atol=1e-5)
