"""The rewrites, one a file: each is a frozen dataclass whose ``__call__(gm)`` returns the sites it changed."""

from brfx.passes.align_residuals import AlignResiduals
from brfx.passes.insert_observers import InsertObservers
from brfx.passes.quantize_functions import QuantizeFunctions
from brfx.passes.quantize_inputs import QuantizeInputs
from brfx.passes.quantize_layers import QuantizeLayers
from brfx.passes.quantize_outputs import QuantizeOutputs
from brfx.passes.quantize_relus import QuantizeReLUs
from brfx.passes.relu_to_module import ReLUToModule
from brfx.passes.split_shared import SplitShared
from brfx.passes.widen_streams import WidenStreams

__all__ = [
    "AlignResiduals",
    "InsertObservers",
    "QuantizeFunctions",
    "QuantizeInputs",
    "QuantizeLayers",
    "QuantizeOutputs",
    "QuantizeReLUs",
    "ReLUToModule",
    "SplitShared",
    "WidenStreams",
]
