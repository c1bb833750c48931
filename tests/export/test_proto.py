import onnx
import onnxruntime
import torch
from onnx import helper

import brfx
from brfx.export.proto import _drop_defaults, strip

OPSET = {"": 21}


def attributes(node):
    _drop_defaults(node, OPSET)
    return {attribute.name for attribute in node.attribute}


def test_attributes_with_their_default_are_left_out():
    conv = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "pads": [1, 1, 1, 1], "auto_pad": "NOTSET"}
    assert attributes(helper.make_node("Conv", ["x", "w"], ["y"], **conv)) == {"pads"}
    other = {"strides": [2, 1], "dilations": [1, 2], "group": 2, "auto_pad": "VALID"}
    assert attributes(helper.make_node("Conv", ["x", "w"], ["y"], **other)) == set(other)
    assert attributes(helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.5)) == {"alpha"}
    assert attributes(helper.make_node("QuantizeLinear", ["x", "s"], ["y"], axis=0, saturate=1)) == {"axis"}
    assert attributes(helper.make_node("Own", ["x"], ["y"], domain="own", axis=1)) == {"axis"}


def test_an_exported_file_says_nothing_that_goes_without_saying(tiny, images, tmp_path):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(weight_grid="symmetric"))
    brfx.calibrate(qmodel, [images])
    brfx.snap_biases(qmodel)
    path = tmp_path / "a.onnx"
    brfx.export_onnx(qmodel, path, images)
    before, proto = path.stat().st_size, onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert not any("NOTSET" in str(node) or "block_size" in str(node) for node in proto.graph.node)
    strip(proto)
    assert len(proto.SerializeToString()) == before
    (output,) = onnxruntime.InferenceSession(path).run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), qmodel.eval()(images).detach(), atol=1e-5, rtol=0)
