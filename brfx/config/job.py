"""Settings of a whole run, and its ``config.json``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from brfx.config.checks import check_types, shown
from brfx.config.images import CHANNEL_ORDERS, INTERPOLATIONS, Augmentation
from brfx.config.qat import QATConfig
from brfx.config.train import TrainConfig
from brfx.errors import ConfigError, first_line

STARTS = ("lsq", "mse")
DEAD_FILTERS = ("keep", "revive", "ignore")
#: Forms of the bin regularizers, each with the lambdas of weights and activations where none are given. The paper's are
#: published; 0.001 for each value closes some 95 % of the distances in the 70 last of 100 epochs of 700 batches.
BR_FORMS = {"mean": (0.1, 0.01), "per_value": (0.001, 0.0)}
TASKS = ("classification", "segmentation", "detection")

#: Where named data sets lie.
DATA_DIR = Path("~/.cache/brfx")

#: Of the loss, what is distilled from a teacher that is named without a share.
TEACHER_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Everything that a command of ``brfx`` works from; written whole into the run's ``config.json``.

    Attributes:
        command: ``"train"``, ``"quantize"``, ``"evaluate"`` or another command's name.
        model: a name that ``brfx models`` lists, or ``path/to/file.py:factory``.
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``; default the model's own, of a file's
            classification.
        ckpt: the FP32 checkpoint, or for ``evaluate`` also a run's ``model.pt``; ``Path("torchvision")``: the model's
            published weights, where torchvision's own download puts them.
        ckpt_key: which state dict of the checkpoint, where it has several.
        strict: refuse a checkpoint of another number of classes, whose head training else makes anew.
        num_classes: default the number of the data's classes.
        cifar_stem: 3x3 stem without pooling, for small images.
        data: ``digits``, ``cifar10``, ``cifar100`` or a folder; default the model's own data set.
        data_dir: where named data sets lie.
        download: let torchvision download a named data set.
        image_size, mean, std, resize, stretch, interpolation, channel_order, divisor: of the evaluation transform, as
            in :class:`brfx.data.Preprocessing`; default what the checkpoint was trained with, where it says so, else
            what the model or the data set wants. A mean and a std of one number make images grey, for a model of one
            channel.
        crop: of :class:`Augmentation`; default ``"resized"`` for classifiers of images above 64 pixels, else
            ``"shift"``.
        flip: the same; default the data set's own: digits are not mirrored.
        rand_augment, mixup, cutmix, erasing: the same.
        class_weights: how much an image of each class counts in the loss, with commas, or ``"balanced"``: the less, the
            more images a class has. They are scaled to a mean of 1 over the training images.
        val_fraction: share of the training images that are held out to measure each epoch on; 0: all are trained on,
            and there is no validation.
        batch_size: images a batch.
        limit_batches: so many batches of each split alone, to try whether a run works; accuracies are of these.
        workers: processes that decode the images of a folder; 0 decodes in the training process.
        skip_bad_images: leave out images of a folder that cannot be read.
        qat: what to quantize.
        bit_budget: mean bits of the weights, from which each layer gets its own by how sensitive it is
            (:func:`brfx.assign_bits`); layers whose bits ``qat.overrides`` names keep them.
        size_budget: the same as bytes of the exported weights.
        train: how to train.
        br_form: what each value of a bin counts, see :class:`brfx.BinPenalty`: ``"mean"`` (as published) or
            ``"per_value"``.
        lambda_br, lambda_br_act: weights of the two bin regularizers; 0 switches one off. Default 0.1 and 0.01; in the
            per-value form 0.001 and 0.
        lambda_kurtosis: weight of the weights' kurtosis regularizer (:mod:`brfx.regularizers.kurtosis`); 0: off.
        br_backprop_to_alpha_act: let the activations' regularizer train the activation steps.
        freeze_weight_alpha, freeze_act_alpha: freeze those steps when regularization starts.
        teacher: another FP32 network to distill from, ``NAME=FILE``: a model as ``model`` takes it, and its checkpoint.
            ``None``: with ``train.distill`` above 0 it is the student's own FP32 network.
        start: rule by which the steps start, see :func:`brfx.calibrate`.
        calibration_batches: training batches that the steps start from.
        reconstruct: round the weights so that each layer's outputs on these batches are kept
            (:func:`brfx.reconstruct`).
        dead_filters: what happens to filters that let nothing pass, see :func:`brfx.calibrate`.
        output_dir: run folder, new or empty; default a free name under ``runs/``.
        tensorboard: write TensorBoard's event files beside ``metrics.jsonl``.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field and what it takes.
    """

    command: str
    model: str = ""
    task: str | None = None
    ckpt: Path | None = None
    ckpt_key: str | None = None
    strict: bool = False
    num_classes: int | None = None
    cifar_stem: bool = False
    data: str | None = None
    data_dir: Path = DATA_DIR
    download: bool = False
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    stretch: bool | None = None
    interpolation: str | None = None
    channel_order: str | None = None
    divisor: float | None = None
    crop: str | None = None
    flip: bool | None = None
    rand_augment: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    class_weights: str | None = None
    val_fraction: float = 0.1
    batch_size: int = 64
    limit_batches: int | None = None
    workers: int = 2
    skip_bad_images: bool = False
    qat: QATConfig = field(default_factory=QATConfig)
    bit_budget: float | None = None
    size_budget: int | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    br_form: str = "mean"
    lambda_br: float | None = None
    lambda_br_act: float | None = None
    lambda_kurtosis: float = 0.0
    br_backprop_to_alpha_act: bool = False
    freeze_weight_alpha: bool = False
    freeze_act_alpha: bool = False
    teacher: str | None = None
    start: str = "mse"
    calibration_batches: int = 8
    reconstruct: bool = False
    dead_filters: str = "keep"
    output_dir: Path | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        try:
            object.__setattr__(self, "data_dir", self.data_dir.expanduser())
        except RuntimeError as error:
            raise ConfigError(f"data_dir={shown(self.data_dir)}: there is no such user's home") from error
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("batch_size", "calibration_batches", "image_size", "resize", "limit_batches"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes 1 or more")
        if self.task not in (None, *TASKS):
            raise ConfigError(f"task={shown(self.task)}: takes {', '.join(TASKS)}, or None for the model's own")
        self._check_quantization()
        for name in ("lambda_br", "lambda_br_act", "lambda_kurtosis", "workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes 0 or more")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction={shown(self.val_fraction)}: takes 0 or a share below 1")
        self._check_images()
        self._check_together()

    def _check_images(self) -> None:
        for name, kinds in (("interpolation", INTERPOLATIONS), ("channel_order", CHANNEL_ORDERS)):
            if getattr(self, name) not in (None, *kinds):
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes {', '.join(kinds)}")
        if self.divisor is not None and not self.divisor > 0:
            raise ConfigError(f"divisor={shown(self.divisor)}: takes a number above 0")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(f"std={shown(self.std)}: takes numbers above 0")
        listed_class_weights(self.class_weights)
        self.augmentation("shift", flip=True)

    def augmentation(self, crop: str, *, flip: bool) -> Augmentation:
        """Of training images, with ``crop`` and ``flip`` where the settings leave them open.

        Raises:
            ConfigError: a value is out of range.
        """
        return Augmentation(
            crop=crop if self.crop is None else self.crop,
            flip=flip if self.flip is None else self.flip,
            **{name: getattr(self, name) for name in ("rand_augment", "mixup", "cutmix", "erasing")},
        )

    def _check_together(self) -> None:
        if not self.val_fraction and self.train.keep == "best":
            raise ConfigError("--keep best chooses on validation images, --val-fraction 0 leaves none: --keep last")
        if self.teacher is None:
            return
        name, _, file = self.teacher.partition("=")
        if not name or not file:
            raise ConfigError(f"teacher={shown(self.teacher)}: takes NAME=FILE, such as resnet56=resnet56.pth")
        if not self.train.distill:
            raise ConfigError("--teacher says nothing at --distill 0: give it a share of the loss, or leave it out")

    def _check_quantization(self) -> None:
        """Also, lambdas that are not given are the form's."""
        self._check_budgets()
        if self.reconstruct and self.qat.weight_quantizer != "lsq":
            raise ConfigError(f"--reconstruct takes --weight-quantizer lsq, not {self.qat.weight_quantizer}")
        for name, choices in (("start", STARTS), ("dead_filters", DEAD_FILTERS), ("br_form", tuple(BR_FORMS))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes {' or '.join(choices)}")
        if self.br_form == "per_value" and self.br_backprop_to_alpha_act:
            raise ConfigError("--br-backprop-to-alpha-act: --br-form per_value trains no step: give one of the two")
        for name, default in zip(("lambda_br", "lambda_br_act"), BR_FORMS[self.br_form], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _check_budgets(self) -> None:
        if self.bit_budget is not None and self.size_budget is not None:
            raise ConfigError("--bit-budget and --size-budget: give one of the two")
        for name in ("bit_budget", "size_budget"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={shown(value)}: takes a number above 0")


def code_file(name: str) -> tuple[str, str] | None:
    """File and factory of a model's name ``path/to/file.py:factory``; ``None`` where the name is not of a file.

    The file may stand on a drive, ``C:\\models\\mine.py:make``; without a factory that is empty.
    """
    found = re.fullmatch(r"(.*\.py)(?::([^:]*))?", name, re.DOTALL)
    return None if found is None else (found[1], found[2] or "")


def listed_class_weights(text: str | None) -> tuple[float, ...] | None:
    """The numbers in ``JobConfig.class_weights``; ``None``: there are none."""
    if text in (None, "balanced"):
        return None
    try:
        numbers = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ConfigError(f"class_weights={shown(text)}: takes balanced, or a number a class with commas, such as 1,4")
    return numbers


def read_job_config(run_dir: Path) -> JobConfig:
    """The settings of a run from its ``config.json``; its folder is ``run_dir``, whatever the file says.

    Raises:
        ConfigError: as :func:`read_job_json`.
    """
    return replace(read_job_json(run_dir / "config.json"), output_dir=run_dir)


def read_job_json(path: Path) -> JobConfig:
    """The settings of a run from its ``config.json``, but for the folder; nothing is downloaded that is not asked for
    anew.

    Raises:
        ConfigError: no such file, damaged, or with settings that are none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = first_line(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{path}: cannot read the settings of a run ({why})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not the settings of a run")
    for beside in ("kind", "versions", "python", "command_line", "machine"):
        content.pop(beside, None)
    content |= {"output_dir": None, "download": False}
    try:
        for name in ("ckpt", "data_dir"):
            if content.get(name) is not None:
                content[name] = Path(content[name])
        for name in ("mean", "std"):
            if content.get(name) is not None:
                content[name] = tuple(content[name])
        qat = dict(content.pop("qat"))
        qat["overrides"] = tuple((pattern, settings) for pattern, settings in qat.get("overrides", ()))
        return JobConfig(qat=QATConfig(**qat), train=TrainConfig(**content.pop("train")), **content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not the settings of a run ({error})") from error
