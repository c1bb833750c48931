"""Settings of quantization."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from brfx.config.checks import Override, check_types, shown
from brfx.config.layer_settings import LayerSettings
from brfx.errors import ConfigError
from brfx.quant.factory import ACT_QUANTIZERS, WEIGHT_QUANTIZERS

PLACEMENTS = ("deploy", "paper")
WEIGHT_GRIDS = ("signed", "symmetric")


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
        check_types(self)
        for name in ("weight_bits", "act_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.bits)
        for name in ("bits", "weight_bits", "act_bits", "input_bits", "residual_bits"):
            bits = getattr(self, name)
            if bits not in (*range(1, 9), 32):
                raise ConfigError(f"{name}={shown(bits)}: takes 1 to 8, or 32 to stay in FP32")
        if self.stream_bits not in range(1, 9):
            raise ConfigError(f"stream_bits={shown(self.stream_bits)}: takes 1 to 8")
        _require_grid(self.weight_grid, self.weight_bits)
        if self.clip_value is not None and not self.clip_value > 0:
            raise ConfigError(f"clip_value={shown(self.clip_value)}: takes a positive number, or None for no ceiling")
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
                raise ConfigError(f"{name}={shown(getattr(self, name))}: takes {takes}")

    def without_clip(self) -> QATConfig:
        """The same with every ReLU's ceiling left as the model has it."""
        overrides = tuple(
            (pattern, settings and {name: value for name, value in settings.items() if name != "clip_value"})
            for pattern, settings in self.overrides
        )
        return replace(self, clip_value=None, overrides=overrides)

    @property
    def symmetric(self) -> bool:
        """Whether weights lie on the grid without a zero."""
        return self.weight_grid == "symmetric"

    def at(self, name: str, kind: str) -> LayerSettings | None:
        """The settings for one layer; ``None``: leave it in FP32.

        Args:
            name: its dotted name.
            kind: its type's name, such as ``"Conv2d"``.

        Raises:
            ConfigError: two overrides of this layer contradict each other.
        """
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        found: dict[str, Any] | None = own
        for pattern, settings in self.overrides:
            if matches(pattern, name, kind):
                found = None if settings is None else _changed(found or own, pattern, settings)
        return None if found is None else _layer_settings(found)

    def _overridden(self, pattern: str, settings: dict[str, Any] | None) -> QATConfig | None:
        if settings is None:
            return None
        known = {field.name for field in fields(self)} - {"placement", "first_last_8bit", "overrides", "skip"}
        strange = [name for name in settings if name not in known]
        if strange:
            raise ConfigError(f"overrides: {pattern!r} sets {shown(strange[0])}; it can set {', '.join(sorted(known))}")
        try:
            return replace(self, overrides=(), **_with_both_bits(settings))
        except ConfigError as error:
            raise ConfigError(f"overrides: {pattern!r}: {error}") from error


def _require_grid(grid: str, weight_bits: int | None) -> None:
    if grid == "symmetric" and weight_bits not in (1, 2, 3, 4, 32):
        raise ConfigError(
            f"weight_grid='symmetric' takes weight_bits 1 to 4, got {weight_bits}: set weight_grid='signed' with it"
        )


def _with_both_bits(settings: dict[str, Any]) -> dict[str, Any]:
    """An override's ``bits`` are those of weights and of activations."""
    if "bits" not in settings:
        return settings
    return {"weight_bits": settings["bits"], "act_bits": settings["bits"]} | settings


def _changed(own: dict[str, Any], pattern: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with one override applied. Each of its values was checked when the configuration was made; what two
    overrides make together is checked here."""
    own = own | _with_both_bits(settings)
    own |= {name: own["bits"] for name in ("weight_bits", "act_bits") if own[name] is None}
    try:
        _require_grid(own["weight_grid"], own["weight_bits"])
    except ConfigError as error:
        raise ConfigError(f"overrides: {pattern!r}: {error}") from error
    return own


def _layer_settings(own: dict[str, Any]) -> LayerSettings:
    names = {field.name for field in fields(LayerSettings)} & set(own)
    bits = {name: None if own[name] == 32 else own[name] for name in ("weight_bits", "act_bits")}
    symmetric = own["weight_grid"] == "symmetric"
    return LayerSettings(**{name: own[name] for name in names} | bits, symmetric=symmetric)


def matches(pattern: str, name: str, kind: str) -> bool:
    """Whether an override's pattern means the layer ``name`` of type ``kind``."""
    wanted_kind = pattern.removeprefix("type:")
    return fnmatchcase(kind, wanted_kind) if wanted_kind != pattern else fnmatchcase(name, pattern)
