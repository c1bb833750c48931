"""Signal-to-quantization-noise ratio (SQNR) of each quantizer at 8 bits, taken while it is calibrated.

Eight bits keep more than 30 dB of nearly everything. A quantizer where they do not has the wrong sign or range, and
fewer bits will not do better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from brfx.compat import in_float64
from brfx.nn import Quantizer
from brfx.quant.grid import MIN_STEP, Grid
from brfx.quant.step_init import STEP_INIT_RULES

#: A quantizer below this many decibels at 8 bits is reported.
LEAST_DB = 15.0


def sqnr(values: Tensor, quantized: Tensor) -> float:
    """``10 * log10(sum v^2 / sum (v - q)^2)`` in decibels; infinite where nothing is lost, and where all is zero."""
    noise = float(in_float64(values - quantized).square().sum())
    return 10 * math.log10(max(float(in_float64(values).square().sum()) / noise, 1e-30)) if noise else math.inf


@contextmanager
def lossy_at_8_bits(quantizers: dict[str, Quantizer], start: str) -> Iterator[dict[str, str]]:
    """Within the block, quantize the first batch that each quantizer is calibrated on to 8 bits, beside its own bits.

    Args:
        quantizers: by name.
        start: the rule by which steps are set (a key of ``STEP_INIT_RULES``), here for 8 bits.

    Yields:
        By name, the ratio of each quantizer that has less than :data:`LEAST_DB`, and the likely reason. It fills up
        while the model runs.
    """
    lossy: dict[str, str] = {}
    seen: set[str] = set()

    def watch(quantizer: Quantizer, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        name = names[quantizer]
        raw = args[0] if args else kwargs["input"]
        if name in seen or quantizer.mode != "calibrate" or not raw.numel():
            return
        seen.add(name)
        values = quantizer.prepare(raw).detach().float()
        grid = Grid(8, quantizer.signed, quantizer.grid.symmetric)
        step = STEP_INIT_RULES[start](grid, values, tuple(quantizer.step.shape))
        ratio = sqnr(values, grid.decode(grid.encode(values, step), step))
        if ratio < LEAST_DB:
            lossy[name] = f"{ratio:.1f} dB ({_reason(grid, values, step)})"

    names = {quantizer: name for name, quantizer in quantizers.items()}
    with ExitStack() as hooks:
        for quantizer in quantizers.values():
            hooks.enter_context(quantizer.register_forward_hook(watch, with_kwargs=True))
        yield lossy


def _reason(grid: Grid, values: Tensor, step: Tensor) -> str:
    """The values that are lost: those on the wrong side of zero, below the first level, or beyond the last."""
    negative = float((values < 0).float().mean())
    if not grid.signed and negative:
        return f"{negative:.0%} of its values are negative, and its grid is unsigned"
    largest = float(values.abs().max())
    if largest < MIN_STEP * grid.reach:
        return f"its values vanish, at most {largest:.2g}: no step is below {MIN_STEP:g}"
    return f"its values reach to {largest:.3g}, its range to {float(step.max()) * grid.reach:.3g}"
