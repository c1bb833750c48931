"""Histograms of what is quantized against the levels it is rounded to: weights, and activations of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from brfx.analysis.dead_filters import dead_filters
from brfx.analysis.weight_statistics import quantized_weights
from brfx.kernels.precision import at_least_float32
from brfx.modes import eval_mode
from brfx.nn import ActivationQuantizer, QuantizedLayer, Quantizer
from brfx.quant.grid import Grid, positive_step
from brfx.regularizers.bin_regularizer import distances

#: Most bins that a histogram has.
WEIGHT_BINS, ACTIVATION_BINS = 128, 64
#: How far a histogram reaches beyond the outermost levels, in steps.
_MARGIN = 2.0
#: Shares of single levels are told of grids with at most so many.
_FEW_LEVELS = 16


@torch.no_grad()
def weight_histograms(qmodel: nn.Module) -> dict[str, dict[str, Any]]:
    """The latent weights of each layer against their levels.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned; weights without a step yet are left out.

    Returns:
        ``{name: figures}`` of plain numbers. Values and levels are in steps, so that channels with steps of their own
        add up, and epochs compare: ``levels`` (first, last, distance between two), ``step`` (the mean; ``step_range``
        where channels differ), ``start`` and ``width`` of the histogram's bins, their ``counts``, values ``below`` and
        ``above`` them, ``codes``: how many values each level has (of grids of at most 16 levels), ``distance`` and
        ``mse`` as in :class:`brfx.WeightStatistics`, and of convolutions and linears ``channels`` and ``dead``, how
        many of them let nothing pass (:func:`brfx.dead_filters`).
    """
    found = {}
    with eval_mode(qmodel):
        for name, weight, quantizer in quantized_weights(qmodel):
            tally = _Tally(quantizer, WEIGHT_BINS)
            tally.add(weight)
            found[name] = tally.figures()
        dead = dead_filters(qmodel)
    modules: dict[str, Any] = dict(qmodel.named_modules())
    for name, figures in found.items():
        layer = modules.get(name)
        if isinstance(layer, QuantizedLayer):
            channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            figures |= {"channels": channels, "dead": len(dead.get(name, ()))}
    return found


@torch.no_grad()
def activation_histograms(qmodel: nn.Module, *inputs: Any) -> dict[str, dict[str, Any]]:
    """What each activation quantizer rounds, after ReLU and clip, in one batch in eval mode.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned, calibrated.
        inputs: the model's inputs.

    Returns:
        As :func:`weight_histograms`, by the quantizer's name and in order of execution. One that is called several
        times, as a residual stream's is, has the sum; one that is not reached is left out.

    Raises:
        NotCalibratedError: a quantizer has no step.
    """
    tallies: dict[str, _Tally] = {}
    quantizers = {name: module for name, module in qmodel.named_modules() if isinstance(module, ActivationQuantizer)}

    def seen(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(quantizer: Any, args: Any, kwargs: Any) -> None:
            if quantizer.has_step():  # without one it raises when it is called
                values = args[0] if args else kwargs["input"]
                tallies.setdefault(name, _Tally(quantizer, ACTIVATION_BINS)).add(values)

        return hook

    handles = [module.register_forward_pre_hook(seen(name), with_kwargs=True) for name, module in quantizers.items()]
    try:
        with eval_mode(qmodel):
            qmodel(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: tally.figures() for name, tally in tallies.items()}


class _Tally:
    """Sums over the values that a quantizer is given."""

    def __init__(self, quantizer: Quantizer, most: int) -> None:
        self.quantizer, self.grid = quantizer, quantizer.grid
        self.start, self.width, self.bins = _bins(quantizer.grid, most)
        self.counts = torch.zeros(self.bins + 2, dtype=torch.int64)  # the first and the last: below and above
        self.codes = torch.zeros(len(self.grid.codes), dtype=torch.int64)
        self.absolute = self.squares = self.power = 0.0

    def add(self, values: Tensor) -> None:
        step = positive_step(self.quantizer.step.detach())
        prepared = at_least_float32(self.quantizer.prepare(values.detach()))
        if bool(torch.isnan(prepared).any()):  # in no bin
            prepared, step = (part[~torch.isnan(prepared)] for part in (prepared, step.expand_as(prepared)))
        code, distance = distances(prepared, step, self.grid)
        place = ((prepared / step - self.start) / self.width).floor().clamp(-1, self.bins) + 1
        self.counts += torch.bincount(place.flatten().int(), minlength=len(self.counts)).cpu()
        index = (code - self.grid.low) / self.grid.codes.step
        self.codes += torch.bincount(index.flatten().int(), minlength=len(self.codes)).cpu()
        self.absolute += float((distance / step).abs_().sum(dtype=torch.float64)) * 2
        self.squares += float(distance.square().sum(dtype=torch.float64))
        self.power += float(prepared.square().sum(dtype=torch.float64))

    def figures(self) -> dict[str, Any]:
        step, count, levels = self.quantizer.step.detach(), int(self.counts.sum()), self.grid.levels
        figures: dict[str, Any] = {
            "bits": self.grid.bits,
            "levels": [levels[0], levels[-1], levels[1] - levels[0]],
            "step": float(step.mean()),
            "start": self.start,
            "width": self.width,
            "counts": self.counts[1:-1].tolist(),
            "below": int(self.counts[0]),
            "above": int(self.counts[-1]),
            "used": int((self.codes > 0).sum()),
            "distance": self.absolute / count if count else 0.0,
            "mse": self.squares / self.power if self.power > 0 else 0.0,
        }
        if step.numel() > 1:
            figures["step_range"] = [float(step.min()), float(step.max())]
        if len(levels) <= _FEW_LEVELS:
            figures["codes"] = self.codes.tolist()
        return figures


def _bins(grid: Grid, most: int) -> tuple[float, float, int]:
    """First edge, width and number of a histogram's bins, in steps: a power of two of them lies between two codes, or
    of codes in a bin."""
    first = grid.levels[0] - (_MARGIN if grid.signed else 0.5)
    length = grid.levels[-1] + _MARGIN - first
    width = 2.0 ** math.ceil(math.log2(length / most))
    return first, width, math.ceil(length / width)
