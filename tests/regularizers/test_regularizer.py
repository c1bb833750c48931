import json

import pytest
import torch
from torch import nn

import brfx
from brfx.config import TrainConfig
from brfx.errors import ConfigError
from brfx.kernels.training_form import HasTrainingForm
from brfx.regularizers import Regularizer, Regularizers, WeightTerm
from brfx.regularizers.kurtosis import KurtosisTerm
from brfx.train.step import loss_step


class Decay(WeightTerm):
    """The mean square of one weight: the smallest regularizer there is."""

    name = "decay"

    def __init__(self, weight: nn.Parameter, strength: float) -> None:
        super().__init__(strength)
        self._weight = [weight]

    def forward(self) -> torch.Tensor:
        return self._weight[0].square().mean()


@pytest.fixture
def qmodel(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    return qmodel.train()


def gradients(qmodel, run, images) -> dict[str, torch.Tensor]:
    qmodel.zero_grad()
    output, terms = run(images)
    (output.square().mean() + terms.total).backward()
    return {name: parameter.grad.clone() for name, parameter in qmodel.named_parameters()}


@pytest.mark.parametrize("act", [0.0, 0.01])
@pytest.mark.parametrize("form", [False, True])
def test_several_add_up(qmodel, images, act: float, form: bool) -> None:
    bins, decay = brfx.BinPenalty(qmodel, weight=0.1, act=act), Decay(qmodel.fc.weight, 2.0)
    both = Regularizers(bins, KurtosisTerm(qmodel, 0.3), decay)
    assert both.logged_terms == ("weight",) + ("act",) * (act > 0) + ("kurtosis", "decay")
    found = gradients(qmodel, both.training_form(kernels=False) if form else both, images)
    qmodel.zero_grad()
    output, terms = bins(images)
    loss = terms.total + 0.3 * KurtosisTerm(qmodel, 0.3)() + 2 * qmodel.fc.weight.square().mean()
    (output.square().mean() + loss).backward()
    for name, parameter in qmodel.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(both(images)[1].total, loss)


def test_the_model_alone_can_be_what_runs(qmodel, images) -> None:
    penalty = Regularizers(qmodel, KurtosisTerm(qmodel, 0.3))
    loss, numbers = loss_step(qmodel, penalty, kernels=False)(images, torch.zeros(8, dtype=torch.long))
    assert set(numbers) == {"task", "correct", "kurtosis"}
    torch.testing.assert_close(loss, numbers["task"] + 0.3 * numbers["kurtosis"])
    torch.testing.assert_close(numbers["kurtosis"], KurtosisTerm(qmodel, 1.0)())
    assert isinstance(qmodel, HasTrainingForm) and not isinstance(nn.ReLU(), HasTrainingForm)


def test_what_is_no_regularizer_is_called_as_it_is_and_all_its_terms_are_logged(qmodel, images) -> None:
    class Plain(nn.Module):
        def forward(self, x):
            return qmodel(x), brfx.regularizers.bin_penalty.BinLoss(
                torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
            )

    _, numbers = loss_step(qmodel, Plain(), kernels=False)(images, torch.zeros(8, dtype=torch.long))
    assert (numbers["weight"], numbers["act"]) == (2, 3)
    assert Regularizer().training_form(kernels=True)


def test_fit_freezes_trains_and_logs_through_it(qmodel, images, tmp_path) -> None:
    bins = brfx.BinPenalty(qmodel, weight=0.1, act=0.0, freeze_act_steps=True)
    begun = []
    bins.begin = lambda: begun.append(True)
    data = [(images, torch.arange(8) % 4)] * 2
    config = TrainConfig(epochs=2, warmup_epochs=1, compile="off")
    brfx.fit(qmodel, data, None, config, penalty=Regularizers(bins, KurtosisTerm(qmodel, 0.5)), run_dir=tmp_path)
    warm, last = (json.loads(line)["train"]["terms"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert not warm and set(last) == {"weight", "kurtosis"} and last["kurtosis"] > 0 and begun


def test_two_of_one_name_are_refused(qmodel) -> None:
    with pytest.raises(ConfigError, match="two regularizers of one name: kurtosis, kurtosis"):
        Regularizers(qmodel, KurtosisTerm(qmodel, 0.3), KurtosisTerm(qmodel, 0.1))
