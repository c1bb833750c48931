"""The settings: what to quantize and how finely, and how to train. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from brfx.errors import ConfigError

PLACEMENTS = ("paper",)


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """How :func:`brfx.prepare_qat` rewrites a model. Frozen; :func:`dataclasses.replace` makes a changed one.

    Attributes:
        bits: bits of weights and activations where the next two say nothing, 1 to 8, or 32 to stay in FP32.
        weight_bits, act_bits: bits of weights, of activations; default ``bits``.
        clip_value: ceiling of a plain ReLU before it is quantized (6.0 makes it a ReLU6); ``None`` leaves it open.
            A ReLU6 of the model keeps its 6 unless the value given is lower.
        per_channel: one weight step per output channel instead of one per layer.
        placement: ``"paper"`` quantizes weights and ReLUs, as the papers do.

    Raises:
        ConfigError: a value is out of range; the message names the field and what it takes.
    """

    bits: int = 2
    weight_bits: int | None = None
    act_bits: int | None = None
    clip_value: float | None = None
    per_channel: bool = False
    placement: str = "paper"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.bits)
        for name in ("bits", "weight_bits", "act_bits"):
            bits = getattr(self, name)
            if bits not in (*range(1, 9), 32):
                raise ConfigError(f"{name}={bits!r}: takes 1 to 8, or 32 to stay in FP32")
        if self.clip_value is not None and not self.clip_value > 0:
            raise ConfigError(f"clip_value={self.clip_value!r}: takes a positive number, or None for no ceiling")
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement={self.placement!r}: takes {' or '.join(map(repr, PLACEMENTS))}")


OPTIMIZERS = ("sgd", "adamw")
STARTS = ("lsq", "mse")
COMPILE = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of :func:`brfx.fit`. Frozen; :func:`dataclasses.replace` makes a changed one.

    Attributes:
        epochs: passes over the training data, the warm-up included.
        warmup_epochs: of these, the first ones without the penalty; default 30 % of ``epochs``.
        optimizer: ``"sgd"`` (Nesterov momentum) or ``"adamw"``.
        lr: peak learning rate; cosine decay to zero at the last batch.
        lr_warmup: share of all batches over which the rate first rises from zero to its peak.
        step_lr: learning rate of parameters that a module names in ``own_rate`` (the quantizers' steps), which
            get no weight decay; default a tenth of ``lr``.
        momentum: of SGD.
        weight_decay: of weights with two or more dimensions; biases and norms get none.
        seed: of everything random in the run.
        device: where the model and the batches live.
        compile: ``"on"``, ``"off"``, or ``"auto"``: on when a C++ compiler is there and the run has enough batches
            to earn the compilation back.
        channels_last: keep images and 4-d weights in that memory format, which convolutions run faster in.

    Raises:
        ConfigError: a value is out of range, or the warm-up leaves no epoch for the penalty.
    """

    epochs: int = 100
    warmup_epochs: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.03
    lr_warmup: float = 0.1
    step_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    seed: int = 0
    device: str = "cpu"
    compile: str = "auto"
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", int(0.3 * self.epochs))
        if self.step_lr is None:
            object.__setattr__(self, "step_lr", self.lr / 10)
        for name in ("epochs", "warmup_epochs", "weight_decay", "momentum", "lr_warmup"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: takes 0 or more")
        for name in ("lr", "step_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: takes a number above 0")
        if not self.lr_warmup < 1:
            raise ConfigError(f"lr_warmup={self.lr_warmup!r}: takes a share below 1")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r}: takes {' or '.join(OPTIMIZERS)}")
        if self.compile not in COMPILE:
            raise ConfigError(f"compile={self.compile!r}: takes {', '.join(COMPILE)}")


#: What training an FP32 network from random weights wants instead of the defaults, which are for quantization.
FLOAT_TRAINING = TrainConfig(epochs=100, warmup_epochs=0, lr=0.1, weight_decay=5e-4)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Everything that a command of ``brfx`` works from; written whole into the run's ``config.json``.

    Attributes:
        command: ``"train"``, ``"quantize"`` or ``"evaluate"``.
        model: a name that ``brfx models`` lists, or ``path/to/file.py:factory``.
        ckpt: the FP32 checkpoint, or for ``evaluate`` also a run's ``model.pt``.
        num_classes: default the number of the data's classes.
        cifar_stem: 3x3 stem without pooling, for small images.
        data: ``digits``, ``cifar10``, ``cifar100`` or a folder; default the model's own data set.
        data_dir: where named data sets lie.
        download: let torchvision download a named data set.
        image_size, mean, std: instead of the data set's defaults.
        val_fraction: share of the training images that the best epoch is chosen on.
        batch_size: images a batch.
        workers: threads that decode images.
        qat: what to quantize.
        train: how to train.
        lambda_br, lambda_br_act: weights of the two bin regularizers; 0 switches one off.
        br_backprop_to_alpha_act: let the activations' regularizer train the activation steps.
        freeze_weight_alpha, freeze_act_alpha: freeze those steps when regularization starts.
        start: rule by which the steps start, see :func:`brfx.calibrate`.
        calibration_batches: training batches that the steps start from.
        output_dir: run folder, new or empty; default a free name under ``runs/``.

    Raises:
        ConfigError: a value is out of range.
    """

    command: str
    model: str = ""
    ckpt: Path | None = None
    num_classes: int | None = None
    cifar_stem: bool = False
    data: str | None = None
    data_dir: Path = Path("~/.cache/brfx")
    download: bool = False
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    val_fraction: float = 0.1
    batch_size: int = 64
    workers: int = 2
    qat: QATConfig = field(default_factory=QATConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lambda_br: float = 0.1
    lambda_br_act: float = 0.01
    br_backprop_to_alpha_act: bool = False
    freeze_weight_alpha: bool = False
    freeze_act_alpha: bool = False
    start: str = "mse"
    calibration_batches: int = 8
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", self.data_dir.expanduser())
        for name in ("batch_size", "workers", "calibration_batches"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: takes 1 or more")
        for name in ("lambda_br", "lambda_br_act"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: takes 0 or more")
        if self.start not in STARTS:
            raise ConfigError(f"start={self.start!r}: takes {' or '.join(STARTS)}")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction!r}: takes a share between 0 and 1")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(f"std={self.std!r}: takes three numbers above 0")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size!r}: takes 1 or more pixels")
