import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.analysis.dead_filters import described
from brfx.io.float_checkpoint import load_float
from brfx.quant.step_init import lsq_step_init

#: Of the real checkpoint, by its batch norms alone.
THIRTEEN = {
    "conv1": [14], "layer1.0.conv1": [2, 8], "layer1.2.conv1": [5, 11], "layer2.1.conv1": [13, 21],
    "layer2.2.conv1": [31], "layer3.0.conv1": [29], "layer3.1.conv1": [0, 28, 59], "layer3.2.conv1": [31],
}  # fmt: skip


class Net(nn.Module):
    """Filters of every kind of layer, and batch norms with and without a ReLU behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(self.up(x).mean((2, 3)))


def prepared(model=None, **config):
    return brfx.prepare_qat(model or Net(), brfx.QATConfig(**{"bits": 2, "placement": "paper"} | config))


def with_dead_filters():
    """Weights of 1e-4 in every layer, and a batch norm's shift that its ReLU never lets through."""
    model = Net()
    with torch.no_grad():
        model.conv1.weight[3].mul_(1e-4)
        model.conv2.weight[1].mul_(1e-4)
        model.up.weight[4:, 2].mul_(1e-4)  # group 1, its third: channel 6
        model.fc.weight[2].mul_(1e-4)
        for norm in (model.norm1, model.norm2):  # behind the second there is an add
            norm.running_mean[3], norm.running_var[5] = 0.5, 1e-8
            norm.weight[5], norm.bias[5] = -1e-4, -6e-4
            norm.weight[6], norm.bias[6] = 1e-4, -4e-4
            norm.weight[7], norm.bias[7] = 1e-4, 6e-4
    return model


DEAD = {"conv1": [3, 5], "conv2": [1], "up": [6], "fc": [2]}


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_filters_of_zeros_and_those_that_no_relu_lets_through_are_found(images, placement, per_channel, caplog):
    caplog.set_level(logging.INFO, "brfx.calibration")
    qmodel = prepared(with_dead_filters(), placement=placement, per_channel=per_channel)
    brfx.calibrate(qmodel, [images])
    # With a step of its own a small filter is not zero; in a grouped transposed convolution groups share theirs.
    found = {"conv1": [5], "up": [6]} if per_channel else DEAD
    assert brfx.dead_filters(qmodel) == found
    assert f"kept as they are: {described(found)}" in caplog.text


def test_a_quantizer_that_values_below_zero_pass_is_no_relu(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight[5], model[1].bias[5] = 1e-4, -1e-2
    qmodel = prepared(model, placement="deploy")
    brfx.calibrate(qmodel, [images])
    assert brfx.dead_filters(qmodel) == {}


def test_a_dead_filter_passes_nothing_and_gets_no_gradient(images):
    qmodel = prepared(with_dead_filters())
    brfx.calibrate(qmodel, [images], batch_statistics=True)
    qmodel.train()(images).square().sum().backward()
    assert qmodel.conv1.weight.grad[5].abs().sum() == 0
    assert qmodel.conv1.weight.grad[[0, 1, 2, 4]].flatten(1).abs().sum(1).min() > 0


def test_one_bit_has_no_zero_and_a_network_without_dead_filters_says_nothing(images, caplog):
    caplog.set_level(logging.INFO, "brfx.calibration")
    qmodel = prepared(with_dead_filters(), weight_bits=1)
    brfx.calibrate(qmodel, [images])
    assert brfx.dead_filters(qmodel) == {"conv1": [5]}
    caplog.clear()
    live = prepared()
    brfx.calibrate(live, [images], dead_filters="revive")
    assert brfx.dead_filters(live) == {} and caplog.text == ""
    assert all(torch.equal(value, live.state_dict()[name]) for name, value in Net().state_dict().items())


def test_revived_filters_are_at_the_layers_scale_and_pass_values_on(images):
    qmodel, again, other = (prepared(with_dead_filters()) for _ in range(3))
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    for model, seed in ((qmodel, 0), (again, 0), (other, 1)):
        brfx.calibrate(model, [images], batch_statistics=True, dead_filters="revive", seed=seed)
        assert brfx.dead_filters(model) == {}
    after = qmodel.state_dict()
    for name, live in (("conv1", [0, 1, 2, 4, 6, 7]), ("conv2", [0, 2, 3, 4, 5, 6, 7]), ("fc", [0, 1, 3])):
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert torch.equal(old[live], new[live])
        rows = [row for row in range(len(new)) if row not in live]
        ratio = new[rows].square().mean().sqrt() / old[live].square().mean().sqrt()
        assert 0.5 < ratio < 2
        assert torch.equal(new, again.state_dict()[f"{name}.weight"])
        assert not torch.equal(new, other.state_dict()[f"{name}.weight"])
    changed = (before["up.weight"] != after["up.weight"]).any(3).any(2).nonzero().tolist()
    assert changed == [[4, 2], [5, 2], [6, 2], [7, 2]]
    assert after["norm1.bias"][[3, 5]].tolist() == [0, 0]
    others = before["norm1.weight"][[0, 1, 2, 4, 6, 7]].abs().mean()
    torch.testing.assert_close(after["norm1.weight"][[3, 5]], others.expand(2))
    assert after["norm1.running_mean"][[3, 5]].tolist() == [0, 0]
    assert after["norm1.running_var"][[3, 5]].tolist() == [1, 1]
    assert after["conv2.bias"][1] == 0 and after["fc.bias"][2] == 0
    qmodel.train()(images).square().sum().backward()
    assert qmodel.conv1.weight.grad[5].abs().sum() > 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_ignored_filters_have_no_part_in_their_layers_step(images, per_channel):
    qmodel, kept = (prepared(with_dead_filters(), per_channel=per_channel) for _ in range(2))
    brfx.calibrate(qmodel, [images], start="lsq", dead_filters="ignore")
    brfx.calibrate(kept, [images], start="lsq")
    step = qmodel.conv1.weight_quantizer.step
    if per_channel:
        assert torch.equal(step, kept.conv1.weight_quantizer.step)
    else:
        live = qmodel.conv1.weight[[0, 1, 2, 4, 6, 7]].detach()
        assert torch.equal(step, lsq_step_init(qmodel.conv1.weight_quantizer.grid, live, ()))
        up = torch.ones(8, 4, dtype=torch.bool)
        up[4:, 2] = False
        expected = lsq_step_init(qmodel.up.weight_quantizer.grid, qmodel.up.weight[up].detach(), ())
        assert torch.equal(qmodel.up.weight_quantizer.step, expected)
    brfx.calibrate(qmodel, [images], start="lsq")  # and is asked for each time
    assert torch.equal(step, kept.conv1.weight_quantizer.step)


def test_a_layer_of_dead_filters_alone(images):
    model = Net()
    model.conv1.weight.data.zero_()
    qmodel = prepared(model)
    brfx.calibrate(qmodel, [images], dead_filters="ignore")
    assert brfx.dead_filters(qmodel) == {"conv1": list(range(8))}
    brfx.calibrate(qmodel, [images], dead_filters="revive")
    assert brfx.dead_filters(qmodel) == {}
    deviation = qmodel.conv1.weight.std().item()
    assert deviation == pytest.approx((2 / 27) ** 0.5, rel=0.2)


def test_what_cannot_be_done_is_refused(images):
    with pytest.raises(brfx.BrfxError, match="dead_filters='cut': takes keep or revive or ignore"):
        brfx.calibrate(prepared(), [images], dead_filters="cut")
    model = Net()
    model.conv1.weight.data[2].zero_()
    nn.utils.parametrizations.weight_norm(model.conv1)
    model.conv1.parametrizations.weight.original0.data[2] = 0
    model.conv1.parametrizations.weight.original1.data[2] = 1
    with pytest.raises(brfx.BrfxError, match="conv1 computes its weight"):
        brfx.calibrate(prepared(model), [images], dead_filters="revive")


def test_a_long_list_is_cut():
    assert described({"a": [1, 2], "b": [0], "c": [3]}, most=2) == "a 1, 2; b 0; and of 1 more layers"


def real(path, **config):
    model = brfx.build_model("resnet20", 10)
    load_float(model, path)
    return prepared(model, **config)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_thirteen_filters_of_the_real_checkpoint_pass_nothing_whatever_the_bits(real_checkpoint, placement):
    assert brfx.dead_filters(real(real_checkpoint, placement=placement)) == THIRTEEN


def test_at_two_bits_there_are_more_and_all_come_back(real_checkpoint):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qmodel = real(real_checkpoint)
    brfx.calibrate(qmodel, [images], start="mse")
    found = brfx.dead_filters(qmodel)
    assert sum(map(len, found.values())) == 21
    assert all(set(channels) <= set(found[name]) for name, channels in THIRTEEN.items())
    brfx.calibrate(qmodel, [images], start="mse", dead_filters="revive")
    assert brfx.dead_filters(qmodel) == {}
