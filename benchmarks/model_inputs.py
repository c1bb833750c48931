"""Legal inputs for each of torchvision's float models, seeded weights made fast, and outputs as a plain list."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn

from brfx.models import CIFAR_RESNETS, build_model

DETECTION = ("rcnn", "retinanet", "fcos", "ssd")
_INITIALIZERS = ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "normal_", "uniform_", "xavier_uniform_")

#: Beginning of a name -> shape of one input, small and as the model was made for; the first that fits.
_SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "inception_v3": ((3, 299, 299), (3, 299, 299)),  # from 75 in eval; its auxiliary head in training needs all of it
    "vit_": ((3, 224, 224), (3, 224, 224)),
    "maxvit": ((3, 224, 224), (3, 224, 224)),
    "mvit": ((3, 16, 224, 224), (3, 16, 224, 224)),
    "s3d": ((3, 14, 224, 224), (3, 16, 224, 224)),
    "swin3d": ((3, 8, 64, 64), (3, 16, 224, 224)),
    "raft": ((3, 128, 128), (3, 520, 960)),
    **dict.fromkeys(("mc3_18", "r3d_18", "r2plus1d_18"), ((3, 4, 56, 56), (3, 16, 112, 112))),
    **dict.fromkeys(("deeplabv3", "fcn_", "lraspp"), ((3, 64, 64), (3, 520, 520))),
    **dict.fromkeys(CIFAR_RESNETS, ((3, 32, 32), (3, 32, 32))),
    "": ((3, 64, 64), (3, 224, 224)),
}


def model_names() -> list[str]:
    """All float models of torchvision."""
    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def is_detection(name: str) -> bool:
    return any(part in name for part in DETECTION)


def example_inputs(name: str, batch: int = 1, small: bool = True, *, train: bool = False, seed: int = 0) -> tuple:
    """Arguments for the model's ``forward``, random but the same each time.

    Args:
        small: the smallest that serves, instead of the size that the model was made for.
        train: for training mode: detection then takes targets too.
    """
    random = torch.Generator().manual_seed(seed)
    if is_detection(name):
        side = 160 if small else 480
        images = [torch.rand(3, side, side, generator=random) for _ in range(batch)]
        return (images, [_target(name, side) for _ in range(batch)]) if train else (images,)
    fitting = name if name in _SHAPES else next(key for key in _SHAPES if name.startswith(key))
    shape = _SHAPES[fitting][0 if small else 1]
    count = 2 if name.startswith("raft") else 1
    return tuple(torch.rand(batch, *shape, generator=random) for _ in range(count))


def _target(name: str, side: int) -> dict[str, Tensor]:
    """Two objects in an image."""
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.9]]) * side
    target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    if name.startswith("maskrcnn"):
        masks = torch.zeros(2, side, side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target["masks"] = masks
    if name.startswith("keypointrcnn"):
        centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        target["keypoints"] = torch.cat([centres, torch.ones(2, 1, 1)], dim=2).repeat(1, 17, 1)
    return target


def outputs(x: Any) -> list[Tensor]:
    """Every tensor in a model's output, whatever holds it, in a fixed order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        x = x.values()
    elif is_dataclass(x):
        x = [getattr(x, field.name) for field in fields(x)]
    elif not isinstance(x, (tuple, list)):
        return []
    return [tensor for part in x for tensor in outputs(part)]


def build_without_weights(name: str, *, seed: int = 0, small: bool = True) -> nn.Module:
    """The model in eval mode with random weights of He's size, without the minutes that its own initialization takes.

    Args:
        small: let a detection model that scales images up to 800 pixels leave them at 160.
    """
    with ExitStack() as stack:
        for initializer in _INITIALIZERS:
            stack.enter_context(patch.object(nn.init, initializer, lambda tensor, *args, **kwargs: tensor))
        model = build_model(name).eval()
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            _fill(module, key, parameter, random)
    if small and min(getattr(getattr(model, "transform", None), "min_size", (0,))) > 320:
        model.transform.min_size = (160,)
    return model


@torch.no_grad()
def _fill(module: nn.Module, key: str, parameter: nn.Parameter, random: torch.Generator) -> None:
    if "Norm" in type(module).__name__:
        parameter.fill_(1.0 if key == "weight" else 0.0)
    elif key == "layer_scale":
        parameter.fill_(0.1)
    elif key == "logit_scale":
        parameter.fill_(math.log(10.0))
    elif key.endswith("weight") and parameter.dim() > 1:
        parameter.normal_(0.0, math.sqrt(2 / parameter[0].numel()), generator=random)
    else:  # biases, positions, class tokens
        parameter.normal_(0.0, 0.02, generator=random)


@torch.no_grad()
def settle(model: nn.Module, inputs: tuple) -> None:
    """Give the batch norms running statistics: those of one forward pass in training mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9
    modes = {module: module.training for module in model.modules()}
    try:
        if norms:
            model.train()
            model(*inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
