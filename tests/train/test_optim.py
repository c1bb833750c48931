import pytest
import torch

import brfx
from brfx.train.optim import rate_factor


@pytest.mark.parametrize("methods", [{}, {"act_quantizer": "pact", "per_channel": True}])
def test_every_trained_parameter_is_in_one_group(tiny, methods):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(**methods))
    qmodel.conv2.weight.requires_grad_(False)
    weights, vectors, steps = brfx.parameter_groups(qmodel, lr=0.1, step_lr=0.01, weight_decay=1e-4)
    names = {id(parameter): name for name, parameter in qmodel.named_parameters()}
    named = [[names[id(parameter)] for parameter in group["params"]] for group in (weights, vectors, steps)]
    assert named[0] == ["conv1.weight", "fc.weight"]
    assert named[1] == ["bn1.weight", "bn1.bias", "conv2.bias", "fc.bias"]
    trained = {name for name, parameter in qmodel.named_parameters() if parameter.requires_grad}
    assert set(named[2]) == trained - set(named[0]) - set(named[1]) and len(named[2]) == len(set(named[2]))
    assert all(name.rpartition(".")[2] in ("step", "alpha") for name in named[2])
    assert [(group["lr"], group["weight_decay"]) for group in (weights, vectors, steps)] == [
        (0.1, 1e-4), (0.1, 0.0), (0.01, 0.0),
    ]  # fmt: skip
    assert {group["lr"] for group in brfx.parameter_groups(qmodel, lr=0.2)} == {0.2}


def test_a_group_of_nothing_is_left_out():
    (group,) = brfx.parameter_groups(torch.nn.Conv2d(3, 4, 1, bias=False), lr=0.1)
    assert len(group["params"]) == 1


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    assert [rate_factor(i, 10, 0.2) for i in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate_factor(6, 10, 0.2) == pytest.approx(0.5) and rate_factor(10, 10, 0.2) == pytest.approx(0)
