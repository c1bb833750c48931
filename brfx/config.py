"""The settings: what to quantize and how finely, and how to train. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

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
        for field in ("weight_bits", "act_bits"):
            if getattr(self, field) is None:
                object.__setattr__(self, field, self.bits)
        for field in ("bits", "weight_bits", "act_bits"):
            bits = getattr(self, field)
            if bits not in (*range(1, 9), 32):
                raise ConfigError(f"{field}={bits!r}: takes 1 to 8, or 32 to stay in FP32")
        if self.clip_value is not None and not self.clip_value > 0:
            raise ConfigError(f"clip_value={self.clip_value!r}: takes a positive number, or None for no ceiling")
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement={self.placement!r}: takes {' or '.join(map(repr, PLACEMENTS))}")


OPTIMIZERS = ("sgd", "adamw")
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
            get no weight decay; default ``lr``.
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
    lr: float = 0.04
    lr_warmup: float = 0.1
    step_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    device: str = "cpu"
    compile: str = "auto"
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", int(0.3 * self.epochs))
        if self.step_lr is None:
            object.__setattr__(self, "step_lr", self.lr)
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
