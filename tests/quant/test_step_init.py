import pytest
import torch

from brfx.quant.grid import Grid
from brfx.quant.step_init import lsq_step_init, mse_step_init


def error(grid: Grid, values: torch.Tensor, step: torch.Tensor) -> float:
    return float((values - grid.encode(values, step) * step).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_mse_start_is_within_a_hundredth_of_a_fine_search(bits: int, signed: bool) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.relu()
    grid = Grid(bits, signed)
    found = error(grid, values, mse_step_init(grid, values, ()))
    best = min(error(grid, values, step) for step in torch.linspace(0.001, 3, 3000))
    assert found <= 1.01 * best
    assert found < error(grid, values, lsq_step_init(grid, values, ()))


@pytest.mark.parametrize("shape", [(4, 16, 64, 34), (2, 12, 96, 96), (3, 5, 197, 48)])
def test_mse_start_looks_at_every_column_row_and_channel(shape: tuple[int, ...]) -> None:
    noise = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert noise.numel() > 2**16  # it samples
    for dim in (1, 2, 3):
        steps = []
        for index in range(shape[dim]):
            values = torch.zeros(shape)
            values.select(dim, index).copy_(noise.select(dim, index))
            steps.append(float(mse_step_init(Grid(8, True), values, ())))
        assert min(steps) > max(steps) / 2 > 0, (dim, steps)


def test_rules_keep_the_shape_of_the_step_and_treat_channels_apart() -> None:
    values = torch.randn(3, 4, 5) * torch.tensor([1.0, 10, 100]).view(3, 1, 1)
    for rule in (lsq_step_init, mse_step_init):
        steps = rule(Grid(2, True), values, (3, 1, 1))
        assert steps.shape == (3, 1, 1)
        torch.testing.assert_close(steps[1], rule(Grid(2, True), values[1:2], (1, 1, 1))[0])
