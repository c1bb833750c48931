"""Names to float models: all of torchvision's, the CIFAR ResNets, and those of other libraries."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.config import code_file
from brfx.errors import ConfigError
from brfx.hubs import HF, TIMM, build_hub_model, is_hub_model, require_hub_model


@dataclass(frozen=True)
class ModelSource:
    """The arguments of :func:`build_model`: what a saved file holds instead of code.

    Attributes:
        name: a name that ``brfx models`` lists, ``timm/NAME``, ``hf/FOLDER``, or ``path/to/file.py:factory``.
        num_classes: classes of the last layer; ``None`` leaves the model's own number.
        cifar_stem: swap the ImageNet stem for a 3x3 convolution of stride 1, without max-pooling.
    """

    name: str
    num_classes: int | None = None
    cifar_stem: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters (He et al., 2016, option A)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images, depth ``6 * blocks + 2`` (He et al., 2016, section 4.2), with option A shortcuts.

    The attribute names are those of the checkpoints in use (``conv1``, ``layer1.0.conv1``, ..., ``linear``).
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(_BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)  # type: ignore[no-any-return]


CIFAR_RESNETS: dict[str, Callable[..., nn.Module]] = {
    f"resnet{6 * blocks + 2}": partial(CifarResNet, blocks) for blocks in (3, 5, 7, 9, 18)
}
# resnet20, resnet32, resnet44, resnet56, resnet110: none of these is a name of torchvision's.


def model_names() -> list[str]:
    """Every name that :func:`build_model` takes, sorted (``quantized_*`` of torchvision are not FP32 and left out)."""
    names = [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    return sorted([*CIFAR_RESNETS, *names])


def build_model(name: str, num_classes: int | None = None, *, cifar_stem: bool = False) -> nn.Module:
    """An FP32 model with random weights.

    Args:
        name: one of :func:`model_names`, ``timm/NAME`` or ``hf/FOLDER`` (:mod:`brfx.hubs`), or
            ``path/to/file.py:factory``: ``factory`` is called with ``num_classes=`` if that is given and it takes it,
            else with no argument. Naming a file runs its code; nothing else that brfx reads does.
        num_classes: classes of the last layer; default the model's own (10 for the CIFAR ResNets, 1000, 91, 21, 400).
        cifar_stem: for models with an ImageNet stem (``conv1`` of stride 2 and ``maxpool``).

    Raises:
        ConfigError: no such name (with the nearest ones), no such file or factory, or a stem that is not there.
    """
    require_model(name)
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if code_file(name):
        factory = _user_factory(name)
        model = factory(**(arguments if _takes_classes(factory, name) else {}))
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
    elif is_hub_model(name):
        model = build_hub_model(name, num_classes)
    elif name in CIFAR_RESNETS:
        model = CIFAR_RESNETS[name](**arguments)
    else:
        builder = torchvision.models.get_model_builder(name)
        untrained = {key: None for key in ("weights", "weights_backbone") if key in signature(builder).parameters}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet and Inception on their future initialization
            model = builder(**untrained, **arguments)
    if cifar_stem:
        _use_cifar_stem(model, name)
    assert isinstance(model, nn.Module)
    model.brfx_source = ModelSource(name, num_classes, cifar_stem)  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class PublishedWeights:
    """torchvision's weights of a model.

    Attributes:
        url: where they are published.
        path: where torchvision's own download puts them, whether they are there or not.
        mean, std: that torchvision normalizes images by for them; ``None`` where the model does it itself.
        transform: torchvision's evaluation transform, as fields of :class:`brfx.data.Preprocessing`; ``None`` where it
            has no such form.
    """

    url: str
    path: Path
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    transform: dict[str, Any] | None

    def normalization(self, model: nn.Module) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and std of the images that ``model``, from :func:`build_model`, must see with these weights.

        torchvision turns ``transform_input`` on along with its weights, where a model has it: the model then goes on
        from ImageNet's mean and std to 0.5 itself. Without it the images must be of 0.5.
        """
        if getattr(model, "transform_input", True):
            return self.mean, self.std
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def published_weights(name: str, weights: str = "DEFAULT") -> PublishedWeights | None:
    """What torchvision publishes for a model of this name under the name ``weights``; ``None`` if it has no such model
    or no such weights of it. Nothing is downloaded."""
    if name not in torchvision.models.list_models():
        return None
    found = getattr(torchvision.models.get_model_weights(name), weights, None)
    if found is None:
        return None
    seen = found.transforms()
    mean, std = (tuple(value) if (value := getattr(seen, key, None)) else None for key in ("mean", "std"))
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(found.url).path).name
    return PublishedWeights(found.url, path, mean, std, _transform(seen))


def published_names(name: str) -> list[str]:
    """Of torchvision's weights of a model, such as ``IMAGENET1K_V1``."""
    if name not in torchvision.models.list_models():
        return []
    return list(torchvision.models.get_model_weights(name).__members__)


def published_as(name: str, path: Path) -> PublishedWeights | None:
    """torchvision's weights of a model that are in a file of this name; ``None`` if they are none of them."""
    every = (published_weights(name, weights) for weights in published_names(name))
    return next((found for found in every if found is not None and found.path.name == path.name), None)


def _transform(seen: Any) -> dict[str, Any] | None:
    """torchvision's ``ImageClassification`` as it would be said of :class:`brfx.data.Preprocessing`."""
    crops, sides = (tuple(getattr(seen, name, None) or ()) for name in ("crop_size", "resize_size"))
    if len(crops) != 1 or len(sides) != 1:
        return None
    (crop,), (resize,) = crops, sides
    values = {"mean": tuple(seen.mean), "std": tuple(seen.std), "interpolation": seen.interpolation.value}
    return {"image_size": crop, "resize": resize, **values}


def require_model(name: str) -> None:
    """Raise ConfigError, with the nearest names, if :func:`build_model` knows no model of this name."""
    if is_hub_model(name):
        return require_hub_model(name)
    if code_file(name) or name in model_names():
        return
    if not name:
        raise ConfigError("say which model: --model NAME (`brfx models` lists them)")
    nearest = difflib.get_close_matches(name, model_names(), n=4) or ["resnet20", "resnet18"]
    raise ConfigError(
        f"unknown model {name!r}: did you mean {', '.join(nearest)}? "
        f"`brfx models` lists all; others are {TIMM}NAME, {HF}FOLDER, and your own path/to/file.py:factory"
    )


def _user_factory(spec: str) -> Callable[..., Any]:
    found = code_file(spec)
    assert found is not None
    file, factory = found
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file}: no such file; --model takes a name or path/to/file.py:factory")
    if not factory:
        raise ConfigError(f"{file}: say which function builds the model: {file}:factory")
    spec_ = importlib.util.spec_from_file_location(path.stem, path)
    assert spec_ is not None and spec_.loader is not None
    module = importlib.util.module_from_spec(spec_)
    try:
        spec_.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{file}: imports {error.name}, which is not installed here") from error
    if not callable(getattr(module, factory, None)):
        raise ConfigError(f"{file} has no function {factory!r}")
    return getattr(module, factory)  # type: ignore[no-any-return]


def _takes_classes(factory: Callable[..., Any], name: str) -> bool:
    """Whether a factory of the user's takes ``num_classes=``; without it, it is called as it is."""
    parameters = signature(factory).parameters
    wanted = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name != "num_classes"
    ]
    if wanted:
        raise ConfigError(
            f"{name} takes {', '.join(wanted)}: give a function that is called with no argument, or with num_classes="
        )
    any_name = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return any_name or "num_classes" in parameters


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    conv = getattr(model, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(getattr(model, "maxpool", None), nn.Module):
        raise ConfigError(f"--cifar-stem needs a model with an ImageNet stem (conv1 and maxpool); {name} has none")
    model.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def example_inputs(name: str, image_size: int, batch: int = 1, *, channels: int = 3) -> tuple[Any, ...]:
    """Random inputs for a model that :func:`build_model` makes: images ``(batch, channels, S, S)`` in 0..1; clips of 16
    frames for torchvision's video models, two images for its optical flow, a list of images for its detectors."""
    known = name in torchvision.models.list_models()
    home = torchvision.models.get_model_builder(name).__module__ if known else ""
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = (batch, channels, image_size, image_size)
    if ".video." in home:
        return (torch.rand(batch, 3, 16, image_size, image_size, generator=generator),)
    if ".optical_flow." in home:
        return tuple(torch.rand(shape, generator=generator) for _ in range(2))
    images = torch.rand(shape, generator=generator)
    return (list(images),) if ".detection." in home else (images,)
