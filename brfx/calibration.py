"""Set every step from data, and switch quantization off for a comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from brfx.analysis.dead_filters import Filters, dead_at_start, described, leave_out, revive
from brfx.analysis.dead_filters import dead_filters as found_dead
from brfx.analysis.sqnr import LEAST_DB, lossy_at_8_bits
from brfx.config import DEAD_FILTERS
from brfx.errors import BrfxError, ConfigError, DataError, NotCalibratedError, first_line
from brfx.metadata import metadata_of
from brfx.modes import eval_mode
from brfx.nn import Quantizer, ResidualAdd
from brfx.quant.step_init import STEP_INIT_RULES

log = logging.getLogger(__name__)


def require_rewritten(model: nn.Module) -> None:
    """Raise BrfxError of a model that has no quantizer and was not made by :func:`brfx.prepare_qat`."""
    if not quantizers(model):
        metadata_of(model)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of a rewritten model by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


@torch.no_grad()
def calibrate(
    qmodel: nn.Module,
    batches: Iterable[Any],
    *,
    start: str = "mse",
    batch_statistics: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    dead_filters: str = "keep",
    seed: int = 0,
) -> None:
    """Set every step from the weights and from what ``batches`` show of the activations.

    Weights are read from the model. Each activation is seen as the layers before it, already quantized, give it.
    The model runs in eval mode and comes back in the mode it had, its buffers unchanged. The log warns of quantizers
    that would keep less than 15 dB of their values even at 8 bits.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned.
        start: ``"mse"``: the step of least squared error, from which few-bit networks train faster, and the one for use
            without training; ``"lsq"``: ``2 * mean|v| / sqrt(Qp)`` (LSQ, section 2.1). The mean over batches.
        batch_statistics: let batch norms normalize with each batch's own mean and variance, as they will in training:
            at few bits the running ones, which come from the FP32 network, no longer fit what reaches them.
        batches: model inputs; of a tuple or list the first element is taken as the input (``(images, labels)``).
        forward: for models that want more than that: ``forward(qmodel, batch)`` runs a batch, instead.
        dead_filters: what to do about filters that let nothing pass (:func:`brfx.dead_filters`), which the log names.
            ``"keep"``: nothing. ``"revive"``: they get new weights at the scale of the layer's others, and a batch norm
            behind them that lets half of the values pass. ``"ignore"``: a step is fitted to the layer's others.
        seed: of the new weights.

    Raises:
        BrfxError: the model was not made by :func:`brfx.prepare_qat`.
        ConfigError: no such rule or treatment; or a filter to revive is in a layer that computes its weight; or a batch
            is a dict that the model does not take as it is.
        DataError: there was no batch.
        NotCalibratedError: a batch or a weight holds NaN or infinity, or a quantizer was never reached that does not
            depend on what Python code decides; one that does stays without a step until it is calibrated.
    """
    if start not in STEP_INIT_RULES:
        raise ConfigError(f"start={start!r}: takes {' or '.join(STEP_INIT_RULES)}")
    if dead_filters not in DEAD_FILTERS:
        raise ConfigError(f"dead_filters={dead_filters!r}: takes {' or '.join(DEAD_FILTERS)}")
    require_rewritten(qmodel)
    dead = _treated(qmodel, dead_filters, start, seed)
    found = quantizers(qmodel)
    with (
        _calibrating(qmodel, start),
        lossy_at_8_bits(found, start) as lossy,
        batch_norms_in_training(qmodel) if batch_statistics else nullcontext(),
    ):
        _run(qmodel, batches, forward or run_first)
    for quantizer in found.values():
        quantizer.set_trainable(quantizer.calibrated)
    missed = [name for name, quantizer in found.items() if not quantizer.calibrated and not quantizer.optional]
    if missed:
        raise NotCalibratedError(f"the batches never reached {len(missed)} quantizers, the first is {missed[0]}")
    if lossy:
        log.warning(
            "%d quantizers would keep less than %g dB even at 8 bits: %s%s",
            *(len(lossy), LEAST_DB, "; ".join(f"{name} {why}" for name, why in islice(lossy.items(), 3))),
            "; ..." if len(lossy) > 3 else "",
        )
    dead = found_dead(qmodel) if dead_filters == "keep" else dead
    if dead:
        count = sum(map(len, dead.values()))
        log.info("%d filters let nothing pass; %s: %s", count, _TREATED[dead_filters], described(dead))


_TREATED = {"keep": "kept as they are", "revive": "revived", "ignore": "no step is fitted to them"}


def _treated(qmodel: nn.Module, how: str, start: str, seed: int) -> Filters:
    """Find dead filters at the steps that are about to be set, and prepare for these."""
    if how == "keep":
        return {}
    dead = dead_at_start(qmodel, start)
    if how == "revive":
        revive(qmodel, dead, seed)
    else:
        leave_out(qmodel, dead)
    return dead


@contextmanager
def _calibrating(qmodel: nn.Module, start: str) -> Iterator[None]:
    """Within the block the model runs in eval mode, and quantizers and sums are calibrated by what they meet."""
    found = quantizers(qmodel).values()
    for quantizer in found:
        quantizer.begin_calibration(start)
    sums = [module for module in qmodel.modules() if isinstance(module, ResidualAdd)]
    _set(sums, "mode", "calibrate")
    try:
        with eval_mode(qmodel):
            yield
    finally:
        for quantizer in found:
            quantizer.end_calibration()
        _set(sums, "mode", "quantize")


def _run(qmodel: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
    """Run each batch; where graphs have quantizers that only training reaches, a second time as in training."""
    found = [quantizer for quantizer in quantizers(qmodel).values() if not quantizer.optional]
    branching = [module for module in qmodel.modules() if getattr(module, "has_mode_branches", False)]
    reached = False
    for batch in batches:
        before = [quantizer.batches_seen for quantizer in found]
        forward(qmodel, batch)
        reached = True
        seen = [quantizer for quantizer, count in zip(found, before, strict=True) if quantizer.batches_seen > count]
        if branching and len(seen) < len(found):
            kept = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
            _set(branching, "training", True)  # of the graph alone, not of the modules that it calls
            _set(seen, "mode", "quantize")
            forward(qmodel, batch)
            _set(branching, "training", False)
            _set(seen, "mode", "calibrate")
            for name, buffer in qmodel.named_buffers():
                if name in kept and not name.endswith("negative"):
                    buffer.copy_(kept[name])
    if not reached:
        raise DataError("calibrate was given no batch: pass an iterable of model inputs")


def _set(modules: Iterable[nn.Module], name: str, value: Any) -> None:
    for module in modules:
        setattr(module, name, value)


def run_first(qmodel: nn.Module, batch: Any) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    device = next(qmodel.parameters()).device
    try:
        return qmodel(inputs.to(device) if isinstance(inputs, torch.Tensor) else inputs)
    except BrfxError:
        raise
    except Exception as error:
        if not isinstance(inputs, Mapping):
            raise
        raise ConfigError(
            f"the model does not take a batch as it is, a {type(inputs).__name__} of {', '.join(map(repr, inputs))} "
            f"({first_line(error)}): say how it is run with forward=, "
            "such as forward=lambda model, batch: model(batch['image'])"
        ) from error


@contextmanager
def batch_norms_in_training(model: nn.Module) -> Iterator[None]:
    """Within the block batch norms use each batch's statistics; their running ones are put back afterwards."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])


def uncalibrated(qmodel: nn.Module) -> list[str]:
    """Names of the quantizers that have no step but need one; of optional ones only where none at all has a step."""
    found = quantizers(qmodel)
    missing = [name for name, quantizer in found.items() if not quantizer.calibrated and not quantizer.has_step()]
    return missing if len(missing) == len(found) else [name for name in missing if not found[name].optional]


def require_calibrated(qmodel: nn.Module) -> None:
    """Raise NotCalibratedError if a quantizer of ``qmodel`` lacks its step."""
    missing = uncalibrated(qmodel)
    if missing:
        raise NotCalibratedError(
            f"{len(missing)} quantizers have no step yet, the first is {missing[0]}: "
            "run brfx.calibrate(qmodel, batches) first"
        )


@contextmanager
def quantization_disabled(qmodel: nn.Module) -> Iterator[None]:
    """Within the block every quantizer lets its values through (ReLUs stay): the rewritten graph in FP32."""
    found = [module for module in qmodel.modules() if isinstance(module, (Quantizer, ResidualAdd))]
    modes = [quantizer.mode for quantizer in found]
    for quantizer in found:
        quantizer.mode = "pass"
    try:
        yield
    finally:
        for quantizer, mode in zip(found, modes, strict=True):
            quantizer.mode = mode
