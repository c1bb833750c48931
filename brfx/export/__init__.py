"""Files that other runtimes execute."""

from brfx.export.onnx import OnnxReport, export_onnx

__all__ = ["OnnxReport", "export_onnx"]
