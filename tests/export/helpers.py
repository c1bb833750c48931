"""Networks that packed files are written of."""

import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.config import QATConfig


class Residual(nn.Module):
    """ResNet-20 in small: a stem, a block with an identity shortcut, one with a projection, an average, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.down, self.bn4 = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        x = F.relu(self.bn3(self.conv3(x)) + self.bn4(self.down(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def randomized(model: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, so that folding them has something to do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias)
    return model


def quantized(model: nn.Module, size: int = 8, **settings: object) -> nn.Module:
    qmodel = brfx.prepare_qat(randomized(model), QATConfig(**settings))
    brfx.calibrate(qmodel, [torch.randn(8, 3, size, size)])
    return qmodel.eval()


class Product(nn.Module):
    """Two linears, and the product of what they give."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x).relu() @ self.b(x)
