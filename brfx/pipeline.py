"""From a float model to a quantized ``GraphModule``: the passes in their order."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from brfx.card import ModelCard, attach
from brfx.config import QATConfig, matches
from brfx.errors import ConfigError
from brfx.graph import check, module_calls
from brfx.nn import QUANTIZED_LAYERS, LSQQuantizer, QuantizedLayer
from brfx.passes import InsertObservers, QuantizeLayers, QuantizeReLUs, ReLUToModule, SplitShared
from brfx.passes.quantize_layers import quantized_layer
from brfx.passes.quantize_relus import quantized_relu
from brfx.trace import trace_islands

log = logging.getLogger(__name__)

Pass = Callable[[GraphModule], int]


def passes(config: QATConfig, scope: str = "") -> list[Pass]:
    """The rewrites that ``config`` asks for, in order, for the graph at ``scope`` (``""``, or a name and a dot)."""
    return [
        ReLUToModule(),
        SplitShared(),
        QuantizeLayers(config, scope),
        QuantizeReLUs(config, scope),
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
    config = _with_first_and_last(traced.model, config)
    for name, reason in traced.stopped.items():
        log.info("%s: %s; its traceable submodules are rewritten instead", name or "the model", reason)
    for name, island in traced.islands.items():
        apply(island, passes(config, name and f"{name}."))
    swapped = swap_outside_islands(traced.model, config)
    _require_matches(traced.model, config)
    if swapped:
        log.info("outside the islands: %d", swapped)
    if not any(isinstance(module, LSQQuantizer) for module in traced.model.modules()):
        raise ConfigError(
            f"nothing to quantize in {type(model).__name__} at W{config.weight_bits}A{config.act_bits}: "
            "it has no convolution, linear or ReLU that these bits would change"
        )
    attach(traced.model, ModelCard(config, source=getattr(model, "brfx_source", None)))
    return traced.model


def _with_first_and_last(model: nn.Module, config: QATConfig) -> QATConfig:
    """``config`` with ``first_last_8bit`` spelled out as overrides, in front of the user's own."""
    if not config.first_last_8bit:
        return config
    if isinstance(model, GraphModule):
        names = [
            str(node.target) for node, module in module_calls(model) if isinstance(module, tuple(QUANTIZED_LAYERS))
        ]
    else:
        names = [name for name, module in model.named_modules() if isinstance(module, tuple(QUANTIZED_LAYERS))]
    ends = tuple((name, {"bits": 8}) for name in names[:1] + names[-1:])
    return replace(config, first_last_8bit=False, overrides=(*ends, *config.overrides))


def _require_matches(qmodel: nn.Module, config: QATConfig) -> None:
    """Raise ConfigError for an override that means no layer; types are given by their names in the float model."""
    places = [(name, type(module).__name__.removeprefix("Quantized")) for name, module in qmodel.named_modules()]
    places += [(name, name_) for name, kind in places for name_ in ("ReLU", "ReLU6") if kind == "ClippedReLU"]
    for pattern, _ in config.overrides:
        if not any(matches(pattern, name, kind) for name, kind in places):
            nearest = difflib.get_close_matches(pattern, [name for name, _ in places], n=3)
            raise ConfigError(
                f"overrides: {pattern!r} matches no layer"
                + (f"; near it: {', '.join(nearest)}" if nearest else "")
                + "; `brfx inspect` lists the names"
            )


def swap_outside_islands(model: nn.Module, config: QATConfig, scope: str = "") -> int:
    """Swap convolutions, linears and ReLUs in place where no graph was traced; returns how many.

    Python code calls these, so that call sites are not known: a ReLU that is called at two sites has one step.
    """
    swapped = 0
    for name, child in list(model.named_children()):
        if isinstance(child, (GraphModule, LSQQuantizer, QuantizedLayer)):
            continue
        path = scope + name
        quantized = quantized_layer(child, config, path) or quantized_relu(child, config, path)
        if quantized is None:
            swapped += swap_outside_islands(child, config, f"{path}.")
        else:
            setattr(model, name, quantized)
            swapped += 1
    return swapped
