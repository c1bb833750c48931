import pytest
import torch

from brfx.kernels.memory_order import from_memory_order, in_memory_order


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_one_row_without_a_copy_and_back(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    row = in_memory_order(x)
    assert row.data_ptr() == x.data_ptr() and row.tolist() == torch.as_strided(x, (120,), (1,)).tolist()
    back = from_memory_order(row, x)
    assert torch.equal(back, x) and back.stride() == x.stride()


def test_gaps_and_single_pixels() -> None:
    for x in (torch.randn(4, 6, 1, 1).to(memory_format=torch.channels_last), torch.randn(8, 8)[:, ::2], torch.ones(())):
        assert torch.equal(from_memory_order(in_memory_order(x), x), x)
