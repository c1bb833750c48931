import pytest
from torch import nn

import brfx
from brfx.graph.trace import trace
from brfx.graph.utils import check, free_name
from brfx.nn import QuantizedClippedReLU, StreamQuantizer


def two_relus(kind):
    return trace(nn.Sequential(kind(2), nn.Conv2d(3, 3, 1), kind(2)))


def test_two_quantizers_have_two_steps():
    gm = two_relus(QuantizedClippedReLU)
    check(gm)
    gm.get_submodule("2").step = gm.get_submodule("0").step
    with pytest.raises(RuntimeError, match="one step in two quantizers: 0 and 2"):
        check(gm)


@pytest.mark.parametrize("kind", [QuantizedClippedReLU, StreamQuantizer])
def test_a_quantizer_is_called_once_but_a_streams_wherever_it_is_read(kind):
    gm = two_relus(kind)
    next(node for node in gm.graph.nodes if node.target == "2").target = "0"
    if kind is StreamQuantizer:
        check(gm)
    else:
        with pytest.raises(RuntimeError, match="called at more than one site"):
            check(gm)


def test_a_free_name_is_no_attribute_parameter_buffer_or_module(tiny):
    gm = trace(tiny)
    gm.conv1.register_buffer("held", None)
    names = ["new", "conv1", "conv1.weight", "conv1.held", "conv1.stride", "nowhere.x"]
    assert [free_name(gm, name) for name in names] == [
        "new", "conv1_1", "conv1.weight_1", "conv1.held_1", "conv1.stride_1", "nowhere.x",
    ]  # fmt: skip
    gm.add_module("conv1_1", nn.ReLU())
    assert free_name(gm, "conv1") == "conv1_2"


def test_no_step_of_a_rewritten_model_is_another_parameter_or_shares_its_memory(tiny, images):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(bits=2))
    brfx.calibrate(qmodel, [images])
    named = qmodel.named_parameters(remove_duplicate=False)
    memory = [parameter.untyped_storage().data_ptr() for _, parameter in named]
    assert len(memory) == len(set(memory))
    assert not set(memory) & {parameter.untyped_storage().data_ptr() for parameter in tiny.parameters()}
