"""The C of ``examples/packed.c`` computes a packed file: nodes in order, from the bytes as they lie in the file."""

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import brfx
from brfx.export.integer import integer_model
from brfx.io.float_checkpoint import load_float

SOURCE = Path(__file__).parents[2] / "examples" / "packed.c"


class Grid(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_float), ("zero_point", ctypes.c_int), ("low", ctypes.c_int), ("high", ctypes.c_int))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, cc")
    path = tmp_path_factory.mktemp("c") / "packed.so"
    flags = ["-O2", "-std=c99", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, SOURCE, "-o", path, "-lm"], check=True)
    return ctypes.CDLL(path)


def pointer(array):
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


class Program:
    """Walks over the nodes of a file and calls C for each; all but adds and the average is integers there."""

    def __init__(self, library, path):
        self.c = library
        with safe_open(path, "np") as file:
            self.header = json.loads(file.metadata()["brfx"])
            self.stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)

    def __call__(self, x):
        values = {self.header["inputs"][0]: x}
        for node in self.header["nodes"]:
            inputs = [values[name] for name in node["inputs"]]
            values[node["name"]] = getattr(self, node["op"])(*inputs, **node["attributes"])
        return values[self.header["outputs"][0]]

    def requantize(self, x, *, y, scale_out):
        out = np.empty(x.shape, np.int32)
        x = np.ascontiguousarray(x, np.float32)
        self.c.requantize(pointer(x), ctypes.c_size_t(x.size), Grid(**y), pointer(out))
        return out.astype(np.float32) * np.float32(scale_out)

    def codes(self, x, grid):
        return np.rint(x / np.float32(grid["scale"])).astype(np.int32)

    def convolution(self, value, *, weight, headroom, weight_scale, bias, stride, padding, dilation, groups, **grids):
        outs, ins, k, _ = weight["shape"]
        assert groups == 1 and dilation == [1, 1] and stride[0] == stride[1] and padding[0] == padding[1]
        n, _, rows, columns = value.shape
        size = [(length + 2 * padding[0] - k) // stride[0] + 1 for length in (rows, columns)]
        out = np.empty((n, outs, *size), np.int32)
        self.c.convolution(
            *(pointer(self.codes(value, grids["x"])), n, ins, rows, columns, pointer(self.stored[weight["tensor"]])),
            *(weight["field"], int(weight["odd"]), headroom, pointer(self.stored[weight_scale["tensor"]])),
            *(pointer(self.stored[bias["tensor"]]), outs, k, stride[0], padding[0]),
            *(ctypes.c_float(grids["x"]["scale"]), Grid(**grids["y"]), pointer(out)),
        )
        return out.astype(np.float32) * np.float32(grids["y"]["scale"])

    def linear(self, value, *, weight, scale, bias, x):
        outs, ins = weight["shape"]
        scale, out = self.stored[scale["tensor"]], np.empty((len(value), outs), np.float32)
        self.c.linear(
            *(pointer(self.codes(value, x)), len(value), ins, pointer(self.stored[weight["tensor"]]), weight["field"]),
            *(int(weight["odd"]), pointer(scale), int(len(scale) == 1), pointer(self.stored[bias["tensor"]]), outs),
            pointer(out),
        )
        return out

    def add(self, a, b, **_):
        return a + b

    def adaptive_avg_pool2d(self, x, **_):
        return x.astype(np.float64).mean((2, 3), keepdims=True).astype(np.float32)

    def mean(self, x, **_):
        return x.astype(np.float64).mean((2, 3)).astype(np.float32)

    def flatten(self, x, **_):
        return x.reshape(len(x), -1)

    def pad(self, x, *, pad, **_):  # the shortcut without weights of the CIFAR ResNets: zeros as further channels
        pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
        return np.pad(x, pairs)

    def getitem(self, x, *, index):
        return x[tuple(slice(*part["slice"]) for part in index)]


@pytest.mark.parametrize("settings", [{"bits": 2, "weight_grid": "symmetric"}, {"bits": 4}, {"bits": 8}], ids=str)
def test_resnet20_is_computed_bit_for_bit(library, real_checkpoint, tmp_path, settings):
    model = brfx.build_model("resnet20", 10)
    load_float(model, real_checkpoint)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qmodel = brfx.prepare_qat(model.eval(), brfx.QATConfig(**settings), x)
    brfx.calibrate(qmodel, [x], start="lsq")
    path = brfx.export_packed(qmodel, tmp_path / "resnet20.safetensors")
    expected = integer_model(qmodel).model(x).detach().numpy()
    assert np.array_equal(Program(library, path)(x.numpy()), expected)


def test_a_code_and_a_rounding_are_those_of_the_format(library):
    """The page's own example of packing, as a linear of ones; halves go to the even code, bounds hold."""
    packed, out = np.array([0xC9, 0x01], np.uint8), np.empty((5, 1), np.float32)
    x, one, zero = np.eye(5, dtype=np.int32), np.ones(1, np.float32), np.zeros(1, np.float32)
    library.linear(pointer(x), 5, 5, pointer(packed), 2, 0, pointer(one), 1, pointer(zero), 1, pointer(out))
    assert out[:, 0].tolist() == [1, -2, 0, -1, 1]
    values, codes = np.array([0.25, 0.75, -9.0, 9.0], np.float32), np.empty(4, np.int32)
    library.requantize(pointer(values), ctypes.c_size_t(4), Grid(0.5, 4, 1, 6), pointer(codes))
    assert codes.tolist() == [0, 2, -3, 2]
