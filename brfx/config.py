"""The settings: what to quantize and how finely, and how to train. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from brfx.errors import ConfigError
from brfx.quant.factory import ACT_QUANTIZERS, WEIGHT_QUANTIZERS

PLACEMENTS = ("deploy", "paper")
WEIGHT_GRIDS = ("signed", "symmetric")

#: A pattern, and what it sets (``None``: nothing is quantized there).
Override = tuple[str, dict[str, Any] | None]


def _is(kind: type) -> Callable[[Any], bool]:
    """Whether a value is of this kind; ``True`` is no number."""
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _are(one: Callable[[Any], bool], *counts: int) -> Callable[[Any], bool]:
    """Whether a value is a list or a tuple of what ``one`` accepts, of one of these lengths."""
    return lambda value: (
        isinstance(value, list | tuple) and (not counts or len(value) in counts) and all(map(one, value))
    )


def _is_override(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return isinstance(value[0], str) and isinstance(value[1], Mapping | None)


#: By how a field is declared: whether a value is of that type, and the type in words.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (_is(bool), "true or false"),
    "int": (_is(Integral), "a whole number"),
    "float": (_is(Real), "a number"),
    "str": (_is(str), "a string"),
    "Path": (_is(Path), "a pathlib.Path"),
    "tuple[float, ...]": (_are(_is(Real), 1, 3), "one number or three"),
    "tuple[str, ...]": (_are(_is(str)), "a list of strings"),
    "tuple[Override, ...]": (_are(_is_override), "a list of (pattern, settings or None)"),
    "QATConfig": (lambda value: isinstance(value, QATConfig), "a QATConfig"),
    "TrainConfig": (lambda value: isinstance(value, TrainConfig), "a TrainConfig"),
}


def _check_types(settings: Any) -> None:
    """Raise a ConfigError that names the first field whose value is not of its declared type."""
    for declared in fields(settings):
        kind, _, none = str(declared.type).partition(" | ")
        value = getattr(settings, declared.name)
        if kind not in _TYPES or (none and value is None):
            continue
        fits, words = _TYPES[kind]
        if not fits(value):
            raise ConfigError(f"{declared.name}={_shown(value)}: takes {words}{', or None' if none else ''}")


def _shown(value: Any) -> str:
    """Its ``repr``, cut to what fits into one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, tables in tables without end
        return f"({type(value).__name__} too long to show)"
    return text if len(text) <= 200 else text[:200] + " ..."


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """How :func:`brfx.prepare_qat` rewrites a model. Frozen; :func:`dataclasses.replace` makes a changed one.

    Attributes:
        bits: bits of weights and activations where the next two say nothing, 1 to 8, or 32 to stay in FP32.
        weight_bits, act_bits: bits of weights, of activations; default ``bits``.
        clip_value: ceiling of a plain ReLU before it is quantized (6.0 makes it a ReLU6); ``None`` leaves it open.
            A ReLU6 of the model keeps its 6 unless the value given is lower.
        per_channel: one weight step per output channel instead of one per layer.
        input_bits: bits of what enters the model, such as the image (``"deploy"``).
        residual_bits: bits of a branch into a residual add, of averages, and of a convolution's output that no other
            quantizer takes (``"deploy"``); 32 leaves the first and the last in FP32.
        weight_grid: ``"signed"`` has a zero, levels ``-2**(bits-1) .. 2**(bits-1) - 1`` steps, as in the LSQ paper.
            ``"symmetric"`` has none: ``-1.5, -0.5, 0.5, 1.5`` steps at 2 bits; for weights of 1 to 4 bits.
        weight_quantizer, act_quantizer: how they are quantized, ``"lsq"`` or another kind
            (:mod:`brfx.quant.factory`). What may be negative, attention, products in Python code and residual streams
            have LSQ's quantizer of activations in any case.
        stream_bits: bits of a residual stream (``"deploy"``), 1 to 8: where an add reads a ReLU's output, that output
            has a grid of its own, and each layer behind it reads it requantized to that layer's ``act_bits``. At
            ``act_bits`` or below the stream is as narrow as the layers' inputs.
        placement: ``"deploy"`` puts every input of a convolution, linear or matrix product on a grid, so that what is
            trained is what integer kernels execute; ``"paper"`` quantizes weights and ReLUs alone, as the papers do.
        first_last_8bit: 8 bits for the first and the last convolution or linear, as many papers have it; overrides
            come after it.
        overrides: ``(pattern, settings)`` pairs for single layers, the last that matches wins, setting by setting. A
            pattern is a glob on dotted names (``"layer1.*"``) or ``"type:Linear"``; settings are those above but
            ``placement``; ``None`` instead of settings leaves the layer in FP32.
        skip: patterns of what stays in FP32, short for overrides with ``None``.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field and what it takes.
    """

    bits: int = 2
    weight_bits: int | None = None
    act_bits: int | None = None
    clip_value: float | None = None
    per_channel: bool = False
    input_bits: int = 8
    residual_bits: int = 8
    stream_bits: int = 8
    weight_grid: str = "signed"
    weight_quantizer: str = "lsq"
    act_quantizer: str = "lsq"
    placement: str = "deploy"
    first_last_8bit: bool = False
    overrides: tuple[Override, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("weight_bits", "act_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.bits)
        for name in ("bits", "weight_bits", "act_bits", "input_bits", "residual_bits"):
            bits = getattr(self, name)
            if bits not in (*range(1, 9), 32):
                raise ConfigError(f"{name}={_shown(bits)}: takes 1 to 8, or 32 to stay in FP32")
        if self.stream_bits not in range(1, 9):
            raise ConfigError(f"stream_bits={_shown(self.stream_bits)}: takes 1 to 8")
        if self.weight_grid == "symmetric" and self.weight_bits not in (1, 2, 3, 4, 32):
            raise ConfigError(
                f"weight_grid='symmetric' takes weight_bits 1 to 4, got {self.weight_bits}: "
                "set weight_grid='signed' with it"
            )
        if self.clip_value is not None and not self.clip_value > 0:
            raise ConfigError(f"clip_value={_shown(self.clip_value)}: takes a positive number, or None for no ceiling")
        self._check_choices()
        pairs = tuple(
            (pattern, settings if settings is None else dict(settings)) for pattern, settings in self.overrides
        )
        pairs += tuple((pattern, None) for pattern in self.skip)
        object.__setattr__(self, "overrides", pairs)
        object.__setattr__(self, "skip", ())
        for pattern, settings in pairs:
            self._overridden(pattern, settings)

    def _check_choices(self) -> None:
        for name, choices in (
            ("weight_quantizer", WEIGHT_QUANTIZERS),
            ("act_quantizer", ACT_QUANTIZERS),
            ("weight_grid", WEIGHT_GRIDS),
            ("placement", PLACEMENTS),
        ):
            if getattr(self, name) not in tuple(choices):
                takes = " or ".join(map(repr, choices))
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes {takes}")

    def without_clip(self) -> QATConfig:
        """The same with every ReLU's ceiling left as the model has it."""
        overrides = tuple(
            (pattern, settings and {name: value for name, value in settings.items() if name != "clip_value"})
            for pattern, settings in self.overrides
        )
        return replace(self, clip_value=None, overrides=overrides)

    @property
    def weight_bits_or_none(self) -> int | None:
        """Bits of weights, ``None`` where they stay in FP32."""
        return None if self.weight_bits == 32 else self.weight_bits

    @property
    def symmetric(self) -> bool:
        """Whether weights lie on the grid without a zero."""
        return self.weight_grid == "symmetric"

    @property
    def weight_settings(self) -> dict[str, Any]:
        """What a layer's quantizer of weights is made with, besides its bits."""
        return {"per_channel": self.per_channel, **self.weight_method}

    @property
    def weight_method(self) -> dict[str, Any]:
        """Of these, what does not depend on a weight's shape."""
        return {"symmetric": self.symmetric, "method": self.weight_quantizer}

    @property
    def acts_quantized(self) -> bool:
        """Whether inputs of layers are to be put on a grid: ``"deploy"``, at fewer than 32 bits."""
        return self.placement == "deploy" and self.act_bits != 32

    @property
    def inner_act_bits(self) -> int | None:
        """Bits of the operands inside what quantizes its own, such as attention."""
        return self.act_bits if self.acts_quantized else None

    def at(self, name: str, kind: str) -> QATConfig | None:
        """The settings for one layer; ``None``: leave it in FP32.

        Args:
            name: its dotted name.
            kind: its type's name, such as ``"Conv2d"``.
        """
        found: QATConfig | None = replace(self, overrides=())
        for pattern, settings in self.overrides:
            if matches(pattern, name, kind):
                found = (found or replace(self, overrides=()))._overridden(pattern, settings)
        return found

    def _overridden(self, pattern: str, settings: dict[str, Any] | None) -> QATConfig | None:
        if settings is None:
            return None
        known = {field.name for field in fields(self)} - {"placement", "first_last_8bit", "overrides", "skip"}
        strange = [name for name in settings if name not in known]
        if strange:
            raise ConfigError(
                f"overrides: {pattern!r} sets {_shown(strange[0])}; it can set {', '.join(sorted(known))}"
            )
        if "bits" in settings:
            settings = {"weight_bits": settings["bits"], "act_bits": settings["bits"]} | settings
        try:
            return replace(self, overrides=(), **settings)
        except ConfigError as error:
            raise ConfigError(f"overrides: {pattern!r}: {error}") from error


def matches(pattern: str, name: str, kind: str) -> bool:
    """Whether an override's pattern means the layer ``name`` of type ``kind``."""
    wanted_kind = pattern.removeprefix("type:")
    return fnmatchcase(kind, wanted_kind) if wanted_kind != pattern else fnmatchcase(name, pattern)


OPTIMIZERS = ("sgd", "adamw")
STARTS = ("lsq", "mse")
DEAD_FILTERS = ("keep", "revive", "ignore")
#: Forms of the bin regularizers, each with the lambdas of weights and activations where none are given. The paper's are
#: published; 0.001 for each value closes some 95 % of the distances in the 70 last of 100 epochs of 700 batches.
BR_FORMS = {"mean": (0.1, 0.01), "per_value": (0.001, 0.0)}
COMPILE = ("auto", "on", "kernels", "off")
PRECISION = ("fp32", "bf16", "fp16")
ON_NONFINITE = ("stop", "skip")
KEEP = ("last", "best")
TASKS = ("classification", "segmentation")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of :func:`brfx.fit`. Frozen; :func:`dataclasses.replace` makes a changed one.

    Attributes:
        epochs: passes over the training data, the warm-up included.
        warmup_epochs: of these, the first ones without the penalty; default 30 % of ``epochs``.
        optimizer: ``"sgd"`` (Nesterov momentum) or ``"adamw"``.
        accumulate: batches an update, whose gradients are averaged: what one batch of so many times the images gives,
            but for batch norms and activations' bins, which see each batch alone. A run is saved between updates.
        lr: peak learning rate; cosine decay to zero at the last update.
        lr_warmup: share of all updates over which the rate first rises from zero to its peak.
        step_lr: learning rate of parameters that a module names in ``own_rate`` (the quantizers' steps), which
            get no weight decay; default ``lr``.
        momentum: of SGD.
        weight_decay: of weights with two or more dimensions; biases and norms get none.
        seed: of everything random in the run.
        device: where the model and the batches live.
        compile: ``"on"`` (the whole step as one graph), ``"kernels"`` (each chain from a layer to the quantizer behind
            it), ``"off"``, or ``"auto"``: what a run of so many batches earns back. Without a C++ compiler nothing is
            compiled.
        precision: ``"bf16"`` or ``"fp16"`` (with loss scaling) train under autocast; steps, codes and bins are
            computed in FP32 all the same.
        channels_last: keep images and 4-d weights in that memory format, which convolutions run faster in. Compiled
            convolutions run in it all the same.
        label_smoothing: share of the target that goes to all classes alike.
        distill: share of the loss that is distillation from a teacher, in :func:`brfx.fit` given as such; 0: none.
        temperature: of distillation's softmax.
        clip_grad: the gradients' total norm is scaled down to this; ``None``: never.
        ema: decay of a moving average of the weights, which is then what is validated and kept; 0: none.
        reestimate_bn: training batches from which batch norms' statistics are estimated anew before each validation;
            0: the running ones are used.
        on_nonfinite: at a loss or gradient that is not finite, ``"stop"`` the run, or ``"skip"`` the batch.
        keep: the epoch that is the result: the ``"last"``, at whose end the rate is 0, or the ``"best"`` on validation
            of those trained with the final objective, the penalty's where there is one; of equals the latest.
        patience: epochs without a better one on validation, after the warm-up, that end the run; with ``keep="best"``.
            ``None``: all epochs are trained.
        checkpoint_minutes: time between two checkpoints inside an epoch; each epoch ends with one anyway.
        keep_checkpoints: how many of the newest stay.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field and what it takes.
    """

    epochs: int = 100
    warmup_epochs: int | None = None
    optimizer: str = "sgd"
    accumulate: int = 1
    lr: float = 0.02
    lr_warmup: float = 0.1
    step_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    seed: int = 0
    device: str = "cpu"
    compile: str = "auto"
    precision: str = "fp32"
    channels_last: bool = True
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    clip_grad: float | None = None
    ema: float = 0.0
    reestimate_bn: int = 0
    on_nonfinite: str = "stop"
    keep: str = "last"
    patience: int | None = None
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        _check_types(self)
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", self.epochs * 3 // 10)
        if self.step_lr is None:
            object.__setattr__(self, "step_lr", self.lr)
        for name in ("epochs", "warmup_epochs", "weight_decay", "momentum", "reestimate_bn"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes 0 or more")
        for name in (
            "lr",
            "step_lr",
            "temperature",
            "clip_grad",
            "checkpoint_minutes",
            "keep_checkpoints",
            "accumulate",
            "patience",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes a number above 0")
        for name in ("lr_warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes 0 or a share below 1")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill={_shown(self.distill)}: takes 0 to 1")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("compile", COMPILE),
            ("precision", PRECISION),
            ("on_nonfinite", ON_NONFINITE),
            ("keep", KEEP),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes {' or '.join(choices)}")
        self._check_together()

    def _check_together(self) -> None:
        if self.patience is not None and self.keep != "best":
            raise ConfigError(
                "--patience ends a run before its rate is 0, so its last epoch is not the one: --keep best"
            )
        if self.accumulate > 1 and self.on_nonfinite == "skip":
            raise ConfigError("--on-nonfinite skip leaves out batches, and none of several an update: --accumulate 1")


#: Where named data sets lie.
DATA_DIR = Path("~/.cache/brfx")

#: Of the loss, what is distilled from a teacher that is named without a share.
TEACHER_SHARE = 0.5

#: What training an FP32 network from random weights wants instead of the defaults, which are for quantization. It keeps
#: the best epoch: the network has not seen the validation images before, so they tell epochs apart, and ``best.pth`` is
#: then the network that was tested.
FLOAT_TRAINING = TrainConfig(epochs=100, warmup_epochs=0, lr=0.1, weight_decay=5e-4, keep="best")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Everything that a command of ``brfx`` works from; written whole into the run's ``config.json``.

    Attributes:
        command: ``"train"``, ``"quantize"`` or ``"evaluate"``.
        model: a name that ``brfx models`` lists, or ``path/to/file.py:factory``.
        task: ``"classification"`` or ``"segmentation"``; default the model's own, of a file's classification.
        ckpt: the FP32 checkpoint, or for ``evaluate`` also a run's ``model.pt``; ``Path("torchvision")``: the model's
            published weights, where torchvision's own download puts them.
        ckpt_key: which state dict of the checkpoint, where it has several.
        strict: refuse a checkpoint of another number of classes, whose head training else makes anew.
        num_classes: default the number of the data's classes.
        cifar_stem: 3x3 stem without pooling, for small images.
        data: ``digits``, ``cifar10``, ``cifar100`` or a folder; default the model's own data set.
        data_dir: where named data sets lie.
        download: let torchvision download a named data set.
        image_size, mean, std: instead of the data set's defaults; a mean and a std of one number make images grey, for
            a model of one channel.
        val_fraction: share of the training images that are held out to measure each epoch on; 0: all are trained on,
            and there is no validation.
        batch_size: images a batch.
        limit_batches: so many batches of each split alone, to try whether a run works; accuracies are of these.
        workers: processes that decode the images of a folder; 0 decodes in the training process.
        skip_bad_images: leave out images of a folder that cannot be read.
        qat: what to quantize.
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
    val_fraction: float = 0.1
    batch_size: int = 64
    limit_batches: int | None = None
    workers: int = 2
    skip_bad_images: bool = False
    qat: QATConfig = field(default_factory=QATConfig)
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
    dead_filters: str = "keep"
    output_dir: Path | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        try:
            object.__setattr__(self, "data_dir", self.data_dir.expanduser())
        except RuntimeError as error:
            raise ConfigError(f"data_dir={_shown(self.data_dir)}: there is no such user's home") from error
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("batch_size", "calibration_batches", "image_size", "limit_batches"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes 1 or more")
        if self.task not in (None, *TASKS):
            raise ConfigError(f"task={_shown(self.task)}: takes {' or '.join(TASKS)}, or None for the model's own")
        self._check_quantization()
        for name in ("lambda_br", "lambda_br_act", "lambda_kurtosis", "workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes 0 or more")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction={_shown(self.val_fraction)}: takes 0 or a share below 1")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(f"std={_shown(self.std)}: takes numbers above 0")
        self._check_together()

    def _check_together(self) -> None:
        if not self.val_fraction and self.train.keep == "best":
            raise ConfigError("--keep best chooses on validation images, --val-fraction 0 leaves none: --keep last")
        if self.teacher is None:
            return
        name, _, file = self.teacher.partition("=")
        if not name or not file:
            raise ConfigError(f"teacher={_shown(self.teacher)}: takes NAME=FILE, such as resnet56=resnet56.pth")
        if not self.train.distill:
            raise ConfigError("--teacher says nothing at --distill 0: give it a share of the loss, or leave it out")

    def _check_quantization(self) -> None:
        """Also, lambdas that are not given are the form's."""
        for name, choices in (("start", STARTS), ("dead_filters", DEAD_FILTERS), ("br_form", tuple(BR_FORMS))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={_shown(getattr(self, name))}: takes {' or '.join(choices)}")
        if self.br_form == "per_value" and self.br_backprop_to_alpha_act:
            raise ConfigError("--br-backprop-to-alpha-act: --br-form per_value trains no step: give one of the two")
        for name, default in zip(("lambda_br", "lambda_br_act"), BR_FORMS[self.br_form], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)


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
        raise ConfigError(f"{path}: cannot read the settings of a run ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not the settings of a run")
    for beside in ("versions", "python", "command_line"):
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
