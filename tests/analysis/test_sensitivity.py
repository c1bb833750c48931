import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.calibration import quantization_disabled
from brfx.errors import ConfigError, DataError
from brfx.quant.grid import Grid
from brfx.quant.step_init import mse_step_init


class Net(nn.Module):
    """The second convolution's weights have outliers that few bits lose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)
        with torch.no_grad():
            self.conv2.weight[:, 0] *= 12
            self.fc.weight.copy_(self.fc.weight.sign())

    def forward(self, x):
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


@pytest.fixture
def qmodel(images):
    return brfx.prepare_qat(Net(), brfx.QATConfig(bits=2, weight_bits=3), images)


def test_one_layer_alone_is_quantized(qmodel, images):
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    batches = [images[:2], (images[2:], "labels")]  # the last batch of a data set is a smaller or a larger one
    found = {(layer.name, layer.kind): layer for layer in brfx.sensitivity(qmodel, batches)}
    assert [key for key in found if key[1] == "weights"] == [
        ("conv1", "weights"),
        ("conv2", "weights"),
        ("fc", "weights"),
    ]
    layer = found["conv2", "weights"]
    assert (layer.bits, layer.values, list(layer.losses)) == (3, 576, [2, 3, 4, 8])
    for name, value in qmodel.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)

    for width in (2, 8):  # by hand, in the float network
        other, grid = Net(), Grid(width, signed=True)
        with torch.no_grad():
            step = mse_step_init(grid, other.conv2.weight, ())
            other.conv2.weight.copy_(grid.decode(grid.encode(other.conv2.weight, step), step))
            reference = [F.log_softmax(Net()(x), 1) for x in (images[:2], images[2:])]
            outputs = [F.log_softmax(other(x), 1) for x in (images[:2], images[2:])]
            kl = [(r.exp() * (r - o)).sum() for r, o in zip(reference, outputs, strict=True)]
        assert layer.losses[width] == pytest.approx(float(sum(kl) / len(images)), rel=1e-3)


def test_one_quantizer_of_activations_alone(qmodel, images):
    found = {layer.name: layer for layer in brfx.sensitivity(qmodel, [images]) if layer.kind == "activations"}
    assert found["relu"].bits == 2 and found["relu"].values == 8 * 6 * 6
    calibrated = copy.deepcopy(qmodel)
    brfx.calibrate(calibrated, [images])
    relu = calibrated.get_submodule("relu")
    with torch.no_grad(), quantization_disabled(calibrated):
        reference = F.log_softmax(calibrated(images), 1)
        relu.step.copy_(mse_step_init(relu.grid, torch.relu(calibrated.conv1(images)), ()))
        relu.mode = "quantize"
        output = F.log_softmax(calibrated(images), 1)
    kl = float((reference.exp() * (reference - output)).sum(1).mean())
    assert found["relu"].losses[2] == pytest.approx(kl, rel=1e-3)
    assert not [layer for layer in brfx.sensitivity(qmodel, [images], activations=False) if layer.kind != "weights"]


def test_the_layer_that_needs_bits_gets_them(qmodel, images):
    found = brfx.sensitivity(qmodel, [images], activations=False)
    at_2 = {layer.name: layer.losses[2] for layer in found}
    assert at_2["conv2"] > 5 * at_2["conv1"] > 0 == pytest.approx(at_2["fc"], abs=1e-6)  # a sign has two levels
    bits = {name: settings["weight_bits"] for name, settings in brfx.assign_bits(qmodel, found, mean_bits=6.5)}
    assert bits["fc"] == 2 and bits["conv2"] > bits["conv1"]
    assert all(
        first >= second
        for layer in found
        for first, second in zip(list(layer.losses.values()), list(layer.losses.values())[1:], strict=False)
    )


def test_a_symmetric_grid_a_sign_from_data_and_a_task_of_ones_own(images):
    qmodel = brfx.prepare_qat(Net(), brfx.QATConfig(bits=2, weight_grid="symmetric"), images)
    found = brfx.sensitivity(
        qmodel, [images], widths=(8, 2), distance=lambda output, reference: (output - reference).abs().max()
    )
    assert list(found[0].losses) == [8, 2] and found[0].losses[2] > found[0].losses[8]

    signed = brfx.sensitivity(brfx.prepare_qat(Net(), brfx.QATConfig(bits=2), images), [images], widths=(8,))
    alike = brfx.sensitivity(qmodel, [images], widths=(8,))
    assert [layer.losses for layer in alike[:3]] == [layer.losses for layer in signed[:3]]  # above 4 bits it is signed

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            for part in self.parts if x.sum() > -1e9 else ():
                x = part(x)
            return x

    x = torch.randn(4, 8)
    model = brfx.prepare_qat(Loop(), brfx.QATConfig(bits=4), x)
    found = brfx.sensitivity(model, [x])
    assert {layer.name for layer in found} >= {"parts.0", "parts.0.input_quantizer"}
    assert {layer.name: layer.losses[8] for layer in found}[
        "parts.0.input_quantizer"
    ] < 1e-3  # signed, so little is lost


def test_what_cannot_be_measured_is_refused(qmodel, images):
    with pytest.raises(DataError, match="no batch"):
        brfx.sensitivity(qmodel, [])
    with pytest.raises(ConfigError, match="bits from 1 to 8"):
        brfx.sensitivity(qmodel, [images], widths=(2, 16))
    with pytest.raises(ConfigError, match="conv1 at 2 bits: the outputs' distance from the FP32 network's is nan"):
        brfx.sensitivity(qmodel, [images * float("nan")])
    with pytest.raises(ConfigError, match="no logits: give distance="):
        brfx.sensitivity(qmodel, [images], forward=lambda model, batch: {"out": model(batch)})
