import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.config import QATConfig
from brfx.graph.trace import trace
from brfx.graph.utils import dump, module_calls
from brfx.models import build_model
from brfx.nn import QuantizedClippedReLU, ResidualAdd, StreamAdd, StreamQuantizer
from brfx.passes import QuantizeReLUs, WidenStreams


class Stage(nn.Module):
    """A stem, a block whose shortcut is the identity, and one with a projection; the branches have a ReLU inside."""

    def __init__(self, clips=(nn.ReLU, nn.ReLU)):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.c, self.project = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.r1, self.inner, self.r2, self.r3 = clips[0](), nn.ReLU(), clips[1](), nn.ReLU()

    def forward(self, x):
        x = F.max_pool2d(self.r1(self.stem(x)), 2)
        x = self.r2(self.b(self.inner(self.a(x))) + x)
        return self.r3(self.c(x) + self.project(x))


def rewritten(model, config):
    gm = trace(model)
    QuantizeReLUs(config)(gm)
    sites = WidenStreams(config)(gm)
    assert WidenStreams(config)(gm) == 0
    gm.recompile()
    return gm, sites


def relus(gm):
    """Of each ReLU in order of execution: the module that it calls, and its bits."""
    return [(str(n.target), m.bits) for n, m in module_calls(gm) if isinstance(m, QuantizedClippedReLU)]


def test_the_relus_of_a_stream_call_one_module_of_its_bits():
    gm, sites = rewritten(Stage(), QATConfig(bits=2))
    assert sites == 2
    assert relus(gm) == [("r1", 8), ("inner", 2), ("r1", 8), ("r3", 2)]  # behind r3 no add reads anything
    assert isinstance(gm.r1, StreamQuantizer) and not hasattr(gm, "r2")
    assert dump(gm).splitlines()[2:4] == ["r1 = StreamQuantizer(stem)", "max_pool2d = max_pool2d(r1)"]


def test_bits_of_the_stream_are_the_setting_and_at_the_layers_bits_nothing_changes():
    assert relus(rewritten(Stage(), QATConfig(bits=2, stream_bits=4))[0])[0] == ("r1", 4)
    for config in (QATConfig(bits=2, stream_bits=2), QATConfig(bits=8), QATConfig(bits=4, stream_bits=3)):
        assert rewritten(Stage(), config)[1] == 0


def test_relus_of_another_ceiling_have_a_stream_of_their_own():
    gm, sites = rewritten(Stage((nn.ReLU, nn.ReLU6)), QATConfig(bits=2))
    assert sites == 1 and relus(gm)[0] == ("r1", 8) and relus(gm)[2] == ("r2", 2)


def test_declines_what_no_add_reads_and_what_stays_fp32():
    assert rewritten(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()), QATConfig())[1] == 0
    assert rewritten(Stage(), QATConfig(act_bits=32))[1] == 0
    assert rewritten(Stage(), QATConfig(skip=("r1", "r2")))[1] == 0


def test_layers_read_the_stream_at_their_own_bits_and_share_what_is_equal():
    qmodel = brfx.prepare_qat(Stage(), QATConfig(bits=2, overrides=[("project", {"act_bits": 4})]))
    inputs = {name: module.bits for name, module in qmodel.named_modules() if name.endswith("_input")}
    assert inputs == {"stem_input": 8, "a_input": 2, "c_input": 2, "project_input": 4}
    assert all(not module.signed for name, module in qmodel.named_modules() if name in ("a_input", "c_input"))
    assert qmodel.a_input.regularized and not qmodel.r1.regularized


def test_paper_placement_keeps_the_stream_of_the_papers():
    qmodel = brfx.prepare_qat(Stage(), QATConfig(bits=2, placement="paper"))
    assert not any(isinstance(module, (StreamQuantizer, StreamAdd)) for module in qmodel.modules())


def test_the_step_covers_the_relu_that_reaches_farthest():
    qmodel = brfx.prepare_qat(Stage(), QATConfig(bits=2))
    with torch.no_grad():
        qmodel.b.bias.fill_(30.0)
    brfx.calibrate(qmodel, [torch.randn(4, 3, 8, 8)])
    assert 255 * qmodel.r1.step.item() > 30


@pytest.mark.parametrize(("name", "streams"), [("resnet18", 4), ("regnet_y_400mf", 3), ("resnext50_32x4d", 4)])
def test_torchvision_s_residual_networks_have_one_stream_a_stage(name, streams):
    qmodel = brfx.prepare_qat(build_model(name), QATConfig(bits=2))
    adds = [module for module in qmodel.modules() if isinstance(module, ResidualAdd)]
    assert sum(isinstance(module, StreamQuantizer) for module in qmodel.modules()) == streams
    assert all(isinstance(add, StreamAdd) or add.high_in is None for add in adds)  # a stage of one block has no stream
    assert sum(isinstance(add, StreamAdd) for add in adds) >= len(adds) - 1


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "swin_t", "efficientnet_b0"])
def test_streams_that_are_wide_already_are_left(name):
    wide, narrow = (brfx.prepare_qat(build_model(name), QATConfig(bits=2, stream_bits=bits)) for bits in (8, 2))
    assert dump(wide) == dump(narrow)
