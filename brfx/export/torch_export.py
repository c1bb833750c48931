"""The trained model as a ``torch.export`` program, which loads where brfx is not installed."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brfx.calibration import require_calibrated
from brfx.card import card_of
from brfx.errors import ExportError
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
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs = tuple(value.detach().cpu() for value in inputs)
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            model = _with_levels_as_weights(qmodel)
            program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
            program = program.run_decompositions({})
    except Exception as error:
        raise ExportError(f"torch.export failed: {first_line(error)}") from error
    _strip(program)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.export.save(program, file, extra_files={"brfx.json": json.dumps(card_entries(qmodel))})
        partial.replace(path)
    except Exception as error:
        raise ExportError(f"{path}: cannot write this model ({first_line(error)})") from error
    return path


@torch.no_grad()
def _with_levels_as_weights(qmodel: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU whose layers hold the levels that ``qmodel`` computes with as their weights."""
    frozen = copy.deepcopy(qmodel).eval().cpu()
    for module in frozen.modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            if module.weight_quantizer.calibrated:
                module.weight.copy_(module.quantized_weight())
            module.weight_quantizer = None
    return frozen.requires_grad_(False)


def _strip(program: torch.export.ExportedProgram) -> None:
    """Take out where on this machine each operation was written."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)


def card_entries(qmodel: nn.Module) -> dict[str, Any]:
    """What a file says of the model in it: what it was made with, and how to feed it."""
    card = card_of(qmodel)
    return {
        "brfx": version("brfx"),
        "config": asdict(card.config),
        "preprocessing": card.preprocessing and asdict(card.preprocessing),
        "classes": card.classes and list(card.classes),
    }


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to what fits a line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [repr(error)])[0][:200]
