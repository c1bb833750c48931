"""Attention and the linear algebra of Python code in integers; softmax and masks stay floats between quantizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from brfx.export.layers import IntegerLinear, IntegerProduct, Requantize, codes_of, integer_linear
from brfx.graph.source_rewrite import QuantizedCall
from brfx.graph.torch_ops import LINEAR
from brfx.nn import QuantizedAttention, QuantizedMultiheadAttention, Quantizer, WeightQuantizer
from brfx.nn.layers import adopted
from brfx.quant.grid import Grid

#: Matrix products of two activations.
PRODUCTS = ("matmul", "rmatmul", "mm", "bmm")


def as_matmul(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """An einsum of two operands as ``matmul``: how to permute the left one, the right one, and the result.

    ``None`` where it is no product of matrices: other than one letter for rows, for columns and for what is summed.
    """
    terms, _, out = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    batch = [letter for letter in out if letter in left and letter in right]
    summed = [letter for letter in left if letter in right and letter not in out]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    made = [*batch, *rows, *columns]
    once = all(len(set(term)) == len(term) for term in (left, right, out))
    if not once or [len(rows), len(columns), len(summed)] != [1, 1, 1] or sorted(made) != sorted(out):
        return None
    return (
        [left.index(letter) for letter in (*batch, *rows, *summed)],
        [right.index(letter) for letter in (*batch, *summed, *columns)],
        [made.index(letter) for letter in out],
    )


class IntegerAttention(QuantizedAttention):
    """Attention with both products in integers; softmax and masks are floats between quantizers."""

    query_quantizer: Requantize
    key_quantizer: Requantize
    value_quantizer: Requantize
    softmax_quantizer: Requantize

    @classmethod
    def of(cls, attention: QuantizedAttention) -> Self | None:
        """``None`` where an operand has no codes."""
        names = [f"{operand}_quantizer" for operand in ("query", "key", "value", "softmax")]
        requantizers = [_requantizer(getattr(attention, name)) for name in names]
        if None in requantizers:
            return None
        new = adopted(cls, attention)
        for name, requantizer in zip(names, requantizers, strict=True):
            setattr(new, name, requantizer)
        return new

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return IntegerProduct(self.query_quantizer.codes, self.key_quantizer.codes)(query, key)  # type: ignore[no-any-return]

    def mixed(self, probabilities: Tensor, value: Tensor) -> Tensor:
        return IntegerProduct(self.softmax_quantizer.codes, self.value_quantizer.codes)(probabilities, value)  # type: ignore[no-any-return]


class IntegerMultiheadAttention(QuantizedMultiheadAttention):
    """Multi-head attention with its four linears and two products in integers."""

    q: IntegerLinear
    k: IntegerLinear
    v: IntegerLinear
    out: IntegerLinear

    @classmethod
    def of(cls, layer: QuantizedMultiheadAttention) -> Self | None:
        """``None`` where an operand has no codes."""
        attention = IntegerAttention.of(layer.attention)
        source, joined = _requantizer(layer.input_quantizer), _requantizer(layer.output_quantizer)
        if attention is None or source is None or joined is None or not layer.weight_quantizers:
            return None
        names = ["in_proj_weight"] if layer.packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        linears = []
        biases = (None, None, None) if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
        parts = [part for name in names for part in _linear_parts(layer, name, 3 if layer.packed else 1)]
        for (weight, scale, grid), bias in zip(parts, biases, strict=True):
            linears.append(integer_linear(weight, scale, bias, source.codes, grid))
        ((weight, scale, grid),) = _linear_parts(layer, "out_proj_weight", 1)
        bias = layer.out_proj.bias
        new = adopted(cls, layer)
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            new._parameters[name] = None
        del new.out_proj, new.weight_quantizers
        new.input_quantizer, new.attention, new.output_quantizer = source, attention, joined
        new.q, new.k, new.v = linears
        new.out = integer_linear(weight, scale, None if bias is None else bias.detach(), joined.codes, grid)
        return new

    def regularized(self) -> list[tuple[Tensor, WeightQuantizer]]:
        return []  # its weights are integers

    def project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(query), self.k(key), self.v(value)

    def project_output(self, x: Tensor) -> Tensor:
        return self.out(x)  # type: ignore[no-any-return]


class IntegerCall(QuantizedCall):
    """A linear or a matrix product in Python code, in integers."""

    left: Requantize  # type: ignore[assignment]
    right: Requantize  # type: ignore[assignment]

    @classmethod
    def of(cls, call: QuantizedCall) -> Self | None:
        """``None`` where an operand has no codes, or the operation has no integer form."""
        left, right = _requantizer(call.left), _requantizer(call.right)
        if left is None or right is None or call.kind not in ("linear", *PRODUCTS):
            return None
        new = adopted(cls, call)
        new.left, new.right = left, right
        return new

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left, right = LINEAR[self.kind].operands(args, kwargs)
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return super().call(function, args, kwargs)
        multiply = IntegerProduct(self.left.codes, self.right.codes)
        if self.kind != "linear":
            return multiply(left, right)
        y, bias = multiply(left, right.t()), args[2] if len(args) > 2 else kwargs.get("bias")
        return y if bias is None else y + bias


def _requantizer(quantizer: nn.Module | None) -> Requantize | None:
    known = isinstance(quantizer, Quantizer) and quantizer.calibrated and quantizer.step.numel() == 1
    codes = codes_of(quantizer) if known else None  # type: ignore[arg-type]
    return None if codes is None else Requantize(codes, "")


def _linear_parts(layer: QuantizedMultiheadAttention, name: str, parts: int) -> list[tuple[Tensor, Tensor, Grid]]:
    """Integers, scales (one a row) and grid of a weight of ``layer``, cut into ``parts`` by rows."""
    weight, quantizer = layer.latent_weights()[name].detach(), layer.weight_quantizers[name]
    assert isinstance(quantizer, WeightQuantizer)
    codes, scale = quantizer.integers(weight)
    scales = scale.flatten().expand(len(weight))
    return [(c.contiguous(), s, quantizer.grid) for c, s in zip(codes.chunk(parts), scales.chunk(parts), strict=True)]
