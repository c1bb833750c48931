"""Every method of quantization, from preparing to exporting, through what all of them have in common."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import brfx
from brfx.calibration import quantizers
from brfx.config import QATConfig, TrainConfig
from brfx.errors import ConfigError, ExportError
from brfx.export.integer import integer_model
from brfx.export.layers import codes_of
from brfx.export.parity import compare_codes
from brfx.nn import ActivationQuantizer, WeightQuantizer
from brfx.quant.factory import ACT_QUANTIZERS, WEIGHT_QUANTIZERS, activation_quantizer, relu_quantizer, weight_quantizer
from brfx.train.batch_norm import reestimate_batch_norm
from brfx.train.step import build_step

METHODS = [(weights, acts) for weights in WEIGHT_QUANTIZERS for acts in ACT_QUANTIZERS]


class Block(nn.Module):
    """A stem, a block with an identity shortcut, one with a projection, a product of two activations, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.down, self.bn3 = nn.Conv2d(8, 16, 1, stride=2), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn1(self.conv1(x)) + x)
        x = F.relu6(self.bn2(self.conv2(x)) + self.bn3(self.down(x)))
        return self.fc(x.mean((2, 3)))


def settings(weights: str, acts: str, **more: object) -> QATConfig:
    return QATConfig(bits=2, weight_quantizer=weights, act_quantizer=acts, **more)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=random), torch.randint(4, (8,), generator=random)) for _ in range(count)]


def prepared(config: QATConfig) -> nn.Module:
    torch.manual_seed(0)
    data = batches()
    qmodel = brfx.prepare_qat(Block(), config, data[0][0])
    brfx.calibrate(qmodel, [images for images, _ in data], batch_statistics=True)
    reestimate_batch_norm(qmodel, [images for images, _ in data])
    return qmodel


@pytest.fixture(scope="module", params=METHODS, ids="-".join)
def trained(request) -> nn.Module:
    qmodel = prepared(settings(*request.param))
    before = copy.deepcopy(qmodel.state_dict())
    train = TrainConfig(epochs=2, warmup_epochs=1, lr=0.05, compile="off")
    result = brfx.fit(qmodel, batches(), None, train, penalty=brfx.BinPenalty(qmodel, weight=0.1, act=0.01))
    assert result.epoch == 2
    moved = {key for key, value in qmodel.state_dict().items() if not torch.equal(value, before[key])}
    for name, quantizer in quantizers(qmodel).items():
        assert all(f"{name}.{scale}" in moved for scale in quantizer.own_rate)
    brfx.snap_biases(qmodel)
    return qmodel.eval()


def test_every_quantizer_is_of_the_method_that_was_chosen(trained: nn.Module) -> None:
    config = brfx.metadata.metadata_of(trained).config
    weight = type(weight_quantizer(2, method=config.weight_quantizer))
    acts = {type(activation_quantizer(2, signed=False, method=config.act_quantizer))}
    acts.add(type(relu_quantizer(2, method=config.act_quantizer)))
    for quantizer in quantizers(trained).values():
        if isinstance(quantizer, WeightQuantizer):
            assert type(quantizer) is weight
        elif not quantizer.signed and not quantizer.is_stream:
            assert type(quantizer) in acts
    assert any(type(quantizer) in acts for quantizer in quantizers(trained).values())


def test_all_of_it_runs_on_grids(trained: nn.Module) -> None:
    report = brfx.audit(trained, batches()[0][0])
    assert report.mac_share == 1 and not report.never_hit
    (fc,) = (layer for layer in report.layers if layer.name == "fc")
    assert fc.parameters == 16 * 4 + 4 and fc.weight_bits == 2 and fc.step > 0
    for layer in trained.modules():
        if isinstance(layer, WeightQuantizer | ActivationQuantizer):
            x = torch.randn(4, 3) if layer.signed else torch.rand(4, 3)
            if layer.step.numel() == 1:
                integers, scale = layer.integers(x)
                assert torch.equal(integers * scale, layer(x).detach())


def test_a_file_gives_the_same_model_back(trained: nn.Module, tmp_path: Path) -> None:
    brfx.save(trained, tmp_path / "model.pt")
    again = brfx.load(tmp_path / "model.pt", Block())
    x = batches()[0][0]
    assert torch.equal(again(x), trained(x))
    assert set(brfx.float_state_dict(trained)) == set(Block().state_dict())


def test_no_code_of_the_integer_form_differs_by_more_than_rounding(trained: nn.Module) -> None:
    for site in compare_codes(trained, integer_model(trained), batches()[0][0]):
        assert site.flipped <= 0.002 * site.codes + 1 and site.largest <= 1


def test_onnx_runtime_computes_the_integers_bit_for_bit(trained: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    report = brfx.export_onnx(trained, tmp_path / "model.onnx", batches()[0][0], profile="portable")
    assert report.reference_difference == 0 and not report.float_layers and len(report.sites) == 7


def test_a_torch_program_holds_the_levels(trained: nn.Module, tmp_path: Path) -> None:
    x = batches()[0][0]
    brfx.export_torch(trained, tmp_path / "model.pt2", x)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), trained(x))


@pytest.mark.parametrize("weights", ["lsq", "dorefa"])
@pytest.mark.parametrize("grid", ["signed", "symmetric"])
def test_codes_kept_for_backward_change_no_gradient(weights: str, grid: str) -> None:
    plain, fast = (prepared(settings(weights, "pact", stream_bits=2, weight_grid=grid)).train() for _ in range(2))
    penalties = [brfx.BinPenalty(qmodel) for qmodel in (plain, fast)]
    x = batches()[0][0]
    for run in (penalties[0], penalties[1].training_form(kernels=False)):
        output, terms = run(x)
        (output.square().sum() + terms.total).backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kernels", "whole"])
def test_compiled_forms_have_the_same_losses_and_gradients(how: str) -> None:
    images, labels = batches()[0]
    found = []
    for form in ("none", how):
        qmodel = prepared(settings("dorefa", "pact", stream_bits=2)).train()
        loss, numbers = build_step(qmodel, brfx.BinPenalty(qmodel, weight=0.1, act=0.01), form)(images, labels)
        loss.backward()
        found.append((numbers, {name: parameter.grad for name, parameter in qmodel.named_parameters()}))
    (numbers, gradients), (compiled_numbers, compiled_gradients) = found
    for wanted, compiled in ((numbers, compiled_numbers), (gradients, compiled_gradients)):
        for name, value in wanted.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


class Functional(nn.Module):
    """A weight that a function reads: as it is, or ``scaled``, which is computed."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.weight, self.scaled = nn.Parameter(torch.randn(40, 30)), scaled

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(x), self.weight * 2 if self.scaled else self.weight)


def functional(scaled: bool = False) -> nn.Module:
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Functional(scaled), settings("dorefa", "pact"))
    brfx.calibrate(qmodel, [torch.randn(8, 30)])
    return qmodel.eval()


def test_a_weight_that_a_function_reads_is_exported_prepared(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    qmodel, x = functional(), torch.randn(4, 30)
    before = qmodel(x)
    torch.testing.assert_close(integer_model(qmodel).model(x), before)
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", x, profile="portable")
    brfx.export_qonnx(qmodel, tmp_path / "model.qonnx.onnx", x)
    assert report.reference_difference < 1e-5
    for name in ("model.onnx", "model.qonnx.onnx"):
        assert "Tanh" not in {node.op_type for node in onnx.load(tmp_path / name).graph.node}
    brfx.export_packed(qmodel, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        nodes = json.loads(file.metadata()["brfx"])["nodes"]
        (node,) = (node for node in nodes if node["op"] == "quantize")
        (source,) = (other for other in nodes if other["name"] in node["inputs"])
        values = file.get_tensor(source["attributes"]["value"]["tensor"])
    (weight,) = (quantizer for quantizer in quantizers(qmodel).values() if isinstance(quantizer, WeightQuantizer))
    assert torch.equal(values, weight.prepare(qmodel.weight).detach()) and not weight.prepared
    assert torch.equal(qmodel(x), before)


def test_a_preparation_that_a_packed_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"weight: a packed file has no form for what a DoReFaWeightQuantizer does"):
        brfx.export_packed(functional(scaled=True), tmp_path / "model.safetensors")


def test_codes_alone_are_no_form_of_what_is_prepared_first() -> None:
    quantizer = weight_quantizer(2, method="dorefa")
    quantizer.begin_calibration()
    quantizer(torch.randn(9))
    assert codes_of(quantizer) is None
    quantizer.prepared = True
    assert codes_of(quantizer).high == 3


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_attention_takes_weights_through_their_quantizers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    qmodel = brfx.prepare_qat(Tokens(), settings("dorefa", "pact", per_channel=True)).eval()
    brfx.calibrate(qmodel, [x])
    integer = integer_model(qmodel)
    assert len(integer.layers) == 4 and not integer.float_layers
    torch.testing.assert_close(integer.model(x), qmodel(x))


@pytest.mark.parametrize("name", ["weight_quantizer", "act_quantizer"])
def test_an_unknown_method_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}='log2': takes 'lsq' or"):
        QATConfig(**{name: "log2"})


def test_a_layer_can_have_a_method_of_its_own() -> None:
    config = QATConfig(bits=2, overrides=(("conv1", {"weight_quantizer": "dorefa"}), ("type:ReLU6", {"bits": 4})))
    qmodel = brfx.prepare_qat(Block(), config)
    kinds = {name: type(module).__name__ for name, module in quantizers(qmodel).items()}
    assert kinds["conv1.weight_quantizer"] == "DoReFaWeightQuantizer" != kinds["conv2.weight_quantizer"]


def test_what_may_be_negative_has_a_signed_grid_whatever_the_method() -> None:
    for signed in (True, None):
        assert type(activation_quantizer(2, signed=signed, method="pact")).__name__ == "LSQActivationQuantizer"


def test_a_method_is_named_in_its_own_file_and_in_the_factory_alone() -> None:
    package = Path(brfx.__file__).parent
    for method in set(ACT_QUANTIZERS) | set(WEIGHT_QUANTIZERS):
        if method != "lsq":
            files = [
                path for path in package.rglob("*.py") if re.search(rf"\b{method}", path.read_text(), re.IGNORECASE)
            ]
            assert {path.name for path in files} == {"factory.py", f"{method}.py"}
            own = next(path for path in files if path.name == f"{method}.py")
            assert len(own.read_text().splitlines()) < 150
    builds = [
        path.name
        for path in package.rglob("*.py")
        if re.search(
            r"LSQ\w*Quantizer|StreamQuantizer\(|QuantizedClippedReLU\(", re.sub(r'"""[\s\S]*?"""', "", path.read_text())
        )
    ]
    assert sorted(builds) == ["__init__.py", "factory.py", "lsq.py"]
