"""The file formats that a trained model is exported to, by suffix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from brfx.errors import ExportError
from brfx.export.onnx import OnnxReport, export_onnx
from brfx.export.packed import export_packed
from brfx.export.qonnx import export_qonnx
from brfx.export.torch_export import export_torch


@dataclass(frozen=True)
class Exporter:
    """One format.

    Attributes:
        suffix: with which the names of its files end.
        format: what it is called.
        write: ``(qmodel, path, example, profile)``; the report, where the format has one.
    """

    suffix: str
    format: str
    write: Callable[[nn.Module, Path, Tensor, str], OnnxReport | Path]


#: A suffix that ends in another one stands in front of it.
EXPORTERS = (
    Exporter(".qonnx.onnx", "QONNX", lambda qmodel, path, example, profile: export_qonnx(qmodel, path, example)),
    Exporter(".onnx", "ONNX", export_onnx),
    Exporter(".safetensors", "packed", lambda qmodel, path, example, profile: export_packed(qmodel, path)),
    Exporter(".pt2", "torch.export", lambda qmodel, path, example, profile: export_torch(qmodel, path, example)),
)


def exporter_for(path: Path) -> Exporter:
    """The exporter that the suffix of ``path`` names; ExportError where there is none."""
    for exporter in EXPORTERS:
        if path.name.endswith(exporter.suffix):
            return exporter
    *others, last = sorted(exporter.suffix for exporter in EXPORTERS)
    raise ExportError(f"{path}: the suffix says what to write: {', '.join(others)} or {last}")
