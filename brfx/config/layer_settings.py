"""The settings of quantization at one place of a model, overrides already applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What :meth:`brfx.QATConfig.at` finds for one layer; the fields are those of :class:`brfx.QATConfig`.

    Attributes:
        weight_bits, act_bits: ``None`` where they stay in FP32.
        symmetric: whether weights lie on the grid without a zero.
    """

    weight_bits: int | None
    act_bits: int | None
    clip_value: float | None
    per_channel: bool
    input_bits: int
    residual_bits: int
    stream_bits: int
    symmetric: bool
    weight_quantizer: str
    act_quantizer: str
    placement: str

    @property
    def weight_settings(self) -> dict[str, Any]:
        """What a layer's quantizer of weights is made with, besides its bits."""
        return {"per_channel": self.per_channel, **self.weight_method}

    @property
    def weight_method(self) -> dict[str, Any]:
        """Of these, what does not depend on a weight's shape."""
        return {"symmetric": self.symmetric, "method": self.weight_quantizer}

    @property
    def inner_act_bits(self) -> int | None:
        """Bits of a layer's inputs and of the operands inside attention; ``None`` where these are not put on a grid:
        at 32 bits, and with ``"paper"``, which quantizes ReLUs alone."""
        return self.act_bits if self.placement == "deploy" else None
