import copy
import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.calibration import calibrate, quantization_disabled, quantizers, require_calibrated
from brfx.errors import NotCalibratedError
from brfx.nn import LSQQuantizer, QuantizedAttention, QuantizedMultiheadAttention

L, S, N, E, HEADS = 5, 7, 2, 8, 2


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    calibrate(module, [args], start="lsq", forward=lambda m, batch: m(*batch, **kwargs))
    return module


def float_layer(**settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, HEADS, **settings)
    for parameter in layer.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.5)
    return layer


def matmul_operands(function: Callable[[], Any]) -> list[Tensor]:
    """Both operands of every product that ``function`` computes, in order."""
    seen: list[Tensor] = []
    matmul, linear = Tensor.__matmul__, F.linear

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def product(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
            seen.extend((left.detach(), right.detach()))
            return original(left, right, *rest)

        return product

    with patch.object(Tensor, "__matmul__", watched(matmul)), patch.object(F, "linear", watched(linear)):
        function()
    return seen


BOOL_MASK = torch.ones(L, S, dtype=torch.bool).tril(2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": BOOL_MASK},
        {"attn_mask": rand(N, HEADS, L, S, seed=4), "scale": 2.0},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
@pytest.mark.parametrize("lead", [(), (N,), (N, HEADS)], ids=str)
def test_attention_in_pass_mode_is_torchs(lead: tuple[int, ...], settings: dict[str, Any], training: bool) -> None:
    mask = settings.get("attn_mask")
    if mask is not None and mask.dim() > len(lead) + 2:
        pytest.skip("the mask has more dimensions than the scores")
    query, key, value = rand(*lead, L, E), rand(*lead, S, E, seed=1), rand(*lead, S, 3, seed=2)
    module = QuantizedAttention(4).train(training)
    with quantization_disabled(module):
        found = module(query=query, key=key, value=value, dropout_p=0.0, **settings)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, **settings))


def test_grouped_queries_and_positional_arguments() -> None:
    query, key, value = rand(N, 6, L, E), rand(N, 2, S, E, seed=1), rand(N, 2, S, E, seed=2)
    module = QuantizedAttention(None)
    expected = F.scaled_dot_product_attention(query, key, value, None, 0.0, False, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(module(query, key, value, None, 0.0, False, 0.5, True), expected)


def test_attention_dropout_follows_the_argument_alone_and_leaves_a_grid() -> None:
    inputs = rand(N, L, E), rand(N, S, E, seed=1), rand(N, S, E, seed=2)
    module = calibrated(QuantizedAttention(2), *inputs).eval()
    _, probabilities = module.attend(*inputs, dropout_p=0.5)
    assert (probabilities == 0).any()
    codes = probabilities / (2 * module.softmax_quantizer.step)
    torch.testing.assert_close(codes, codes.round())
    assert codes.max() <= 3
    assert torch.equal(module(*inputs), module(*inputs))


def test_attention_refuses_two_masks() -> None:
    x = rand(N, L, E)
    with pytest.raises(RuntimeError, match="not both"):
        QuantizedAttention(None)(x, x, x, attn_mask=torch.zeros(L, L), is_causal=True)


def test_a_row_that_is_masked_whole_attends_to_nothing_as_in_torchs_kernels() -> None:
    x, mask = rand(N, L, E), torch.ones(L, L, dtype=torch.bool)
    mask[1] = False
    for given in (mask, torch.zeros(L, L).masked_fill(~mask, -torch.inf)):
        output = QuantizedAttention(None)(x, x, x, attn_mask=given)
        assert output[:, 1].eq(0).all() and output[:, 0].ne(0).all()
        torch.testing.assert_close(output, F.scaled_dot_product_attention(x, x, x, attn_mask=given))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_operands_of_attention_take_few_values(bits: int) -> None:
    inputs = rand(N, L, E), rand(N, S, E, seed=1), rand(N, S, E, seed=2)
    module = calibrated(QuantizedAttention(bits), *inputs)
    operands = matmul_operands(lambda: module(*inputs))
    assert len(operands) == 4
    assert all(2 <= len(operand.unique()) <= 2**bits for operand in operands)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 3},
    "extras": {"add_bias_kv": True, "add_zero_attn": True},
    "separate_extras": {"kdim": 6, "add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True, "bias": False, "batch_first": True},
}
INPUTS = ("self", "cross", "key_is_value", "unbatched")
MASKS = ("none", "bool", "float", "per_head", "padding", "float_padding", "both", "causal")


def call(layer: nn.MultiheadAttention, inputs: str, mask: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The arguments of one call, or a skip if the layer has no such inputs."""
    separate = (layer.kdim, layer.vdim) != (E, E)
    if separate and (inputs == "self" or (inputs == "key_is_value" and layer.kdim != layer.vdim)):
        pytest.skip("one tensor cannot have two widths")
    source = L if inputs == "self" or mask == "causal" else S
    query, key, value = rand(L, N, E), rand(source, N, layer.kdim, seed=1), rand(source, N, layer.vdim, seed=2)
    if inputs == "unbatched":
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
    elif layer.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if inputs == "self":
        key = value = query
    if inputs == "key_is_value":
        value = key
    batch = 1 if inputs == "unbatched" else N
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, -2:] = True
    allowed = torch.ones(L, source, dtype=torch.bool).tril(0 if mask == "causal" else 2)
    additive = torch.zeros(L, source).masked_fill(~allowed, -torch.inf)
    if inputs == "unbatched":
        padding = padding[0]
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "bool": {"attn_mask": ~allowed},
        "float": {"attn_mask": rand(L, source, seed=3)},
        "per_head": {"attn_mask": rand(batch * HEADS, L, source, seed=3) > 1},
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": rand(*padding.shape, seed=3)},
        "both": {"key_padding_mask": padding, "attn_mask": ~allowed},
        "causal": {"attn_mask": additive, "is_causal": True},
    }
    return (query, key, value), options[mask]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_pass_mode_is_torchs(name: str, inputs: str, mask: str) -> None:
    layer = float_layer(**LAYERS[name])
    args, options = call(layer, inputs, mask)
    quantized = QuantizedMultiheadAttention.from_float(layer, 4, 4)
    for training, need_weights, average in itertools.product((True, False), (True, False), (True, False)):
        flags = {"need_weights": need_weights, "average_attn_weights": average}
        with quantization_disabled(quantized), torch.set_grad_enabled(training):
            found, found_weights = quantized.train(training)(*args, **options, **flags)
            expected, expected_weights = layer.train(training)(*args, **options, **flags)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found_weights is None) == (expected_weights is None) == (not need_weights)
        if need_weights:
            torch.testing.assert_close(found_weights, expected_weights, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    x = rand(L, N, E)
    layer = calibrated(QuantizedMultiheadAttention.from_float(float_layer(dropout=0.5), 2, 2), x, x, x)
    assert not torch.equal(layer.train()(x, x, x)[0], layer(x, x, x)[0])
    assert torch.equal(layer.eval()(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_operand_of_a_layer_takes_few_values_and_every_parameter_has_a_gradient(
    name: str, per_channel: bool
) -> None:
    layer = float_layer(**LAYERS[name])
    args, options = call(layer, "cross", "both")
    quantized = QuantizedMultiheadAttention.from_float(layer, 2, 2, per_channel=per_channel)
    calibrated(quantized, *args, **options)
    operands = matmul_operands(lambda: quantized(*args, **options)[0].square().sum().backward())
    assert len(operands) == 2 * (3 + 2 + 1)  # projections, the core, the output
    for place, operand in enumerate(operands):
        weight = place in (1, 3, 5, 11)
        rows = operand if weight and per_channel else [operand]
        assert all(2 <= len(row.unique()) <= 4 for row in rows)
    for path, parameter in quantized.named_parameters():
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path


@pytest.mark.parametrize("name", ["plain", "separate"])
def test_regularized_lists_each_weight_with_its_quantizer(name: str) -> None:
    layer = QuantizedMultiheadAttention.from_float(float_layer(**LAYERS[name]), 2, None, per_channel=True)
    found = layer.regularized()
    assert len(found) == len(quantizers(layer)) == (2 if name == "plain" else 4)
    assert {id(weight) for weight, _ in found} == {id(p) for k, p in layer.named_parameters() if k.endswith("weight")}
    assert all(quantizer.step.shape == (len(weight), 1) for weight, quantizer in found)


def test_bits_of_none_leave_a_kind_alone() -> None:
    x = rand(L, N, E)
    weights = QuantizedMultiheadAttention.from_float(float_layer(), 2, None)
    acts = QuantizedMultiheadAttention.from_float(float_layer(), None, 2)
    assert set(quantizers(weights)) == {"weight_quantizers.in_proj_weight", "weight_quantizers.out_proj_weight"}
    assert acts.regularized() == []
    assert set(quantizers(acts)) == {
        "input_quantizer",
        "output_quantizer",
        *(f"attention.{operand}_quantizer" for operand in ("query", "key", "value", "softmax")),
    }
    for layer in (weights, acts):
        require_calibrated(calibrated(layer, x, x, x))


@pytest.mark.parametrize("name", LAYERS)
def test_fp32_state_dict_loads_and_leaves_the_layer_uncalibrated(name: str) -> None:
    layer = float_layer(**LAYERS[name])
    args, _ = call(layer, "cross", "none")
    expected = {key: value.clone() for key, value in layer.state_dict().items()}
    quantized = QuantizedMultiheadAttention.from_float(layer, 2, 2)
    assert all(quantized.get_parameter(key) is parameter for key, parameter in layer.named_parameters())
    calibrated(quantized, *args)
    state = {key: value.clone() for key, value in quantized.state_dict().items()}
    assert {key for key in state if not key.endswith(".step")} == set(expected)

    quantized.load_state_dict(expected)
    with pytest.raises(NotCalibratedError):
        quantized(*args)
    other = QuantizedMultiheadAttention.from_float(float_layer(**LAYERS[name]), 2, 2)
    other.load_state_dict(state)
    quantized.load_state_dict(state)
    assert torch.equal(other(*args)[0], quantized(*args)[0])


def test_settings_hooks_and_subclasses_are_kept() -> None:
    class Own(nn.MultiheadAttention):
        def twice(self) -> int:
            return 2 * self.num_heads

    layer = Own(E, HEADS, dropout=0.25, batch_first=True).eval()
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    quantized = QuantizedMultiheadAttention.from_float(layer, None, None)
    x = rand(N, L, E)
    quantized(x, x, x)
    assert (quantized.dropout, quantized.batch_first, quantized.training, called) == (0.25, True, False, [1])
    assert isinstance(quantized, Own) and quantized.twice() == 4
    assert layer._qkv_same_embed_dim and quantized.packed


def test_deepcopy_is_equal_and_apart() -> None:
    x = rand(L, N, E)
    layer = calibrated(QuantizedMultiheadAttention.from_float(float_layer(), 2, 2), x, x, x)
    has_mode_branches = copy.deepcopy(layer)
    assert torch.equal(has_mode_branches(x, x, x)[0], layer(x, x, x)[0])
    for quantizer in quantizers(has_mode_branches).values():
        quantizer.step.data.mul_(3)
    assert not torch.equal(has_mode_branches(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("quantizer", ["input_quantizer", "attention.softmax_quantizer", "output_quantizer"])
def test_encoder_layer_in_eval_mode_runs_the_quantized_layer(quantizer: str) -> None:
    encoder = nn.TransformerEncoderLayer(E, HEADS, dim_feedforward=8, batch_first=True, dropout=0.0).eval()
    x = rand(N, L, E)
    with torch.no_grad():
        expected = encoder(x)  # torch's fast path
        encoder.self_attn = QuantizedMultiheadAttention.from_float(encoder.self_attn, 4, 4)
        with quantization_disabled(encoder):
            torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
        before = calibrated(encoder, x)(x)
        step = encoder.self_attn.get_submodule(quantizer)
        assert isinstance(step, LSQQuantizer)
        step.step.mul_(3)
        assert not torch.equal(encoder(x), before)


def test_nested_tensors_are_refused_with_the_remedy() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 8, batch_first=True), 1).eval()
    encoder.layers[0].self_attn = QuantizedMultiheadAttention.from_float(encoder.layers[0].self_attn, None, None)
    padding = torch.tensor([[False] * L, [False] * (L - 2) + [True] * 2])
    with torch.no_grad():
        with pytest.raises(TypeError, match="use_nested_tensor"):
            encoder(rand(N, L, E), src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        assert torch.isfinite(encoder(rand(N, L, E), src_key_padding_mask=padding)).all()


@pytest.mark.parametrize("name", ["plain", "separate_extras"])
def test_compiles_without_graph_breaks(name: str) -> None:
    layer = float_layer(**LAYERS[name])
    args, options = call(layer, "cross", "both")
    quantized = calibrated(QuantizedMultiheadAttention.from_float(layer, 4, 4), *args, **options)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **options), quantized(*args, **options))
