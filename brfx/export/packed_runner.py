"""Run a packed file as it stands: its integer operations are those of the integer form, all else is torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brfx.errors import ExportError, first_line
from brfx.export.operators import convolution, linear, product, requantize
from brfx.export.packed_reader import PackedModel, read_packed

#: Settings of torch's layers that change nothing where the tensors are given.
_SAID_BY_TENSORS = {"affine", "elementwise_affine", "num_channels", "num_features", "track_running_stats", "momentum"}

#: Functions of lists of tensors or of numbers, which are no methods of a tensor.
_NO_METHODS = {"cat", "concat", "concatenate", "stack", "einsum", "arange", "linspace", "eye", "zeros", "ones", "full"}
_NO_METHODS |= {"zeros_like", "ones_like", "full_like"}

#: Attributes of a tensor that an operation may read.
_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "T", "mT"}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):  # a function, say, which an operation would call
        raise ValueError(f"{name!r} is no dtype")
    return found


#: What stands in where JSON has no word.
_WORDS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "dtype": _dtype,
    "ellipsis": lambda _: Ellipsis,
    "text": str,
}


def packed_runner(path: Path) -> Callable[..., list[Tensor]]:
    """The file as a function of tensors.

    Raises:
        ExportError: as :func:`~brfx.export.packed_reader.read_packed`; or, when run, an operation is not known here.
    """
    network = _Network(path, read_packed(path))
    return torch.no_grad()(network.run)


class _Network:
    def __init__(self, path: Path, packed: PackedModel) -> None:
        self.path, self.header = path, packed.header
        self.tensors = {name: torch.from_numpy(value) for name, value in packed.tensors.items()}

    def run(self, *inputs: Tensor) -> list[Tensor]:
        names = self.header["inputs"]
        if len(inputs) != len(names):
            raise ExportError(f"{self.path}: takes {len(names)} inputs ({', '.join(names)}), was given {len(inputs)}")
        values: dict[str, Any] = dict(zip(names, inputs, strict=True))
        for node in self.header["nodes"]:
            arguments = [values[name] for name in node["inputs"]]
            try:
                attributes = {key: self._value(value, values) for key, value in node["attributes"].items()}
                values[node["name"]] = self._operation(node, arguments, attributes)
            except ExportError:
                raise
            except Exception as error:
                raise ExportError(f"{self.path}: {node['name']} ({node['op']}) failed: {first_line(error)}") from error
        return [values[name] for name in self.header["outputs"]]

    def _operation(self, node: dict[str, Any], inputs: list[Any], given: dict[str, Any]) -> Any:
        op = node["op"]
        if op == "constant":
            return given["value"]
        if op == "getitem":
            index = given["index"]
            return inputs[0][tuple(index) if isinstance(index, list) else index]
        if op.startswith("float_conv"):
            return _float_conv(op, *inputs, **given)
        if op == "getattr" and given["arguments"][1] in _ATTRIBUTES:
            return getattr(inputs[0], given["arguments"][1])
        if op in _OWN:
            return _OWN[op](*inputs, **given)
        function = _function(op)
        if function is None:
            raise ExportError(f"{self.path}: {node['name']}: brfx does not run the operation {op!r}")
        if "arguments" in given:
            given_in_order = given.pop("arguments")
            method = getattr(Tensor, op, None)  # takes sizes one by one, as in x.permute(0, 2, 1)
            if method and function is getattr(torch, op, None) and isinstance(given_in_order[0], Tensor):
                return method(*given_in_order, **given)
            return function(*given_in_order, **given)
        if _refers(node["attributes"]):
            return function(**given)
        return function(*inputs, **_settings(function, given))

    def _value(self, value: Any, values: dict[str, Any]) -> Any:
        """An attribute out of its JSON form."""
        if isinstance(value, list):
            return [self._value(item, values) for item in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:  # a packed weight has been unpacked
            return self.tensors[value["tensor"]]
        if "value" in value:
            return values[value["value"]]
        if "slice" in value:
            return slice(*(self._value(part, values) for part in value["slice"]))
        word = next(iter(value), "") if len(value) == 1 else ""
        return _WORDS[word](value[word]) if word in _WORDS else value


def _function(op: str) -> Callable[..., Any] | None:
    """torch's function of this name, where it is one that computes with tensors: a file names no other, such as those
    that read and write files."""
    own = None if op.startswith("_") else getattr(F, op, None)
    if getattr(own, "__module__", "") in ("torch.nn.functional", "torch._C._nn", "torch._jit_internal"):
        return own  # type: ignore[no-any-return]
    if op.startswith("_") or not (callable(getattr(Tensor, op, None)) or op in _NO_METHODS):
        return {"upsample": F.interpolate}.get(op)
    function = getattr(torch, op, None)  # torch.float is a dtype
    return function if callable(function) else getattr(Tensor, op)  # type: ignore[no-any-return]


def _settings(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """A layer's settings as arguments of the function that it stands for."""
    try:
        known = inspect.signature(function).parameters
    except ValueError:
        return given
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return given
    return {key: value for key, value in given.items() if key in known or key not in _SAID_BY_TENSORS}


def _refers(attributes: Any) -> bool:
    """Whether a value of the network stands among the attributes."""
    if isinstance(attributes, dict):
        return set(attributes) == {"value"} or any(map(_refers, attributes.values()))
    return isinstance(attributes, list) and any(map(_refers, attributes))


def _grid(codes: dict[str, Any]) -> tuple[float, int, int, int]:
    return codes["scale"], codes["zero_point"], codes["low"], codes["high"]


# The operations of docs/packed-format.md.


def _requantize(x: Tensor, *, y: Any, scale_out: float) -> Tensor:
    return requantize(x, *_grid(y), scale_out)  # type: ignore[no-any-return]


def _convolution(
    value: Tensor, *, weight: Tensor, headroom: int, weight_scale: Tensor, bias: Tensor, x: Any, y: Any, **how: Any
) -> Tensor:
    stride, padding, dilation, groups = (how[name] for name in ("stride", "padding", "dilation", "groups"))
    whole = (weight * headroom).to(torch.int8)
    scale, zero_point = _grid(x)[:2]
    grids = (scale, zero_point, *_grid(y))
    return convolution(  # type: ignore[no-any-return]
        value, whole, weight_scale, bias, *grids, stride, padding, dilation, groups
    )


def _linear(value: Tensor, *, weight: Tensor, scale: Tensor, bias: Tensor, x: Any) -> Tensor:
    return linear(value, weight.t().contiguous(), scale, bias, *_grid(x)[:2])  # type: ignore[no-any-return]


def _product(*_: Tensor, left: Tensor, right: Tensor, x: Any, y: Any) -> Tensor:
    return product(left, right, *_grid(x)[:2], *_grid(y)[:2])  # type: ignore[no-any-return]


def _quantize(x: Tensor, *, scale: Tensor, low: float, high: float, offset: float, binary: bool, **clip: Any) -> Tensor:
    if binary:
        return torch.where(x >= 0, scale, -scale)
    if clip["floor"] is not None or clip["ceiling"] is not None:
        x = x.clamp(clip["floor"], clip["ceiling"])
    return ((x / scale - offset).clamp(low, high).round() + offset) * scale


def _batch_norm(x: Tensor, *, running_mean: Tensor, running_var: Tensor, eps: float, **rest: Any) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, rest.get("weight"), rest.get("bias"), False, 0.0, eps)


def _float_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None = None) -> Tensor:
    return F.linear(x, weight if weight_scale is None else weight.float() * weight_scale, bias)


def _float_conv(
    op: str, x: Tensor, *, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None = None, **how: Any
) -> Tensor:
    if how.pop("padding_mode") != "zeros":
        raise ExportError(f"{op}: brfx does not run a padding that is not of zeros")
    whole = weight if weight_scale is None else weight.float() * weight_scale
    result: Tensor = getattr(F, op.removeprefix("float_"))(x, whole, bias, **how)
    return result


_OWN: dict[str, Callable[..., Tensor]] = {
    "requantize": _requantize,
    "convolution": _convolution,
    "linear": _linear,
    "product": _product,
    "quantize": _quantize,
    "batch_norm": _batch_norm,
    "float_linear": _float_linear,
}
