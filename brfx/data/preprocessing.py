"""Preprocessing of images: size, mean and standard deviation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from brfx.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image: resized to a square, scaled to 0..1, normalized.

    Attributes:
        image_size: side of the square in pixels.
        mean, std: per RGB channel, of images in 0..1; or one number each, for a model that sees grey images.

    Raises:
        ConfigError: ``mean`` and ``std`` are not three numbers each, or one.
    """

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ConfigError(
                f"--mean of {len(self.mean)} and --std of {len(self.std)} numbers: give three each, or one each for a "
                "model of one channel, which then sees grey images"
            )

    @property
    def channels(self) -> int:
        """That the model sees, 1 or 3."""
        return len(self.mean)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images ``(N, 3, H, W)`` to float32 ``(N, channels, H, W)``, normalized."""
        if self.channels == 1:
            images = _grey(images)
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return images.float().div_(255).sub_(mean).div_(std)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _grey(images: Tensor) -> Tensor:
    """The luma of RGB (ITU-R 601-2), rounded as Pillow's mode L is: uint8 ``(N, 1, H, W)``."""
    red, green, blue = torch.split(images.to(torch.int32), 1, 1)
    grey: Tensor = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)
    return grey


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``(1, C, 1, 1)``; kept, as copying it to a GPU for each batch would wait for the GPU each time."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


#: Documented defaults by data set. CIFAR takes ImageNet's mean and std, as the checkpoints in circulation do.
#: A folder takes the model's own size (32 for the CIFAR ResNets, 224 else).
DEFAULTS = {
    "digits": Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": Preprocessing(32),
    "cifar100": Preprocessing(32),
}


def with_overrides(
    base: Preprocessing,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Preprocessing:
    """``base`` with what the user gave instead of its defaults."""
    changes: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std}
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
