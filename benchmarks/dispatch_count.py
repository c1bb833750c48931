"""Count, beneath every module and graph, which multiplications had both operands on a grid.

    with DistinctValues() as seen, torch.no_grad():
        model(images)
    print(seen.share, *seen.misses(), sep="\\n")

It sees only aten operations and the values in their tensors, and imports nothing of brfx. Forward passes only: in a
backward pass it would count the products of gradients as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SAMPLE = 2**16  # values looked at first
_CHUNK = 2**22  # values looked at together
_FINER = 32  # a step may be this part of the least gap between two levels
_TOLERANCE = 0.02  # of a step


@dataclass(frozen=True)
class Operand:
    """What was found in one operand.

    Attributes:
        distinct: number of values, in the whole tensor or the most in one output channel; ``None``: beyond the limit.
        even: where so few elements could hardly show more values: whether these are multiples of one step.
        by_channel: the grid is one per output channel.
    """

    shape: tuple[int, ...]
    on_grid: bool
    distinct: int | None
    even: bool = True
    by_channel: bool = False

    def __str__(self) -> str:
        count = "many" if self.distinct is None else str(self.distinct)
        where = " a channel" if self.by_channel else ""
        return f"{list(self.shape)} {count} values{where}{'' if self.even else ' unevenly spaced'}"


@dataclass(frozen=True)
class Call:
    """One convolution or product. ``operands`` are left and right; none for a kernel that hides its products."""

    op: str
    macs: int
    operands: tuple[Operand, ...]
    on_grid: bool

    def __str__(self) -> str:
        operands = " x ".join(map(str, self.operands)) or "products within one kernel"
        return f"{self.op}, {self.macs:,} MACs: {operands}"


Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Product:
    """Where the operands of an aten operation are, how their MACs count, and the right one's rows, one a channel."""

    left: int
    right: int
    macs: Callable[[Tensor, Tensor, Any], int]
    rows: Rows


def _columns(right: Tensor) -> Tensor:
    return right.transpose(-1, -2).reshape(-1, right.shape[-2])


def _matrix(left: int, right: int) -> _Product:
    return _Product(left, right, lambda a, b, out: a.numel() * b.shape[-1], _columns)


def _vector(matrix: int, vector: int) -> _Product:
    """The matrix is the weight, wherever it stands."""
    return _Product(vector, matrix, lambda a, b, out: b.numel(), lambda b: b.reshape(-1, b.shape[-1]))


_LINEAR = _Product(0, 1, lambda a, b, out: a.numel() * b.shape[0], lambda b: b.reshape(-1, b.shape[-1]))
_DOT = _Product(0, 1, lambda a, b, out: a.numel(), lambda b: b.reshape(1, -1))

_PRODUCTS: dict[str, _Product] = {
    **{name: _matrix(0, 1) for name in ("mm", "bmm", "matmul", "_int_mm", "_scaled_mm", "_grouped_mm")},
    **{name: _matrix(1, 2) for name in ("addmm", "_addmm_activation", "baddbmm", "addbmm")},
    "mv": _vector(0, 1),
    "addmv": _vector(1, 2),
    "dot": _DOT,
    "vdot": _DOT,
    "linear": _LINEAR,
    "mkldnn_linear": _LINEAR,
}
_PRODUCTS |= {f"{name}_": _PRODUCTS[name] for name in ("addmm", "baddbmm", "addbmm", "addmv")}

#: Name -> positions of (transposed, groups); -1: it is none, and so are its groups.
_CONVOLUTIONS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), (6, 8)),
    **dict.fromkeys(("mkldnn_convolution", "cudnn_convolution", "miopen_convolution", "_conv_depthwise2d"), (-1, -1)),
}
_RNNS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
_ATTENTION = ("_scaled_dot_product", "scaled_dot_product", "_flash_attention", "_efficient_attention")
_TRANSFORMERS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")


class DistinctValues(TorchDispatchMode):
    """Within the block every convolution and matrix product is counted, by whether its operands are on a grid.

    An operand is on a grid if it has at most ``2**max_bits`` distinct values; the right one also if each of its output
    channels has (the columns of a product's right matrix: steps along the summed dimension would not do). Where a
    tensor or channel has fewer than four elements a value the count says little, and the values must also be
    multiples of one step, no further apart than ``2**max_bits`` of it.

    Attributes:
        calls: in order of execution.
    """

    def __init__(self, max_bits: int = 8) -> None:
        super().__init__()
        self.limit = 2**max_bits
        self.calls: list[Call] = []

    @property
    def macs(self) -> int:
        return sum(call.macs for call in self.calls)

    @property
    def share(self) -> float:
        """MACs of the calls with both operands on a grid, of all MACs; 1.0 where there are none."""
        return sum(call.macs for call in self.calls if call.on_grid) / self.macs if self.macs else 1.0

    def misses(self) -> list[str]:
        """One line for each call that is not on a grid."""
        return [str(call) for call in self.calls if not call.on_grid]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # these come here only in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        found = None
        if name in _CONVOLUTIONS or name in _PRODUCTS:
            found = self._operands(name, args)  # before the call, which may write into one of them
        out = func(*args, **kwargs)
        if name in _CONVOLUTIONS:
            self._add(name, _conv_macs(name, args, out), found)
        elif name in _PRODUCTS:
            product = _PRODUCTS[name]
            self._add(name, product.macs(args[product.left], args[product.right], out), found)
        elif (macs := _hidden_macs(name, args)) is not None:
            self._add(name, macs, None)
        return out

    def _add(self, name: str, macs: int, operands: tuple[Operand, Operand] | None) -> None:
        self.calls.append(Call(name, macs, operands or (), bool(operands) and all(o.on_grid for o in operands or ())))

    @torch.no_grad()
    def _operands(self, name: str, args: Sequence[Any]) -> tuple[Operand, Operand]:
        if name in _CONVOLUTIONS:
            left, right = args[0], args[1]
            rows: Rows = lambda weight: _channels(weight, *_conv_form(name, args))  # noqa: E731
        else:
            product = _PRODUCTS[name]
            left, right, rows = args[product.left], args[product.right], product.rows
        whole = examine(right, self.limit)
        return examine(left, self.limit), whole if whole.on_grid else examine_channels(right, rows, self.limit)


def examine(values: Tensor, limit: int) -> Operand:
    """A tensor as an operand with one grid."""
    shape = tuple(values.shape)
    found = levels(values, limit)
    if found is None:
        return Operand(shape, False, None)
    even = 4 * len(found) <= values.numel() or bool(evenly_spaced(found.double()[None], limit).all())
    return Operand(shape, even, len(found), even)


def levels(values: Tensor, limit: int) -> Tensor | None:
    """The distinct values, in order, or ``None`` where there are more than ``limit`` (or any is NaN)."""
    flat = values.detach().reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    known = _sample(flat).unique()
    for chunk in flat.split(_CHUNK):
        while len(known) <= limit:
            place = torch.searchsorted(known, chunk).clamp_(max=max(len(known) - 1, 0))
            unknown = chunk[known[place] != chunk] if len(known) else chunk
            if not unknown.numel():
                break
            if unknown.isnan().any():
                return None
            known = torch.cat([known, _sample(unknown)]).unique()
    return known if len(known) <= limit else None


def _sample(flat: Tensor) -> Tensor:
    return flat[:: max(1, flat.numel() // _SAMPLE)]


def examine_channels(values: Tensor, rows: Rows, limit: int) -> Operand:
    """A tensor as an operand with one grid for each output channel."""
    shape, channels = tuple(values.shape), rows(values.detach())
    most, even = 0, True
    for chunk in channels.split(max(1, _CHUNK // max(1, channels.shape[1]))):
        ordered = chunk.double().sort(dim=1).values
        distinct = 1 + (ordered.diff(dim=1) != 0).sum(dim=1)
        most = max(most, int(distinct.max()))
        if most > limit:
            return Operand(shape, False, None, by_channel=True)
        few = 4 * distinct > ordered.shape[1]
        even = even and bool(evenly_spaced(ordered[few], limit).all())
        if not even:
            break
    return Operand(shape, even, most, even, by_channel=True)


def evenly_spaced(ordered: Tensor, limit: int) -> Tensor:
    """For each row of ascending values, whether all are multiples of one step from its first, within ``limit`` steps.

    The step is the least gap in the row or a small fraction of it.
    """
    offsets = ordered - ordered[:, :1]
    gaps = offsets.diff(dim=1)
    smallest = 4 * torch.finfo(torch.float32).eps * ordered.abs().amax(dim=1, keepdim=True)  # rounding is no gap
    gap = torch.where(gaps > smallest, gaps, torch.inf).amin(dim=1, keepdim=True) if gaps.shape[1] else None
    if gap is None:
        return torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    even = gap.isinf().squeeze(1)  # a single value
    for part in range(1, _FINER + 1):
        steps = offsets / (gap / part)
        near = (steps - steps.round()).abs() <= _TOLERANCE
        even |= near.all(dim=1) & (steps[:, -1] < limit - 0.5)
    return even


def _is_composite(func: Any) -> bool:
    return bool(func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def _conv_form(name: str, args: Sequence[Any]) -> tuple[bool, int]:
    transposed, groups = _CONVOLUTIONS[name]
    return (bool(args[transposed]), int(args[groups])) if transposed > 0 else (False, 1)


def _conv_macs(name: str, args: Sequence[Any], out: Tensor) -> int:
    transposed, _ = _conv_form(name, args)
    return (args[0] if transposed else out).numel() * args[1][0].numel()  # type: ignore[no-any-return]


def _channels(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    if transposed:  # (groups * inputs, outputs, ...) -> (groups * outputs, inputs, ...)
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _hidden_macs(name: str, args: Sequence[Any]) -> int | None:
    """MACs of the kernels that multiply within, unquantized; ``None`` for all others."""
    if name.startswith(_ATTENTION) and "backward" not in name:
        query, key, value = args[:3]
        return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])  # type: ignore[no-any-return]
    if name not in _RNNS and name not in _TRANSFORMERS:
        return None
    tokens = args[0].numel() // args[0].shape[-1]
    weights = args[1:3] if name == "mkldnn_rnn_layer" else args[1:18]
    macs = tokens * sum(weight.numel() for weight in _tensors(weights) if weight.dim() == 2)
    if name in _TRANSFORMERS:
        macs += 2 * tokens * math.prod(args[0].shape[-2:])
    return macs  # type: ignore[no-any-return]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
