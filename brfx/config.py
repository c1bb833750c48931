"""What to quantize, and how finely."""

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
