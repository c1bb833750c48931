"""Augmentation by torchvision's transforms, as a function of seeds: a resumed run varies each image as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from brfx.config import Augmentation
from brfx.data.image_files import pixels
from brfx.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


class VaryImage:
    """A picture to uint8 ``(3, S, S)`` by the seed of its place: a resized crop, or the square of evaluation; then
    RandAugment."""

    def __init__(self, augmentation: Augmentation, preprocessing: Preprocessing, seeds: Tensor) -> None:
        steps: list[Callable[[Any], Any]] = []
        if augmentation.crop == "resized":
            size = (preprocessing.image_size, preprocessing.image_size)
            steps.append(v2.RandomResizedCrop(size, interpolation=InterpolationMode(preprocessing.interpolation)))
        else:
            steps.append(preprocessing.square)
        if augmentation.rand_augment:
            steps.append(v2.RandAugment(magnitude=augmentation.rand_augment))
        self.steps, self.seeds = steps, seeds

    def __call__(self, image: Image, place: int) -> Tensor:
        with seeded(int(self.seeds[place])):
            for step in self.steps:
                image = step(image)
        return pixels(image)

    def all(self, images: Tensor, places: Tensor) -> Tensor:
        """The same of uint8 ``(N, 3, H, W)``."""
        from PIL import Image

        pictures = (Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images)
        return torch.stack([self(picture, place) for picture, place in zip(pictures, places.tolist(), strict=True)])


class Erase:
    """Normalized images ``(N, C, S, S)``, of which some lose a rectangle to zeros, by a seed for each."""

    def __init__(self, probability: float) -> None:
        self.erase = v2.RandomErasing(p=probability)

    def __call__(self, images: Tensor, seeds: list[int]) -> Tensor:
        for i, seed in enumerate(seeds):
            with seeded(seed):
                images[i] = self.erase(images[i])
        return images


class Mix:
    """Images ``(N, C, S, S)`` and labels ``(N,)`` to mixtures of each with the one before it, by mixup or cutmix, and
    shares of the classes ``(N, num_classes)``."""

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        self.ways = [
            way(alpha=alpha, num_classes=num_classes)
            for way, alpha in ((v2.MixUp, augmentation.mixup), (v2.CutMix, augmentation.cutmix))
            if alpha
        ]

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with seeded(seed):
            way = self.ways[int(torch.randint(len(self.ways), ()))]
            mixed, shares = way(images, labels)
        return mixed, shares


def shift_and_mirror(images: Tensor, shifts: Tensor, mirrored: Tensor, reach: int, fill: int = 0) -> Tensor:
    """Crop each image at its own offset out of the batch padded with ``fill``, and mirror the marked ones."""
    count, _, height, width = images.shape
    windows = F.pad(images, (reach, reach, reach, reach), value=fill).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count, device=images.device), :, shifts[:, 0], shifts[:, 1]]
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(-1), cropped)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch draws by ``seed`` on the CPU, and afterwards as if nothing had been drawn."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
