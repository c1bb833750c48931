import json

import pytest
import torch

import brfx
from brfx.card import card_of
from brfx.data import Preprocessing
from brfx.models import build_model

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(build_model("resnet20"))
    brfx.calibrate(qmodel, [torch.randn(8, 3, 32, 32)])
    card_of(qmodel).preprocessing, card_of(qmodel).classes = Preprocessing(32), tuple("abcdefghij")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    report = brfx.export_onnx(qmodel.train(), path, torch.randn(4, 3, 32, 32))
    assert qmodel.training
    return qmodel.eval(), path, report


def test_onnx_runtime_agrees_on_the_example(exported):
    _, path, report = exported
    assert report.path == path and report.bytes == path.stat().st_size
    assert report.same_top1 == 1
    assert report.max_difference < 1e-3


def test_any_batch_size_runs(exported):
    qmodel, path, _ = exported
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        agree = (torch.from_numpy(found).argmax(1) == qmodel(x).argmax(1)).float().mean()
        assert found.shape == (batch, 10) and agree > 0.8


def test_weights_are_levels_and_the_file_says_how_to_feed_it(exported):
    _, path, _ = exported
    proto = onnx.load(path)
    kernels = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) == 4]
    assert len(kernels) == 19
    assert all(len(set(kernel.flatten().tolist())) <= 4 for kernel in kernels)
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["preprocessing"]["image_size"] == 32
    assert metadata["classes"] == list("abcdefghij")
    assert metadata["brfx_config"]["weight_bits"] == 2
