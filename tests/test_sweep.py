"""Every torchvision model, and in the usual run one of each mechanism; the whole table is benchmarks/coverage.py."""

import pytest

from benchmarks.coverage import check_model
from benchmarks.model_inputs import model_names
from brfx.graph.torch_ops import words

#: One of each: plain, aux heads, cat, preactivation, gates, linear bottleneck, fx-wrapped attention, MHA, 3-d layers,
#: a buffer that no forward reads, segmentation, a detector and optical flow (islands).
FAMILIES = words(
    """
    alexnet googlenet squeezenet1_1 densenet121 efficientnet_b0 mobilenet_v3_small regnet_y_400mf shufflenet_v2_x0_5
    mnasnet0_5 swin_t vit_b_32 r3d_18 lraspp_mobilenet_v3_large ssdlite320_mobilenet_v3_large raft_small convnext_tiny
    """
)


def check(name: str) -> None:
    row = check_model(name)
    assert row["errors"] == {}
    assert row["share_audit"] == row["share_values"] == 1.0, row["exceptions"] + row["misses"]
    assert row["macs_audit"] == row["macs_values"]
    tolerance = 1e-5 if name.startswith("vit") else 0.0  # attention is decomposed there
    assert row["fp32_eval"] <= tolerance and row["fp32_train"] <= tolerance
    assert row["grads"] == [] and row["reload"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model_names() if name not in FAMILIES])
def test_all_others(name):
    check(name)
