import torch
from torch import nn

import brfx
from brfx.data import BatchLoader


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def loaders(digits, batch=64):
    train = BatchLoader(digits.train, digits.preprocessing, batch, augment=True, flip=False, drop_last=True)
    return train, BatchLoader(digits.val, digits.preprocessing, 256)


def quantized(digits, **config):
    qmodel = brfx.prepare_qat(small_net(), brfx.QATConfig(**config))
    train, _ = loaders(digits)
    brfx.calibrate(qmodel, [next(iter(train))], start="mse", batch_statistics=True)
    return qmodel
