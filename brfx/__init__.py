"""brfx: take an FP32 network to 1-4 bits with learned steps and bin regularization.

The names below are the public ones; they are imported when first used, so that ``import brfx`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brfx.analysis.audit import audit
    from brfx.analysis.dead_filters import dead_filters
    from brfx.analysis.observe import observe
    from brfx.analysis.sensitivity import sensitivity
    from brfx.analysis.weight_statistics import WeightStatistics
    from brfx.bit_budget import assign_bits, weight_bytes
    from brfx.calibration import calibrate, quantization_disabled
    from brfx.config import QATConfig, TrainConfig
    from brfx.errors import BrfxError
    from brfx.export import export_onnx, export_packed, export_qonnx, export_torch, snap_biases
    from brfx.io.model_file import float_state_dict, load, save
    from brfx.models import build_model
    from brfx.prepare import prepare_qat
    from brfx.reconstruction import reconstruct
    from brfx.regularizers.bin_penalty import BinPenalty
    from brfx.regularizers.bin_regularizer import BinRegularizer
    from brfx.train import evaluate, fit, parameter_groups

_HOMES = {
    "BinPenalty": "brfx.regularizers.bin_penalty",
    "BinRegularizer": "brfx.regularizers.bin_regularizer",
    "BrfxError": "brfx.errors",
    "QATConfig": "brfx.config",
    "TrainConfig": "brfx.config",
    "WeightStatistics": "brfx.analysis.weight_statistics",
    "assign_bits": "brfx.bit_budget",
    "audit": "brfx.analysis.audit",
    "build_model": "brfx.models",
    "calibrate": "brfx.calibration",
    "dead_filters": "brfx.analysis.dead_filters",
    "evaluate": "brfx.train",
    "export_onnx": "brfx.export",
    "export_packed": "brfx.export",
    "export_qonnx": "brfx.export",
    "export_torch": "brfx.export",
    "fit": "brfx.train",
    "float_state_dict": "brfx.io.model_file",
    "load": "brfx.io.model_file",
    "observe": "brfx.analysis.observe",
    "parameter_groups": "brfx.train",
    "prepare_qat": "brfx.prepare",
    "quantization_disabled": "brfx.calibration",
    "reconstruct": "brfx.reconstruction",
    "save": "brfx.io.model_file",
    "sensitivity": "brfx.analysis.sensitivity",
    "snap_biases": "brfx.export",
    "weight_bytes": "brfx.bit_budget",
}

__all__ = [  # noqa: RUF022  (in the order of use)
    "QATConfig",
    "prepare_qat",
    "calibrate",
    "reconstruct",
    "dead_filters",
    "audit",
    "sensitivity",
    "assign_bits",
    "weight_bytes",
    "observe",
    "quantization_disabled",
    "build_model",
    "TrainConfig",
    "fit",
    "evaluate",
    "parameter_groups",
    "BinPenalty",
    "BinRegularizer",
    "WeightStatistics",
    "snap_biases",
    "save",
    "load",
    "float_state_dict",
    "export_onnx",
    "export_packed",
    "export_torch",
    "export_qonnx",
    "BrfxError",
]


#: Rooms that are read from outside, as in ``brfx.train.TensorBoard``.
_ROOMS = ("config", "data", "export", "quant", "regularizers", "report", "train")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"brfx.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'brfx' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
