"""Several batches an update are one large batch, for all that does not look at a batch as a whole."""

import os
import signal
from typing import NamedTuple

import pytest
import torch
from torch import nn

import brfx
from brfx.errors import ConfigError, Interrupted, TrainingError
from brfx.train import Callback, fit


def net():
    """No batch norm; in float64, where sums in another order differ in the last digits alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 3, 8, 8, generator=generator).double(), torch.randint(0, 4, (48,), generator=generator)


def batches(data, size):
    return list(zip(*(part.split(size) for part in data), strict=True))


def settings(**given):
    common = {"epochs": 3, "warmup_epochs": 0, "lr": 0.1, "compile": "off", "clip_grad": 0.5, "ema": 0.9}
    return brfx.TrainConfig(**common | given)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_batches_together_are_the_batch_of_all_their_images(images, optimizer):
    large, small = net(), net()
    fit(large, batches(images, 16), None, settings(optimizer=optimizer))
    result = fit(small, batches(images, 4), None, settings(optimizer=optimizer, accumulate=4))
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not torch.equal(small[0].weight, net()[0].weight)
    assert result.history[-1].lr == fit(net(), batches(images, 16), None, settings()).history[-1].lr


class Terms(NamedTuple):
    total: torch.Tensor


class WeightPenalty(nn.Module):
    """The squared weights of the first layer, of which a batch's images are no part."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def begin(self):
        pass

    def forward(self, images):
        total = 3 * self.model[0].weight.square().sum()
        return self.model(images), Terms(total)


def test_a_penalty_of_the_weights_counts_once_an_update(images):
    large, small = net(), net()
    one = settings(epochs=1, clip_grad=None, ema=0.0)
    first = tuple(part[:16] for part in images)
    fit(large, batches(first, 16), None, one, penalty=WeightPenalty(large))
    four = settings(epochs=1, clip_grad=None, ema=0.0, accumulate=4)
    fit(small, batches(first, 4), None, four, penalty=WeightPenalty(small))
    torch.testing.assert_close(large[0].weight, small[0].weight, rtol=1e-9, atol=1e-12)


def test_the_last_update_of_an_epoch_has_the_batches_that_are_left(images):
    a, b = net(), net()
    given = [*batches(tuple(part[:32] for part in images), 16), *batches(tuple(part[32:40] for part in images), 8)]
    fit(a, given, None, settings())
    fit(b, batches(tuple(part[:40] for part in images), 8), None, settings(accumulate=2))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


class StopAt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_batch(self, progress):
        if (progress.epoch, progress.batch) == (2, self.batch):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_between_updates_ends_bit_for_bit_as_without(images, tmp_path, monkeypatch):
    monkeypatch.setattr("brfx.train.loop.LOG_EVERY", 5)  # asks to stop after the fifth batch, in the second update
    data, config = batches(images, 4), settings(accumulate=4)
    whole, cut = net(), net()
    fit(whole, data, None, config)
    with pytest.raises(Interrupted, match="epoch 2, batch 8"):
        fit(cut, data, None, config, run_dir=tmp_path, callbacks=[StopAt(5)])
    again = net()
    fit(again, data, None, config, run_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="begun with accumulate=4, now it is 2"):
        fit(net(), data, None, settings(accumulate=2), run_dir=tmp_path, resume=True)


def test_a_batch_that_is_not_finite_is_named_and_not_its_update(images):
    data = batches(images, 4)
    data[5] = (data[5][0] * float("nan"), data[5][1])
    with pytest.raises(TrainingError, match="epoch 1, batch 6"):
        fit(net(), data, None, settings(accumulate=4))
    with pytest.raises(ConfigError, match="skip leaves out batches"):
        settings(accumulate=4, on_nonfinite="skip")
    with pytest.raises(ConfigError, match="accumulate=0: takes a number above 0"):
        settings(accumulate=0)
