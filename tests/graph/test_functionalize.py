"""Operations in place: a graph has none, and computes what the model does that has."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.errors import TraceError
from brfx.fast.training_graph import training_forward
from brfx.graph.functionalize import functionalize, written
from brfx.graph.trace import Tracer, Tracing, trace, trace_islands
from brfx.graph.utils import dump


class Net(nn.Module):
    """Layers of eight channels; ``how(self, x)`` is everything between the first and the head."""

    def __init__(self, how):
        super().__init__()
        self.c0, self.c, self.c2 = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.f, self.how = nn.Linear(8, 4), how
        self.r, self.r6, self.silu, self.same = nn.ReLU(True), nn.ReLU6(True), nn.SiLU(True), nn.Identity()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        return self.f(self.how(self, x).mean((2, 3)))


def residual(relu):
    def how(m, x):
        x = m.c0(x)
        return m.c2(relu(m, m.c(relu(m, x)))) + x

    return how


def statement(change, first=True):
    """``change(m, x)`` as a statement, between two layers or on the input."""

    def how(m, x):
        x = m.c0(x) if first else x
        change(m, x)
        return m.c(x) if first else m.c0(x)

    return how


def changed_view(m, x):
    x = m.c0(x)
    half = x[:, :4]
    half.mul_(0.2)
    return m.c(x) + half.repeat(1, 2, 1, 1)


def changed_base(m, x):
    x = m.c0(x)
    first, second = x[:, :4], x.narrow(1, 4, 4)
    x.relu_()
    return m.c(x) + torch.cat([second, first], 1)


def reshaped(m, x):
    x = m.c0(x)
    y = x.unflatten(1, (2, 4))
    y[:, 0].add_(1.0)
    y.transpose(1, 2)[:, 1:3] *= -1
    return m.c(x)


def rebound(m, x):
    x = m.c0(x)
    z = x
    x += 1.0
    x *= 0.5
    return m.c(z) + x


def added_to(m, x):
    h = m.c(x := m.c0(x).relu())
    o = m.c2(x)
    o.add_(h)
    return m.r(o)


def added_to_relu(m, x):
    y = F.relu(m.c0(x))
    y.sub_(0.3)
    return m.c2(y)


def scaled_after(m, x):
    h = m.c(m.c0(x).relu())
    o = m.c2(h)
    h.mul_(0.3)
    return o * h


def out_argument(m, x):
    x = m.c0(x)
    buffer = torch.empty_like(x)
    torch.mul(x, 0.5, out=buffer)
    return m.c(buffer) + x


def squeezed(m, x):
    x = m.c0(x).unsqueeze(1)
    y = x
    x.squeeze_(1)
    y.mul_(2)
    return m.c(x)


def counted(m, x):
    n = x.shape[1]
    k = n
    n += 5
    return m.c(m.c0(x)[:, :n] * k)


def constant(m, x):
    mask = torch.ones(1, 8, 1, 1)
    x = m.c0(x)
    mask[:, ::2] = x.mean((0, 2, 3))[::2].view(1, 4, 1, 1)
    return m.c(x * mask)


def two_conditions(m, x):
    x = m.c0(x)
    return m.c(torch.where((x > 0) & (x < 0.5) | (x > 1), x, -x))


CASES = {
    "and, or": two_conditions,
    "relu module": residual(lambda m, x: m.r(x)),
    "relu6 module": residual(lambda m, x: m.r6(x)),
    "silu module": residual(lambda m, x: m.silu(x)),
    "relu function": residual(lambda m, x: F.relu(x, inplace=True)),
    "relu by position": residual(lambda m, x: F.relu(x, True)),
    "relu by keyword": residual(lambda m, x: F.relu(input=x, inplace=True)),
    "relu_": residual(lambda m, x: x.relu_()),
    "torch.relu_": residual(lambda m, x: torch.relu_(x)),
    "F.relu_": residual(lambda m, x: F.relu_(x)),
    "leaky": residual(lambda m, x: F.leaky_relu(x, 0.2, True)),
    "hardtanh_": residual(lambda m, x: F.hardtanh_(x, -0.5, 0.5)),
    "dropout": residual(lambda m, x: m.drop(x)),
    "F.dropout": residual(lambda m, x: F.dropout(x, 0.5, m.training, True)),
    "through an identity": residual(lambda m, x: m.r(m.same(x))),
    "mul_, clamp_": statement(lambda m, x: (x.mul_(3.0), x.clamp_(min=0))),
    "module as a statement": statement(lambda m, x: m.r(x)),
    "masked_fill_": statement(lambda m, x: x.masked_fill_(x < 0.1, 0.5)),
    "slices": statement(lambda m, x: x.__setitem__((slice(None), slice(0, 4)), 0.25)),
    "an index": statement(lambda m, x: x.__setitem__(x < 0, 0.25)),
    "fill_, copy_": statement(lambda m, x: (x[:, :2].fill_(0.5), x[:, 2:4].copy_(x[:, 4:6]))),
    "gt_": statement(lambda m, x: x[:, :2].gt_(0)),
    "data": statement(lambda m, x: x.data.mul_(0.5)),
    "detached": statement(lambda m, x: x.detach().mul_(0.5)),
    "bernoulli_": statement(lambda m, x: x[:, :2].bernoulli_(0.5)),
    "noise": statement(lambda m, x: x[:, :2].uniform_(-1, 1)),
    "input": statement(lambda m, x: (x.sub_(0.4), x.div_(0.2)), first=False),
    "input, a chain": statement(lambda m, x: x.sub_(0.4).div_(0.2), first=False),
    "input, by operator": statement(lambda m, x: x.__isub__(0.4), first=False),
    "view": changed_view,
    "base": changed_base,
    "views of views": reshaped,
    "operators": rebound,
    "add_": added_to,
    "sub_ behind a relu": added_to_relu,
    "mul_ behind a layer": scaled_after,
    "out": out_argument,
    "squeeze_": squeezed,
    "numbers": counted,
    "constant": constant,
}


#: PyTorch itself has no gradient for these: what is changed was kept for backward.
FORWARD_ONLY = {"sub_ behind a relu", "mul_ behind a layer", "out"}


@pytest.fixture
def x():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def run(model, x, gradients=True):
    """Output and gradients from one seed."""
    torch.manual_seed(3)
    with torch.set_grad_enabled(gradients):
        out = model(x.clone())
    if not gradients:
        return [out]
    model.zero_grad()
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def made(case):
    torch.manual_seed(0)
    return Net(CASES[case])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_graph_computes_what_the_model_does(case, training, x):
    model = made(case).train(training)
    for traced in (trace(model), qmodel := brfx.prepare_qat(model)):
        with brfx.quantization_disabled(qmodel):
            results = zip(*(run(m, x, case not in FORWARD_ONLY) for m in (traced, model)), strict=True)
            assert all(torch.equal(a, b) for a, b in results)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"noise", "bernoulli_", "gt_", "an index", "masked_fill_"}))
def test_eight_bits_keep_the_signal_and_training_computes_the_same(case, x):
    model = made(case).eval()
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=8)).eval()
    brfx.calibrate(qmodel, [x.clone()], start="mse")
    with torch.no_grad():
        signal = model(x.clone())
        noise = qmodel(x.clone()) - signal
    assert 10 * torch.log10(signal.square().sum() / noise.square().sum()) > 25
    qmodel.train()
    lean = copy.deepcopy(qmodel)
    lean.forward = partial(training_forward(lean, None, kernels=False), lean)
    for a, b in zip(run(lean, x), run(qmodel, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    ["relu module", "mul_, clamp_", "sub_ behind a relu", "slices", "masked_fill_", "view", "views of views", "input"],
)
def test_the_onnx_file_computes_the_same(case, x, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    qmodel = brfx.prepare_qat(made(case).eval(), brfx.QATConfig(bits=8)).eval()
    brfx.calibrate(qmodel, [x.clone()])
    brfx.snap_biases(qmodel)
    report = brfx.export_onnx(qmodel, tmp_path / "model.onnx", x.clone(), "portable")
    with torch.no_grad():
        assert report.max_difference < 0.02 * float(qmodel(x.clone()).abs().max())


def test_what_the_caller_gave_is_left_as_it_was(x):
    given = x.clone()
    brfx.prepare_qat(made("input"), example_inputs=given)
    trace(made("input"))(given)
    assert torch.equal(given, x)


def functional(how):
    model = Net(how)
    graph = Tracer(Tracing()).trace(model)
    return functionalize([graph], model), trace(model)


def test_before_and_after():
    count, gm = functional(changed_view)
    assert count == 1
    assert dump(gm).splitlines()[:7] == [
        "x = input",
        "c0 = Conv2d(x)",
        "getitem = getitem(c0)",
        "mul_ = mul(getitem)",
        "written = written(c0, mul_)",
        "c = Conv2d(written)",
        "repeat = repeat(mul_)",
    ]
    assert not [node for node in gm.graph.nodes if str(node.target).endswith("_")]


@pytest.mark.parametrize(
    ("change", "arguments"), [("squeeze_", ()), ("unsqueeze_", (0,)), ("transpose_", (2, 3)), ("mul_", (2,))]
)
def test_no_method_in_place_is_left(change, arguments):
    def how(m, x):
        y = m.c0(x)
        getattr(y, change)(*arguments)
        return m.c(y[0] if change == "unsqueeze_" else y)

    _, gm = functional(how)
    assert change not in [str(node.target) for node in gm.graph.nodes]
    torch.manual_seed(0)
    model, x = Net(how), torch.randn(2, 3, 6, 6)
    assert torch.equal(trace(model)(x), model(x))


def test_modules_lose_the_flag_and_the_model_keeps_it():
    model = made("relu module")
    gm = trace(model)
    assert not gm.r.inplace and model.r.inplace


def test_nothing_in_place_is_left_as_it_is():
    count, gm = functional(lambda m, x: m.c(m.c0(x).relu()))
    assert count == 0 and "written" not in dump(gm)


REFUSED = {
    "a copy, perhaps": lambda m, x: (lambda h: (h.flatten(1).mul_(2), m.c(h))[1])(m.c0(x)),
    "read after": lambda m, x: (lambda h, y: (h.mul_(2), m.c(y))[1])(*(lambda h: (h, h.contiguous()))(m.c0(x))),
    "dropout in eval": lambda m, x: (lambda h: (F.dropout(h, 0.5, m.training).mul_(2), m.c(h))[1])(m.c0(x)),
    "another form": lambda m, x: (lambda h: (h.resize_(2, 8, 8, 8), m.c(h))[1])(m.c0(x)),
    "several": lambda m, x: (lambda h: torch.max(h, 1, out=(h[:, 0], h[:, 1])))(m.c0(x))[0],
    "its own state": lambda m, x: (m.c.weight.contiguous().mul_(x.mean()), m.c(m.c0(x)))[1],
    "initialization": lambda m, x: (lambda h: (nn.init.constant_(h, 1.0), m.c(h))[1])(m.c0(x)),
    "an attribute": lambda m, x: (lambda h: (setattr(h, "data", h * 2), m.c(h))[1])(m.c0(x)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_with_its_line(case):
    with pytest.raises(TraceError, match=r"test_functionalize.py:\d+"):
        trace(Net(REFUSED[case]))


def test_what_may_share_memory_is_no_matter_where_nothing_reads_it(x):
    model = Net(lambda m, x: F.dropout(m.c0(x), 0.5, m.training).contiguous().mul_(2).add_(2))
    assert torch.equal(run(trace(model), x)[0], run(model, x)[0])


def test_an_island_changes_its_input_as_the_module_did(x):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.conv = nn.ReLU(True), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(self.relu(x))

    class Preactivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Conv2d(3, 8, 3), Block()

        def forward(self, x):
            x = self.first(x)
            return (self.block(x) + x if x.mean() < 100 else x).mean((2, 3))

    torch.manual_seed(0)
    model = Preactivation()
    qmodel = brfx.prepare_qat(model)
    assert not isinstance(qmodel, torch.fx.GraphModule)
    with brfx.quantization_disabled(qmodel):
        assert all(torch.equal(a, b) for a, b in zip(run(qmodel, x), run(model, x), strict=True))
    brfx.calibrate(qmodel, [x])
    run(qmodel, x)


def test_a_leaf_that_may_change_its_input_is_refused_where_something_reads_it_later():
    def net(how):
        model = Net(how)
        model.leaf = nn.Sequential(nn.ReLU(True), nn.Conv2d(8, 8, 1))
        return model

    tracing = Tracing(leaf_modules=(nn.Sequential,))
    trace(net(lambda m, x: m.leaf(m.c0(x))), tracing)
    with pytest.raises(TraceError, match="may change its input in place"):
        trace(net(lambda m, x: (lambda h: m.leaf(h) + h)(m.c0(x))), tracing)


def test_a_module_that_others_call_keeps_its_flag_there():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(True)
            self.block = nn.Sequential(nn.Conv2d(3, 4, 1), self.relu)

        def forward(self, x):
            return self.block(x) if x.mean() < 100 else self.relu(x)

    traced = trace_islands(Shared())
    assert list(traced.islands) == ["block"]
    assert traced.model.relu.inplace and not traced.model.block.get_submodule("1").inplace


def test_state_is_changed_in_place(x):
    def how(m, x):
        m.scale.data.mul_(x.mean().detach())
        return m.c(m.c0(x) * m.scale)

    torch.manual_seed(0)
    model = Net(how)
    model.scale = nn.Parameter(torch.ones(1))
    gm = trace(model)
    for _ in range(2):
        assert torch.equal(gm(x), model(x)) and torch.equal(gm.scale, model.scale)
    assert model.scale < 0.5


def test_a_tensor_in_containers_within_each_other_is_written_where_it_is():
    a, b, c = torch.arange(12.0).view(3, 4), torch.ones(2), torch.zeros(2)
    value = {"pair": [a, b], "c": c}
    into = (("getitem", ("pair",), {}), ("getitem", (0,), {}), ("t", (), {}), ("getitem", (1,), {}))
    found = written(value, torch.full((3,), -1.0), into)
    expected = a.clone()
    expected[:, 1] = -1
    assert torch.equal(found["pair"][0], expected) and a[0, 1] == 1
    assert found["pair"][1] is b and found["c"] is c and list(found) == ["pair", "c"]
    assert torch.equal(written(value, c + 5, (("getitem", ("c",), {}),))["c"], c + 5)


def flattened(m, x):
    x = m.c0(x)
    y = x.view(x.size(0), -1)
    z = x.view(-1)
    z[::7] = 0.5
    return m.c(y.view(x.shape) + x.relu().view_as(x))


def test_views_run_in_any_memory_format(x):
    torch.manual_seed(0)
    model = Net(flattened)
    qmodel = brfx.prepare_qat(model, None, x)
    with brfx.quantization_disabled(qmodel):
        wanted, found = run(model, x), run(qmodel, x)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, found, strict=True))
        last = qmodel.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, model(x))


def test_a_view_that_a_buffer_is_written_through_stays_one(x):
    """A reshape of it in another memory format is a copy, which would take the write."""
    model = Net(lambda m, x: (m.seen.view(-1).add_(1.0), m.c(m.c0(x) + m.seen))[1])
    model.register_buffer("seen", torch.zeros(1, 8, 1, 1))
    qmodel = brfx.prepare_qat(model, None, x)
    called = {node.target for node in qmodel.graph.nodes if node.op == "call_method"}
    assert "view" in called and "reshape" not in called
    before = qmodel.seen.clone()
    with brfx.quantization_disabled(qmodel):
        qmodel(x)
    assert torch.equal(qmodel.seen, before + 1)


def test_a_view_as_another_type_stays_one(x):
    def how(m, x):
        x = m.c0(x)
        return m.c(x.view(torch.int32).view(x.dtype))

    model = Net(how)
    qmodel = brfx.prepare_qat(model, None, x)
    with brfx.quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
