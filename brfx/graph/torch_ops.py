"""Properties of torch's functions: linear algebra, effect on a grid, effect on the sign.

Used on graphs before anything runs (:mod:`brfx.graph.dataflow`) and on calls while they run
(:mod:`brfx.analysis.audit`), so that both speak of the same operations. Functions are known by torch's own
names: ``F.max_pool2d``, ``torch.max_pool2d`` and
``Tensor.relu_`` are ``max_pool2d``, ``max_pool2d`` and ``relu``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearOp:
    """A function that multiplies and accumulates two operands.

    Attributes:
        left, right: where the operands are, as (position, keyword).
        weight: the right operand is a weight by its role, as in ``F.conv2d(x, weight)``.
        macs: ``(left, right, out) -> multiply-accumulates``.
        channel_dim: of the output channels in a weight.
    """

    left: tuple[int, str]
    right: tuple[int, str]
    macs: Callable[[Tensor, Tensor, Tensor], int]
    weight: bool = False
    channel_dim: int = 0

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Left and right out of a call's arguments; ``None`` where one is absent."""
        return tuple(  # type: ignore[return-value]
            args[place] if place < len(args) else kwargs.get(name) for place, name in (self.left, self.right)
        )


def _per_output(left: Tensor, right: Tensor, out: Tensor) -> int:
    return out.numel() * math.prod(right.shape[1:])


def _per_input(left: Tensor, right: Tensor, out: Tensor) -> int:
    return left.numel() * math.prod(right.shape[1:])


def _inner(left: Tensor, right: Tensor, out: Tensor) -> int:
    return out.numel() * left.shape[-1]


_PRODUCT = LinearOp((0, "input"), (1, "other"), _inner)

#: Name -> operation. ``einsum`` and ``scaled_dot_product_attention`` take forms of their own, see their users.
LINEAR: dict[str, LinearOp] = {
    "linear": LinearOp((0, "input"), (1, "weight"), _inner, weight=True),
    **{f"conv{d}d": LinearOp((0, "input"), (1, "weight"), _per_output, weight=True) for d in (1, 2, 3)},
    **{
        f"conv_transpose{d}d": LinearOp((0, "input"), (1, "weight"), _per_input, weight=True, channel_dim=1)
        for d in (1, 2, 3)
    },
    "matmul": _PRODUCT,
    "rmatmul": LinearOp((1, "other"), (0, "input"), _inner),
    "mm": LinearOp((0, "input"), (1, "mat2"), _inner),
    "bmm": LinearOp((0, "input"), (1, "mat2"), _inner),
    "mv": LinearOp((0, "input"), (1, "vec"), _inner),
    "addmm": LinearOp((1, "mat1"), (2, "mat2"), _inner),
    "baddbmm": LinearOp((1, "batch1"), (2, "batch2"), _inner),
    "addbmm": LinearOp((1, "batch1"), (2, "batch2"), lambda a, b, out: a.numel() * b.shape[-1]),
    "einsum": LinearOp((1, "left"), (2, "right"), lambda a, b, out: out.numel()),  # see einsum_macs
}


def words(text: str) -> frozenset[str]:
    """The set of the words of a text."""
    return frozenset(text.split())


def einsum_macs(equation: str, left: Tensor, right: Tensor) -> int:
    """Multiply-accumulates of a two-operand einsum: the product of the sizes of all its letters."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, (left, right), strict=True):
        letters = term.replace("...", "")
        shape = list(operand.shape)
        if "..." in term:
            before = term.index("...")
            after = len(letters) - before
            for index, size in enumerate(shape[before : len(shape) - after]):
                sizes[f".{index - len(shape) + after}"] = size
            shape = shape[:before] + shape[len(shape) - after :]
        sizes.update(zip(letters, shape, strict=True))
    return math.prod(sizes.values())


#: The values that come out went in (or are 0, or all scaled by one factor): on a grid before, on a grid after.
PASSES = words(
    """
    flatten reshape view permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze expand expand_as
    repeat tile clone contiguous detach to type_as getitem chunk split split_with_sizes tensor_split unbind
    narrow select index_select roll flip pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    unfold unflatten max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d dropout dropout1d dropout2d dropout3d feature_dropout stochastic_depth
    amax amin t adjoint take_along_dim gather view_as reshape_as broadcast_to repeat_interleave
    max_pool2d_with_indices
    """
)
#: These pass values on only in one of their forms: the padding is 0, the interpolation copies.
PASSES_IF: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], bool]] = {
    "pad": lambda args, kwargs: not (args[3] if len(args) > 3 else kwargs.get("value")),
    "interpolate": lambda args, kwargs: str(args[3] if len(args) > 3 else kwargs.get("mode", "nearest")).startswith(
        "nearest"
    ),
    "to": lambda args, kwargs: (
        not any(isinstance(value, torch.dtype) and not value.is_floating_point for value in (*args, *kwargs.values()))
    ),
}
#: Several inputs become one: on a grid if all of them are on the same.
JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
#: Never negative, whatever goes in (NaN is not negative).
NONNEGATIVE = words(
    """
    relu relu6 sigmoid softmax gumbel_softmax hardsigmoid exp exp2 square abs absolute norm linalg_norm
    linalg_vector_norm hypot softmin var std sqrt rsqrt
    gt ge lt le eq ne logical_and logical_or logical_not isfinite isnan zeros ones zeros_like ones_like new_zeros
    new_ones rand rand_like
    """
)
#: Not negative if the first argument is not, whatever the others are.
KEEPS_SIGN = words(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum silu gelu
    hardswish leaky_relu elu celu prelu rrelu mish lp_pool2d glu log1p expm1 cumsum prod nansum floor ceil round trunc
    tanh erf softsign hardshrink softshrink tanhshrink normalize local_response_norm fold float half double bfloat16
    median sort topk kthvalue quantile reciprocal
    """
) | PASSES  # fmt: skip
#: The names of a call's arguments, in order, where a sign or a factor depends on more than the first.
_PARAMETERS = {
    "add iadd": "input other alpha",
    "sub isub subtract": "input other alpha",
    "masked_fill": "input mask value",
    "softplus": "input beta threshold",
    "mul imul multiply": "input other",
    "div truediv itruediv divide true_divide": "input other rounding_mode",
    "maximum minimum fmax fmin": "input other",
    "max min": "input other keepdim dim",  # other: or a dimension
    "where": "condition input other",
    "gt ge lt le": "input other",
    "threshold": "input threshold value inplace",
    "pow ipow": "input exponent",
    "clamp clip": "input min max",
    "clamp_min": "input min",
    "hardtanh": "input min_val max_val inplace",
    "elu celu": "input alpha inplace",
    "interpolate upsample": "input size scale_factor mode align_corners recompute_scale_factor antialias",
    "pad": "input pad mode value",
    "lerp": "input end weight",
    "addcmul addcdiv": "input tensor1 tensor2 value",
}
PARAMETERS = {name: parameters.split() for names, parameters in _PARAMETERS.items() for name in names.split()}


def named(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by their names, as far as :data:`PARAMETERS` knows them, and ``input``, the first.

    Returns:
        ``None`` if an argument is not known by its name: then nothing is known of the call.
    """
    parameters = PARAMETERS.get(name)
    if parameters is None:
        return {"input": args[0] if args else kwargs.get("input")}
    if len(args) > len(parameters) or not set(kwargs) <= set(parameters):
        return None
    return dict(zip(parameters, args, strict=False)) | dict(kwargs)


def name_of(target: Any) -> str | None:
    """torch's name of a function, or of a tensor method given as a word; ``None`` for anything that is not torch's."""
    if isinstance(target, str):
        return target.strip("_")
    home = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", "")
    if not str(home).startswith(("torch", "_operator", "builtins")):
        return None
    return str(getattr(target, "__name__", "")).strip("_")


def linear_op(target: Any) -> LinearOp | None:
    """The entry of :data:`LINEAR` for a function or a method's name, else ``None``."""
    name = name_of(target)
    return LINEAR.get(name) if name else None


def preserves_values(name: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether such a call leaves values as they are, see :data:`PASSES`."""
    if name in PASSES_IF:
        return PASSES_IF[name](args, kwargs)
    return name in PASSES


def is_attention(target: Any) -> bool:
    """Whether this is ``F.scaled_dot_product_attention``."""
    return target is torch.nn.functional.scaled_dot_product_attention
