"""Settings of images: how they are read, and how training varies them."""

from __future__ import annotations

from dataclasses import dataclass

from brfx.config.checks import check_types, shown
from brfx.errors import ConfigError

#: Pillow's names, in small letters.
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
CHANNEL_ORDERS = ("rgb", "bgr")
CROPS = ("shift", "resized", "none")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        crop: ``"shift"`` by up to an eighth of the side, what comes in at the edges being black; ``"resized"``, a part
            of 8 to 100 % of the picture's area, resized to the square that the model sees (torchvision's
            ``RandomResizedCrop``); ``"none"``.
        flip: mirror half of the images.
        rand_augment: magnitude of two operations of RandAugment an image, up to 30; 0: none.
        mixup, cutmix: alpha of the Beta distribution that two images of a batch, and their labels, are mixed by; 0:
            none. With both, each batch takes one of the two.
        erasing: probability that a rectangle of an image is erased, to the mean colour.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field and what it takes.
    """

    crop: str = "shift"
    flip: bool = True
    rand_augment: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.crop not in CROPS:
            raise ConfigError(f"crop={shown(self.crop)}: takes {' or '.join(CROPS)}")
        if not 0 <= self.rand_augment <= 30:
            raise ConfigError(f"rand_augment={shown(self.rand_augment)}: takes a magnitude of 0 to 30")
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes 0 or more")
        if not 0 <= self.erasing <= 1:
            raise ConfigError(f"erasing={shown(self.erasing)}: takes 0 to 1")

    @property
    def per_image(self) -> bool:
        """Whether each image is varied on its own, before it is in a batch."""
        return self.crop == "resized" or self.rand_augment > 0

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of the classes."""
        return self.mixup > 0 or self.cutmix > 0

    def __str__(self) -> str:
        """In words, such as ``resized crop, flip, mixup 0.2``."""
        crop = {"shift": ["shift"], "resized": ["resized crop"], "none": []}[self.crop]
        numbers = {"RandAugment": self.rand_augment, "mixup": self.mixup, "cutmix": self.cutmix}
        numbers["erasing"] = self.erasing
        named = [*crop, *["flip"] * self.flip, *(f"{name} {value:g}" for name, value in numbers.items() if value)]
        return ", ".join(named) or "none"
