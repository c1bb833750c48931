import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.analysis.weight_statistics import quantized_weights
from brfx.data import BatchLoader
from brfx.errors import ConfigError
from brfx.train import fit
from tests.train.helpers import small_net


def calibrated(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    brfx.calibrate(qmodel, [images], start="lsq")
    return qmodel


@pytest.mark.parametrize("config", [{"bits": 2}, {"weight_bits": 1}, {"bits": 4, "per_channel": True}])
def test_figures_are_those_of_their_formulas(tiny, images, config):
    qmodel = calibrated(tiny, images, **config)
    statistics = brfx.WeightStatistics(qmodel, after=1)
    statistics.begin()
    first = statistics(1, 10)
    assert list(first) == ["conv1", "conv2", "fc"]
    before = {name: qmodel.get_submodule(name).quantized_weight() for name in first}
    for name, figures in first.items():
        layer = qmodel.get_submodule(name)
        weight, step = layer.weight.detach(), layer.weight_quantizer.step.detach()
        regularizer = brfx.BinRegularizer(layer.weight_quantizer.bits)
        diagnosis = regularizer.diagnose(weight, step)
        distance = (weight - before[name].detach()).abs() / (step / 2)
        assert figures["distance"] == pytest.approx(distance.mean().item(), rel=1e-6)
        assert figures["distance"] == pytest.approx(1 - diagnosis.effectiveness / 100, rel=1e-5)
        assert figures["mse"] == pytest.approx(diagnosis.mse / weight.square().mean().item(), rel=1e-6)
        assert (figures["closed"], figures["flips"]) == (0, 0)
    with torch.no_grad():
        for name in first:  # three quarters of the way to the level, and ten weights to another code
            layer = qmodel.get_submodule(name)
            layer.weight.lerp_(before[name], 0.75)
            layer.weight.view(-1)[:10] = -before[name].view(-1)[:10]
    second = statistics(2, 20)
    for name, figures in second.items():
        now = qmodel.get_submodule(name).quantized_weight()
        changed = int((now != before[name]).sum())
        assert figures["flips"] == pytest.approx(1000 * changed / now.numel() / 20)
        assert figures["closed"] == pytest.approx(1 - figures["distance"] / first[name]["distance"])
        assert figures["closed"] > 0.7
    assert sum(figures["flips"] for figures in second.values()) > 0
    assert {figures["flips"] for figures in statistics(3, 20).values()} == {0}


def test_before_the_epoch_that_is_measured_from_nothing_is_closed(tiny, images):
    qmodel = calibrated(tiny, images)
    deferred, early = brfx.WeightStatistics(qmodel, after=2), brfx.WeightStatistics(qmodel)
    for statistics, expected in ((deferred, [None, 0, 0]), (early, [0, 0, 0])):
        statistics.begin()
        assert [statistics(epoch, 1)["fc"]["closed"] for epoch in (1, 2, 3)] == expected


def test_a_state_goes_on_where_it_was(tiny, images):
    qmodel = calibrated(tiny, images)
    whole = brfx.WeightStatistics(qmodel)
    whole.begin()
    resumed = brfx.WeightStatistics(qmodel)
    resumed.load_state_dict(whole.state_dict())
    with torch.no_grad():
        qmodel.fc.weight.neg_()
    assert resumed(1, 5) == whole(1, 5)
    assert whole(1, 5)["fc"]["flips"] == 0


class Others(nn.Module):
    """A weight that functions compute, one of spectral norm, and attention."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel - self.kernel.mean()))
        x = self.normed(x).flatten(2).transpose(1, 2)
        return self.attention(x, x, x)[0]


def test_weights_of_functions_and_of_attention_have_names_and_reading_moves_no_buffer(images):
    torch.manual_seed(0)
    qmodel = calibrated(Others(), images).train()
    buffers = {name: value.clone() for name, value in qmodel.named_buffers()}
    weights = {name: weight for name, weight, _ in quantized_weights(qmodel)}
    assert len(weights) == len([name for name in qmodel.state_dict() if "weight" in name and name.endswith("step")])
    assert {"normed", "conv2d_weight"} <= set(weights)
    torch.testing.assert_close(weights["conv2d_weight"], qmodel.kernel - qmodel.kernel.mean())
    for name, value in qmodel.named_buffers():
        value.copy_(buffers[name])
    statistics = brfx.WeightStatistics(qmodel)
    statistics.begin()
    assert set(statistics(1, 1)) == set(weights)
    assert qmodel.training
    assert all(torch.equal(value, buffers[name]) for name, value in qmodel.named_buffers())


def test_a_network_of_zeros_has_figures(tiny, images):
    for parameter in tiny.parameters():
        parameter.data.zero_()
    figures = brfx.WeightStatistics(calibrated(tiny, images))(1, 1)["fc"]
    assert figures == {"distance": 0, "closed": None, "mse": 0, "flips": 0}


def train(digits, run_dir, weight, **settings):
    qmodel = brfx.prepare_qat(small_net(), brfx.QATConfig(bits=2))
    data = BatchLoader(digits.train, digits.preprocessing, 64, augment=True, flip=False, drop_last=True)
    brfx.calibrate(qmodel, [next(iter(data))], start="mse", batch_statistics=True)
    config = brfx.TrainConfig(epochs=3, warmup_epochs=1, compile="off", **settings)
    penalty = brfx.BinPenalty(qmodel, weight, act=0, form="per_value") if weight else None
    statistics = brfx.WeightStatistics(qmodel, after=1)
    val = BatchLoader(digits.val, digits.preprocessing, 256)
    fit(qmodel, data, val, config, penalty=penalty, statistics=statistics, run_dir=run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["weights"] for line in lines]


def test_a_run_tells_the_figures_of_each_epoch_with_a_regularizer_and_without(digits, tmp_path):
    ends = []
    for weight in (0.0, 1.0):
        run_dir = tmp_path / str(weight)
        run_dir.mkdir()
        logged = train(digits, run_dir, weight)
        assert [set(figures) for figures in logged] == [{"0", "3", "8"}] * 3
        assert [{figures["closed"] == 0 for figures in epoch.values()} for epoch in logged] == [
            {True},
            {False},
            {False},
        ]
        assert logged[0]["3"]["flips"] > 0
        ends.append(logged[-1])
        last = torch.load(run_dir / "last.pth", weights_only=True)
        assert last["metrics"]["weights"] == logged[-1]
    for layer in ("0", "3", "8"):
        assert ends[1][layer]["closed"] > 0.5 > ends[0][layer]["closed"]
        assert ends[1][layer]["mse"] < ends[0][layer]["mse"]


def test_the_weights_that_are_validated_are_the_ones_measured(digits, tmp_path):
    logged = train(digits, tmp_path, 0.0, ema=0.99)
    averaged = torch.load(tmp_path / "last.pth", weights_only=True)["state_dict"]
    weight, step = averaged["8.weight"], averaged["8.weight_quantizer.step"]
    assert logged[-1]["8"]["distance"] == pytest.approx(
        1 - brfx.BinRegularizer(2).diagnose(weight, step).effectiveness / 100, rel=1e-5
    )


def test_a_run_that_was_begun_without_is_not_gone_on_with(digits, tmp_path):
    class Stop(brfx.train.Callback):
        def on_epoch(self, metrics):
            raise KeyboardInterrupt

    qmodel = brfx.prepare_qat(small_net(), brfx.QATConfig(bits=2))
    data = BatchLoader(digits.train, digits.preprocessing, 64, drop_last=True)
    brfx.calibrate(qmodel, [next(iter(data))])
    config = brfx.TrainConfig(epochs=2, compile="off")
    with pytest.raises(KeyboardInterrupt):
        fit(qmodel, data, data, config, run_dir=tmp_path, callbacks=[Stop()])
    with pytest.raises(ConfigError, match="begun without statistics"):
        fit(qmodel, data, data, config, run_dir=tmp_path, resume=True, statistics=brfx.WeightStatistics(qmodel))
