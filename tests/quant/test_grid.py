import math

import pytest
import torch
from torch import Tensor

from brfx.quant.grid import Grid, clipped, nearest_code, where_unclipped


@pytest.mark.parametrize(
    ("bits", "signed", "codes"),
    [
        (2, True, [-2, -1, 0, 1]),
        (2, False, [0, 1, 2, 3]),
        (1, True, [-1, 1]),
        (1, False, [0, 1]),
        (3, True, list(range(-4, 4))),
        (8, True, list(range(-128, 128))),
        (8, False, list(range(256))),
    ],
)
def test_codes(bits: int, signed: bool, codes: list[int]) -> None:
    grid = Grid(bits, signed)
    assert list(grid.codes) == codes
    assert (grid.low, grid.high) == (codes[0], codes[-1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_reached_and_no_other(bits: int, signed: bool) -> None:
    grid = Grid(bits, signed)
    values = torch.linspace(-400, 400, 80_001)
    assert sorted(grid.encode(values, torch.tensor(1.0)).unique().tolist()) == list(grid.codes)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_nan_has_no_code(bits: int, signed: bool) -> None:
    codes = Grid(bits, signed).encode(torch.tensor([torch.nan, 0.0, -0.0, 0.9]), torch.tensor(0.5))
    zero = 1.0 if signed and bits == 1 else 0.0
    assert codes[0].isnan() and codes[1:3].tolist() == [zero, zero] and codes[3] >= 1
    assert codes.dtype == torch.float32


def test_binary_start_is_the_mean_magnitude_and_others_use_qp() -> None:
    assert Grid(1, True).start(torch.tensor(0.3)) == pytest.approx(0.3)
    assert Grid(2, True).start(torch.tensor(0.3)) == pytest.approx(2 * 0.3 / 1**0.5)  # Qp = 1, not |Qn| = 2
    assert Grid(2, False).start(torch.tensor(0.3)) == pytest.approx(2 * 0.3 / 3**0.5)
    assert Grid(8, True).start(torch.tensor(0.3)) == pytest.approx(2 * 0.3 / 127**0.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_levels_are_odd_halves_and_as_many_below_zero_as_above(bits: int) -> None:
    grid = Grid(bits, True, symmetric=True)
    step = torch.tensor(0.3)
    codes = torch.tensor(list(grid.codes))
    levels = grid.decode(codes, step)
    torch.testing.assert_close(levels, -levels.flip(0))
    torch.testing.assert_close(levels[1:] - levels[:-1], step.expand(len(levels) - 1))
    assert levels.abs().min() == step / 2 and float(levels[-1] / step) == pytest.approx(grid.reach)
    assert torch.equal(grid.encode(levels, step), codes.float())
    found = grid.encode(torch.tensor([-1e-4, 1e-4, -50.0, 50.0]), step)
    assert found.tolist() == [-1, 0, grid.low, grid.high]


def test_a_symmetric_code_is_the_nearest_level() -> None:
    grid, step = Grid(2, True, symmetric=True), torch.tensor(0.7)
    values = torch.linspace(-3, 3, 1001)
    levels = grid.decode(torch.tensor(list(grid.codes)), step)
    nearest = levels[(values[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(grid.decode(grid.encode(values, step), step), nearest)


def test_one_symmetric_bit_is_the_binary_grid() -> None:
    grid = Grid(1, True, symmetric=True)
    assert list(grid.codes) == [-1, 1] and grid.offset == 0 and grid.reach == 1


@pytest.mark.parametrize("grid", [Grid(2, True), Grid(3, True, symmetric=True), Grid(1, True), Grid(8, False)])
def test_integers_times_their_scale_are_the_levels_bit_for_bit(grid: Grid) -> None:
    codes = torch.tensor(list(grid.codes), dtype=torch.float32)
    for step in torch.rand(200, generator=torch.Generator().manual_seed(0)):
        integers, scale = grid.integers(codes, step)
        assert torch.equal(integers * scale, grid.decode(codes, step))
        assert torch.equal(integers, integers.round())


def test_a_step_at_or_below_zero_is_taken_as_tiny_and_positive() -> None:
    codes = Grid(2, True).encode(torch.tensor([-1.0, 1.0]), torch.tensor(-0.5))
    assert codes.tolist() == [-2, 1]


def test_text_names_the_levels() -> None:
    assert str(Grid(2, True)) == "signed 2-bit [-2s, -s, 0, s]"
    assert str(Grid(2, False)) == "unsigned 2-bit [0, s, 2s, 3s]"
    assert str(Grid(2, True, True)) == "symmetric 2-bit [-1.5s, -0.5s, 0.5s, 1.5s]"
    assert str(Grid(8, False)) == "unsigned 8-bit [0, s, ..., 254s, 255s]"


GRIDS = [Grid(bits, signed) for bits in range(1, 9) for signed in (True, False)]
GRIDS += [Grid(bits, True, symmetric=True) for bits in range(1, 9)]
BOUNDS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (0.0, 0.37), (-1.0, 1.0)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("floor", "ceiling"), BOUNDS)
def test_backward_recomputes_the_codes_of_forward(grid: Grid, floor: float, ceiling: float) -> None:
    step = torch.tensor(0.37)
    values = _values_at_edges(grid, floor, ceiling, step)
    code = grid.encode(clipped(values, floor, ceiling), step, lower_bound=floor)
    seen = grid.recompute(values, step, floor=floor, ceiling=ceiling)
    assert torch.equal(seen.code[~values.isnan()], code[~values.isnan()])
    assert seen.code[values.isnan()].isnan().all() and code[values.isnan()].isnan().all()


def _values_at_edges(grid: Grid, floor: float, ceiling: float, step: Tensor) -> Tensor:
    edges = torch.tensor([*grid.levels, *(level + 0.5 for level in grid.levels), grid.low - 0.5]) * step
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, floor, ceiling, 1e30, -1e30])
    return torch.cat([edges, edges.nextafter(odd[1]), edges.nextafter(odd[2]), odd, 100 * torch.randn(4096)])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("floor", "ceiling"), BOUNDS)
@pytest.mark.parametrize("grad_margin", [0.0, 1e-4])
def test_gradients_end_where_the_grid_and_the_bounds_do(
    grid: Grid, floor: float, ceiling: float, grad_margin: float
) -> None:
    step = torch.tensor(0.37)
    values = _values_at_edges(grid, floor, ceiling, step)
    values = values[values.isfinite()]
    ratio = grid.recompute(values, step, floor=floor, ceiling=ceiling).ratio
    on_grid = grid.where_on_grid(torch.ones_like(values), ratio, floor=floor, grad_margin=grad_margin)
    beyond = (ratio > grid.high + grad_margin) | ((ratio < grid.low - grad_margin) & (floor < 0))
    assert torch.equal(on_grid, (~beyond).float())
    unclipped = where_unclipped(torch.ones_like(values), values, floor, ceiling)
    outside = [values <= floor] * (floor > -math.inf) + [values >= ceiling] * (ceiling < math.inf)
    assert torch.equal(unclipped, (~torch.stack(outside).any(0)).float() if outside else torch.ones_like(values))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_level_has_the_code_that_it_was_decoded_from(grid: Grid) -> None:
    codes = torch.tensor(list(grid.codes), dtype=torch.float32)
    for step in (torch.tensor(0.1), torch.tensor(3e-5), torch.tensor(700.0)):
        assert torch.equal(grid.encode(grid.decode(codes, step), step), codes)


def test_clipping_before_or_after_rounding_is_one() -> None:
    ratio = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([math.inf, -math.inf])])
    low, high = torch.tensor(-7.0), torch.tensor(8.0)
    assert torch.equal(nearest_code(ratio, -7, 8), ratio.round().clamp(-7, 8))
    assert torch.equal(nearest_code(ratio, low, high), nearest_code(ratio, -7, 8))
