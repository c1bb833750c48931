"""Settings of training."""

from __future__ import annotations

from dataclasses import dataclass

from brfx.config.checks import check_types, shown
from brfx.errors import ConfigError

OPTIMIZERS = ("sgd", "adamw")
COMPILE = ("auto", "on", "kernels", "off")
PRECISION = ("fp32", "bf16", "fp16")
ON_NONFINITE = ("stop", "skip")
KEEP = ("last", "best")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of :func:`brfx.fit`. Frozen; :func:`dataclasses.replace` makes a changed one.

    Attributes:
        epochs: passes over the training data, the warm-up included.
        epoch_batches: batches of an epoch, for data without a length, or with more than wanted; ``None``: its length.
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
    epoch_batches: int | None = None
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
        check_types(self)
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", self.epochs * 3 // 10)
        if self.step_lr is None:
            object.__setattr__(self, "step_lr", self.lr)
        for name in ("epochs", "warmup_epochs", "weight_decay", "momentum", "reestimate_bn"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes 0 or more")
        for name in (
            "lr",
            "step_lr",
            "temperature",
            "clip_grad",
            "checkpoint_minutes",
            "keep_checkpoints",
            "accumulate",
            "patience",
            "epoch_batches",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes a number above 0")
        for name in ("lr_warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes 0 or a share below 1")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill={shown(self.distill)}: takes 0 to 1")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("compile", COMPILE),
            ("precision", PRECISION),
            ("on_nonfinite", ON_NONFINITE),
            ("keep", KEEP),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes {' or '.join(choices)}")
        self._check_together()

    def _check_together(self) -> None:
        if self.patience is not None and self.keep != "best":
            raise ConfigError(
                "--patience ends a run before its rate is 0, so its last epoch is not the one: --keep best"
            )
        if self.accumulate > 1 and self.on_nonfinite == "skip":
            raise ConfigError("--on-nonfinite skip leaves out batches, and none of several an update: --accumulate 1")


#: What training an FP32 network from random weights wants instead of the defaults, which are for quantization. It keeps
#: the best epoch: the network has not seen the validation images before, so they tell epochs apart, and ``best.pth`` is
#: then the network that was tested.
FLOAT_TRAINING = TrainConfig(epochs=100, warmup_epochs=0, lr=0.1, weight_decay=5e-4, keep="best")
