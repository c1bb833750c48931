"""From a float model to a quantized ``GraphModule``: the passes in their order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import nn
from torch.fx import GraphModule

from brfx.card import ModelCard, attach
from brfx.config import QATConfig
from brfx.errors import ConfigError
from brfx.graph import check
from brfx.nn import LSQQuantizer, QuantizedLayer
from brfx.passes import InsertObservers, QuantizeLayers, QuantizeReLUs, ReLUToModule, SplitShared
from brfx.passes.quantize_layers import quantized_layer
from brfx.passes.quantize_relus import quantized_relu
from brfx.trace import trace_islands

log = logging.getLogger(__name__)

Pass = Callable[[GraphModule], int]


def passes(config: QATConfig) -> list[Pass]:
    """The rewrites that ``config`` asks for, in order."""
    return [
        ReLUToModule(),
        SplitShared(),
        QuantizeLayers(config),
        QuantizeReLUs(config),
        InsertObservers(),
    ]


def apply(gm: GraphModule, rewrites: Sequence[Pass]) -> GraphModule:
    """Run each pass on ``gm`` in place; after each, drop what is unused, check the invariants and log the count."""
    for rewrite in rewrites:
        sites = rewrite(gm)
        check(gm)
        log.info("%s: %d", type(rewrite).__name__, sites)
    gm.recompile()
    return gm


def prepare_qat(model: nn.Module, config: QATConfig | None = None) -> nn.Module:
    """Rewrite a float model into one that is quantized wherever ``config`` says.

    Args:
        model: any FP32 module. It is left as it was.
        config: what to quantize; by default 2 bits everywhere.

    Returns:
        A ``GraphModule`` with the model's inputs, outputs and state-dict keys (plus those of the steps). It takes the
        FP32 state dict. Run :func:`brfx.calibrate` before anything else. A model that cannot be traced whole comes
        back as a module of its own class with ``GraphModule`` islands in it; the log says which line stopped the trace.

    Raises:
        ConfigError: there is nothing in the model that ``config`` would quantize.
    """
    config = config or QATConfig()
    traced = trace_islands(model)
    for name, reason in traced.stopped.items():
        log.info("%s: %s; its traceable submodules are rewritten instead", name or "the model", reason)
    for island in traced.islands.values():
        apply(island, passes(config))
    swapped = swap_outside_islands(traced.model, config)
    if swapped:
        log.info("outside the islands: %d", swapped)
    if not any(isinstance(module, LSQQuantizer) for module in traced.model.modules()):
        raise ConfigError(
            f"nothing to quantize in {type(model).__name__} at W{config.weight_bits}A{config.act_bits}: "
            "it has no convolution, linear or ReLU that these bits would change"
        )
    attach(traced.model, ModelCard(config, source=getattr(model, "brfx_source", None)))
    return traced.model


def swap_outside_islands(model: nn.Module, config: QATConfig) -> int:
    """Swap convolutions, linears and ReLUs in place where no graph was traced; returns how many.

    Python code calls these, so that call sites are not known: a ReLU that is called at two sites has one step.
    """
    swapped = 0
    for name, child in list(model.named_children()):
        if isinstance(child, (GraphModule, LSQQuantizer, QuantizedLayer)):
            continue
        quantized = quantized_layer(child, config) or quantized_relu(child, config)
        if quantized is None:
            swapped += swap_outside_islands(child, config)
        else:
            setattr(model, name, quantized)
            swapped += 1
    return swapped
