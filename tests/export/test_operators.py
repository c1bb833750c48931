import re
from pathlib import Path

import pytest
import torch
from torch._library.custom_ops import CustomOpDef

from brfx.export import operators


def written() -> set[str]:
    """The names in the docstring's table."""
    table = operators.__doc__.split("============  ")[2]
    return set(re.findall(r"^(\w+)  ", table, re.MULTILINE)) - {"operator"}


def test_the_table_names_every_operator() -> None:
    defined = {name for name, value in vars(operators).items() if isinstance(value, CustomOpDef)}
    assert written() == defined == {"requantize", "recode", "convolution", "linear", "product"}


def test_every_operator_has_a_translation_and_a_node_of_the_packed_format() -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    assert {str(overload).split(".")[1] for overload in operators.translations()} == written()
    page = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text()
    for name in written() - {"recode"}:  # which is written as a requantize
        assert f"`{name}`" in page, name


@pytest.mark.parametrize(("zero_point", "low", "high"), [(0, 0, 3), (128, 0, 255), (2, 0, 3), (0, 0, 200)])
def test_requantize_is_what_its_line_says(zero_point: int, low: int, high: int) -> None:
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([0.25, 0.75, -0.25])])
    found = operators.requantize(x, 0.5, zero_point, low, high, 2.0)
    assert torch.equal(found, (x / 0.5).round().clamp(low - zero_point, high - zero_point) * 2.0)
    assert not torch.signbit(found[found == 0]).any()  # bytes have one zero
