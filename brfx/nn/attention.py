"""Attention with every operand of its matrix products on a grid: the function, and the layer around it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from brfx.nn.layers import adopted
from brfx.quant.factory import activation_quantizer, weight_quantizer
from brfx.quant.quantizer import WeightQuantizer


class QuantizedAttention(nn.Module):
    """``F.scaled_dot_product_attention`` written out, with a quantizer on each operand of its two products.

    ``softmax(Q(query) @ Q(key)^T * scale + mask)`` is quantized unsigned and multiplies ``Q(value)``; the formula is
    the one in torch's documentation, which gives NaN where a row is masked whole.

    Args:
        bits: of all four operands; ``None`` leaves them in FP32.
    """

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self.query_quantizer = _quantizer(bits, "query of an attention")
        self.key_quantizer = _quantizer(bits, "key of an attention")
        self.value_quantizer = _quantizer(bits, "value of an attention")
        self.softmax_quantizer = _quantizer(bits, "attention probabilities", signed=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``(..., L, E)``, ``(..., S, E)`` and ``(..., S, Ev)`` to ``(..., L, Ev)``; arguments as torch's."""
        return self.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[0]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The output ``(..., L, Ev)``, and what multiplied the values: ``(..., L, S)``, quantized, after dropout."""
        if is_causal and attn_mask is not None:
            raise RuntimeError("scaled_dot_product_attention takes attn_mask or is_causal=True, not both")
        query, key, value = self.query_quantizer(query), self.key_quantizer(key), self.value_quantizer(value)
        if enable_gqa:
            key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        scores = self.scores(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probabilities = scores.softmax(-1)
        if attn_mask is not None:  # a row that is masked whole attends to nothing, as in torch's kernels
            probabilities = probabilities.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
        probabilities = self.softmax_quantizer(probabilities)
        if dropout_p > 0:  # after the quantizer: zeros and a common factor leave a grid a grid
            probabilities = F.dropout(probabilities, dropout_p)
        return self.mixed(probabilities, value), probabilities

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """The first product, of ``(..., L, E)`` and ``(..., E, S)``."""
        return query @ key

    def mixed(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """The second, of ``(..., L, S)`` and ``(..., S, Ev)``."""
        return probabilities @ value


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with quantized weights and inputs of all its products.

    The layer keeps its parameters and their names, and gains

    - ``input_quantizer``: of query, key and value, which are often one tensor, or two;
    - ``attention``: a :class:`QuantizedAttention`;
    - ``output_quantizer``: in front of the output projection;
    - ``weight_quantizers``: of ``in_proj_weight``, or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` where
      they are separate, and of ``out_proj_weight``.
    """

    input_quantizer: nn.Module
    attention: QuantizedAttention
    output_quantizer: nn.Module
    weight_quantizers: nn.ModuleDict
    packed: bool  #: whether the weights of the three input projections are one: torch's ``_qkv_same_embed_dim``

    @classmethod
    def from_float(
        cls,
        layer: nn.MultiheadAttention,
        weight_bits: int | None,
        act_bits: int | None,
        *,
        per_channel: bool = False,
        symmetric: bool = False,
        method: str = "lsq",
    ) -> Self:
        """The quantized form of ``layer``, with its very parameters, settings and hooks.

        Args:
            layer: or one of a subclass that has no ``forward`` of its own.
            weight_bits, act_bits: ``None`` leaves weights, or activations, in FP32.
            per_channel: one step per output channel of a weight.
            symmetric: put weights on the grid without a zero.
            method: of the weights' quantizers, one of :data:`brfx.quant.factory.WEIGHT_QUANTIZERS`.
        """
        kind = cls
        if type(layer) not in cls.__mro__:
            kind = type(f"Quantized{type(layer).__name__}", (cls, type(layer)), {"__module__": __name__})
        new = adopted(kind, layer)
        new.packed = layer._qkv_same_embed_dim
        new._qkv_same_embed_dim = False  # so that nn.TransformerEncoderLayer calls this layer in eval mode, too
        new.input_quantizer = _quantizer(act_bits, "input of an attention layer")
        new.attention = QuantizedAttention(act_bits)
        new.output_quantizer = _quantizer(act_bits, "input of an attention layer's output projection")
        new.weight_quantizers = nn.ModuleDict()
        if weight_bits is not None:
            for name, weight in new.latent_weights().items():
                step_shape = (len(weight), 1) if per_channel else ()
                new.weight_quantizers[name] = weight_quantizer(
                    weight_bits, step_shape=step_shape, symmetric=symmetric, method=method
                )
        for child in (new.input_quantizer, new.attention, new.output_quantizer, new.weight_quantizers):
            child.to(layer.out_proj.weight.device).train(layer.training)
        return new

    def latent_weights(self) -> dict[str, Tensor]:
        """The weights by the names of their quantizers, each ``(out, in)``."""
        names = ["in_proj_weight"] if self.packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return {**{name: getattr(self, name) for name in names}, "out_proj_weight": self.out_proj.weight}

    def regularized(self) -> list[tuple[Tensor, WeightQuantizer]]:
        """Each latent weight with its quantizer, for the bin regularizer."""
        weights = self.latent_weights()
        return [(weights[name], quantizer) for name, quantizer in self.weight_quantizers.items()]  # type: ignore[misc]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, results and their shapes are those of ``nn.MultiheadAttention``."""
        if query.is_nested:
            raise TypeError(
                "quantized attention takes no nested tensors: set use_nested_tensor = False on nn.TransformerEncoder"
            )
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        is_causal = is_causal and key_padding_mask is None and not need_weights  # where torch follows the hint
        mask = None if is_causal else self._merged_mask(attn_mask, key_padding_mask, query.dtype)

        q, k, v = (self._split_heads(x) for x in self._project(*self._quantized_inputs(query, key, value)))
        output, probabilities = self.attention.attend(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=is_causal
        )
        output = self.output_quantizer(output.transpose(1, 2).flatten(2))  # (N, L, E)
        output = self.project_output(output)
        output = output.squeeze(0) if not batched else output if self.batch_first else output.transpose(0, 1)
        if not need_weights:
            return output, None
        if average_attn_weights:
            probabilities = probabilities.mean(1)
        return output, probabilities if batched else probabilities.squeeze(0)

    def _quantized_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three as ``(N, length, features)``; what is one tensor is quantized once."""
        q = self._quantized_input(query)
        k = q if key is query else self._quantized_input(key)
        v = k if value is key else q if value is query else self._quantized_input(value)
        return q, k, v

    def _quantized_input(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return self.input_quantizer(x)  # type: ignore[no-any-return]

    def _weight(self, name: str) -> Tensor:
        weight = self.latent_weights()[name]
        return self.weight_quantizers[name](weight) if name in self.weight_quantizers else weight

    def project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three linears in front of the attention."""
        if self.packed:
            q, k, v = self._weight("in_proj_weight").chunk(3)
        else:
            q, k, v = self._weight("q_proj_weight"), self._weight("k_proj_weight"), self._weight("v_proj_weight")
        bias_q, bias_k, bias_v = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return F.linear(query, q, bias_q), F.linear(key, k, bias_k), F.linear(value, v, bias_v)

    def project_output(self, x: Tensor) -> Tensor:
        """The linear behind it."""
        return F.linear(x, self._weight("out_proj_weight"), self.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input projections, with the extra key and value of ``add_bias_kv`` and of ``add_zero_attn``."""
        query, key, value = self.project_inputs(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(key.size(0), -1, -1)], 1)
            value = torch.cat([value, self.bias_v.expand(value.size(0), -1, -1)], 1)
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        return query, key, value

    def _split_heads(self, x: Tensor) -> Tensor:
        """``(N, length, E)`` to ``(N, heads, length, E / heads)``."""
        return x.reshape(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)

    def _merged_mask(self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one that is added to the scores and broadcasts to ``(N, heads, L, S)``.

        Args:
            attn_mask: ``(L, S)`` or ``(N * heads, L, S)``; True masks out, floats are added.
            padding: ``(N, S)``, or ``(S)`` without a batch.
        """
        other_type = None if attn_mask is None else attn_mask.dtype
        padding = F._canonical_mask(padding, "key_padding_mask", other_type, "attn_mask", dtype)
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", dtype, check_other=False)
        if mask is not None and mask.dim() == 3:
            mask = mask.reshape(-1, self.num_heads, mask.size(1), mask.size(2))
        if padding is not None:
            padding = padding.reshape(-1, 1, 1, padding.size(-1))
            mask = padding if mask is None else mask + padding
        extra = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, extra)) if mask is not None and extra else mask


def _quantizer(bits: int | None, reason: str, *, signed: bool = True) -> nn.Module:
    return nn.Identity() if bits is None else activation_quantizer(bits, signed=signed, reason=reason)
