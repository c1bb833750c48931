"""The integer form as one ``.safetensors`` file: packed codes, and the graph as JSON. See ``docs/packed-format.md``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
from brfx.export.packing import container, pack, packed_bytes, unpack
from brfx.graph.torch_ops import name_of
from brfx.metadata import metadata_entries
from brfx.nn import QUANTIZED_LAYERS, QuantizedLayer, Quantizer

FORMAT_VERSION = 2

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "brfx": str,
    "config": dict,
    "preprocessing": (dict, type(None)),
    "classes": (list, type(None)),
    "inputs": list,
    "outputs": list,
    "nodes": list,
}


@dataclass(frozen=True)
class PackedModel:
    """The content of a packed file.

    Attributes:
        header: the JSON header as plain data.
        tensors: by the names that the header uses; weight codes are unpacked, int8 in the shape of the weight.
    """

    header: dict[str, Any]
    tensors: dict[str, np.ndarray]


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
                _no_lasting_change(node)
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
                _no_lasting_change(node)
                op, attributes = self._operation(node)
                sources = list(dict.fromkeys(self.names[value] for value in node.all_input_nodes))
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
            return {"value": self.names[value]}
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
    """The nodes that the output depends on, and every input."""
    used: set[Node] = set()
    for node in reversed(list(nodes)):
        if node.op in ("output", "placeholder") or used.intersection(node.users):
            used.add(node)
    return used


def _no_lasting_change(node: Node) -> None:
    """Refuse an operation in place whose old input is used once more: a value of the file has one content."""
    if node.op not in ("call_function", "call_method"):
        return
    word = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    operator = getattr(node.target, "__module__", "") == "_operator"
    in_place = (word.endswith("_") and not word.endswith("__")) or (
        operator and word in ("iadd", "isub", "imul", "itruediv", "setitem")
    )
    if not (in_place or node.kwargs.get("inplace")) or not node.all_input_nodes:
        return
    if any(user > node for user in node.all_input_nodes[0].users):
        raise ExportError(f"{node.name}: changes a value in place that is used after it; write the model without")


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


def read_packed(path: str | Path) -> PackedModel:
    """Read what :func:`export_packed` wrote. Nothing in the file is executed, and all of it is checked.

    Raises:
        ExportError: the file is absent, damaged, of another format or version, or contradicts itself.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("brfx")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except Exception as error:  # safetensors, NumPy and the system each have their own
        raise ExportError(f"{path}: not a safetensors file, or a damaged one ({first_line(error)})") from error
    if text is None:
        raise ExportError(f"{path}: no packed brfx model, its metadata have no key 'brfx'")
    try:
        return _Reading(stored).run(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: its header is no JSON ({first_line(error)})") from error
    except _Invalid as error:
        raise ExportError(f"{path}: {first_line(error)}") from error


class _Invalid(Exception):
    """The defect of a file."""


def _must(holds: bool, wrong: str) -> None:
    if not holds:
        raise _Invalid(wrong)


def _is_int(value: Any, low: int, high: int = 2**31 - 1) -> bool:
    return type(value) is int and low <= value <= high


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 3.4e38 and float(np.float32(value)) > 0


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class _Reading:
    """One file on its way out of its packing."""

    def __init__(self, stored: dict[str, np.ndarray]) -> None:
        self.stored = stored
        self.tensors: dict[str, np.ndarray] = {}

    def run(self, header: Any) -> PackedModel:
        _must(isinstance(header, dict), "its header is no JSON object")
        found = header.get("format_version")
        _must(
            found == FORMAT_VERSION and type(found) is int,
            f"is of format version {str(found)[:20]}, this brfx reads version {FORMAT_VERSION}",
        )
        for key, kind in _TYPES.items():
            _must(key in header, f"its header has no {key!r}")
            _must(isinstance(header[key], kind), f"its header has a wrong {key!r}: {str(header[key])[:60]!r}")
        _must(header["classes"] is None or _words(header["classes"]), "its 'classes' are no list of names")
        _must(_words(header["inputs"]) and _words(header["outputs"]), "its inputs and outputs are no lists of names")
        known: set[str] = set(header["inputs"])
        _must(len(known) == len(header["inputs"]), "two of its inputs have one name")
        for place, node in enumerate(header["nodes"]):
            self._node(place, node, known)
        lost = [name for name in header["outputs"] if name not in known]
        _must(not lost and bool(header["outputs"]), f"it gives back {str(lost)[:60]}, which no node makes")
        surplus = sorted(set(self.stored) - set(self.tensors))
        _must(not surplus, f"no node uses the tensor {surplus[:1]}")
        return PackedModel(header, self.tensors)

    def _node(self, place: int, node: Any, known: set[str]) -> None:
        shape = isinstance(node, dict) and set(node) == {"name", "op", "inputs", "attributes"}
        _must(shape, f"node {place} has not the keys name, op, inputs and attributes")
        name, attributes = node["name"], node["attributes"]
        _must(isinstance(name, str) and isinstance(node["op"], str), f"node {place}: its name and op are no words")
        _must(name not in known, f"node {name!r} is there twice")
        _must(_words(node["inputs"]) and isinstance(attributes, dict), f"node {name!r}: wrong inputs or attributes")
        early = [value for value in node["inputs"] if value not in known]
        _must(not early, f"node {name!r} takes {early[:1]}, which no node before it makes")
        for part in _objects(attributes):
            if "value" in part and set(part) == {"value"} and isinstance(part["value"], str):
                _must(part["value"] in node["inputs"], f"node {name!r}: {part['value']!r} is not among its inputs")
            if "tensor" in part:
                self._read(name, part)
        check = {"convolution": self._convolution, "linear": self._linear, "requantize": self._requantize}
        if node["op"] == "product":
            _product(f"node {name!r}", attributes)
        elif node["op"] in check:
            _must(len(node["inputs"]) == 1, f"node {name!r}: takes one input, has {len(node['inputs'])}")
            check[node["op"]](f"node {name!r}", attributes)
        known.add(name)

    def _read(self, name: str, part: dict[str, Any]) -> None:
        """The tensor that ``part`` names, out of its packing."""
        key = part["tensor"]
        _must(isinstance(key, str) and key in self.stored, f"node {name!r}: no tensor {str(key)[:60]!r} in the file")
        value = self.stored[key]
        if "bits" in part:
            value = self._unpacked(f"tensor {key!r}", value, part)
        before = self.tensors.setdefault(key, value)
        same = before.shape == value.shape and before.dtype == value.dtype
        _must(same, f"tensor {key!r} is described in two ways")

    def _unpacked(self, where: str, packed: np.ndarray, part: dict[str, Any]) -> np.ndarray:
        bits, shape = part["bits"], part.get("shape")
        _must(_is_int(bits, 1, 8), f"{where}: bits={str(bits)[:20]}, takes 1 to 8")
        _must(part.get("field") == container(bits), f"{where}: codes of {bits} bits are in fields of {container(bits)}")
        fits = isinstance(shape, list) and 1 <= len(shape) <= 5 and all(_is_int(size, 1) for size in shape)
        _must(fits, f"{where}: shape={str(shape)[:40]}")
        assert isinstance(shape, list)
        count, field = math.prod(shape), container(bits)
        size = packed_bytes(count, bits)
        _must(
            packed.dtype == np.uint8 and packed.shape == (size,),
            f"{where}: {count} codes of {bits} bits take {size} bytes, it is {packed.dtype} {packed.shape}",
        )
        codes = unpack(packed.tobytes(), field, count).reshape(shape)
        low, high = (-1, 1) if bits == 1 else (-(1 << bits - 1), (1 << bits - 1) - 1)
        _must(int(codes.min()) >= low and int(codes.max()) <= high, f"{where}: has codes beyond {low} to {high}")
        odd = part.get("odd")
        _must(isinstance(odd, bool) and not (odd and bits > 6), f"{where}: odd={str(odd)[:20]}")
        return 2 * codes + np.int8(1) if odd else codes

    def _array(self, where: str, attributes: dict[str, Any], key: str, kind: type) -> np.ndarray:
        part = attributes.get(key)
        _must(isinstance(part, dict) and "tensor" in part, f"{where}: has no tensor {key!r}")
        assert isinstance(part, dict)
        value = self.tensors[part["tensor"]]
        _must(value.dtype == kind, f"{where}: {key!r} is {value.dtype}, {np.dtype(kind)} is wanted")
        _must(bool(np.isfinite(value).all()), f"{where}: {key!r} is not finite")
        return value

    def _convolution(self, where: str, attributes: dict[str, Any]) -> None:
        weight = self._array(where, attributes, "weight", np.int8)
        scale = self._array(where, attributes, "weight_scale", np.float32)
        bias = self._array(where, attributes, "bias", np.int32)
        dims, channels = weight.ndim - 2, len(weight)
        _must(1 <= dims <= 3, f"{where}: its weight has {weight.ndim} dimensions")
        _must(scale.shape == bias.shape == (channels,), f"{where}: takes a scale and a bias for each channel")
        for key, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = attributes.get(key)
            fits = isinstance(value, list) and len(value) == dims and all(_is_int(part, least) for part in value)
            _must(fits, f"{where}: {key}={str(value)[:40]}")
        groups: Any = attributes.get("groups")
        headroom: Any = attributes.get("headroom")
        _must(_is_int(groups, 1) and channels % groups == 0, f"{where}: groups={str(groups)[:20]}")
        _must(_is_int(headroom, 1, 127), f"{where}: headroom={str(headroom)[:20]}")
        largest = weight.astype(np.int32) * headroom
        _must(largest.min() >= -128 and largest.max() <= 127, f"{where}: headroom={headroom} leaves 8 bits")
        _grid(where, attributes, "y")
        sums = np.abs(largest).reshape(channels, -1).sum(1, dtype=np.int64) * _grid(where, attributes, "x")
        _must(int((sums + np.abs(bias.astype(np.int64))).max()) < 2**31, f"{where}: its sums can exceed 32 bits")

    def _linear(self, where: str, attributes: dict[str, Any]) -> None:
        weight = self._array(where, attributes, "weight", np.int8)
        scale = self._array(where, attributes, "scale", np.float32)
        bias = self._array(where, attributes, "bias", np.float32)
        _must(weight.ndim == 2, f"{where}: its weight has {weight.ndim} dimensions")
        fits = bias.shape == (len(weight),) and scale.shape in ((1,), bias.shape)
        _must(fits, f"{where}: its scale or bias does not fit its weight")
        sums = np.abs(weight.astype(np.int64)).sum(1) * _grid(where, attributes, "x")
        _must(int(sums.max()) < 2**31, f"{where}: its sums can exceed 32 bits")

    def _requantize(self, where: str, attributes: dict[str, Any]) -> None:
        _grid(where, attributes, "y")
        _must(_is_scale(attributes.get("scale_out")), f"{where}: scale_out={str(attributes.get('scale_out'))[:20]}")


def _product(where: str, attributes: dict[str, Any]) -> None:
    for key in ("left", "right"):
        value = attributes.get(key)
        _must(isinstance(value, dict) and set(value) == {"value"}, f"{where}: has no value {key!r}")
    for key in ("x", "y"):
        _grid(where, attributes, key)


def _grid(where: str, attributes: dict[str, Any], key: str) -> int:
    """Check the grid ``key``; the largest magnitude of its codes, less the zero point."""
    grid = attributes.get(key)
    _must(isinstance(grid, dict) and set(grid) == set(QuantParams._fields), f"{where}: has no grid {key!r}")
    assert isinstance(grid, dict)
    codes = all(_is_int(grid[part], 0, 255) for part in ("zero_point", "low", "high"))
    _must(codes and grid["low"] <= grid["high"] and _is_scale(grid["scale"]), f"{where}: {key}={str(grid)[:80]}")
    return int(max(abs(grid["low"] - grid["zero_point"]), abs(grid["high"] - grid["zero_point"])))


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object within ``value``."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)
