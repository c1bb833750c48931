"""From a float model to a quantized ``GraphModule``: the passes in their order."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from brfx.analysis.equivalence import missing, prove
from brfx.config import QATConfig, matches
from brfx.errors import ConfigError
from brfx.fast.training_graph import QuantizedGraph
from brfx.graph.call_arguments import CallRecorder, Calls
from brfx.graph.dataflow import operands
from brfx.graph.source_rewrite import QuantizedFunction, rewrite_methods
from brfx.graph.trace import Tracing, trace_islands
from brfx.graph.user_classes import copied, keep_containers
from brfx.graph.utils import check, module_calls
from brfx.kernels.hooks import has_hooks
from brfx.metadata import ModelMetadata, attach
from brfx.modes import eval_mode
from brfx.nn import (
    QUANTIZED_LAYERS,
    ActivationQuantizer,
    QuantizedAttention,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    Quantizer,
)
from brfx.passes import (
    AlignResiduals,
    InsertObservers,
    QuantizeFunctions,
    QuantizeInputs,
    QuantizeLayers,
    QuantizeOutputs,
    QuantizeReLUs,
    ReLUToModule,
    SplitShared,
    WidenStreams,
)
from brfx.passes.quantize_layers import quantized_layer
from brfx.passes.quantize_relus import quantized_relu
from brfx.quant.factory import activation_quantizer

log = logging.getLogger(__name__)

Pass = Callable[[GraphModule], int]


def passes(config: QATConfig, scope: str = "") -> list[Pass]:
    """The rewrites that ``config`` asks for, in order, for the graph at ``scope`` (``""``, or a name and a dot)."""
    layers: list[Pass] = [
        ReLUToModule(),
        SplitShared(),
        QuantizeLayers(config, scope),
        QuantizeFunctions(config, scope),
        QuantizeReLUs(config, scope),
    ]
    inputs: list[Pass] = [
        WidenStreams(config, scope),
        QuantizeInputs(config, scope),
        AlignResiduals(config, scope),
        QuantizeOutputs(config, scope),
    ]
    return [*layers, *(inputs if config.placement == "deploy" else []), InsertObservers()]


def apply(gm: GraphModule, rewrites: Sequence[Pass]) -> GraphModule:
    """Run each pass on ``gm`` in place; after each, check the invariants and log the count."""
    for rewrite in rewrites:
        sites = rewrite(gm)
        check(gm)
        log.info("%s: %d", type(rewrite).__name__, sites)
    gm.recompile()
    return gm


def prepare_qat(
    model: nn.Module,
    config: QATConfig | None = None,
    example_inputs: Any = None,
    *,
    concrete_args: Mapping[str, Any] | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
) -> nn.Module:
    """Rewrite a float model into one that is quantized wherever ``config`` says.

    Args:
        model: any FP32 module. It is left as it was. DataParallel, DDP and compiled wrappers are taken off.
        config: what to quantize; by default 2 bits everywhere.
        example_inputs: a tensor or a tuple of inputs, a batch of two or more for models with batch norms. The model
            must run on it, and what it was rewritten to is compared with it, quantizers off: outputs and gradients, in
            training and in eval. Without it nothing is compared.
        concrete_args: inputs of ``forward`` to hold fixed while tracing, by name.
        leaf_modules: types that are not to be traced into; nothing in them is quantized.

    Returns:
        A ``GraphModule`` with the model's inputs, outputs and state-dict keys (plus those of the steps). It takes the
        FP32 state dict. Run :func:`brfx.calibrate` before anything else. A model that cannot be traced whole comes
        back as a module of its own class with ``GraphModule`` islands in it; the log says which line stopped the trace.

    Raises:
        ConfigError: there is nothing in the model that ``config`` would quantize, a lazy module has not been run, an
            override matches nothing, the model does not run on ``example_inputs``, or its first call registers hooks
            and was not made.
        RewriteError: the rewritten model differs from the float one; names the first value that does, and its line.
    """
    config = config or QATConfig()
    model = unwrapped(model)
    _require_module(model)
    tracing = Tracing(concrete_args, tuple(leaf_modules))
    _require_initialized(model)
    if example_inputs is None:
        _warn_of_no_proof()
        return rewrite(model, config, tracing)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tracing = replace(tracing, calls=_calls(model, inputs, concrete_args or {}))
    qmodel = rewrite(model, config, tracing)
    uncapped = config.without_clip()
    rewritten = copied(qmodel) if uncapped == config else rewrite(model, uncapped, tracing)
    prove(model, rewritten, inputs, concrete_args or {})
    return qmodel


@functools.cache
def _warn_of_no_proof() -> None:
    """Once in a process."""
    log.warning(
        "prepare_qat: the rewritten model was not compared with the float one: give example_inputs=, a batch of two"
    )


def rewrite(model: nn.Module, config: QATConfig, tracing: Tracing) -> nn.Module:
    """:func:`prepare_qat` without the comparison with the float model."""
    _require_plain_weights(model)
    leaf_modules = tracing.leaf_modules
    traced = trace_islands(model, tracing)
    _require_hooked_before(model, traced.model)
    config = _with_first_and_last(traced.model, config)
    for name, reason in traced.stopped.items():
        log.info("%s: %s; its traceable submodules are rewritten instead", name or "the model", reason)
    for name, island in traced.islands.items():
        scope = name and f"{name}."
        for node, module in module_calls(island):
            called = not isinstance(module, (nn.Sequential, nn.MultiheadAttention, *leaf_modules))
            if called and any(True for _ in module.children()):
                swap_called_by_python(module, config, f"{scope}{node.target}.")
        apply(island, passes(config, scope))
    swapped = 0
    if not isinstance(traced.model, GraphModule):
        swapped = swap_called_by_python(traced.model, config, leaf_modules=leaf_modules)
        for module in traced.model.modules():
            if isinstance(module, Quantizer):
                module.optional = True
    _require_matches(traced.model, config)
    if swapped:
        log.info("outside the islands: %d", swapped)
    if not any(isinstance(module, Quantizer) for module in traced.model.modules()):
        raise ConfigError(
            f"nothing to quantize in {type(model).__name__} at W{config.weight_bits}A{config.act_bits}: "
            "it has no convolution, linear or ReLU that these bits would change"
        )
    qmodel = traced.model
    if isinstance(qmodel, GraphModule):
        qmodel = QuantizedGraph.of(qmodel, qmodel.graph)
    keep_containers(qmodel, model)
    _follow_devices(qmodel, model)
    _name_quantizers(qmodel)
    attach(qmodel, ModelMetadata(config, source=getattr(model, "brfx_source", None), tracing=tracing))
    return qmodel


def _require_hooked_before(model: nn.Module, traced: nn.Module) -> None:
    """Raise ConfigError where the trace, as the first call of ``model``, registered hooks: they ran in it alone."""
    before = {name for name, module in model.named_modules() if has_hooks(module)}
    hooked = [name for name, module in traced.named_modules() if has_hooks(module) and name not in before]
    if hooked:
        raise ConfigError(
            f"{type(model).__name__}: its first call registers hooks, such as of {hooked[0] or 'itself'}: call the "
            "model once, as model(inputs), before it is rewritten"
        )


def _name_quantizers(qmodel: nn.Module) -> None:
    """Let each quantizer know where it is, for its errors."""
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer):
            module.name = name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DDP and ``torch.compile``, however many lie around it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _require_module(model: object) -> None:
    """Raise ConfigError for what is no Python module any more."""
    exported = isinstance(model, torch.export.ExportedProgram) or (
        isinstance(model, GraphModule) and "eval" in vars(model)  # what unlifting an exported program gives
    )
    if isinstance(model, torch.jit.ScriptModule) or exported or not isinstance(model, nn.Module):
        made_by = "torch.export" if exported else "torch.jit" if isinstance(model, torch.jit.ScriptModule) else None
        what = f"the output of {made_by}" if made_by else f"a {type(model).__name__}"
        raise ConfigError(f"prepare_qat takes an nn.Module in Python, and this is {what}: give the module itself")
    quantizer = next((name for name, module in model.named_modules() if isinstance(module, Quantizer)), None)
    if quantizer is not None:
        raise ConfigError(f"the model is rewritten already, {quantizer} is a quantizer: give the float model")


def _require_plain_weights(model: nn.Module) -> None:
    """Raise ConfigError for a weight or bias that a hook computes before each call: quantized layers are not always
    called."""
    for name, module in model.named_modules():
        for what in ("weight", "bias"):
            if isinstance(module, tuple(QUANTIZED_LAYERS)) and isinstance(vars(module).get(what), Tensor):
                raise ConfigError(
                    f"{name or type(model).__name__}: its {what} is computed by a hook before each call; use the form "
                    f"in torch.nn.utils.parametrizations, or after pruning torch.nn.utils.prune.remove(layer, '{what}')"
                )


def _require_initialized(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConfigError(f"{name} belongs to a lazy module that has no shape yet: run the model once before")


@torch.no_grad()
def _calls(model: nn.Module, inputs: tuple[Any, ...], concrete_args: Mapping[str, Any]) -> Calls:
    """Run the model once, and see how its modules are called."""
    try:
        fixed = missing(model, inputs, concrete_args)
        with eval_mode(model), CallRecorder(model) as recorder:
            model(*tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs), **fixed)
        return recorder.calls
    except Exception as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"{type(model).__name__} does not run on example_inputs: {first}") from error


def _follow_devices(qmodel: nn.Module, model: nn.Module) -> None:
    """Steps lie where the model's parameters do."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type != "cpu":
        for module in qmodel.modules():
            if isinstance(module, Quantizer):
                module.to(device)


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
    ends = tuple((name, {"bits": 8, "weight_grid": "signed"}) for name in names[:1] + names[-1:])
    return replace(config, first_last_8bit=False, overrides=(*ends, *config.overrides))


def _require_matches(qmodel: nn.Module, config: QATConfig) -> None:
    """Raise ConfigError for an override that means no layer; types are given by their names in the float model."""
    modules = dict(qmodel.named_modules())
    places = [(name, type(module).__name__.removeprefix("Quantized")) for name, module in modules.items()]
    relus = [name for name, module in modules.items() if isinstance(module, ActivationQuantizer) and module.is_relu]
    places += [(name, kind) for name in relus for kind in ("ReLU", "ReLU6")]
    for graph in (module for module in qmodel.modules() if isinstance(module, GraphModule)):
        places += [(node.name, "function") for node in graph.graph.nodes if operands(graph, node)]
    for pattern, _ in config.overrides:
        if not any(matches(pattern, name, kind) for name, kind in places):
            nearest = difflib.get_close_matches(pattern, [name for name, _ in places], n=3)
            raise ConfigError(
                f"overrides: {pattern!r} matches no layer"
                + (f"; near it: {', '.join(nearest)}" if nearest else "")
                + "; `brfx inspect` lists the names"
            )


def swap_called_by_python(
    model: nn.Module, config: QATConfig, scope: str = "", leaf_modules: tuple[type[nn.Module], ...] = ()
) -> int:
    """Swap layers in place where no graph was traced, and rewrite methods that multiply matrices; returns how many.

    Python code calls these, so that call sites are not known: a layer quantizes its own input, by a sign that
    calibration finds, and a ReLU that is called at two sites has one step.
    """
    own = config.at(scope.rstrip("."), type(model).__name__)
    swapped = 0
    if isinstance(model, nn.TransformerEncoder):
        model.use_nested_tensor = False  # its layers no longer have the fused kernel that takes these
    if own is not None and not isinstance(model, (GraphModule, nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        swapped += rewrite_methods(model, own.weight_bits, own.inner_act_bits, **own.weight_method)
    for name, child in list(model.named_children()):
        if isinstance(child, (GraphModule, Quantizer, *_OURS, *leaf_modules)) or name.endswith("_sites"):
            continue
        path = scope + name
        quantized = quantized_layer(child, config, path) or quantized_relu(child, config, path)
        if quantized is None:
            swapped += swap_called_by_python(child, config, f"{path}.", leaf_modules)
            continue
        if isinstance(quantized, QuantizedLayer):
            layer = config.at(path, type(child).__name__)
            if layer is not None and layer.inner_act_bits is not None:
                quantized.input_quantizer = activation_quantizer(
                    layer.inner_act_bits, signed=None, reason="called by Python code; sign from calibration"
                )
        setattr(model, name, quantized)
        swapped += 1
    return swapped


_OURS = (QuantizedLayer, QuantizedMultiheadAttention, QuantizedAttention, QuantizedFunction)
