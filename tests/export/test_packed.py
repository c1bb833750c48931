import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import brfx
from brfx.data import Preprocessing
from brfx.errors import ExportError
from brfx.export.integer import integer_model
from brfx.export.packed import export_packed
from brfx.export.packed_reader import read_packed
from brfx.metadata import metadata_of
from brfx.models import build_model

from .helpers import Product, Residual, quantized


class Interpreter:
    """The network out of a file, in NumPy: what docs/packed-format.md says, and nothing from brfx."""

    def __init__(self, header, tensors):
        self.header, self.tensors = header, tensors

    def __call__(self, x):
        values = dict(zip(self.header["inputs"], [x], strict=True))
        for node in self.header["nodes"]:
            inputs = [values[name] for name in node["inputs"]]
            values[node["name"]] = getattr(self, node["op"])(*inputs, **node["attributes"])
        (output,) = self.header["outputs"]
        return values[output]

    def convolution(self, value, *, weight, headroom, weight_scale, bias, stride, padding, dilation, groups, **grids):
        grid, out = grids["x"], grids["y"]
        w = self.tensors[weight["tensor"]].astype(np.int32) * headroom
        scale, bias = self.tensors[weight_scale["tensor"]], self.tensors[bias["tensor"]]
        codes = np.rint(value / np.float32(grid["scale"])).astype(np.int32)
        codes = np.pad(codes, [(0, 0), (0, 0), *[(p, p) for p in padding]])
        (sy, sx), (dy, dx), (ky, kx) = stride, dilation, w.shape[2:]
        rows = (codes.shape[2] - dy * (ky - 1) - 1) // sy + 1
        columns = (codes.shape[3] - dx * (kx - 1) - 1) // sx + 1
        total = np.zeros((len(codes), len(w), rows, columns), np.int32) + bias[:, None, None]
        ins, outs = w.shape[1], len(w) // groups
        for group in range(groups):
            a, b = slice(group * ins, (group + 1) * ins), slice(group * outs, (group + 1) * outs)
            for i in range(ky):
                for j in range(kx):
                    part = codes[:, a, i * dy :: sy, j * dx :: sx][:, :, :rows, :columns]
                    total[:, b] += np.einsum("nchw,oc->nohw", part, w[b, :, i, j])
        factor = np.float32(grid["scale"]) * scale / np.float32(out["scale"])
        stored = np.rint(total.astype(np.float32) * factor[:, None, None]) + out["zero_point"]
        stored = np.clip(stored, out["low"], out["high"])
        return (stored - out["zero_point"]).astype(np.float32) * np.float32(out["scale"])

    def linear(self, value, *, weight, scale, bias, x):
        codes = np.rint(value / np.float32(x["scale"])).astype(np.int32)
        total = codes @ self.tensors[weight["tensor"]].astype(np.int32).T
        return total.astype(np.float32) * self.tensors[scale["tensor"]] + self.tensors[bias["tensor"]]

    def product(self, a, b, *, left, right, x, y):
        codes = [np.rint(v / np.float32(g["scale"])).astype(np.int32) for v, g in ((a, x), (b, y))]
        return (codes[0] @ codes[1]).astype(np.float32) * (np.float32(x["scale"]) * np.float32(y["scale"]))

    def requantize(self, value, *, y, scale_out):
        stored = np.clip(np.rint(value / np.float32(y["scale"])) + y["zero_point"], y["low"], y["high"])
        return (stored - y["zero_point"]).astype(np.float32) * np.float32(scale_out)

    def add(self, a, b, *, input, other, alpha):
        assert alpha == 1
        return a + b

    def adaptive_avg_pool2d(self, value, *, input, output_size):
        assert output_size == 1
        return value.astype(np.float64).mean((2, 3), keepdims=True).astype(np.float32)

    def flatten(self, value, *, input, start_dim, end_dim):
        assert (start_dim, end_dim) == (1, -1)
        return value.reshape(len(value), -1)

    def getitem(self, value, *, index):
        return value[tuple(slice(*part["slice"]) for part in index)]

    def pad(self, array, /, *, input, pad, mode, **rest):
        assert mode == "constant"
        pairs = [(0, 0)] * (array.ndim - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
        return np.pad(array, pairs)


def run_by(path, x):
    """Outputs of the file, and of the integer form that it was written from."""
    packed = read_packed(path)
    return Interpreter(packed.header, packed.tensors)(x.numpy())


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 2, "stream_bits": 2},
        {"bits": 2, "weight_grid": "symmetric"},
        {"bits": 4, "weight_grid": "symmetric", "per_channel": True},
        {"bits": 4, "per_channel": True},
        {"weight_bits": 1, "act_bits": 3},
        {"bits": 8},
        {"bits": 2, "act_quantizer": "pact", "weight_quantizer": "dorefa"},
        {"bits": 3, "act_quantizer": "pact", "weight_quantizer": "dorefa", "weight_grid": "symmetric"},
        {"bits": 4, "act_quantizer": "pact", "weight_quantizer": "dorefa", "per_channel": True, "stream_bits": 4},
    ],
)
def test_the_file_alone_gives_the_outputs_bit_for_bit(tmp_path, settings):
    torch.manual_seed(0)
    qmodel = quantized(Residual(), **settings)
    path = export_packed(qmodel, tmp_path / "model.safetensors")
    x = torch.randn(4, 3, 8, 8)
    expected = integer_model(qmodel).model(x).detach().numpy()
    assert np.array_equal(run_by(path, x), expected)
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture(scope="module")
def resnet20(tmp_path_factory):
    torch.manual_seed(0)
    qmodel = quantized(build_model("resnet20"), 32)
    metadata_of(qmodel).preprocessing, metadata_of(qmodel).classes = Preprocessing(32), tuple("abcdefghij")
    return qmodel, export_packed(qmodel, tmp_path_factory.mktemp("packed") / "resnet20.safetensors")


def test_resnet20(resnet20):
    qmodel, path = resnet20
    x = torch.randn(2, 3, 32, 32)
    assert np.array_equal(run_by(path, x), integer_model(qmodel).model(x).detach().numpy())
    weights = sum(m.weight.numel() for m in qmodel.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert weights / 4 < path.stat().st_size < weights / 4 + 34_000
    header = read_packed(path).header
    assert header["preprocessing"]["image_size"] == 32 and header["classes"] == list("abcdefghij")
    assert header["config"]["weight_bits"] == 2
    assert sum(node["op"] == "convolution" for node in header["nodes"]) == 19


def test_tensors_have_the_documented_types(resnet20):
    _, path = resnet20
    with safe_open(path, "np") as file:
        kinds = {name.rpartition(".")[2]: file.get_tensor(name).dtype for name in file.keys() if "conv1" in name}  # noqa: SIM118
    assert kinds == {"weight": np.uint8, "weight_scale": np.float32, "bias": np.int32}


def test_what_stays_float_is_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten()
    )
    qmodel = quantized(model, bits=2, placement="paper")
    packed = read_packed(export_packed(qmodel, tmp_path / "model.safetensors"))
    nodes = packed.header["nodes"]
    assert [node["op"] for node in nodes] == ["float_conv2d", "batch_norm", "gelu", "max_pool2d", "flatten"]
    weight = nodes[0]["attributes"]["weight"]
    scale = packed.tensors[nodes[0]["attributes"]["weight_scale"]["tensor"]]
    expected = qmodel.get_submodule("0").quantized_weight().detach().numpy()
    assert weight["field"] == 2 and np.array_equal(packed.tensors[weight["tensor"]] * scale, expected)
    assert set(nodes[1]["attributes"]) >= {"eps", "weight", "bias", "running_mean", "running_var"}
    assert nodes[3]["attributes"]["kernel_size"] == 2


def test_signs_and_float_weights(tmp_path):
    torch.manual_seed(0)
    qmodel = quantized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), bits=1, input_bits=1, skip=("0",)
    )
    packed = read_packed(export_packed(qmodel, tmp_path / "model.safetensors"))
    ops = {node["op"]: node["attributes"] for node in packed.header["nodes"]}
    assert ops["quantize"]["binary"] and (ops["quantize"]["low"], ops["quantize"]["high"]) == (-1, 1)
    first = next(node for node in packed.header["nodes"] if node["op"] == "float_conv2d")
    assert packed.tensors[first["attributes"]["weight"]["tensor"]].dtype == np.float32


def test_what_it_cannot_hold(tmp_path):
    class Own(nn.Module):
        def forward(self, x):
            return self.attention(x, x, x)[0]

        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    qmodel = brfx.prepare_qat(Own())
    brfx.calibrate(qmodel, [torch.randn(2, 5, 8)])
    with pytest.raises(ExportError, match=r"^attention: "):
        export_packed(qmodel, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="no folder"):
        export_packed(qmodel, tmp_path / "absent" / "model.safetensors")


def test_state_that_changes_in_place_is_refused_and_a_value_is_not(tmp_path):
    class InPlace(nn.Module):
        def __init__(self, counts):
            super().__init__()
            self.conv, self.counts = nn.Conv2d(3, 4, 3), counts
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            y = self.conv(x)
            y.add_(1)
            return y + self.calls.add_(1) if self.counts else y + self.calls

    export_packed(quantized(InPlace(False)), tmp_path / "value.safetensors")
    with pytest.raises(ExportError, match="in place"):
        export_packed(quantized(InPlace(True)), tmp_path / "state.safetensors")


def test_a_product_of_two_activations(tmp_path):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Product()).eval()
    x = torch.randn(3, 6, 6)
    brfx.calibrate(qmodel, [x])
    path = export_packed(qmodel, tmp_path / "model.safetensors")
    assert np.array_equal(run_by(path, x), integer_model(qmodel).model(x).detach().numpy())
    node = read_packed(path).header["nodes"][-1]
    assert node["op"] == "product" and set(node["attributes"]) == {"left", "right", "x", "y"}
