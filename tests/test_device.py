"""The whole way on a device, against the CPU: ``BRFX_TEST_DEVICE=cuda`` takes a GPU. Without it both are the CPU."""

import copy
import os

import pytest
import torch
from torch import nn

import brfx
from brfx.quant.grid import Grid
from brfx.quant.lsq import lsq_quantize
from brfx.regularizers.bin_regularizer import bin_sums

DEVICE = torch.device(os.environ.get("BRFX_TEST_DEVICE", "cpu"))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.fixture
def images():
    return torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def qmodel(images):
    qmodel = brfx.prepare_qat(network(), brfx.QATConfig(bits=2), images)
    brfx.calibrate(qmodel, [images])
    return qmodel


def batches(images, device):
    return [(images.to(device), torch.arange(32, device=device) % 4)] * 4


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_gradients_are_those_of_the_cpu(bits, signed):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, torch.arange(-8, 8) * 0.37, torch.arange(-8, 8) * 0.37 + 0.185])
    found = []
    for device in (torch.device("cpu"), DEVICE):
        x = values.to(device).requires_grad_()
        step = torch.tensor(0.37, device=device, requires_grad=True)
        levels = lsq_quantize(x, step, Grid(bits, signed), gradient_scale=1.0)
        levels.square().sum().backward()
        found.append([levels.detach().cpu(), x.grad.cpu(), step.grad.cpu()])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[1][2], found[0][2])


@pytest.mark.parametrize("bits", [2, 8])
def test_bins_are_those_of_the_cpu(bits):
    values = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    step, grid = torch.tensor(0.37), Grid(bits, True)
    found = [bin_sums(values.to(device), step.to(device), grid) for device in ("cpu", DEVICE)]
    assert torch.equal(found[0][0], found[1][0].cpu())
    torch.testing.assert_close(found[1][1].cpu(), found[0][1])


@pytest.mark.parametrize("form", [False, True])
def test_the_step_has_the_gradients_of_the_cpu(qmodel, images, form):
    found = []
    for device in (torch.device("cpu"), DEVICE):
        penalty = brfx.BinPenalty(copy.deepcopy(qmodel).to(device), weight=0.1, act=0.01).double().train()
        run = penalty.training_form(kernels=False, deferred=False) if form else penalty
        output, br = run(images.to(device).double())
        (output.square().sum() + br.total).backward()
        found.append({name: value.grad.cpu() for name, value in penalty.named_parameters()})
    assert found[0].keys() == found[1].keys()
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_resumes_exactly_and_exports(qmodel, images, tmp_path, precision):
    config = brfx.TrainConfig(epochs=3, lr=0.05, device=str(DEVICE), precision=precision, compile="off")
    data, ends = batches(images, "cpu"), []
    for folder, stops in (("whole", (3,)), ("parts", (1, 3))):
        for epochs in stops:
            model = copy.deepcopy(qmodel).to(DEVICE)
            penalty = brfx.BinPenalty(model, weight=0.1, act=0.01)

            class Stop(brfx.train.Callback):
                def on_epoch(self, metrics, last=epochs):
                    if metrics.epoch == last < 3:
                        raise KeyboardInterrupt

            kept = {"run_dir": tmp_path / folder, "resume": epochs == 3 and folder == "parts", "callbacks": [Stop()]}
            try:
                brfx.fit(model, data, data[:1], config, penalty=penalty, **kept)
            except KeyboardInterrupt:
                continue
            ends.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(end.state_dict().values() for end in ends), strict=True))
    model = ends[0].cpu().eval()
    brfx.snap_biases(model)
    brfx.save(model, tmp_path / "model.pt")
    assert torch.equal(brfx.load(tmp_path / "model.pt", network())(images), model(images))
