"""Write the integer form as one ``.safetensors`` file: packed codes, and the graph as JSON (docs/packed-format.md)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.operator_schemas import normalize_function

from brfx.errors import ExportError, first_line
from brfx.export.destination import destination, replacing
from brfx.export.integer import integer_model
from brfx.export.layers import FloatLayer, IntegerConv, IntegerLinear, IntegerProduct, Requantize, Storage
from brfx.export.operators import QuantParams
from brfx.export.packing import container, pack
from brfx.graph.mode_branches import changes_state
from brfx.graph.torch_ops import name_of
from brfx.metadata import metadata_entries
from brfx.nn import QUANTIZED_LAYERS, QuantizedLayer, Quantizer

FORMAT_VERSION = 2

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"}
_OPERATORS |= {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}


def export_packed(qmodel: nn.Module, path: str | Path) -> Path:
    """Write the integer form with packed weights and its graph, to be executed from the file alone.

    Args:
        qmodel: a calibrated model; it is left as it was.
        path: of the file to write; ``.safetensors``.

    Returns:
        The path.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: the model is not one graph, a layer has no packed form, a sum could overflow 32 bits, or the file
            cannot be written.
    """
    from safetensors.torch import save_file

    path = destination(path)
    if not isinstance(qmodel, GraphModule):
        raise ExportError("a packed file holds one graph, and Python code runs between the parts of this model")
    integer = integer_model(qmodel)
    assert isinstance(integer.model, GraphModule)
    writing = _Writing(integer.model, {id(module): name for name, module in integer.layers.items()})
    header = {"format_version": FORMAT_VERSION, **metadata_entries(qmodel), **writing.run()}
    try:
        text = json.dumps(header, allow_nan=False)
    except ValueError as error:
        raise ExportError(f"{path}: cannot write this model ({first_line(error)})") from error
    with replacing(path) as partial:
        save_file(writing.tensors, partial, metadata={"brfx": text})
    return path


class _Writing:
    """The nodes of one graph as plain data, and their tensors."""

    def __init__(self, gm: GraphModule, layer_names: dict[int, str]) -> None:
        self.gm, self.layer_names = gm, layer_names
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[Node, str] = {}

    def run(self) -> dict[str, Any]:
        """The entries ``inputs``, ``nodes`` and ``outputs`` of the header."""
        inputs: list[str] = []
        outputs: list[str] = []
        nodes: list[dict[str, Any]] = []
        used = _used(self.gm.graph.nodes)
        for node in self.gm.graph.nodes:
            if node not in used:
                _no_lasting_change(node, used)
                continue
            if _is_setting(node):
                continue
            self.names[node] = node.name
            if node.op == "placeholder":
                inputs.append(node.name)
            elif node.op == "output":
                leaves = torch.utils._pytree.tree_leaves(node.args[0])
                outputs = [self.names[leaf] for leaf in leaves if isinstance(leaf, Node)]
            elif node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), _NOTHING):
                self.names[node] = self.names[node.all_input_nodes[0]]
            else:
                _no_lasting_change(node, used)
                op, attributes = self._operation(node)
                values = [value for value in node.all_input_nodes if not _is_setting(value)]
                sources = list(dict.fromkeys(self.names[value] for value in values))
                nodes.append({"name": node.name, "op": op, "inputs": sources, "attributes": attributes})
        return {"inputs": inputs, "outputs": outputs, "nodes": nodes}

    def _operation(self, node: Node) -> tuple[str, dict[str, Any]]:
        if node.op == "get_attr":
            value: Any = self.gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return "constant", {"value": self._tensor(str(node.target), value)}
        if node.op != "call_module":
            return self._function(node)
        module = self.gm.get_submodule(str(node.target))
        name = self.layer_names.get(id(module), str(node.target))
        if isinstance(module, IntegerProduct):
            left, right = self._plain(list(node.args))
            return "product", {"left": left, "right": right, "x": _codes(module.left), "y": _codes(module.right)}
        if len(node.args) != 1 or node.kwargs:
            raise ExportError(f"{name}: a packed file has no form for a layer called with several arguments")
        return self._module(name, module)

    def _module(self, name: str, module: nn.Module) -> tuple[str, dict[str, Any]]:
        if isinstance(module, Requantize):
            return "requantize", {"y": _codes(module.codes), "scale_out": _f32(module.scale_out)}
        if isinstance(module, IntegerConv):
            return "convolution", {
                "weight": self._packed(name, module.weight // module.headroom, module.storage),
                "headroom": module.headroom,
                "weight_scale": self._tensor(f"{name}.weight_scale", module.weight_scale),
                "bias": self._tensor(f"{name}.bias", module.bias),
                "x": _codes(module.x),
                "y": _codes(module.y),
                "stride": module.stride,
                "padding": module.padding,
                "dilation": module.dilation,
                "groups": module.groups,
            }
        if isinstance(module, IntegerLinear):
            return "linear", {
                "weight": self._packed(name, module.weight, module.storage),
                "scale": self._tensor(f"{name}.scale", module.scale),
                "bias": self._tensor(f"{name}.bias", module.bias),
                "x": _codes(module.x),
            }
        if isinstance(module, Quantizer):
            if not module.only_clips:
                kind = type(module).__name__
                raise ExportError(f"{name}: a packed file has no form for what a {kind} does before it rounds")
            return "quantize", {
                "scale": self._tensor(f"{name}.step", module.step),
                "low": module.grid.low,
                "high": module.grid.high,
                "offset": module.grid.offset,
                "binary": module.grid.binary,
                "floor": _finite(module.floor),
                "ceiling": _finite(module.ceiling),
            }
        if isinstance(module, (FloatLayer, QuantizedLayer)) or type(module) in QUANTIZED_LAYERS:
            return self._float_layer(name, module)
        return self._torch_module(name, module)

    def _float_layer(self, name: str, module: nn.Module) -> tuple[str, dict[str, Any]]:
        """A convolution or linear in floating point; its weight as codes where it has them."""
        layer: Any = module.layer if isinstance(module, FloatLayer) else module
        if getattr(layer, "input_quantizer", None) is not None:
            raise ExportError(f"{name}: a packed file has no form for a layer that quantizes its own input")
        attributes: dict[str, Any] = {}
        if isinstance(module, FloatLayer):
            attributes["weight"] = self._packed(name, module.codes, module.storage)
            attributes["weight_scale"] = self._tensor(f"{name}.weight_scale", module.scale)
        else:
            attributes["weight"] = self._tensor(f"{name}.weight", layer.weight)
        attributes["bias"] = None if layer.bias is None else self._tensor(f"{name}.bias", layer.bias)
        if isinstance(layer, nn.Linear):
            return "float_linear", attributes
        for key in ("stride", "padding", "dilation", "groups", "padding_mode"):
            attributes[key] = self._plain(getattr(layer, key))
        dims = len(layer.kernel_size)
        if not layer.transposed:
            return f"float_conv{dims}d", attributes
        return f"float_conv_transpose{dims}d", {**attributes, "output_padding": list(layer.output_padding)}

    def _torch_module(self, name: str, module: nn.Module) -> tuple[str, dict[str, Any]]:
        """A layer of torch's own in floating point: its settings and tensors under torch's names."""
        kind = type(module).__name__
        if not type(module).__module__.startswith("torch.nn.modules") or list(module.children()):
            raise ExportError(
                f"{name}: a packed file has no form for a {kind}; export_onnx and export_torch write such layers"
            )
        settings = [key for key in getattr(module, "__constants__", ()) if key != "inplace"]
        attributes = {key: self._plain(getattr(module, key)) for key in settings if hasattr(module, key)}
        for key, value in (*module.named_parameters(), *module.named_buffers()):
            if key != "num_batches_tracked":
                attributes[key] = self._tensor(f"{name}.{key}", value)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch_norm", attributes
        spelled = kind.replace("ReLU", "Relu").replace("SiLU", "Silu")
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", spelled).lower(), attributes

    def _function(self, node: Node) -> tuple[str, dict[str, Any]]:
        """A call of torch's: its arguments by name where torch tells their names, else in order."""
        name = name_of(node.target)
        if name is None:
            raise ExportError(f"{node.name}: a packed file has no form for {node.target}, which is not torch's")
        if node.op == "call_method" and name == "unfold":
            raise ExportError(f"{node.name}: a packed file has no form for a tensor's method unfold, only for F.unfold")
        name = _OPERATORS.get(name, name)
        if name == "getitem":
            return name, {"index": self._plain(node.args[1])}
        named = _named_arguments(node, name)
        if named is None:
            return name, {"arguments": self._plain(node.args), **self._plain(node.kwargs)}
        return name, {key: self._plain(value) for key, value in named.items() if key != "inplace"}

    def _tensor(self, name: str, value: Tensor) -> dict[str, str]:
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        self.tensors.setdefault(name, value.clone().contiguous())
        return {"tensor": name}

    def _packed(self, name: str, integers: Tensor, storage: Storage) -> dict[str, Any]:
        field = container(storage.bits)
        packed = np.frombuffer(pack(storage.stored(integers).numpy(), field), np.uint8).copy()
        self.tensors.setdefault(f"{name}.weight", torch.from_numpy(packed))
        shape = list(integers.shape)
        return {"tensor": f"{name}.weight", "bits": storage.bits, "field": field, "odd": storage.odd, "shape": shape}

    def _plain(self, value: Any) -> Any:
        """An argument as JSON; what JSON has no word for as an object with one key."""
        if isinstance(value, Node):
            return self._plain(value.args[0]) if _is_setting(value) else {"value": self.names[value]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self._plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, slice):
            return {"slice": [self._plain(part) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return {"text": str(value)}


def _used(nodes: Any) -> set[Node]:
    """The nodes that the output depends on, and every input that has no default."""
    used: set[Node] = set()
    for node in reversed(list(nodes)):
        asked = node.op == "output" or (node.op == "placeholder" and not node.args)
        if asked or used.intersection(node.users):
            used.add(node)
    return used


def _is_setting(node: Node) -> bool:
    """Whether this is an argument with a default, such as ``scale=2.0``, which the file has instead."""
    return node.op == "placeholder" and bool(node.args) and node.args[0] is not None


def _no_lasting_change(node: Node, used: set[Node]) -> None:
    """Refuse a change of a parameter or buffer that is read: in the file it is a constant."""
    if not changes_state(node):
        return
    changed = node
    while changed.op.startswith("call_") and changed.all_input_nodes:
        changed = changed.all_input_nodes[0]
    if any(other.op == "get_attr" and other.target == changed.target for other in used):
        raise ExportError(
            f"{node.name}: changes {changed.target} in place in every call, and a packed file has constants; "
            "export_onnx and export_torch write such models"
        )


def _named_arguments(node: Node, name: str) -> dict[str, Any] | None:
    function: Any = node.target if node.op == "call_function" else None
    if function is None or getattr(function, "__module__", "") == "_operator":
        function = getattr(torch, name, None)
    if function is None:
        return None
    try:
        named = normalize_function(
            function,
            node.args,
            dict(node.kwargs),
            tuple(_type(value) for value in node.args),  # type: ignore[arg-type]
            {key: _type(value) for key, value in node.kwargs.items()},
            normalize_to_only_use_kwargs=True,
        )
    except Exception:  # torch has no schema that tells
        return None
    return dict(named.kwargs) if named is not None else None


def _type(value: Any) -> type:
    return Tensor if isinstance(value, Node) else type(value)


def _codes(codes: QuantParams) -> dict[str, Any]:
    return {**codes._asdict(), "scale": _f32(codes.scale)}


def _f32(value: float) -> float:
    return float(np.float32(value))


def _finite(value: float) -> float | None:
    return _f32(value) if math.isfinite(value) else None
