"""How to train."""

from __future__ import annotations

from dataclasses import dataclass

from brfx.errors import ConfigError

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
