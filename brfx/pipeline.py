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
from brfx.nn import LSQQuantizer
from brfx.passes import InsertObservers, QuantizeLayers, QuantizeReLUs, ReLUToModule, SplitShared
from brfx.trace import trace

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


def prepare_qat(model: nn.Module, config: QATConfig | None = None) -> GraphModule:
    """Rewrite a float model into one that is quantized wherever ``config`` says.

    Args:
        model: any FP32 module that ``torch.fx`` can trace. It is left as it was.
        config: what to quantize; by default 2 bits everywhere.

    Returns:
        A ``GraphModule`` with the model's inputs, outputs and state-dict keys (plus those of the steps). It takes the
        FP32 state dict. Run :func:`brfx.calibrate` before anything else.

    Raises:
        TraceError: the model cannot be traced; the message names the line.
        ConfigError: there is nothing in the model that ``config`` would quantize.
    """
    config = config or QATConfig()
    gm = apply(trace(model), passes(config))
    if not any(isinstance(module, LSQQuantizer) for module in gm.modules()):
        raise ConfigError(
            f"nothing to quantize in {type(model).__name__} at W{config.weight_bits}A{config.act_bits}: "
            "it has no convolution, linear or ReLU that these bits would change"
        )
    attach(gm, ModelCard(config, source=getattr(model, "brfx_source", None)))
    return gm
