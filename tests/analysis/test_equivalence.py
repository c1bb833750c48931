"""`prepare_qat` proves that the rewritten model computes what the float model does, and leaves no trace of it."""

import logging
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

import brfx
from brfx.analysis.equivalence import prove
from brfx.errors import RewriteError
from brfx.graph.side_effects import Surroundings
from brfx.graph.trace import trace
from brfx.graph.traced_module import TracedModule
from brfx.prepare import _warn_of_no_proof


class Net(nn.Module):
    """``how(self, x)`` between two convolutions."""

    def __init__(self, how):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.drop, self.how = nn.Dropout(0.5), how
        self.register_buffer("kernel", torch.ones(1, 4, 1, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.last(self.how(self, x))


def without_gradient(m, x):
    with torch.no_grad():
        gate = x.sigmoid()
    return x * gate


def all_without_gradient(m, x):
    with torch.no_grad():
        return x * 1


def drawn(m, x):
    return x * 2 if random.random() < 0.5 else x


def counted(m, x):
    m.steps.add_(1)
    return x


#: (what is between, what the error says)
WRONG = {
    "a constant of a buffer": (lambda m, x: x * (m.kernel / m.kernel.sum()), "mode, after .* changed: first at mul, "),
    "no_grad": (without_gradient, "training mode: the gradient first.weight, of first, .* differs"),
    "no_grad for all": (all_without_gradient, "training mode: the gradient first.weight, of first, .* differs"),
    "one draw of torch": (lambda m, x: x * torch.rand(1), "training mode: first at mul, "),
    "one draw of NumPy": (lambda m, x: x * float(np.random.rand()), "training mode: first at mul, "),
    "one draw of Python": (drawn, "mode.*: first at "),
    "state": (counted, "the buffer steps differs"),
}


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def believed(monkeypatch):
    """A trace that neither records nor refuses what it cannot see."""
    monkeypatch.setattr(brfx.graph.trace, "recording", lambda tracer, root: nullcontext())
    monkeypatch.setattr(Surroundings, "require_same", lambda self: None)
    monkeypatch.setattr(Surroundings, "require_no_draws", lambda self: None)
    monkeypatch.setattr(TracedModule, "train", GraphModule.train)


@pytest.mark.parametrize("case", WRONG)
def test_what_differs_is_an_error_with_its_line(case, x, believed):
    how, message = WRONG[case]
    with pytest.raises(RewriteError, match=message) as caught:
        brfx.prepare_qat(Net(how), example_inputs=x)
    assert "\n" not in str(caught.value) and "rewritten Net" in str(caught.value)
    if case != "state":
        assert "test_equivalence.py:" in str(caught.value)


def test_what_it_runs_on(x):
    seen = []

    class Watched(nn.Linear):
        def forward(self, input):
            seen.append((self.training, input.clone(), float(self.weight.detach().sum())))
            return super().forward(input)

    torch.manual_seed(0)
    model, rewritten = Watched(4, 2), nn.Linear(4, 2)
    rewritten.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)
    prove(model, rewritten, (x,), {})
    assert [training for training, *_ in seen] == [True, False, True, False]
    (_, first, weight), *_, (_, second, changed_weight) = seen
    assert torch.equal(first, x) and not torch.equal(second, x) and weight != changed_weight
    assert torch.equal(second.flatten().sort().values, x.flatten().sort().values)


def test_a_train_method_that_freezes_is_kept(x):
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    qmodel = brfx.prepare_qat(Frozen(lambda m, x: x), example_inputs=x)
    assert qmodel.train().training and not qmodel.norm.training


RIGHT = {
    "plain": lambda m, x: x.relu(),
    "in place": lambda m, x: F.relu(x, inplace=True) + x,
    "dropout": lambda m, x: F.dropout(m.drop(x), 0.3, m.training),
    "dropout of another layout": lambda m, x: m.drop(x.transpose(1, 3)).transpose(1, 3),
    "noise": lambda m, x: x + torch.randn_like(x) if m.training else x,
    "a buffer": lambda m, x: x * m.kernel,
    "the mode": lambda m, x: x * 2 if m.training else x,
}


def everything(model):
    return [value.clone() for value in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_passes_and_nothing_is_changed(case, x):
    model = Net(RIGHT[case]).eval()
    before, given = everything(model), x.clone()
    plain = brfx.prepare_qat(model)
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    qmodel = brfx.prepare_qat(model, example_inputs=x)
    assert random.getstate() == generators[0] and np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2]) and torch.equal(x, given)
    assert all(torch.equal(a, b) for a, b in zip(everything(model), before, strict=True))
    assert not model.training and not qmodel.training and all(p.grad is None for p in qmodel.parameters())
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(everything(qmodel), everything(plain), strict=True))
    assert all(module.mode == "quantize" for module in qmodel.modules() if hasattr(module, "begin_calibration"))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_equal_enough_and_dropped_alike(dropout, batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=batch_first)
    brfx.prepare_qat(layer, example_inputs=torch.randn(3, 5, 8))


def changed(model, name, **attributes):
    gm = trace(model)
    node = next(node for node in gm.graph.nodes if node.name == name)
    for key, value in attributes.items():
        setattr(node, key, value(node))
    gm.recompile()
    return gm


def test_the_first_node_that_differs_is_named(x):
    model = Net(lambda m, x: F.gelu(x * 3) + 1)
    prove(model, trace(model), (x,), {})
    with pytest.raises(RewriteError, match=r"first at add, test_equivalence.py:\d+;"):
        prove(model, changed(model, "add", args=lambda node: (node.args[0], 1.01)), (x,), {})
    line = Net.forward.__code__.co_firstlineno + 1
    with pytest.raises(RewriteError, match=f"first at norm, test_equivalence.py:{line};"):
        gm = trace(model)
        gm.norm.eps = 1.0
        prove(model, gm, (x,), {})
    gm = trace(model)
    nodes = {node.name: node for node in gm.graph.nodes}
    nodes["last"].args = (nodes["norm"],)
    gm.recompile()
    with pytest.raises(RewriteError, match=f"first at what goes into last, test_equivalence.py:{line + 1};"):
        prove(model, gm, (x,), {})


def test_a_rewritten_model_that_raises(x):
    model = Net(lambda m, x: x.flatten(2))
    model.last = nn.Conv1d(4, 2, 1)
    with pytest.raises(RewriteError, match="does not run in training mode, where the float model does: "):
        prove(model, changed(model, "flatten", args=lambda node: (node.args[0], 1)), (x,), {})


def test_another_type_is_a_difference(x):
    model = Net(lambda m, x: x)
    model.last = nn.Identity()
    with pytest.raises(RewriteError, match="first at last"):
        prove(model, changed(model, "last", op=lambda node: "call_method", target=lambda node: "double"), (x,), {})


def test_what_the_float_model_cannot_do_is_left_out(x, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    with caplog.at_level(logging.INFO, "brfx.analysis.equivalence"):
        brfx.prepare_qat(model, example_inputs=x[:1])  # one value a channel
    assert "training mode was not compared" in caplog.text


def test_a_float_model_that_no_seed_fixes_is_said(x, caplog):
    class Clock(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            Clock.calls += 1
            return self.conv(x) * Clock.calls

    with caplog.at_level(logging.WARNING, "brfx.analysis.equivalence"):
        brfx.prepare_qat(Clock(), example_inputs=x)
    assert "differs from run to run" in caplog.text


def test_a_ceiling_that_was_asked_for_is_no_difference(x):
    config = brfx.QATConfig(clip_value=0.1, overrides=[("last", {"bits": 4, "clip_value": 0.2})])
    qmodel = brfx.prepare_qat(Net(lambda m, x: x.relu()), config, x)
    assert qmodel.relu.clip_value == 0.1


def test_what_is_held_fixed_is_given_to_both(x):
    class Optional(Net):
        def forward(self, x, scale=1.0, double=False):
            return super().forward(x) * (2.0 if double else 1.0) * scale

    qmodel = brfx.prepare_qat(Optional(lambda m, x: x), None, (x, 2.0), concrete_args={"double": True})
    assert isinstance(qmodel, torch.fx.GraphModule)


def test_nothing_compared_is_said_once(caplog):
    _warn_of_no_proof.cache_clear()
    with caplog.at_level(logging.WARNING, "brfx.prepare"):
        brfx.prepare_qat(nn.Linear(2, 2))
        brfx.prepare_qat(nn.Linear(2, 2))
    assert caplog.text.count("was not compared") == 1 and "example_inputs=" in caplog.text


class Rounded(nn.Module):
    """``w * x + 10_000 - 10_000``, with the sum rounded to a thousandth; or without it, or with ``w * x + offset``."""

    def __init__(self, sums=True, offset=0.0):
        super().__init__()
        self.w, self.sums, self.offset = nn.Parameter(torch.tensor(0.7)), sums, offset

    def forward(self, x):
        y = self.w * x + self.offset
        return (y + 1e4) - 1e4 if self.sums else y


def test_a_difference_of_rounding_alone_is_none(x, caplog):
    with caplog.at_level(logging.INFO):
        prove(Rounded(), Rounded(sums=False), (x,), {})
    assert "training mode: the two differ by rounding, and not in float64" in caplog.text
    with pytest.raises(RewriteError, match="does not compute what the float model does in training mode"):
        prove(Rounded(), Rounded(sums=False, offset=1e-3), (x,), {})


def autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, m.w).to(x.dtype)


def in_half(m, x):
    return F.linear(x.half(), m.w.half()).to(x.dtype)


def in_double(m, x):
    return ((F.linear(x, m.w).double() + 1e6) - 1e6).to(x.dtype)


def in_single(m, x):
    return ((F.linear(x, m.w) + 1e6) - 1e6).to(x.dtype)


def changed_in_place(m, x):
    y = F.linear(x, m.w)
    return y + y.float().mul_(2)  # y itself in FP32, a copy of it in float64


def changed_apart(m, x):
    y = F.linear(x, m.w)
    return y + y * 2


def linear(m, x):
    return F.linear(x, m.w)


class Linear(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.w, self.how = nn.Parameter(torch.eye(8) + 0.1), how

    def forward(self, x):
        return self.how(self, x)


@pytest.mark.parametrize(
    ("model", "rewritten"),
    [
        (autocast, linear),
        (linear, autocast),
        (in_half, linear),
        (linear, in_half),
        (in_double, in_single),
        (in_single, in_double),
        (changed_in_place, changed_apart),
        (changed_apart, changed_in_place),
    ],
)
def test_float64_does_not_excuse_another_precision(model, rewritten, x):
    with pytest.raises(RewriteError, match="does not compute what the float model does in training mode"):
        prove(Linear(model), Linear(rewritten), (x,), {})


def test_a_parameter_of_another_type_is_a_difference(x):
    wide = Rounded(sums=False)
    wide.w = nn.Parameter(wide.w.double())
    with pytest.raises(RewriteError, match="the gradient w differs"):
        prove(Rounded(sums=False), wide, (x,), {})
