"""The evaluation transform: from a picture of any size to the tensor that a model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brfx.config import CHANNEL_ORDERS, INTERPOLATIONS
from brfx.config.checks import check_types
from brfx.errors import ConfigError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What a picture goes through before the model. It is written into each file of the model; docs/export.md has the
    same in numpy.

    The picture is resized, the square in its centre is cut out, and its values become ``(value / divisor - mean) /
    std``.

    Attributes:
        image_size: side of the square that is cut out, in pixels.
        mean, std: per channel, of values that are divided by ``divisor``; or one number each, for a model that sees
            grey images.
        resize: length that the shorter side is resized to, in pixels; ``None``: ``image_size``.
        stretch: resize both sides to that length, whatever the picture's shape.
        interpolation: Pillow's name of it, such as ``"bilinear"``.
        channel_order: ``"rgb"`` or ``"bgr"``; that of ``mean`` and ``std`` too.
        divisor: of the values 0..255.

    Raises:
        ConfigError: ``mean`` and ``std`` are not three numbers each, or one; ``resize`` is below ``image_size``; or
            another value is out of range.
    """

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: int | None = None
    stretch: bool = False
    interpolation: str = "bilinear"
    channel_order: str = "rgb"
    divisor: float = 255.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        if self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size}: takes 1 or more")
        if self.resize is None:
            object.__setattr__(self, "resize", self.image_size)
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f"--mean of {len(self.mean)} and --std of {len(self.std)} numbers: give three each, or one each for a "
                "model of one channel, which then sees grey images"
            )
        if self.side < self.image_size:
            raise ConfigError(
                f"--resize {self.side} leaves no square of {self.image_size} pixels to cut out: "
                f"give {self.image_size} or more, or a smaller --image-size"
            )
        for name, choices in (("interpolation", INTERPOLATIONS), ("channel_order", CHANNEL_ORDERS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: takes {', '.join(choices)}")
        if not all(map(isfinite, self.mean)):
            raise ConfigError(f"mean={self.mean}: takes finite numbers")
        if not all(value > 0 and isfinite(value) for value in (self.divisor, *self.std)):
            raise ConfigError(f"divisor={self.divisor}, std={self.std}: takes numbers above 0")

    @property
    def channels(self) -> int:
        """That the model sees, 1 or 3."""
        return len(self.mean)

    @property
    def side(self) -> int:
        """``resize``, which is never ``None`` by now."""
        assert self.resize is not None
        return self.resize

    def resized_to(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a picture of this size before the centre is cut out."""
        if self.stretch:
            return self.side, self.side
        short = min(width, height)
        return int(self.side * width / short), int(self.side * height / short)

    def square(self, image: Image) -> Image:
        """The square that the model sees of ``image``, in 8 bits a channel as before."""
        from PIL import Image

        size = self.resized_to(*image.size)
        resized = image.resize(size, Image.Resampling[self.interpolation.upper()])
        return resized.crop(self.centre(*size))

    def centre(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the square in the centre of a resized picture."""
        left, top = (round((length - self.image_size) / 2) for length in (width, height))
        return left, top, left + self.image_size, top + self.image_size

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 RGB images ``(N, 3, H, W)`` to float32 ``(N, channels, H, W)``, normalized."""
        if self.channels == 1:
            images = _grey(images)
        elif self.channel_order == "bgr":
            images = images.flip(1)
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return images.float().div_(self.divisor).sub_(mean).div_(std)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Preprocessing:
        """What :meth:`as_dict` gave, from a file of any age.

        Raises:
            ConfigError: a setting is unknown, as of a newer brfx, missing, or has no such value.
        """
        strange = sorted(set(content) - {field.name for field in fields(cls)}) if isinstance(content, Mapping) else [""]
        if strange:
            raise ConfigError(f"preprocessing: this brfx knows no setting {strange[0]!r}")
        try:
            return cls(**content)
        except TypeError as error:  # one is missing
            raise ConfigError(f"preprocessing: {first_line(error)}") from error
        except ConfigError as error:
            raise ConfigError(f"preprocessing: {error}") from error

    def __str__(self) -> str:
        """In words, such as ``3x224x224 (shorter side to 256, bilinear, the centre)``."""
        resized = f"{'stretched' if self.stretch else 'shorter side'} to {self.side}, {self.interpolation}"
        cut = ", the centre" if self.side > self.image_size or not self.stretch else ""
        numbers = [f"{name} {','.join(f'{value:g}' for value in getattr(self, name))}" for name in ("mean", "std")]
        order = f", {self.channel_order.upper()}" if self.channel_order != "rgb" else ""
        divided = f", divided by {self.divisor:g}" if self.divisor != 255 else ""
        shape = f"{self.channels}x{self.image_size}x{self.image_size}"
        return f"{shape} ({resized}{cut}{order}{divided}, {', '.join(numbers)})"


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


def with_overrides(base: Preprocessing, **given: Any) -> Preprocessing:
    """``base`` with what the user gave instead of its defaults, ``None`` where nothing was.

    Another ``image_size`` alone keeps the share of the picture that is cut out.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    size = changes.get("image_size")
    if size is not None and "resize" not in changes:
        changes["resize"] = round(base.side * size / base.image_size)
    return replace(base, **changes)
