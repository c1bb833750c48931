"""Linear algebra found and quantized in Python that torch.fx cannot trace."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, matmul, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.optical_flow.raft import CorrBlock
from torchvision.models.swin_transformer import shifted_window_attention
from torchvision.models.video.mvit import _add_rel_pos
from torchvision.models.video.swin_transformer import shifted_window_attention_3d

from brfx.graph.source_rewrite import QuantizedCall, QuantizedFunction, find_sites, rewrite, rewrite_methods
from brfx.quant.lsq import LSQQuantizer, LSQWeightQuantizer

Call = Callable[[Callable[..., Any]], Any]


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _swin(function: Callable[..., Any], **extra: Tensor) -> Any:
    weights = {"qkv_bias": _rand(24), "proj_bias": _rand(8), **extra}
    return function(
        _rand(2, 7, 6, 8), _rand(24, 8), _rand(8, 8), _rand(1, 2, 16, 16), [4, 4], 2, shift_size=[2, 2], **weights
    )


def _swin_v2(function: Callable[..., Any]) -> Any:
    return _swin(function, logit_scale=_rand(2, 1, 1))


def _swin_3d(function: Callable[..., Any]) -> Any:
    return function(
        _rand(1, 4, 4, 6, 8),
        _rand(24, 8),
        _rand(8, 8),
        _rand(1, 2, 18, 18),
        [2, 3, 3],
        2,
        [1, 1, 1],
        qkv_bias=_rand(24),
    )


def _rel_pos(function: Callable[..., Any]) -> Any:
    attn, q = _rand(2, 2, 13, 13), _rand(2, 2, 13, 8)
    return function(attn, q, (2, 2, 3), (2, 2, 3), _rand(3, 8), _rand(5, 8), _rand(3, 8))


#: How to call each function, its sites, and how many of them that call meets (one function is both swin v1 and v2).
WRAPPED = [
    pytest.param(shifted_window_attention, _swin, 5, 4, id="swin"),
    pytest.param(shifted_window_attention, _swin_v2, 5, 4, id="swin_v2"),
    pytest.param(shifted_window_attention_3d, _swin_3d, 4, 4, id="swin_3d"),
    pytest.param(_add_rel_pos, _rel_pos, 3, 3, id="mvit"),
]


@torch.no_grad()  # it keeps its pyramid, and no deepcopy takes tensors with a history
def _corr(block: CorrBlock) -> Tensor:
    block.build_pyramid(_rand(1, 6, 8, 8), _rand(1, 6, 8, 8).flip(1))
    return torch.cat([level.flatten() for level in block.corr_pyramid])


def _quantizers(module: nn.Module) -> list[LSQQuantizer]:
    return [part for part in module.modules() if isinstance(part, LSQQuantizer)]


def _pass(module: nn.Module) -> None:
    for quantizer in _quantizers(module):
        quantizer.mode = "pass"


def _calibrate(module: nn.Module, run: Callable[[], Any]) -> None:
    for quantizer in _quantizers(module):
        quantizer.begin_calibration("mse")
    run()
    for quantizer in _quantizers(module):
        quantizer.mode = "quantize"


class _Operands(TorchDispatchMode):
    """The most distinct values in an operand of any product, and how many products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if first is not None:
            self.levels += [operand.unique().numel() for operand in args[first : first + 2]]
        return func(*args, **(kwargs or {}))


def _of(function: Callable[..., Any], weight_bits: int | None = 3, act_bits: int | None = 3) -> QuantizedFunction:
    quantized = QuantizedFunction.of(function, weight_bits, act_bits)
    assert quantized is not None
    return quantized


@pytest.mark.parametrize(("function", "call", "sites", "met"), WRAPPED)
def test_torchvision_functions(function: Callable[..., Any], call: Call, sites: int, met: int) -> None:
    quantized = _of(function)
    assert len(quantized.sites) == len(quantized.places) == len(find_sites(function)) == sites
    _pass(quantized)
    assert torch.equal(call(quantized), call(function))

    _calibrate(quantized, lambda: call(quantized))
    assert sum(q.calibrated for q in _quantizers(quantized)) == 2 * met
    with _Operands() as operands:
        out = call(quantized)
    assert len(operands.levels) == 2 * met
    assert max(operands.levels) <= 2**3
    assert not torch.equal(out, call(function))


def test_a_correlation_block() -> None:
    block = CorrBlock(num_levels=2, radius=1)
    expected = _corr(block)
    assert rewrite_methods(block, 3, 3) == 1
    assert list(block.state_dict()) == [
        f"_compute_corr_volume_sites.0.{name}"
        for name in ("left.step", "left.negative", "right.step", "right.negative")
    ]
    _pass(block)
    assert torch.equal(_corr(block), expected)
    _calibrate(block, lambda: _corr(block))
    with _Operands() as operands:
        _corr(block)
    assert len(operands.levels) == 2 and max(operands.levels) <= 2**3

    has_mode_branches = copy.deepcopy(block)
    with torch.no_grad():
        for quantizer in _quantizers(has_mode_branches):
            quantizer.step.zero_()
    assert not torch.equal(_corr(has_mode_branches), _corr(block))


def test_roles_and_places() -> None:
    quantized = _of(shifted_window_attention, weight_bits=2, act_bits=None)
    roles = [type(site.right) for site in quantized.sites]
    assert roles == [LSQWeightQuantizer, type(None), type(None), type(None), LSQWeightQuantizer]
    assert all(site.left is None for site in quantized.sites)
    file, line, text = quantized.places[0].split(":", 2)
    assert file.endswith("swin_transformer.py") and text == " F.linear(x, qkv_weight, qkv_bias)"
    with open(file) as source:
        assert source.readlines()[int(line) - 1].strip() == "qkv = F.linear(x, qkv_weight, qkv_bias)"


def test_deepcopies_are_independent() -> None:
    quantized = _of(_add_rel_pos)
    _calibrate(quantized, lambda: _rel_pos(quantized))
    before, has_mode_branches = _rel_pos(quantized), copy.deepcopy(quantized)
    assert torch.equal(_rel_pos(has_mode_branches), before)
    with torch.no_grad():
        for quantizer in _quantizers(has_mode_branches):
            quantizer.step.mul_(3)
    assert torch.equal(_rel_pos(quantized), before)
    assert not torch.equal(_rel_pos(has_mode_branches), before)


def _forms(a: Tensor, b: Tensor, /, *pair: Tensor, scale: float = 2.0, out: list[Tensor] | None = None) -> Tensor:
    product = matmul(a, other=b)
    product @= b
    holder = [product]
    holder[0] @= a
    nested = (lambda x: x.mm(b).matmul(a))(holder[0])
    starred = torch.einsum("ij,jk->ik", [a, b]) + torch.einsum("ij,jk->ik", *pair)
    return torch.addmm(nested, starred, mat2=torch.Tensor.mm(a, b)) * scale


def test_every_form_of_call() -> None:
    quantized = _of(_forms)
    kinds = [site.kind for site in quantized.sites]
    assert kinds == ["matmul"] * 4 + ["mm", "einsum", "einsum", "addmm", "mm"]  # the outer call comes first
    a, b = _rand(4, 4), _rand(4, 4).t()
    _pass(quantized)
    assert torch.equal(quantized(a, b, b, a), _forms(a, b, b, a))
    assert torch.equal(quantized(a, b, b, a, scale=3), _forms(a, b, b, a, scale=3))
    _calibrate(quantized, lambda: quantized(a, b, b, a))
    assert all(quantizer.calibrated for quantizer in _quantizers(quantized))
    with _Operands() as operands:
        quantized(a, b, b, a)
    assert len(operands.levels) == 2 * 9 and max(operands.levels) <= 2**3


class _Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def __private(self, x: Tensor) -> Tensor:
        """Named by its class."""
        return x @ x

    def private(self, x: Tensor) -> Tensor:
        return self.__private(x)

    def overridden(self, x: Tensor) -> Tensor:
        return x @ x


class _Derived(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, times: int = 2) -> Tensor:
        text = """Some text that
is not indented"""
        assert text.endswith("\nis not indented")
        return super().forward(self.linear(x) @ x) * times

    def overridden(self, x: Tensor) -> Tensor:
        return x

    def a_module(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_methods() -> None:
    module, x = _Derived(), _rand(4, 4)
    expected = module(x), module.private(x)
    assert rewrite_methods(module, 3, 3) == 2
    assert [name for name, _ in module.named_children()] == ["linear", "forward_sites", "_Base__private_sites"]
    assert module._Base__private.__doc__ == "Named by its class."
    assert module.forward.__qualname__ == "_Derived.forward"
    _pass(module)
    assert torch.equal(module(x), expected[0]) and torch.equal(module.private(x), expected[1])
    assert torch.equal(module(x, times=4), 2 * expected[0])
    has_mode_branches = copy.deepcopy(module)
    assert has_mode_branches.forward.__self__ is has_mode_branches  # type: ignore[attr-defined]
    assert rewrite_methods(nn.Linear(2, 2), 3, 3) == 0  # torch's own


@functools.wraps(_add_rel_pos)
def _wrapper(*args: Any) -> Any:
    return _add_rel_pos(*args)


def _through_a_module(net: _Derived, x: Tensor) -> Tensor:
    return net.linear(x)


def test_what_is_left_alone() -> None:
    names: dict[str, Any] = {}
    exec("def sourceless(a, b): return a @ b", names)
    untouched = (names["sourceless"], torch.einsum, lambda a, b: a @ b, _wrapper, _through_a_module, _Derived.a_module)
    assert [rewrite(function) for function in untouched] == [None] * 6


class _Multiplies(nn.Module):
    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


def test_what_is_no_linear_algebra_when_it_runs() -> None:
    def function(left: Any, right: Any) -> Any:
        return left.matmul(right, right) if isinstance(left, nn.Module) else left @ right

    quantized, x = _of(function), _rand(3)
    assert torch.equal(quantized(_Multiplies(), x), x * x)
    integers = torch.arange(4).view(2, 2)
    assert torch.equal(quantized(integers, integers), integers @ integers)
    assert quantized(x.numpy(), x.numpy()) == x.numpy() @ x.numpy()
    assert not any(quantizer.calibrated for quantizer in _quantizers(quantized))


def test_closures_and_defaults_are_the_originals() -> None:
    factor, default = 2.0, torch.eye(3)

    def function(x: Tensor, y: Tensor = default, *, z: Tensor = default) -> Tensor:
        return x @ y @ z * factor

    quantized = _of(function)
    _pass(quantized)
    assert torch.equal(quantized(default), 2 * default)
    factor = 3.0
    assert torch.equal(quantized(default), 3 * default)
    assert quantized.function.__name__ == "function" and quantized.function.__defaults__ is function.__defaults__


def test_tracebacks_show_the_original_line() -> None:
    quantized = _of(_add_rel_pos)
    _pass(quantized)
    with pytest.raises(RuntimeError) as caught:
        quantized(_rand(2, 2, 13, 13), _rand(2, 2, 13, 8), (2, 2, 3), (2, 2, 3), _rand(3, 8), _rand(5, 8), _rand(3, 7))
    frame = next(f for f in traceback.extract_tb(caught.tb) if f.name == "_add_rel_pos")
    assert frame.line == "rel_q_t = torch.matmul(r_q, Rt.transpose(1, 2)).transpose(0, 1)"
    assert quantized.places[2].startswith(f"{frame.filename}:{frame.lineno}: torch.matmul(")


@pytest.mark.parametrize(("function", "call", "sites", "met"), WRAPPED)
def test_compiles_into_one_graph(function: Callable[..., Any], call: Call, sites: int, met: int) -> None:
    quantized = _of(function)
    _calibrate(quantized, lambda: call(quantized))
    torch.compiler.reset()
    assert torch.equal(call(torch.compile(quantized, fullgraph=True, backend="eager")), call(quantized))


def test_methods_compile_into_one_graph() -> None:
    module, x = _Derived(), _rand(4, 4)
    rewrite_methods(module, 3, 3)
    _calibrate(module, lambda: module(x))
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_attention() -> None:
    pytest.importorskip("brfx.nn.attention")

    def function(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, value=k)

    quantized, q, k = _of(function), _rand(1, 2, 5, 4), _rand(1, 2, 6, 4)
    assert isinstance(quantized.sites[0], QuantizedCall) and quantized.sites[0].attention is not None
    _pass(quantized)
    torch.testing.assert_close(quantized(q, k), function(q, k))
    _calibrate(quantized, lambda: quantized(q, k))
    with _Operands() as operands:
        quantized(q, k)
    assert max(operands.levels) <= 2**3
    assert torch.equal(_of(function, act_bits=None)(q, k), function(q, k))


def _inner(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if x.shape[0] else x


def _outer(x: Tensor, weight: Tensor, depth: int = 1) -> Tensor:
    x = _inner(x, weight=weight)
    return _outer(x, weight, depth - 1) if depth else x @ weight


def test_functions_that_it_calls_are_opened_too_and_recursion_ends() -> None:
    function = QuantizedFunction.of(_outer, 2, 2)
    assert function is not None
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    found = [q for q in function.modules() if isinstance(q, LSQQuantizer)]
    assert len(found) == 4
    for quantizer in found:
        quantizer.mode = "pass"
    assert torch.equal(function(x, weight), _outer(x, weight))


def test_what_wraps_a_method_under_its_own_name_is_not_lost() -> None:
    """The wrapped function's source is what ``inspect`` finds, and it is not what is called."""

    def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def product(self: nn.Module, x: Tensor) -> Tensor:
            return 2 * function(self, x)

        return product

    class Product(nn.Module):
        @doubled
        def product(self, x: Tensor) -> Tensor:
            return x @ x.t()

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x)

    module, x = Product(), _rand(3, 3)
    expected = module(x)
    assert find_sites(Product.product) == [] and rewrite_methods(module, 3, 3) == 0
    assert torch.equal(module(x), expected)
