"""A small U-Net (Ronneberger et al., arXiv:1505.04597) with batch norms: a segmenter of one's own.

brfx train --model examples/unet.py:unet --task segmentation --data ../shared/data/nuclei
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Logits ``(batch, num_classes, H, W)`` of images ``(batch, 3, H, W)``, whose sides are multiples of 8."""

    def __init__(self, num_classes: int = 2, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(double_conv(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        widths.reverse()
        self.enlarge = nn.Upsample(scale_factor=2)
        self.up = nn.ModuleList(double_conv(i + o, o) for i, o in pairwise(widths))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([skips.pop(), self.enlarge(x)], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


def unet(num_classes: int = 2) -> UNet:
    return UNet(num_classes)
