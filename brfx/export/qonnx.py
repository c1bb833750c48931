"""The trained model as QONNX: float convolutions between ``Quant`` nodes, for FINN, hls4ml and the like."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brfx.analysis.observe import graphs
from brfx.calibration import require_calibrated
from brfx.errors import ExportError, first_line
from brfx.export.destination import as_inputs, destination, replacing
from brfx.export.layers import store_transformed_weights
from brfx.export.onnx import quiet
from brfx.extras import needed
from brfx.graph.mode_branches import pruned
from brfx.graph.utils import attribute, set_module, step_read
from brfx.metadata import metadata_entries
from brfx.nn import QuantizedLayer, QuantizedMultiheadAttention, Quantizer, ResidualAdd
from brfx.quant.grid import Grid, positive_step

DOMAIN = "qonnx.custom_op.general"
_OPSET = 18
_BYTE = Grid(8, signed=True)


def quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, grid: Grid) -> Tensor:
    """QONNX's ``Quant`` with ``rounding_mode="ROUND"`` (half to even), or its ``BipolarQuant``, for the exporter alone:
    run in PyTorch it gives zeros.

    Args:
        x: any shape.
        scale: one, or one a channel in a shape that broadcasts against ``x``.
        zero_point: the code of zero; a scalar, -1/2 where no code is zero.
        bits: those of ``grid``; a scalar.
        grid: the codes.
    """
    like: Any = {"dtype": x.dtype, "shape": x.shape, "version": 1}
    if grid.binary:
        return torch.onnx.ops.symbolic(f"{DOMAIN}::BipolarQuant", (x, scale), **like)
    attributes: Any = {"signed": int(grid.signed), "narrow": 0, "rounding_mode": "ROUND"}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Quant", (x, scale, zero_point, bits), attributes, **like)


class _Quant(nn.Module):
    """Stands in for a quantizer: its ReLU and clip as operations of their own, then ``Quant``."""

    scale: Tensor
    zero_point: Tensor
    bits: Tensor

    def __init__(self, scale: Tensor, grid: Grid, zero_point: float = 0.0, prepare: Any = None) -> None:
        super().__init__()
        self.grid, self.prepare = grid, prepare
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", torch.tensor(zero_point))
        self.register_buffer("bits", torch.tensor(float(grid.bits)))

    def forward(self, x: Tensor) -> Tensor:
        values = x if self.prepare is None else self.prepare(x)
        return quant(values, self.scale, self.zero_point, self.bits, self.grid)


class _QuantAdd(nn.Module):
    """Stands in for a residual add: ``Quant`` on what is rounded, a factor on a shortcut that is on a grid."""

    factor: Tensor | None

    def __init__(self, add: ResidualAdd, step_out: Tensor, step_in: Tensor | None) -> None:
        super().__init__()
        units = add.units(step_out, step_in)
        zero_point = float(units.zero_point) - 128  # of int8
        self.branch, self.shortcut = (_Quant(units.unit, _BYTE, zero_point=zero_point) for _ in range(2))
        self.rounds_shortcut = units.multiple is None
        self.register_buffer("factor", add.shortcut_factor(units, step_in))

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        if self.rounds_shortcut:
            return self.branch(branch) + self.shortcut(shortcut)  # type: ignore[no-any-return]
        return self.branch(branch) + (shortcut if self.factor is None else shortcut * self.factor)  # type: ignore[no-any-return]


def export_qonnx(qmodel: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...]) -> Path:
    """Write the trained model in eval mode as QONNX, with the batch size of the example (its tools want fixed shapes).

    Weights and activations go through ``Quant`` (``BipolarQuant`` where they are signs), and everything between, batch
    norms included, is ONNX in floating point.

    Args:
        qmodel: a calibrated model; it is left as it was.
        path: of the file to write.
        example_inputs: the model's inputs.

    Returns:
        The path.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: the extra ``onnx`` is not installed, the exporter failed, or the file cannot be written.
    """
    require_calibrated(qmodel)
    path, inputs = destination(path), as_inputs(example_inputs)
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it)
    except ImportError as error:
        raise ExportError(needed("QONNX export", "onnx", error)) from error
    model = _with_quant(qmodel)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                input_names=["input"],
                output_names=["output"],
                opset_version=_OPSET,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:
        raise ExportError(f"torch's ONNX exporter failed: {first_line(error)}") from error
    _tidy(proto)
    for key, value in metadata_entries(qmodel).items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    with replacing(path) as partial:
        onnx.checker.check_model(proto)
        onnx.save(proto, partial)
    return path


@torch.no_grad()
def _with_quant(qmodel: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU with ``Quant`` for its quantizers and residual adds."""
    model = copy.deepcopy(qmodel).eval().cpu()
    for gm in graphs(model).values():
        if getattr(gm, "has_mode_branches", False):
            gm.graph = pruned(gm, False)
        for node in list(gm.graph.nodes):
            add = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(add, ResidualAdd):
                steps = [step_read(gm, value) for value in node.args[2:]]
                set_module(gm, str(node.target), _QuantAdd(add, steps[0], steps[1] if len(steps) > 1 else None))
                read = node.args[2:]
                node.args = node.args[:2]
                for value in read:
                    if not value.users:
                        gm.graph.erase_node(value)
        store_transformed_weights(gm)
        gm.graph.lint()
        gm.recompile()
    _prepare_weights(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Quantizer) and module.calibrated:
            step = positive_step(module.step.detach())
            stand_in = _Quant(step, module.grid, zero_point=-module.grid.offset, prepare=module.prepare)
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = stand_in
    return model.requires_grad_(False)


def _prepare_weights(model: nn.Module) -> None:
    """Let layers hold what their quantizers round, where that is not the weight itself and nothing else reads it."""
    layers = [layer for layer in model.modules() if isinstance(layer, (QuantizedLayer, QuantizedMultiheadAttention))]
    pairs = [pair for layer in layers for pair in layer.regularized()]
    reads = Counter(id(weight) for weight, _ in pairs)
    for gm in graphs(model).values():
        reads.update(id(attribute(gm, node)) for node in gm.graph.nodes if node.op == "get_attr")
    for weight, quantizer in pairs:
        alone = isinstance(weight, nn.Parameter) and reads[id(weight)] == 1
        if alone and quantizer.calibrated and not quantizer.only_clips:
            weight.copy_(quantizer.prepare(weight))
            quantizer.prepared = True


def _tidy(proto: Any) -> None:
    """Take out what the exporter wrote for its own debugging; constants become initializers, which QONNX tools read."""
    graph = proto.graph
    del proto.functions[:], graph.metadata_props[:]
    for node in list(graph.node):
        del node.metadata_props[:]
        node.doc_string = ""
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.node.remove(node)
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
    if DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.add(domain=DOMAIN, version=1)
