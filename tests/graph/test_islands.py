"""Models that cannot be traced whole are rewritten island by island, and keep their interface."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import brfx
from brfx.calibration import quantizers
from brfx.graph.trace import trace_islands
from brfx.models import build_model
from brfx.nn import QuantizedClippedReLU, QuantizedConv2d


class Branchy(nn.Module):
    """Two traceable blocks and a bare convolution in a forward that looks at its data."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.bare = nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2)])
        self.blocks[0].width = 4

    def forward(self, x):
        x = self.bare(self.first(x))
        for block in self.blocks:
            x = block(x) if x.mean() < 100 else x
        return x * self.blocks[0].width


@pytest.fixture
def branchy():
    torch.manual_seed(0)
    return Branchy()


def test_the_largest_traceable_submodules_become_islands(branchy):
    traced = trace_islands(branchy)
    assert list(traced.islands) == ["first", "blocks.0", "blocks.1"]
    assert list(traced.stopped) == [""]
    assert "test_islands.py:" in traced.stopped[""]
    assert set(traced.model.state_dict()) == set(branchy.state_dict())
    assert not {id(p) for p in traced.model.parameters()} & {id(p) for p in branchy.parameters()}


def test_rewritten_islands_compute_what_the_model_did(branchy, images, caplog):
    with caplog.at_level(logging.INFO, "brfx.prepare"):
        qmodel = brfx.prepare_qat(branchy)
    assert "test_islands.py:" in caplog.text and "rewritten instead" in caplog.text
    with brfx.quantization_disabled(qmodel):
        assert torch.equal(qmodel(images), branchy(images))
    assert isinstance(qmodel, Branchy)
    assert sum(isinstance(m, QuantizedConv2d) for m in qmodel.modules()) == 4
    assert sum(isinstance(m, QuantizedClippedReLU) for m in qmodel.modules()) == 3


def test_observations_leave_the_islands_with_their_gradient(branchy, images):
    qmodel = brfx.prepare_qat(branchy)
    brfx.calibrate(qmodel, [images])
    seen = brfx.observe(qmodel, images)
    assert list(seen) == ["first.1", "blocks.0.1", "blocks.1.1"]
    output, br = brfx.BinPenalty(qmodel)(images)
    assert torch.equal(output, qmodel(images))
    br.total.backward()
    assert qmodel.first.get_submodule("0").weight.grad.abs().sum() > 0
    assert not any("forward" in vars(module) for module in qmodel.modules())


class Opens(nn.Module):
    """Iterates, indexes and counts a Sequential, calls another method of a child, reads a property."""

    def __init__(self):
        super().__init__()
        self.stem = Stem()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        x = self.stem.embed(x) * self.stem.width
        if x.mean() > 100:
            return x
        for layer in self.layers:
            x = layer(x)
        return self.head(x) / len(self.head) + self.head[0].weight.mean() + self.head[-1].bias.sum()


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    @property
    def width(self):
        return self.conv.out_channels

    def embed(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.embed(x).relu()


def test_python_code_sees_the_users_classes_in_islands(images):
    model = Opens()
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(act_bits=4), images)
    assert isinstance(qmodel.head, GraphModule) and isinstance(qmodel.head, nn.Sequential)
    assert len(qmodel.head) == 3 < len(qmodel.head._modules)
    assert not isinstance(qmodel.layers, GraphModule)  # its layers quantize their own inputs
    assert qmodel.layers[2].input_quantizer is not None and qmodel.stem.conv.input_quantizer is not None
    brfx.calibrate(qmodel, [images])
    assert all(quantizer.calibrated for quantizer in quantizers(qmodel).values())
    with brfx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel(images), model(images))
    copied = copy.deepcopy(qmodel)
    assert torch.equal(copied(images), qmodel(images)) and len(copied.head) == 3


def test_islands_without_example_inputs_keep_what_python_code_reads(images):
    model = Opens()
    qmodel = brfx.prepare_qat(model)
    with brfx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel(images), model(images))


def test_save_load_and_fp32_round_trip(branchy, images, tmp_path):
    qmodel = brfx.prepare_qat(branchy)
    brfx.calibrate(qmodel, [images])
    brfx.save(qmodel, tmp_path / "model.pt")
    assert torch.equal(brfx.load(tmp_path / "model.pt", model=Branchy())(images), qmodel.eval()(images))
    state = brfx.float_state_dict(qmodel)
    assert list(state) == list(branchy.state_dict())
    copied = copy.deepcopy(qmodel)
    assert torch.equal(copied(images), qmodel(images))
    brfx.save(copied, tmp_path / "copy.pt")


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(
        map(same, a.values() if isinstance(a, dict) else a, b.values() if isinstance(b, dict) else b)
    )


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "raft_small"])
def test_detection_and_optical_flow(name):
    torch.manual_seed(0)
    model = build_model(name).eval()
    inputs = (torch.rand(1, 3, 128, 128),) * 2 if name == "raft_small" else ([torch.rand(3, 160, 160)],)
    qmodel = brfx.prepare_qat(model)
    with torch.no_grad():
        with brfx.quantization_disabled(qmodel):
            assert same(qmodel(*inputs), model(*inputs))
        qmodel.load_state_dict(model.state_dict())
    found = quantizers(qmodel)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum(name.endswith("weight_quantizer") for name in found) == len(layers)
