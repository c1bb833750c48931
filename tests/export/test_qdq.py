import numpy as np
import pytest
import torch
from torch import nn

import brfx
from brfx.export.integer import integer_model
from brfx.export.onnx import onnx_runner

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

ORDINARY = {"QuantizeLinear", "DequantizeLinear", "Clip", "Conv", "MatMul", "Add", "ReduceMean", "Reshape"}


class Residual(nn.Module):
    """A stem, a block with an identity shortcut and groups, one with a projection, an average, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv3, self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(8, 12, 1, stride=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)
        return self.fc(torch.relu(self.conv3(x) + self.down(x)).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def exported(tmp_path, images, profile, **settings):
    """The file, its outputs as they should be, and the layers of the integer form."""
    torch.manual_seed(0)
    model = Residual()
    model(images)  # statistics of its own for the batch norm
    qmodel = brfx.prepare_qat(model.eval(), brfx.QATConfig(**settings), images)
    brfx.calibrate(qmodel, [images])
    brfx.snap_biases(qmodel)
    report = brfx.export_onnx(qmodel, tmp_path / "net.onnx", images, profile=profile)
    integer = integer_model(qmodel)
    return report, integer.model(images).detach().numpy(), integer.layers


def by_the_reference_evaluator(path, images):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load(path)).run(None, {"input": images.numpy()})[0]


def nearly(found, expected):
    """Equal, but for two images of 16 in which a sum beside a rounding threshold got the other code."""
    off = np.abs(found - expected).max(1) / np.abs(expected).max()
    return (off > 1e-6).sum() <= 2 and off.max() < 0.02


@pytest.mark.parametrize("profile", ["compact", "fast", "portable"])
def test_integer_operators_are_the_same_bit_for_bit_in_onnx_own_evaluator(tmp_path, images, profile):
    report, expected, _ = exported(tmp_path, images, profile, bits=2)
    assert report.reference_difference == 0
    assert np.array_equal(by_the_reference_evaluator(report.path, images), expected)


@pytest.mark.parametrize("profile", ["qdq", "qdq-int4"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 2, "weight_grid": "symmetric", "stream_bits": 2},
        {"bits": 4, "per_channel": True},
        {"bits": 4, "weight_grid": "symmetric"},
        {"bits": 8},
    ],
    ids=str,
)
def test_ordinary_operators_between_quantizers_give_the_same_outputs(tmp_path, images, profile, settings):
    """Those of ONNX Runtime, which fuses some of them, of it told to fuse none, and of onnx's own evaluator."""
    report, expected, layers = exported(tmp_path, images, profile, **settings)
    proto = onnx.load(report.path)
    assert {node.op_type for node in proto.graph.node} <= ORDINARY
    assert nearly(onnx_runner(report.path)(images)[0].numpy(), expected)
    assert nearly(by_the_reference_evaluator(report.path, images), expected)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(report.path, options).run(None, {"input": images.numpy()})[0]
    assert nearly(plain, expected)

    constants = {value.name: value for value in proto.graph.initializer}
    weights = [node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    weights = [node for node in weights if len(constants[node.input[0]].dims) > 1]
    assert len(weights) == len(layers) == 6
    int4 = (
        profile == "qdq-int4"
        and settings["bits"] < 8
        and (settings["bits"], settings.get("weight_grid")) != (4, "symmetric")
    )
    for node in weights:
        assert constants[node.input[0]].data_type == (onnx.TensorProto.INT4 if int4 else onnx.TensorProto.INT8)
        assert list(constants[node.input[1]].dims) in ([8], [12], [5])
        assert len(node.input) == 2 or not onnx.numpy_helper.to_array(constants[node.input[2]]).any()
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            zero = onnx.numpy_helper.to_array(constants[node.input[2]])
            assert zero.dtype == np.uint8 or zero == 0


def test_openvino_gives_the_same_outputs(tmp_path, images):
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    for bits in (2, 4):
        for profile in ("qdq", "qdq-int4"):
            folder = tmp_path / f"{profile}{bits}"
            folder.mkdir()
            report, expected, _ = exported(folder, images, profile, bits=bits)
            core = openvino.Core()
            model = core.compile_model(core.read_model(report.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            assert nearly(model([images.numpy()])[0], expected)


def test_8_bit_layers_run_exactly_on_kernels_without_vnni_too(tmp_path, images):
    report, expected, _ = exported(tmp_path, images, "qdq", bits=8)
    assert report.saturating
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    found = ort.InferenceSession(report.path, options).run(None, {"input": images.numpy()})[0]
    assert nearly(found, expected)


class Wide(nn.Module):
    """So many channels that torch's exporter computes no constants of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3000, 1), nn.Linear(3000, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("profile", ["qdq", "qdq-int4"])
def test_scales_and_biases_are_constants_in_wide_layers_too(tmp_path, profile):
    x = torch.randn(2, 3, 2, 2)
    qmodel = brfx.prepare_qat(Wide(), brfx.QATConfig(bits=4, per_channel=True), x)
    brfx.calibrate(qmodel, [x])
    report = brfx.export_onnx(qmodel, tmp_path / "net.onnx", x, profile=profile)
    proto = onnx.load(report.path)
    assert {node.op_type for node in proto.graph.node} <= ORDINARY
    assert report.reference_difference < 0.02 * report.output_range
    constants = {value.name for value in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            assert node.input[1] in constants
