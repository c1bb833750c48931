import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer

import brfx
from brfx.data import Preprocessing
from brfx.export.integer import integer_model
from brfx.export.layers import saturates
from brfx.export.onnx import onnx_runner
from brfx.export.operators import QuantParams
from brfx.metadata import metadata_of
from brfx.models import build_model

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(build_model("resnet20"))
    brfx.calibrate(qmodel, [torch.randn(8, 3, 32, 32)])
    metadata_of(qmodel).preprocessing, metadata_of(qmodel).classes = Preprocessing(32), tuple("abcdefghij")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    report = brfx.export_onnx(qmodel.train(), path, torch.randn(4, 3, 32, 32))
    assert qmodel.training
    return qmodel.eval(), path, report


def test_onnx_runtime_agrees_on_the_example(exported):
    _, path, report = exported
    assert report.path == path and report.bytes == path.stat().st_size
    assert report.reference_difference == 0  # ONNX Runtime equals the integers bit for bit
    flipped, codes = report.flipped
    assert codes > 100_000 and flipped < 0.002 * codes


def test_any_batch_size_runs_bit_for_bit(exported):
    qmodel, path, _ = exported
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    reference = integer_model(qmodel).model
    for batch in (1, 7):
        x = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.equal(torch.from_numpy(found), reference(x))


def optimized_kinds(path):
    """The operators of the model that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimized")), 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node]


@pytest.mark.parametrize("profile", ["compact", "fast", "portable"])
def test_no_layer_runs_in_float(exported, tmp_path, profile):
    qmodel, _, _ = exported
    path = tmp_path / "model.onnx"
    report = brfx.export_onnx(qmodel, path, torch.randn(2, 3, 32, 32), profile)
    assert report.reference_difference == 0 and report.integer_layers == 20 and not report.float_layers
    kinds = optimized_kinds(path)
    assert kinds.count("QLinearConv") == 19 and kinds.count("QLinearAdd") == 9
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "ConvInteger"} & set(kinds)
    assert kinds.count("QLinearLeakyRelu") == 9  # layers that read the stream look their codes up, in its layout
    opset = onnx.load(path).opset_import[0].version
    assert opset == 25 if profile == "compact" else opset <= 21


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("squeezenet1_1", 1e-7),  # it ends in an average of floats
        *(
            pytest.param(name, 0, marks=pytest.mark.slow)
            for name in ("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "efficientnet_b0")
        ),
    ],
)
def test_no_convolution_of_any_family_runs_in_float(tmp_path, name, difference):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    model = build_model(name, 10).eval()
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    qmodel = brfx.prepare_qat(model)
    brfx.calibrate(qmodel, [images])
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", images)
    assert report.reference_difference <= difference and not report.float_layers
    kinds = optimized_kinds(report.path)
    assert kinds.count("QLinearConv") == convolutions - 2 * (name == "googlenet")  # less the auxiliary heads
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "ConvInteger"} & set(kinds)


def test_an_unknown_profile_and_a_folder_that_is_not_there(exported, tmp_path):
    qmodel, _, _ = exported
    with pytest.raises(brfx.BrfxError, match="compact, fast, portable, qdq, qdq-int4"):
        brfx.export_onnx(qmodel, tmp_path / "m.onnx", torch.randn(2, 3, 32, 32), "tiny")
    with pytest.raises(brfx.BrfxError, match="there is no folder"):
        brfx.export_onnx(qmodel, tmp_path / "no" / "m.onnx", torch.randn(2, 3, 32, 32))


class Bessel(torch.nn.Module):
    """Has a function that ONNX does not."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.last(torch.special.bessel_j0(x))


def test_an_operator_that_onnx_does_not_have_is_named_with_its_line(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    qmodel = brfx.prepare_qat(Bessel())
    brfx.calibrate(qmodel, [images])
    line = Bessel.forward.__code__.co_firstlineno + 2
    with pytest.raises(brfx.BrfxError, match=rf"no operator for \w+.bessel_j0, called in test_onnx.py:{line};"):
        brfx.export_onnx(qmodel, tmp_path / "model.onnx", images)
    assert not list(tmp_path.iterdir())


def test_weights_are_packed_and_the_file_says_how_to_feed_it(exported):
    _, path, report = exported
    proto = onnx.load(path)
    kernels = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT2]
    assert len(kernels) == 20 and {"conv1.weight.int2", "linear.transposed.int2"} <= {t.name for t in kernels}
    assert report.bytes < 87_000  # 13 times less than FP32
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["preprocessing"]["image_size"] == 32
    assert metadata["classes"] == list("abcdefghij")
    assert metadata["config"]["weight_bits"] == 2


@pytest.mark.parametrize("profile", ["compact", "fast"])
def test_attention_in_python_code_is_integers_and_its_weights_are_packed(tmp_path, profile):
    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    qmodel = brfx.prepare_qat(model)
    brfx.calibrate(qmodel, [images])
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", images, profile)
    assert report.reference_difference == 0 and not report.float_layers
    kinds = optimized_kinds(report.path)
    assert kinds.count("MatMulInteger") == 14  # four linears and two products a block, and two more linears
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(kinds)
    assert not [t for t in onnx.load(report.path).graph.initializer if t.data_type == 1 and np.prod(t.dims) > 600]


@pytest.mark.parametrize(("bits", "packed"), [(2, True), (8, False)])
def test_a_constant_under_an_unsigned_quantizer_is_packed_where_a_signed_type_holds_it(tmp_path, bits, packed):
    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.p = torch.nn.Linear(6, 6), torch.nn.Parameter(torch.rand(6, 6))

        def forward(self, x):
            return self.layer(x).softmax(-1) @ torch.relu(self.p)

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    qmodel = brfx.prepare_qat(Mixing(), brfx.QATConfig(bits=bits))
    brfx.calibrate(qmodel, [x])
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", x)
    assert report.reference_difference == 0 and not report.float_layers
    names = {tensor.name for tensor in onnx.load(report.path).graph.initializer}
    assert ("p.int4" in names) == packed


@pytest.mark.parametrize("profile", ["compact", "portable", "fast"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_weights_are_stored_as_codes_and_run_as_odd_integers(tmp_path, profile, bits):
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    images = torch.randn(4, 3, 8, 8)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=bits, weight_grid="symmetric"))
    brfx.calibrate(qmodel, [images])
    report = brfx.export_onnx(qmodel.eval(), tmp_path / "model.onnx", images, profile)
    assert report.reference_difference == 0 and report.integer_layers == 2
    container = {"compact": {2: "INT2"}, "portable": {}, "fast": dict.fromkeys((2, 3, 4), "INT8")}[profile]
    weights = [value for value in onnx.load(report.path).graph.initializer if len(value.dims) > 1]
    assert {onnx.TensorProto.DataType.Name(value.data_type) for value in weights} == {container.get(bits, "INT4")}


def logged(caplog):
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "brfx.export.onnx")


def exported_to(path, model, inputs, **config):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config), inputs)
    brfx.calibrate(qmodel, [inputs])
    report = brfx.export_onnx(qmodel, path / "model.onnx", inputs)
    assert report.max_difference <= 2e-7 + 1e-5 * report.output_range
    return report


class UpTo(nn.Module):
    """Is told the size that its transposed convolution has to give."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(self.down(x).relu(), output_size=x.shape[-2:])


def test_a_transposed_convolution_that_is_given_its_size(tmp_path):
    report = exported_to(tmp_path, UpTo(), torch.randn(2, 3, 8, 8), bits=4)
    assert list(report.float_layers) == ["up"] and onnx.load(report.path)


class ReadTwice(nn.Module):
    """Reads its convolution's weight besides, and multiplies by its linear's once more."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        y = self.inner(self.conv(x).relu().mean((2, 3))).relu()
        return F.linear(y, self.inner.weight) * self.conv.weight.abs().mean()


def test_a_weight_that_is_read_besides_stays_what_it_was_there_and_products_as_functions_are_counted(tmp_path):
    report = exported_to(tmp_path, ReadTwice(), torch.randn(4, 3, 8, 8), bits=4)
    assert report.integer_layers == 2 and list(report.float_layers) == ["linear"]
    assert "function" in report.float_layers["linear"]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.rnn = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.GRU(8, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(F.conv2d(x, self.weight).relu().flatten(2).transpose(1, 2))[0]


def test_what_multiplies_in_floating_point_is_named_though_it_is_no_quantized_layer():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6)
    qmodel = brfx.prepare_qat(Functional(), example_inputs=images)
    brfx.calibrate(qmodel, [images])
    assert set(integer_model(qmodel).float_layers) == {"conv2d", "rnn"}


def test_a_batch_norm_without_running_statistics_stays_a_float_layer(tmp_path):
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
    report = exported_to(tmp_path, model, torch.randn(4, 3, 8, 8), bits=4)
    assert list(report.float_layers) == ["0"] and "running statistics" in report.float_layers["0"]


def test_a_cast_to_integers_takes_values_off_their_grid(tmp_path):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.last((self.first(x).relu() * 3).to(torch.int32).to(torch.float32))

    exported_to(tmp_path, Cast(), torch.randn(4, 3, 8, 8), bits=8)


def test_inputs_without_a_batch_are_refused_by_the_layer_that_sees_them(tmp_path):
    convolution, linear = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.Linear(6, 3), nn.ReLU())
    for model, inputs in ((convolution, torch.randn(3, 8, 8)), (linear, torch.randn(6))):
        qmodel = brfx.prepare_qat(model)
        brfx.calibrate(qmodel, [inputs])
        with pytest.raises(brfx.BrfxError, match=r"^0: its input of shape \(.*\) has no batch dimension"):
            brfx.export_onnx(qmodel, tmp_path / "model.onnx", inputs)
    assert not list(tmp_path.iterdir())
    with pytest.raises(brfx.BrfxError, match="does not run on example_inputs"):
        brfx.export_onnx(qmodel, tmp_path / "model.onnx", torch.randn(2, 7))


def test_biases_that_were_not_snapped_are_told_with_the_figure_and_the_cure(tmp_path, caplog):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    images[0] = 0.0
    qmodel = brfx.prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), brfx.QATConfig(bits=4), images)
    brfx.calibrate(qmodel, [images])
    layer = integer_model(qmodel).layers["0"]
    unit, half = layer.x.scale * layer.weight_scale, 0.5 * layer.y.scale
    fraction = (half / unit) % 1
    with torch.no_grad():  # an image of zeros gives half a code, and a little more or less: rounding the bias decides
        qmodel.get_parameter("0.bias").copy_(half + torch.where(fraction < 0.5, 0.02, -0.02) * unit)
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", images)
    share = f"{report.rounding_difference / report.output_range:.1%} of their range"
    assert report.unsnapped == 1 and report.rounding_difference == pytest.approx(layer.y.scale)
    assert f"{share}: 1 biases are not integers yet; call brfx.snap_biases(qmodel)" in logged(caplog)
    caplog.clear()
    brfx.snap_biases(qmodel)
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", images)
    assert report.unsnapped == 0 and report.rounding_difference < 1e-6 and "differ" not in logged(caplog)


@pytest.mark.parametrize(("bits", "saturating"), [(8, ("0", "2", "5", "7")), (4, ())])
def test_layers_that_saturate_without_vnni_are_named_and_brfx_s_sessions_are_exact(
    tmp_path, caplog, monkeypatch, bits, saturating
):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))
    images = torch.randn(4, 3, 8, 8)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=bits), images)
    brfx.calibrate(qmodel, [images])
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", images)
    assert report.saturating == saturating
    assert ('"session.x64quantprecision", "1"' in logged(caplog)) == bool(saturating)
    entries = {}
    plain = ort.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        ort.SessionOptions, "add_session_config_entry", lambda o, k, v: entries.update({k: v}) or plain(o, k, v)
    )
    for vnni in (False, True):
        entries.clear()
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        (found,) = onnx_runner(report.path)(images)
        assert ("session.x64quantprecision" in entries) == (bool(saturating) and not vnni)
        if not vnni:
            assert torch.equal(found, integer_model(qmodel).model(images))


def test_a_sum_of_two_products_leaves_16_bits():
    codes = QuantParams(1.0, 0, 0, 255)
    assert not saturates(torch.tensor([[64, -64, 64, -64]]), codes)  # 128 * 255 = 32640
    assert saturates(torch.tensor([[64, -64, 65, -64]]), codes)
    assert saturates(torch.tensor([[1, 1], [-100, -100]]), codes)
    assert not saturates(torch.tensor([[127]]), codes)


def test_a_runtime_that_computes_something_else_is_told(tmp_path, caplog, monkeypatch):
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    qmodel = brfx.prepare_qat(model, example_inputs=images)
    brfx.calibrate(qmodel, [images])
    brfx.snap_biases(qmodel)
    assert not brfx.export_onnx(qmodel, tmp_path / "model.onnx", images).wrong and not logged(caplog)
    right = onnx_runner(tmp_path / "model.onnx")
    monkeypatch.setattr("brfx.export.onnx.onnx_runner", lambda path: lambda x: [1.1 * y for y in right(x)])
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", images)
    assert report.wrong and "ONNX Runtime on this machine computes something else" in logged(caplog)


def test_a_runtime_older_than_the_opset_says_what_runs(tmp_path, monkeypatch):
    """Python 3.10 has no newer one than that, and in its words the opset is under development."""

    def refused(*args, **settings):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Load model failed: Opset 25 is under development")

    monkeypatch.setattr(ort, "InferenceSession", refused)
    monkeypatch.setattr(ort, "__version__", "1.23.2")
    with pytest.raises(brfx.BrfxError, match=r"\(1\.23\.2 is older than its opset; .* the profile portable, runs\)$"):
        onnx_runner(tmp_path / "m.onnx")


class ReadsData(torch.nn.Module):
    """Reads the data of a weight, and keeps a weight masked, as autoregressive models of images do."""

    def __init__(self):
        super().__init__()
        self.first, self.masked, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        self.register_buffer("mask", torch.tril(torch.ones(3, 3)))

    def forward(self, x):
        self.masked.weight.data.mul_(self.mask)
        x = self.masked(self.first(x).relu()) * self.first.weight.data.abs().mean()
        return self.last(x.mean((2, 3)))


def test_data_of_a_weight(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    qmodel = brfx.prepare_qat(ReadsData(), brfx.QATConfig(weight_bits=2, act_bits=8), x)
    brfx.calibrate(qmodel, [x])
    brfx.snap_biases(qmodel.eval())
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", x)
    torch.testing.assert_close(onnx_runner(report.path)(x)[0], qmodel(x), rtol=0, atol=1e-3)
    program = torch.export.load(brfx.export_torch(qmodel, tmp_path / "model.pt2", x))
    torch.testing.assert_close(program.module()(x), qmodel(x))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_type_is_refused_by_name(tiny, images, tmp_path, kind):
    qmodel = brfx.prepare_qat(tiny.to(kind), None, images.to(kind))
    brfx.calibrate(qmodel, [images.to(kind)])
    with pytest.raises(brfx.BrfxError, match=rf"is in {str(kind)[6:]}, .*float\(\)"):
        brfx.export_onnx(qmodel, tmp_path / "model.onnx", images.to(kind))
