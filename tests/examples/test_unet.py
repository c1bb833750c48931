"""The U-Net of ``examples/unet.py``: every multiplication quantized, computed right, exported bit for bit."""

import runpy
from pathlib import Path

import torch

import brfx

FILE = Path(__file__).parents[2] / "examples" / "unet.py"


def test_the_unet_is_quantized_whole_and_exported_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = runpy.run_path(str(FILE))["unet"](num_classes=3)
    images = torch.rand(2, 3, 24, 16)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=4), example_inputs=(images,))
    assert brfx.audit(qmodel, images).mac_share == 1
    model.eval(), qmodel.eval()
    with brfx.quantization_disabled(qmodel):
        assert torch.allclose(qmodel(images), model(images), atol=1e-5)
    assert model(images).shape == (2, 3, 24, 16)
    brfx.calibrate(qmodel, [images])
    report = brfx.export_onnx(qmodel, tmp_path / "unet.onnx", images)
    assert report.reference_difference == 0 and not report.float_layers
