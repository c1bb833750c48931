import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brfx
from brfx.config import QATConfig
from brfx.data import Preprocessing
from brfx.errors import ExportError, NotCalibratedError
from brfx.metadata import metadata_of

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

from brfx.export.qonnx import DOMAIN, export_qonnx  # noqa: E402


class Projected(nn.Module):
    """A block with a projection, and one with an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down, self.bn2 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        x = F.relu(self.bn1(self.conv1(x)) + self.bn2(self.down(x)))
        return self.fc(F.relu(self.conv2(x) + x).mean((2, 3)))


def quantized(model: nn.Module, images: Tensor, **settings: object) -> nn.Module:
    qmodel = brfx.prepare_qat(model, QATConfig(**settings))
    brfx.calibrate(qmodel, [images], start="lsq")
    return qmodel.eval()


def executed(path, x: Tensor) -> Tensor:
    """What the qonnx package makes of the file."""
    pytest.importorskip("qonnx", reason="the package qonnx is not installed")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    return torch.from_numpy(execute_onnx(ModelWrapper(str(path)), {"input": x.numpy()})["output"])


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 2, "stream_bits": 2},
        {"bits": 3, "weight_grid": "symmetric"},
        {"bits": 4, "per_channel": True, "clip_value": 6.0},
        {"weight_bits": 1, "act_bits": 2},
        {"bits": 1, "input_bits": 1},
        {"bits": 3, "placement": "paper"},
        {"bits": 2, "act_quantizer": "pact", "weight_quantizer": "dorefa"},
        {
            "bits": 2,
            "act_quantizer": "pact",
            "weight_quantizer": "dorefa",
            "stream_bits": 2,
            "weight_grid": "symmetric",
        },
    ],
)
@pytest.mark.parametrize("model", ["tiny", "projected"])
def test_qonnx_gives_the_outputs_of_the_model(tmp_path, tiny, images, settings, model):
    torch.manual_seed(0)
    qmodel = quantized(tiny if model == "tiny" else Projected(), images, **settings)
    path = export_qonnx(qmodel, tmp_path / "model.onnx", images)
    assert (executed(path, images) - qmodel(images)).abs().max() < 1e-4
    assert not list(tmp_path.glob("*.partial"))


def test_attention(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    qmodel = quantized(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), x, bits=4)
    path = export_qonnx(qmodel, tmp_path / "model.onnx", x)
    assert (executed(path, x) - qmodel(x)).abs().max() < 1e-4


def test_the_graph_is_quantizers_between_float_layers(tmp_path, images):
    torch.manual_seed(0)
    qmodel = quantized(Projected(), images, weight_bits=2, act_bits=3)
    metadata_of(qmodel).preprocessing, metadata_of(qmodel).classes = Preprocessing(8), tuple("abcd")
    proto = onnx.load(export_qonnx(qmodel.train(), tmp_path / "model.onnx", images))
    assert qmodel.training
    assert {entry.domain: entry.version for entry in proto.opset_import}[DOMAIN] == 1
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    quants = {node.output[0]: node for node in proto.graph.node if node.op_type == "Quant"}
    assert all(node.domain == DOMAIN and len(node.input) == 4 for node in quants.values())
    for node in quants.values():
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        assert set(attributes) == {"signed", "narrow", "rounding_mode"} and attributes["rounding_mode"] == b"ROUND"
        assert all(name in constants for name in node.input[1:])
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 4
    for node in layers:
        assert node.input[0] in quants and constants[quants[node.input[1]].input[3]] == 2
    step = qmodel.conv1.weight_quantizer.step.item()
    scale = next(constants[node.input[1]] for node in quants.values() if node.input[0] == "conv1.weight")
    assert np.isclose(scale, step)
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["preprocessing"]["image_size"] == 8 and metadata["classes"] == list("abcd")


def test_signs_are_bipolar(tmp_path, tiny, images):
    qmodel = quantized(tiny, images, weight_bits=1, act_bits=2)
    proto = onnx.load(export_qonnx(qmodel, tmp_path / "model.onnx", images))
    bipolar = [node.input[0] for node in proto.graph.node if node.op_type == "BipolarQuant"]
    assert sorted(bipolar) == ["conv1.weight", "conv2.weight", "fc.weight"]


def test_what_cannot_be_written(tmp_path, tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    with pytest.raises(NotCalibratedError):
        export_qonnx(qmodel, tmp_path / "model.onnx", images)
    brfx.calibrate(qmodel, [images])
    with pytest.raises(ExportError, match="no folder"):
        export_qonnx(qmodel, tmp_path / "absent" / "model.onnx", images)
    with pytest.raises(ExportError, match="exporter failed"):
        export_qonnx(qmodel, tmp_path / "model.onnx", torch.randn(2, 5))
    assert not list(tmp_path.iterdir())
