"""The options that commands share. Defaults are those of the settings' own fields."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from brfx.config import (
    BR_FORMS,
    CHANNEL_ORDERS,
    COMPILE,
    CROPS,
    DEAD_FILTERS,
    INTERPOLATIONS,
    KEEP,
    ON_NONFINITE,
    OPTIMIZERS,
    PLACEMENTS,
    PRECISION,
    STARTS,
    TASKS,
    TEACHER_SHARE,
    WEIGHT_GRIDS,
    JobConfig,
    QATConfig,
    TrainConfig,
)
from brfx.config.recipes import recipe_names
from brfx.quant.factory import ACT_QUANTIZERS, WEIGHT_QUANTIZERS

from . import completion

F = TypeVar("F", bound=Callable[..., Any])


def default_of(settings: type, name: str) -> Any:
    """The default of a settings field, so that the command line has none of its own."""
    return next(field.default for field in fields(settings) if field.name == name)


class OptionalFloat(click.ParamType):  # type: ignore[type-arg]
    """A number, or ``None`` written as a word."""

    name = "number|None"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value is None or isinstance(value, float):
            return value
        if str(value).lower() == "none":
            return None
        return float(click.FLOAT.convert(value, param, ctx))


class PerChannel(click.ParamType):  # type: ignore[type-arg]
    """Three numbers with commas, one a colour channel, or one for grey images."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3):
            self.fail(f"{value!r}: three numbers with commas, such as 0.485,0.456,0.406, or one for grey", param, ctx)
        return numbers


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, or of kB or MB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|kB|KB|MB)?", str(value).strip())
        if found is None:
            self.fail(f"{value!r}: a number of bytes, such as 400kB, 1.5MB or 400000", param, ctx)
        return round(float(found[1]) * {"kB": 1e3, "KB": 1e3, "MB": 1e6}.get(found[2], 1))


def _job(flag: str, name: str, **settings: Any) -> Callable[[F], F]:
    settings.setdefault("default", default_of(JobConfig, name))
    return click.option(flag, name, show_default=settings["default"] not in (None, ""), **settings)


def _train(*flags: str, name: str, **settings: Any) -> Callable[[F], F]:
    settings.setdefault("default", default_of(TrainConfig, name))
    return click.option(*flags, name, show_default=settings["default"] is not None, **settings)


def combine(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_options = combine(
    _job(
        "--model",
        "model",
        shell_complete=completion.models,
        help="The network: a name that `brfx models` lists, timm/NAME, hf/FOLDER, or your own as "
        "path/to/file.py:factory.",
    ),
    _job(
        "--task", "task", type=click.Choice(TASKS), help="What the network is trained for.  [default: the model's own]"
    ),
    click.option(
        "--ckpt",
        "--pretrained-baseline",
        "ckpt",
        type=click.Path(path_type=Path),
        help="The checkpoint to start from, such as best.pth. The word torchvision, or a name such as IMAGENET1K_V1, "
        "means torchvision's weights of the model.",
    ),
    _job(
        "--ckpt-key",
        "ckpt_key",
        help="Take this state dict of the checkpoint, such as model_ema.  [default: state_dict, ...]",
    ),
    _job(
        "--strict",
        "strict",
        is_flag=True,
        help="Refuse a checkpoint of other classes. Without this its last layer is made anew.",
    ),
    _job("--num-classes", "num_classes", type=int, help="The number of classes.  [default: as many as the data has]"),
    _job(
        "--cifar-stem",
        "cifar_stem",
        is_flag=True,
        help="Give the model a 3x3 stem without pooling, for images of 32 pixels or so.",
    ),
)

data_dir_option = _job(
    "--data-dir", "data_dir", type=click.Path(path_type=Path), help="The folder where named data sets lie."
)

data_options = combine(
    _job(
        "--data",
        "data",
        shell_complete=completion.data,
        help="The images: digits, cifar10, cifar100, or a folder with train/ and test/ (or val/).  "
        "[default: the model's own]",
    ),
    data_dir_option,
    _job("--download", "download", is_flag=True, help="Let torchvision download a named data set that is not there."),
    _job(
        "--image-size",
        "image_size",
        type=int,
        help="Give the model images of so many pixels a side.  [default: 16 digits, 32 CIFAR, else the model's own]",
    ),
    _job(
        "--mean",
        "mean",
        type=PerChannel(),
        help="Subtract these from images in 0..1. One number makes images grey.  [default: ImageNet's; digits 0.5]",
    ),
    _job(
        "--std",
        "std",
        type=PerChannel(),
        help="Divide images by these, after --mean. One number makes images grey.  [default: ImageNet's; digits 0.5]",
    ),
    _job(
        "--resize",
        "resize",
        type=int,
        help="Resize the shorter side to so many pixels, of which the centre is cut out.  [default: the model's own]",
    ),
    _job(
        "--stretch/--no-stretch",
        "stretch",
        help="Resize both sides to it, whatever the picture's shape.  [default: of segmentation]",
    ),
    _job(
        "--interpolation",
        "interpolation",
        type=click.Choice(INTERPOLATIONS),
        help="Resize by this rule.  [default: the model's own, or bilinear]",
    ),
    _job(
        "--channel-order",
        "channel_order",
        type=click.Choice(CHANNEL_ORDERS),
        help="Give the model its colours in this order.  [default: the model's own, or rgb]",
    ),
    _job(
        "--divisor",
        "divisor",
        type=float,
        help="Divide the values 0 to 255 by this, before --mean.  [default: the model's own, or 255]",
    ),
    _job("--batch-size", "batch_size", type=int, help="How many images a batch has."),
    _job(
        "--workers",
        "workers",
        type=int,
        help="How many processes decode the images of a folder; 0 decodes them in the training process.",
    ),
    _job(
        "--skip-bad-images",
        "skip_bad_images",
        is_flag=True,
        help="Leave out images of a folder that are damaged, and name them.",
    ),
    _train("--device", name="device", help="Where to compute: cpu, cuda, cuda:1 ..."),
)


def train_options(preset: TrainConfig) -> Callable[[F], F]:
    """How to train, with the defaults of ``preset``."""

    def option(flag: str, name: str, **settings: Any) -> Callable[[F], F]:
        return click.option(flag, name, default=getattr(preset, name), show_default=True, **settings)

    return combine(
        _job(
            "--crop",
            "crop",
            type=click.Choice(CROPS),
            help="Shift training images by an eighth, or train on resized crops of them.  [default: by their size]",
        ),
        _job(
            "--flip/--no-flip",
            "flip",
            help="Mirror half of the training images.  [default: all but digits]",
        ),
        _job(
            "--rand-augment",
            "rand_augment",
            type=int,
            help="Vary training images by RandAugment of this magnitude, such as 9; 0 switches it off.",
        ),
        _job(
            "--mixup",
            "mixup",
            type=float,
            help="Mix training images by mixup with this alpha, such as 0.2; 0 switches it off.",
        ),
        _job(
            "--cutmix",
            "cutmix",
            type=float,
            help="Mix training images by cutmix with this alpha, such as 1; 0 switches it off.",
        ),
        _job(
            "--erasing",
            "erasing",
            type=float,
            help="Erase a rectangle of a training image with this probability, such as 0.1.",
        ),
        _job(
            "--class-weights",
            "class_weights",
            help="Weigh classes in the loss: balanced, or a number a class, such as 1,4.  [default: all alike]",
        ),
        option(
            "--accumulate",
            "accumulate",
            type=int,
            help="Update the weights once in so many batches, as one large batch would.",
        ),
        option("--lr", "lr", type=float, help="The highest learning rate of the schedule."),
        click.option(
            "--step-lr", "step_lr", type=float, help="The learning rate of the quantizers' steps.  [default: --lr]"
        ),
        option(
            "--weight-decay", "weight_decay", type=float, help="The decay of weights. Steps, biases and norms get none."
        ),
        option("--momentum", "momentum", type=float, help="The momentum of SGD."),
        option(
            "--optimizer", "optimizer", type=click.Choice(OPTIMIZERS), help="The optimizer that updates the weights."
        ),
        option(
            "--seed", "seed", type=int, help="The seed of order, augmentation, new weights and the validation split."
        ),
        option(
            "--compile",
            "compile",
            type=click.Choice(COMPILE),
            help="Compile the training step. auto does where the run is long enough to gain by it.",
        ),
        option(
            "--precision",
            "precision",
            type=click.Choice(PRECISION),
            help="Run the model's forward in this precision. The loss stays in FP32.",
        ),
        option(
            "--label-smoothing",
            "label_smoothing",
            type=float,
            help="Spread this share of the target over all classes, such as 0.1.",
        ),
        option(
            "--clip-grad",
            "clip_grad",
            type=float,
            help="Scale gradients down to this norm, such as 1.  [default: as they are]",
        ),
        option(
            "--ema",
            "ema",
            type=float,
            help="Ship a moving average of the weights with this decay, such as 0.999; 0 switches it off.",
        ),
        option(
            "--reestimate-bn",
            "reestimate_bn",
            type=int,
            help="Estimate batch norms from so many batches before each validation, such as 50.",
        ),
        option(
            "--on-nonfinite",
            "on_nonfinite",
            type=click.Choice(ON_NONFINITE),
            help="At a loss or gradient that is not finite, stop, or skip the batch.",
        ),
        option(
            "--checkpoint-minutes",
            "checkpoint_minutes",
            type=float,
            help="Write a checkpoint after so many minutes within an epoch.",
        ),
        option("--keep-checkpoints", "keep_checkpoints", type=int, help="Keep so many of the newest checkpoints."),
        _job(
            "--tensorboard",
            "tensorboard",
            is_flag=True,
            help="Write TensorBoard's event files into the run folder too.",
        ),
        click.option(
            "--resume",
            type=click.Path(path_type=Path),
            help="Go on with the unfinished run in this folder, with its own settings.",
        ),
        option(
            "--keep",
            "keep",
            type=click.Choice(KEEP),
            help="Ship the last epoch, or the one that was best on validation images.",
        ),
        click.option(
            "--patience",
            type=int,
            help="End after so many epochs that are none better on validation.  [default: never]",
        ),
        _job(
            "--limit-batches",
            "limit_batches",
            type=int,
            help="Use so few batches of each split, to see in seconds whether a run works.  [default: all]",
        ),
        _job(
            "--val-fraction",
            "val_fraction",
            type=float,
            help="Hold out this share of the training images for validation; 0 trains on all.",
        ),
        click.option(
            "--output-dir",
            "output_dir",
            type=click.Path(path_type=Path),
            help="Write the run into this folder, new or empty.  [default: a free name under runs/]",
        ),
    )


_BITS = default_of(QATConfig, "bits")

quantizer_options = combine(
    click.option(
        "--bits",
        "--num-bits",
        "bits",
        type=int,
        help=f"Quantize weights and activations to 1 to 8 bits.  [default: {_BITS}]",
    ),
    click.option("--weight-bits", type=int, help="Quantize weights to 1 to 8 bits; 32 leaves FP32.  [default: --bits]"),
    click.option(
        "--act-bits", type=int, help="Quantize activations to 1 to 8 bits; 32 leaves FP32.  [default: --bits]"
    ),
    click.option(
        "--clip-value", type=OptionalFloat(), help="Clip ReLUs at this number, such as 6, or None.  [default: None]"
    ),
    click.option("--per-channel", is_flag=True, default=None, help="Give each output channel a step of its own."),
    click.option("--input-bits", type=int, help="Quantize the image to so many bits.  [default: 8]"),
    click.option(
        "--residual-bits",
        type=int,
        help="Quantize branches into residual adds to so many bits; 32 leaves them in FP32.  [default: 8]",
    ),
    click.option(
        "--stream-bits",
        type=int,
        help="Keep residual streams at so many bits; at --act-bits they are as narrow as layers' inputs.  [default: 8]",
    ),
    click.option(
        "--weight-grid",
        type=click.Choice(WEIGHT_GRIDS),
        help="Put weights on levels with a zero (signed), or on symmetric ones without.  "
        "[default: symmetric at 2 bits, else signed]",
    ),
    click.option(
        "--weight-quantizer",
        type=click.Choice(list(WEIGHT_QUANTIZERS)),
        help="The method by which weights are quantized.  [default: lsq]",
    ),
    click.option(
        "--act-quantizer",
        type=click.Choice(list(ACT_QUANTIZERS)),
        help="The method by which activations that are never negative are quantized.  [default: lsq]",
    ),
    click.option(
        "--placement",
        type=click.Choice(PLACEMENTS),
        help="Quantize every input of a layer (deploy), or weights and ReLUs alone (paper).  [default: deploy]",
    ),
    click.option(
        "--skip",
        multiple=True,
        help="Leave layers of this name in FP32, or of a pattern: 'classifier.*', type:Linear. May be repeated.",
    ),
    click.option("--first-last-8bit", is_flag=True, default=None, help="Give the first and the last layer 8 bits."),
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="Read settings from TOML, with [[overrides]] by layer, or from a run's config.json. Flags win over it.",
    ),
)

budget_options = combine(
    _job(
        "--bit-budget",
        "bit_budget",
        type=float,
        help="Mean bits of the weights; each layer gets 2, 3, 4 or 8 by how sensitive it is.",
    ),
    _job(
        "--size-budget",
        "size_budget",
        type=Bytes(),
        help="The same as the weights' size in the exported file, such as 400kB.",
    ),
)

penalty_options = combine(
    click.option(
        "--recipe",
        type=click.Choice(recipe_names()),
        help="Begin with complete settings; `brfx recipes` lists them, `brfx recipes NAME` shows one.",
    ),
    _job(
        "--lambda-br",
        "lambda_br",
        type=float,
        help="The weight of the weights' bin regularizer; 0 switches it off.  [default: 0.1, per value 0.001]",
    ),
    _job(
        "--lambda-br-act",
        "lambda_br_act",
        type=float,
        help="The weight of the activations' bin regularizer; 0 switches it off.  [default: 0.01, per value 0]",
    ),
    _job(
        "--br-form",
        "br_form",
        type=click.Choice(list(BR_FORMS)),
        help="Count bins alike, as published (mean), or pull each value alike whatever its bin holds (per_value).",
    ),
    _job(
        "--lambda-kurtosis",
        "lambda_kurtosis",
        type=float,
        help="The weight of the weights' kurtosis regularizer (KURE); 0 switches it off.",
    ),
    _train(
        "--qat-epochs",
        name="epochs",
        type=int,
        help="Train for so many epochs, warm-up included; 0 calibrates and exports only.",
    ),
    _train(
        "--warmup-epochs",
        name="warmup_epochs",
        type=int,
        help="Train so many of them with LSQ alone.  [default: 30 % of --qat-epochs]",
    ),
    _train(
        "--distill",
        name="distill",
        type=float,
        help=f"Distill this share of the loss from the FP32 model, or from --teacher ({TEACHER_SHARE:g} then).",
    ),
    _job(
        "--teacher",
        "teacher",
        metavar="NAME=FILE",
        help="Distill from another FP32 model and its checkpoint, such as resnet56=resnet56.pth.",
    ),
    _train("--temperature", name="temperature", type=float, help="The temperature of distillation."),
    _job(
        "--start",
        "start",
        type=click.Choice(STARTS),
        help="Start steps at LSQ's formula, or at the least squared error.",
    ),
    _job(
        "--reconstruct",
        "reconstruct",
        is_flag=True,
        help="Round weights so that each layer's outputs are kept; a minute or more, for --qat-epochs 0.",
    ),
    _job(
        "--dead-filters",
        "dead_filters",
        type=click.Choice(DEAD_FILTERS),
        help="Keep filters that let nothing pass, revive them with new weights, or ignore them where steps are fitted.",
    ),
    click.option("--freeze-alpha", is_flag=True, help="Freeze all steps when regularization begins."),
    _job(
        "--freeze-weight-alpha",
        "freeze_weight_alpha",
        is_flag=True,
        help="Freeze the weights' steps when regularization begins.",
    ),
    _job(
        "--freeze-act-alpha",
        "freeze_act_alpha",
        is_flag=True,
        help="Freeze the activations' steps when regularization begins.",
    ),
    _job(
        "--br-backprop-to-alpha-act",
        "br_backprop_to_alpha_act",
        is_flag=True,
        help="Let the activations' regularizer train the activations' steps.",
    ),
)


table_options = combine(
    click.option("--wide", "table", flag_value="wide", help="Print a line for each, nothing folded or left out."),
    click.option("--json", "table", flag_value="json", help="Print JSON, for programs."),
    click.option("--csv", "table", flag_value="csv", help="Print CSV, for spreadsheets."),
    click.option("--folded", "table", flag_value="folded", default=True, hidden=True),
)
