"""Files that other runtimes execute."""

from brfx.export.integer import snap_biases
from brfx.export.onnx import OnnxReport, export_onnx
from brfx.export.packed import export_packed
from brfx.export.packed_reader import read_packed
from brfx.export.qonnx import export_qonnx
from brfx.export.torch_export import export_torch

__all__ = [
    "OnnxReport",
    "export_onnx",
    "export_packed",
    "export_qonnx",
    "export_torch",
    "read_packed",
    "snap_biases",
]
