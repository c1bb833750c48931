"""``fit`` on loaders of torch's own: with and without a length, with generators and samplers of their own."""

import os
import signal
from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import brfx
from brfx.errors import ConfigError, DataError, Interrupted
from brfx.train import Callback, fit


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(240, 3, 2, 2, generator=generator), torch.randint(0, 4, (240,), generator=generator)
    return TensorDataset(images, labels)


class Stream(IterableDataset):
    """Samples without end, or without saying how many; one that tells epochs apart."""

    def __init__(self, data, repeats=1):
        self.data, self.repeats, self.epochs = data, repeats, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for _ in range(self.repeats):
            yield from self.data


def settings(**given):
    return brfx.TrainConfig(**{"epochs": 2, "lr": 0.1, "compile": "off"} | given)


def weights(data, config=None, **more):
    model = net()
    fit(model, data, None, config or settings(), **more)
    return model[1].weight


def test_data_without_a_length_is_trained_on_when_the_settings_say_how_many_batches_an_epoch_has(data):
    stream = Stream(data, repeats=3)
    with pytest.raises(ConfigError, match=r"train_data has no length \(.*\): say how many .*epoch_batches="):
        weights(DataLoader(stream, 8))
    found = weights(DataLoader(stream, 8), settings(epoch_batches=30))
    assert stream.epochs == [1, 2]
    assert torch.equal(found, weights(DataLoader(data, 8)))
    assert torch.equal(
        weights(DataLoader(data, 8), settings(epoch_batches=5)), weights(list(islice(DataLoader(data, 8), 5)))
    )


def test_an_epoch_that_ends_early_is_an_error_and_not_a_shorter_schedule(data):
    with pytest.raises(DataError, match=r"epoch 1: train_data gave 30 batches, not 31, .*epoch_batches="):
        weights(DataLoader(Stream(data), 8), settings(epoch_batches=31))
    with pytest.raises(ConfigError, match=r"epoch_batches=0: takes a number above 0"):
        settings(epoch_batches=0)


class Noisy(Dataset):
    """Draws by the global generator, in the workers by theirs; or by its own."""

    def __init__(self, data, generator=None):
        self.data, self.generator = data, generator

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + 0.1 * torch.randn(image.shape, generator=self.generator), label


def own_generator(data):
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5))


def own_sampler(data):
    return DataLoader(data, 8, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(5)))


def workers(data):
    return DataLoader(Noisy(data), 8, shuffle=True, generator=torch.Generator().manual_seed(5), num_workers=2)


class StopAt(Callback):
    def __init__(self, epoch, batch):
        self.where = epoch, batch

    def on_batch(self, progress):
        if (progress.epoch, progress.batch) == self.where:
            os.kill(os.getpid(), signal.SIGTERM)


def own_data_set(data):
    return DataLoader(Noisy(data, torch.Generator().manual_seed(5)), 8)


@pytest.mark.parametrize("make", [own_generator, own_sampler, own_data_set, workers])
def test_a_run_goes_on_exactly_on_a_loader_with_a_generator_of_its_own(data, tmp_path, make):
    expected = weights(make(data))
    assert not torch.equal(expected, weights(DataLoader(data, 8)))
    with pytest.raises(Interrupted):
        weights(make(data), run_dir=tmp_path, callbacks=[StopAt(2, 10)])
    assert torch.equal(weights(make(data), run_dir=tmp_path, resume=True), expected)


def test_samplers_are_told_the_epoch(data):
    class Sampler(RandomSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    sampler = Sampler(data)
    weights(DataLoader(data, 8, sampler=sampler))
    assert sampler.epochs == (1, 2)
    weights(DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False)))
    assert sampler.epochs == (1, 2, 1, 2)
