"""Read a packed file and check all that it says, so that whoever runs it need not (docs/packed-format.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brfx.errors import ExportError, first_line
from brfx.export.operators import QuantParams
from brfx.export.packed import FORMAT_VERSION
from brfx.export.packing import container, packed_bytes, unpack

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


def read_packed(path: str | Path) -> PackedModel:
    """Read what :func:`~brfx.export.packed.export_packed` wrote; nothing in the file is executed, all of it is checked.

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
