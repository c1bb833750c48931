"""Preprocessing of images: size, mean and standard deviation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image: resized to a square, scaled to 0..1, normalized.

    Attributes:
        image_size: side of the square in pixels.
        mean, std: per RGB channel, of images in 0..1.
    """

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images ``(N, 3, H, W)`` to float32, normalized."""
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return images.float().div_(255).sub_(mean).div_(std)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """``(1, 3, 1, 1)``; kept, as copying it to a GPU for each batch would wait for the GPU each time."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


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
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Preprocessing:
    """``base`` with what the user gave instead of its defaults."""
    changes: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std}
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
