import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import brfx
from brfx.errors import ExportError
from brfx.export.packed import export_packed
from brfx.export.packed_reader import read_packed

from .helpers import Product, Residual, quantized


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A good file as header and stored tensors."""
    torch.manual_seed(0)
    path = export_packed(quantized(Residual()), tmp_path_factory.mktemp("good") / "model.safetensors")
    with safe_open(path, "np") as file:
        return file.metadata()["brfx"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _node(header, op):
    return next(node for node in header["nodes"] if node["op"] == op)["attributes"]


def _lowest(tensors):
    """Make all codes of the stem -2."""
    tensors["stem.weight"] = np.full_like(tensors["stem.weight"], 0b10101010)


HOSTILE = {
    "version": (lambda h, t: h.update(format_version=9), "format version 9"),
    "no version": (lambda h, t: h.pop("format_version"), "format version None"),
    "no nodes": (lambda h, t: h.pop("nodes"), "no 'nodes'"),
    "nodes a number": (lambda h, t: h.update(nodes=3), "wrong 'nodes'"),
    "node without op": (lambda h, t: h["nodes"][0].pop("op"), "node 0"),
    "node twice": (lambda h, t: h["nodes"].append(h["nodes"][0]), "twice"),
    "cycle": (lambda h, t: h["nodes"][0].update(inputs=[h["nodes"][0]["name"]]), "no node before"),
    "output": (lambda h, t: h.update(outputs=["nowhere"]), "nowhere"),
    "classes": (lambda h, t: h.update(classes=[1]), "classes"),
    "tensor gone": (lambda h, t: t.pop("stem.weight"), "no tensor 'stem.weight'"),
    "tensor short": (lambda h, t: t.update({"stem.weight": t["stem.weight"][:-1]}), "bytes"),
    "tensor surplus": (lambda h, t: t.update(more=np.zeros(3)), "more"),
    "code": (lambda h, t: (_lowest(t), _node(h, "convolution")["weight"].update(bits=1)), "codes beyond"),
    "bits": (lambda h, t: _node(h, "convolution")["weight"].update(bits=2**40), "takes 1 to 8"),
    "field": (lambda h, t: _node(h, "convolution")["weight"].update(field=8), "fields of 2"),
    "shape": (lambda h, t: _node(h, "convolution")["weight"].update(shape=[2**30] * 4), "bytes"),
    "negative shape": (lambda h, t: _node(h, "convolution")["weight"].update(shape=[-8, -27]), "shape"),
    "stride": (lambda h, t: _node(h, "convolution").update(stride=[0, 1]), "stride"),
    "padding": (lambda h, t: _node(h, "convolution").update(padding="same"), "padding"),
    "groups": (lambda h, t: _node(h, "convolution").update(groups=True), "groups"),
    "headroom": (lambda h, t: (_lowest(t), _node(h, "convolution").update(headroom=127)), "headroom"),
    "grid": (lambda h, t: _node(h, "convolution")["x"].update(high=256), "x="),
    "scale": (lambda h, t: _node(h, "convolution")["y"].update(scale=float("nan")), "y="),
    "zero scale": (lambda h, t: _node(h, "requantize").update(scale_out=0), "scale_out"),
    "no bias": (lambda h, t: _node(h, "linear").pop("bias"), "bias"),
    "bias type": (lambda h, t: t.update({"stem.bias": t["stem.bias"].astype(np.float32)}), "int32"),
    "bias size": (lambda h, t: t.update({"fc.bias": t["fc.bias"][:2]}), "bias"),
    "overflow": (lambda h, t: t.update({"stem.bias": t["stem.bias"] | np.int32(2**31 - 1)}), "32 bits"),
    "nan": (lambda h, t: t.update({"fc.scale": t["fc.scale"] * np.float32("nan")}), "finite"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path, parts, case):
    header, tensors = json.loads(parts[0]), dict(parts[1])
    change, message = HOSTILE[case]
    change(header, tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"brfx": json.dumps(header)})
    with pytest.raises(ExportError, match=message) as error:
        read_packed(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"format_version": 1'])
def test_headers_that_are_none(tmp_path, text):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1, np.uint8)}, path, metadata={"brfx": text})
    with pytest.raises(ExportError):
        read_packed(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, struct.pack("<Q", 2**60) + b"{}", b"PK\x03\x04 and so on"])
def test_files_that_are_none(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError):
        read_packed(path)
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ExportError, match="no key"):
        read_packed(path)
    with pytest.raises(ExportError, match="no such file"):
        read_packed(tmp_path / "absent")


@pytest.mark.parametrize("part", ["left", "right", "x", "y"])
def test_a_product_without_one_of_its_parts_is_refused(tmp_path, part):
    qmodel = brfx.prepare_qat(Product()).eval()
    brfx.calibrate(qmodel, [torch.randn(3, 6, 6)])
    path = export_packed(qmodel, tmp_path / "model.safetensors")
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["brfx"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["nodes"][-1]["attributes"][part]
    save_file(tensors, path, {"brfx": json.dumps(header)})
    with pytest.raises(ExportError, match=f"has no (value|grid) '{part}'"):
        read_packed(path)
