import math

import pytest
import torch
from torch import Tensor

from brfx.kernels.masks import clamp, keep_between, keep_within

X = torch.tensor([-1.5, -1.0, -0.0, 0.0, 0.5, 3.0, 3.5] * 5)
X = torch.cat([X, X.nextafter(torch.tensor(math.inf)), X.nextafter(torch.tensor(-math.inf))])  # uneven: a tail remains


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 0.0), (-math.inf, 3.0), (0.0, math.inf)])
@pytest.mark.parametrize("compiling", [False, True])
def test_values_are_kept_within_and_between(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, low: float, high: float, compiling: bool
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = X.to(dtype)
    values = torch.arange(1, len(x) + 1).to(dtype)
    assert keep_within(values, x, low, high).tolist() == [v if low <= i <= high else 0 for v, i in _pairs(values, x)]
    assert keep_between(values, x, low, high).tolist() == [v if low < i < high else 0 for v, i in _pairs(values, x)]


@pytest.mark.parametrize(("low", "high"), [(None, None), (-1.0, None), (None, 3.0), (0.0, 3.0)])
def test_both_forms_clamp(monkeypatch: pytest.MonkeyPatch, low: float | None, high: float | None) -> None:
    x = torch.cat([X, torch.tensor([math.inf, -math.inf, math.nan])])
    eager = clamp(x, low, high)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(clamp(x, low, high), eager, rtol=0, atol=0, equal_nan=True)


def _pairs(values: Tensor, x: Tensor) -> list[tuple[float, float]]:
    return list(zip(values.tolist(), x.tolist(), strict=True))
