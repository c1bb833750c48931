"""What ``forward`` does beside calls on its inputs: it is in the graph, or the code that does it stays Python."""

import copy
import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Proxy
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import brfx
from brfx.compat import factories_are_overridden
from brfx.graph.trace import trace_islands


class Net(nn.Module):
    """Layers of eight channels; ``how(self, x)`` is everything between the first and the head."""

    def __init__(self, how):
        super().__init__()
        self.c0, self.c, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.f, self.how, self.r = nn.Linear(8, 4), how, nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.register_buffer("k", torch.rand(8, 1, 3, 3) + 0.1)
        self.register_buffer("m", torch.rand(8) + 0.5)
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.register_buffer("two", torch.tensor(2))
        self.register_buffer("flag", torch.tensor(True))
        self.p, self.ps = nn.Parameter(torch.rand(8)), nn.ParameterList([torch.rand(8)])
        self.inner = Inner()
        self.plain, self.feats, self.calls, self.aux, self.table = torch.rand(8), [], 0, None, None
        self.rng, self.notes = np.random.default_rng(0), {"seen": 0}

    def forward(self, x):
        return self.f(self.how(self, self.c0(x)).mean((2, 3)))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("m", torch.rand(8))


def column(v):
    return v.view(1, -1, 1, 1)


def dtype_of_constants(m, x):
    return x * torch.tensor([2.0] * 8, dtype=x.dtype, device=x.device).view(-1, 1, 1)


def constant_changed_later(m, x):
    ones = torch.ones(8, 1, 1)
    y = x + ones
    ones.mul_(3.0)
    return m.c(y) * ones


#: They read the model's state; the graph does too.
STATE = {
    "a kernel of a buffer": lambda m, x: F.conv2d(x, (m.k / m.k.sum()).repeat(1, 1, 1, 1), groups=8),
    "as many groups as the shape says": lambda m, x: F.conv2d(x, m.k / 2, groups=m.k.shape[0]),
    "normalization": lambda m, x: (x - m.m.view(1, -1, 1, 1)) / m.m[None, :, None, None],
    "reflected": lambda m, x: x * column(1 / m.m) + column(1 - m.m) + column(2**m.m),
    "of a nested module": lambda m, x: m.c(x * column(m.inner.m.exp())),
    "given to a function": lambda m, x: x * column(m.m),
    "through a dict": lambda m, x: x * column(m._buffers["m"].sqrt() + m._parameters["p"].sqrt()),
    "through iterators": lambda m, x: x * column(dict(m.named_buffers())["m"] * dict(m.named_parameters())["p"]),
    "a parameter": lambda m, x: x * column(m.p.softmax(0) + m.ps[0] * 2),
    "sizes": lambda m, x: sum(x[:, i : i + 1] * m.m[i] for i in range(len(m.m))) + x / (m.k.dim() * m.k.size(2)),
    "a stack": lambda m, x: x * column(torch.stack([m.m, m.inner.m]).amax(0)),
    "dtype and device": lambda m, x: x * torch.ones(8, 1, 1, dtype=m.m.dtype, device=m.m.device),
    "a plain tensor": lambda m, x: x * column(m.plain.to(x.dtype) / 3),
    "if it is there": lambda m, x: x * column(m.m * 2) if isinstance(m.m, torch.Tensor) and m.m is not None else x,
    "transposed": lambda m, x: (x.transpose(1, 3) @ m.k[:, 0, 0].mT.mT.new_ones(8, 8)).transpose(1, 3) * m.m.data.sum(),
    "constants": lambda m, x: x * torch.tensor([2.0] * 8).view(-1, 1, 1) + torch.arange(x.shape[3], device=x.device),
    "dtype of constants": dtype_of_constants,
    "zeros": lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 2, x.shape[2], x.shape[3])], 1)[:, 2:],
    "a constant changed later": constant_changed_later,
    "the batch's size": lambda m, x: F.conv2d(
        x.flatten(0, 1)[None], m.k.repeat(x.shape[0], 1, 1, 1), groups=8 * x.shape[0]
    ).unflatten(1, (x.shape[0], 8))[0],
    "sizes one by one": lambda m, x: x + torch.zeros(x.shape[0], 1, 1, x.shape[3]) + torch.ones(x.size(0), 8, 1, 1),
    "positions of the size": lambda m, x: x + torch.linspace(0, 1, x.shape[3]) + torch.zeros((x.shape[0], 1, 1, 1)),
}  # fmt: skip


def counted(m, x):
    m.n.add_(1)
    m.n += 2
    return x * m.n


def averaged_in_place(m, x):
    m.m.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return x * column(m.m)


def counted_in_training(m, x):
    if m.training:
        m.n.add_(1)
    return m.block(x) * m.n


def counted_in_eval(m, x):
    if not m.training:
        m.n.add_(1)
    return m.block(x) * m.n


def norm_of_its_own(m, x):
    if m.training:
        m.n += 1
        mean = x.mean((0, 2, 3))
        m.m.mul_(0.9).add_(mean.detach() * 0.1)
    else:
        mean = m.m
    m.inner.m.mul_(0.5).add_(x.detach().amax((0, 2, 3)))
    return x - column(mean) + column(m.inner.m)


#: They change it in place, or draw numbers by torch: in the graph as well.
ALIVE = {
    "counted": counted,
    "averaged in place": averaged_in_place,
    "counted in training": counted_in_training,
    "counted in eval": counted_in_eval,
    "a norm of its own": norm_of_its_own,
    "a number of torch": lambda m, x: x * torch.rand(1),
    "numbers of torch": lambda m, x: x + torch.empty(8, 1, 1).uniform_() * torch.randn((x.shape[0], 1, 1, 1)),
    "dropped layers": lambda m, x: x + m.block(x) * torch.bernoulli(torch.full((1,), 0.5)),
    "numbers of sizes one by one": lambda m, x: x * torch.rand(x.shape[0], 1, 1, 1) + torch.randn(x.shape[0], 8, 1, 1),
    "noise": lambda m, x: x + torch.randn_like(x) if m.training else x,
}


def no_grad(m, x):
    with torch.no_grad():
        gate = m.block(x).sigmoid()
    return x * gate


@torch.no_grad()
def decorated(m, x):
    return m.block(x)


def autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        return m.block(x)


def saved_on_cpu(m, x):
    with torch.autograd.graph.save_on_cpu():
        return m.block(x)


def sets(name, value):
    def how(m, x):
        y = m.block(x)
        setattr(m, name, value(m, y))
        return y

    return how


def appended(m, x):
    m.feats.append(m.block(x))
    return m.feats[-1]


def noted(m, x):
    m.notes["seen"] += 1
    return m.block(x) * m.notes["seen"]


def cached(m, x):
    if m.table is None or m.table.shape[-1] != x.shape[-1]:
        m.table = torch.arange(x.shape[-1]).float()
    return m.block(x) + m.table


def by_own_dict(m, x):
    m.__dict__["calls"] += 1
    return m.block(x) * m.calls


CALLS, GENERATOR, TORCH_GENERATOR = 0, random.Random(0), torch.Generator()


def counted_globally(m, x):
    global CALLS
    CALLS += 1
    return m.block(x) * CALLS


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def switched(m, x):
    m.norm.eval()
    return m.norm(m.block(x))


#: They do what no graph says; their code stays Python, around islands.
PYTHON = {
    "no_grad": (no_grad, "without gradients"),
    "no_grad as a decorator": (decorated, "without gradients"),
    "autocast": (autocast, "autocast"),
    "hooks of saved tensors": (saved_on_cpu, "hooks of saved tensors"),
    "a function with a gradient of its own": (lambda m, x: Reversed.apply(m.block(x)), ""),
    "a count in Python": (sets("calls", lambda m, y: m.calls + 1), "sets Net.calls"),
    "a kept value": (sets("aux", lambda m, y: y), "sets Net.aux"),
    "a new attribute": (sets("other", lambda m, y: y), "sets Net.other"),
    "a new buffer": (sets("m", lambda m, y: 0.9 * m.m + 0.1 * y.detach().mean((0, 2, 3))), "sets Net.m"),
    "a list": (appended, "forward changes Net.feats"),
    "a list then no_grad": (lambda m, x: no_grad(m, appended(m, x)), "without gradients"),
    "a dict": (noted, "forward changes Net.notes"),
    "its dict": (by_own_dict, "forward changes Net.calls"),
    "a cached table": (cached, "sets Net.table"),
    "a layer's mode": (switched, "sets BatchNorm2d.training"),
    "Python's random": (lambda m, x: m.block(x) * random.random(), "Python's random"),
    "a layer dropped by Python": (lambda m, x: x if random.random() < 0.5 else m.block(x), "random"),
    "NumPy's random": (lambda m, x: m.block(x) * float(np.random.rand()), "numpy.random"),
    "a layer dropped by torch": (lambda m, x: x if torch.rand(1) < 0.5 else m.block(x), ""),
    "a generator of the model": (lambda m, x: m.block(x) * float(m.rng.random()), "forward changes Net.rng"),
    "a global generator": (lambda m, x: m.block(x) * GENERATOR.random(), "forward changes test_side_effects.GENERATOR"),
    "a generator of torch": (
        lambda m, x: m.block(x) * torch.rand(1, generator=TORCH_GENERATOR),
        "draws from a generator",
    ),
    "a global count": (counted_globally, "forward changes test_side_effects.CALLS"),
    "a number of a buffer": (lambda m, x: m.block(x) * int(m.two), "takes a number out of two"),
    "a choice by a buffer": (lambda m, x: m.block(x) if m.flag else x, "takes a number out of flag"),
    "an array of a buffer": (lambda m, x: m.block(x) * float(m.m.numpy().sum()), "takes a number out of m"),
}


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def outcome(model, x):
    """Output, buffers and gradients; random numbers from one seed."""
    global CALLS
    CALLS = 0
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    GENERATOR.seed(1), TORCH_GENERATOR.manual_seed(1)
    model.rng = np.random.default_rng(1)
    model.zero_grad()
    output = model(x)
    (output * torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()).sum().backward()
    named = {f"the gradient of {name}": value.grad for name, value in model.named_parameters()}
    return {"output": output.detach()} | dict(model.named_buffers()) | named


def require_same(model, qmodel, x):
    with brfx.quantization_disabled(qmodel):
        wanted, found = outcome(model, x), outcome(qmodel, x)
    for name, value in wanted.items():
        other = found[name]
        assert (value is None) == (other is None), name
        assert value is None or (value.dtype == other.dtype and torch.allclose(value, other, rtol=1e-4)), name


def require_sound(model, x, example_inputs=None):
    """The same in both modes, after other weights are loaded, on another batch, and in double precision."""
    qmodel = brfx.prepare_qat(model, example_inputs=example_inputs)
    assert not [value for module in qmodel.modules() for value in vars(module).values() if isinstance(value, Proxy)]
    for training in (True, False, True):
        require_same(model.train(training), qmodel.train(training), x)
    other = {name: value * 1.5 for name, value in model.state_dict().items() if value.is_floating_point()}
    other = model.state_dict() | other
    model.load_state_dict(other), qmodel.load_state_dict(other)
    require_same(model, qmodel, torch.cat([x, x])[:3])
    require_same(model.double(), qmodel.double(), x.double())
    return qmodel


@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("case", [*STATE, *ALIVE])
def test_in_the_graph(case, proved, x):
    torch.manual_seed(0)
    how = (STATE | ALIVE)[case]
    qmodel = require_sound(Net(how), x, x if proved else None)
    if case == "the batch's size" and not factories_are_overridden():
        assert isinstance(qmodel, Net)  # no traced number for a method of a parameter; that is said
    else:
        assert isinstance(qmodel, GraphModule)


@pytest.mark.parametrize("case", PYTHON)
def test_python_around_islands(case, x):
    how, reason = PYTHON[case]
    torch.manual_seed(0)
    model = Net(how)
    traced = trace_islands(model)
    assert "block" in traced.islands and reason in traced.stopped[""]
    assert "test_side_effects.py:" in traced.stopped[""] or "forward changes" in reason
    assert model.calls == 0 and model.feats == [] and model.aux is None and model.notes == {"seen": 0}
    qmodel = require_sound(model, x)
    assert isinstance(qmodel, Net)


def test_nothing_of_a_trace_is_left_behind(x):
    names = "a list then no_grad", "Python's random", "NumPy's random", "a global generator"
    cases = [PYTHON[name][0] for name in names]
    models = [Net(how) for how in (*cases, PYTHON["a generator of the model"][0], ALIVE["a number of torch"])]
    generators = random.getstate(), np.random.get_state()[1].tolist(), GENERATOR.getstate()
    of_torch = torch.get_rng_state()
    for model in models:
        traced = trace_islands(model).model
        assert torch.equal(torch.get_rng_state(), of_torch) and traced.feats == []
        assert traced.rng.bit_generator.state == model.rng.bit_generator.state
    assert (random.getstate(), np.random.get_state()[1].tolist(), GENERATOR.getstate()) == generators
    torch.manual_seed(0)
    model = Net(no_grad)
    set_attribute = nn.Module.__setattr__
    trace_islands(model)
    assert nn.Module.__setattr__ is set_attribute
    with torch.autocast("cpu"):
        assert model(x).dtype == torch.bfloat16


class Frozen(Net):
    """Batch norms that ``train`` leaves in eval."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class FrozenBlock(nn.Sequential):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("copied", [False, True])
def test_a_train_method_of_its_own_is_kept(copied, x):
    torch.manual_seed(0)
    model = Frozen(lambda m, x: F.dropout(m.norm(m.block(x)), 0.5, m.training))
    qmodel = require_sound(model, x, x)
    assert isinstance(qmodel, GraphModule)
    qmodel = copy.deepcopy(qmodel) if copied else qmodel
    assert qmodel.train() is qmodel and qmodel.training and not qmodel.norm.training and qmodel.c.training
    assert not qmodel.eval().training and not qmodel.c.training


def test_a_train_method_below_the_model(x):
    torch.manual_seed(0)
    model = Net(lambda m, x: m.norm(m.block(x)))
    model.block = FrozenBlock(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU())
    qmodel = require_sound(model, x, x)
    assert isinstance(qmodel, GraphModule) and qmodel.train().norm.training
    model = Net(no_grad)
    model.block = FrozenBlock(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU())
    assert not require_sound(model, x).train().block.training


def test_a_train_method_of_the_instance_is_not_traced(x):
    model = Net(lambda m, x: m.norm(m.block(x)))
    model.train = types.MethodType(Net.train, model)
    traced = trace_islands(model)
    assert "train() of its own" in traced.stopped[""] and "block" in traced.islands


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_gone_and_said(reentrant, x, caplog):
    torch.manual_seed(0)
    model = Net(lambda m, x: checkpoint(m.block, x, use_reentrant=reentrant) if m.training else m.block(x))
    qmodel = require_sound(model, x, x)
    assert isinstance(qmodel, GraphModule) and "1 calls of torch.utils.checkpoint are gone" in caplog.text
    assert sum("checkpoint" in record.getMessage() for record in caplog.records) == 1
    brfx.calibrate(qmodel.float(), [x])
    output, br = brfx.BinPenalty(qmodel.train())(x)
    (output.sum() + br.total).backward()
    calls = []
    model.block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.float().train()(x).sum().backward()
    assert len(calls) == 2  # the float model's own are there


@pytest.mark.parametrize("where", ["r", "block", "block.1", "block.0", "norm", ""])
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_run(where, pre, x):
    seen = []
    torch.manual_seed(0)
    model = Net(lambda m, x: m.r(m.norm(m.block(x))))
    module = model.get_submodule(where)
    if pre:
        module.register_forward_pre_hook(lambda module, args: seen.append(1) or (args[0] * 2,))
    else:
        module.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    qmodel = require_sound(model, x, x).float()
    seen.clear()
    brfx.calibrate(qmodel, [x])
    assert len(seen) > 0
    seen.clear()
    qmodel(x)
    assert len(seen) == 1
