"""Models of Hugging Face's transformers, from tiny configurations: prepared, calibrated, trained, exported."""

import pytest
import torch

import brfx
from brfx.export import export_onnx
from brfx.nn import QuantizedLayer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 4}


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), (torch.randn(2, 3, 16, 16),)


def bert():
    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config), (torch.randint(0, 50, (2, 12)),)


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config), (torch.randn(2, 3, 32, 32),)


@pytest.mark.parametrize("build", [vit, bert, segformer])
def test_a_model_of_transformers(build, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(weight_bits=8, act_bits=8), inputs)
    brfx.calibrate(qmodel, [inputs[0]])
    wanted, found = model(*inputs).logits.detach(), qmodel.eval()(*inputs).logits.detach()
    assert 10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()) > 25
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert sum(isinstance(module, QuantizedLayer) for module in qmodel.modules()) == len(layers)
    export_onnx(qmodel, tmp_path / "model.onnx", inputs)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    exported = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    torch.testing.assert_close(torch.from_numpy(exported), found, rtol=1e-3, atol=0.01 * float(found.abs().max()))
    before = [parameter.clone() for parameter in qmodel.parameters()]
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.1)
    qmodel.train()(*inputs).logits.square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, qmodel.parameters(), strict=True))
