"""One graph that is right in training and in eval."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.calibration import quantizers
from brfx.graph.mode_branches import pruned, select_by_mode
from brfx.graph.trace import trace


def selections(gm):
    return [node.args for node in gm.graph.nodes if node.target is select_by_mode]


class Net(nn.Module):
    """``how(self, x)`` between two layers."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.aux, self.how = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), how
        self.register_buffer("unread", torch.ones(2))

    def forward(self, x):
        return self.how(self, self.first(x))


def noisy(m, x):
    if m.training:
        x = x * torch.rand_like(x)
    return m.second(x)


CASES = {
    "nothing differs": (lambda m, x: m.second(F.relu(x)), 0),
    "a flag": (lambda m, x: m.second(F.dropout(x, 0.5, m.training)), 1),
    "a number": (lambda m, x: m.second(x * (0.5 if m.training else 2.0)), 1),
    "always on": (lambda m, x: m.second(F.dropout(x, 0.5, True)), 0),
    "more in training": (noisy, 1),
    "more in eval": (lambda m, x: m.second(x) if m.training else m.second(x).softmax(-1), 1),
    "another output": (lambda m, x: (m.second(x), m.aux(x)) if m.training else m.second(x), 1),
    "a dict": (lambda m, x: {"out": m.second(x)} | ({"aux": m.aux(x)} if m.training else {}), 1),
    "in place": (lambda m, x: m.second(x.add_(1) if m.training else x.mul_(2)), 1),
}  # fmt: skip


def flat(output):
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("copied", [False, True])
def test_right_in_both_modes(case, copied):
    how, expected = CASES[case]
    torch.manual_seed(0)
    model = Net(how)
    gm = trace(model)
    assert len(selections(gm)) == expected
    gm = copy.deepcopy(gm) if copied else gm
    x = torch.randn(3, 4)
    for training in (True, False, True):
        outputs = []
        for module in (model, gm):
            torch.manual_seed(1)
            outputs.append(module.train(training)(x))
        assert type(outputs[0]) is type(outputs[1])
        assert all(torch.equal(a, b) for a, b in zip(*map(flat, outputs), strict=True))


def test_what_differs_before_a_layer_does_not_give_it_two_quantizers():
    qmodel = brfx.prepare_qat(Net(noisy))
    assert sorted(quantizers(qmodel)) == [
        "first.weight_quantizer", "first_input", "second.weight_quantizer", "second_input",
    ]  # fmt: skip
    brfx.calibrate(qmodel, [torch.randn(8, 4)])


def test_a_mode_computes_nothing_of_the_other():
    gm = trace(Net(CASES["another output"][0]))
    names = {training: [str(node.target) for node in pruned(gm, training).nodes] for training in (True, False)}
    assert "aux" in names[True] and "aux" not in names[False]


def test_a_functional_dropout_in_a_compiled_model_follows_the_mode():
    torch._dynamo.reset()
    gm = trace(Net(CASES["a flag"][0]))
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    assert torch.equal(compiled.eval()(x), gm.eval()(x))
    assert not torch.equal(compiled.train()(x), compiled(x))
