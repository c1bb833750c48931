"""The trained model as a ``torch.export`` program, which loads where brfx is not installed."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from brfx.analysis.observe import graphs
from brfx.calibration import require_calibrated
from brfx.errors import ExportError, first_line
from brfx.export.destination import as_inputs, destination, replacing
from brfx.graph.functionalize import detach_data
from brfx.graph.mode_branches import pruned
from brfx.graph.utils import attribute
from brfx.metadata import metadata_entries
from brfx.nn import QuantizedLayer


def export_torch(qmodel: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...]) -> Path:
    """Write the trained model in eval mode as ``.pt2`` with a free batch size, for ``torch.export.load``.

    Weights are stored as the levels that the model computes with, and quantizers of activations are plain operations
    of torch's (divide, clip, round, multiply): the outputs are the model's, in floating point. What the model knows of
    itself is in the file as ``extra_files={"brfx.json": ""}``.

    Args:
        qmodel: a calibrated model; it is left as it was.
        path: of the file to write.
        example_inputs: the model's inputs, a batch of two or more.

    Returns:
        The path.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: ``torch.export`` failed, or the file cannot be written.
    """
    require_calibrated(qmodel)
    path, inputs = destination(path), as_inputs(example_inputs)
    batch = torch.export.Dim("batch", max=2**40)
    try:
        with torch.no_grad():
            model = _with_levels_as_weights(qmodel)
            program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
            program = program.run_decompositions({})
    except Exception as error:
        raise ExportError(f"torch.export failed: {first_line(error)}") from error
    _strip(program)
    with replacing(path) as partial, partial.open("wb") as file:
        torch.export.save(program, file, extra_files={"brfx.json": json.dumps(metadata_entries(qmodel))})
    return path


@torch.no_grad()
def _with_levels_as_weights(qmodel: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU whose layers hold the levels that ``qmodel`` computes with as their weights."""
    frozen = copy.deepcopy(qmodel).eval().cpu()
    for gm in graphs(frozen).values():
        if getattr(gm, "has_mode_branches", False):
            gm.graph = pruned(gm, False)  # torch.export reads the graph, which has both modes
        detach_data(gm.graph)
        gm.recompile()
    layers = [module for module in frozen.modules() if isinstance(module, QuantizedLayer) and module.regularized()]
    readers = Counter(id(layer._parameters.get("weight")) for layer in layers)
    for gm in graphs(frozen).values():
        readers.update(id(attribute(gm, node)) for node in gm.graph.nodes if node.op == "get_attr")
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is None or readers[id(weight)] > 1:
            continue  # it is computed, or something else reads it, perhaps in other levels: the program rounds it
        assert layer.weight_quantizer is not None
        if layer.weight_quantizer.calibrated:
            weight.copy_(layer.quantized_weight())
        layer.weight_quantizer = None
    return frozen.requires_grad_(False)


def _strip(program: torch.export.ExportedProgram) -> None:
    """Take out where on this machine each operation was written."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)
