import pytest
import torch

import brfx
from brfx.errors import ConfigError
from brfx.train import Callback, Evaluation, fit, loop

from .helpers import small_net


@pytest.fixture
def accuracies(monkeypatch):
    """What each epoch's validation comes to, in percent, instead of being measured."""

    def given(*percent):
        left = iter(percent)
        monkeypatch.setattr(loop, "evaluate", lambda model, data, task: Evaluation(next(left), 100, 1.0))

    return given


def settings(**given):
    return brfx.TrainConfig(
        **{"epochs": 8, "warmup_epochs": 0, "compile": "off", "keep": "best", "patience": 2} | given
    )


def batches():
    return [(torch.randn(4, 3, 8, 8), torch.arange(4))]


@pytest.mark.parametrize(
    ("percent", "epochs", "kept"),
    [((10, 30, 20, 25), 4, 2), ((10, 30, 30, 30), 4, 4), ((10, 20, 15, 30, 40, 1, 2), 7, 5), (range(8), 8, 8)],
)
def test_a_run_ends_when_so_many_epochs_are_none_better(accuracies, percent, epochs, kept):
    accuracies(*percent)
    result = fit(small_net(), batches(), batches(), settings())
    assert (len(result.history), result.epoch) == (epochs, kept)


def test_the_warm_up_is_no_better_epoch(accuracies):
    qmodel = brfx.prepare_qat(small_net())
    brfx.calibrate(qmodel, [batches()[0][0]])
    accuracies(90, 10, 20, 15, 15)
    result = fit(qmodel, batches(), batches(), settings(warmup_epochs=1), penalty=brfx.BinPenalty(qmodel))
    assert (len(result.history), result.epoch) == (5, 3)


def test_a_run_that_waits_waits_as_long_when_it_is_resumed(accuracies, tmp_path):
    class Stop(Callback):
        def on_epoch(self, metrics):
            if metrics.epoch == 3:
                raise KeyboardInterrupt

    accuracies(10, 30, 20, 25)
    with pytest.raises(KeyboardInterrupt):
        fit(small_net(), batches(), batches(), settings(), run_dir=tmp_path, callbacks=[Stop()])
    result = fit(small_net(), batches(), batches(), settings(), run_dir=tmp_path, resume=True)
    assert (len(result.history), result.epoch) == (4, 2)


def test_patience_keeps_the_best():
    with pytest.raises(ConfigError, match="--keep best"):
        settings(keep="last")
    with pytest.raises(ConfigError, match="patience=0: takes a number above 0"):
        settings(patience=0)
