import json
import logging

import pytest
import torch

import brfx
from brfx.config import TrainConfig
from brfx.data import BatchLoader
from brfx.errors import TrainingError
from brfx.jobs.statistics import FILE, RunStatistics
from brfx.train import Callback, fit
from tests.train.helpers import small_net


class Stop(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch(self, metrics):
        if metrics.epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.fixture
def run(digits, tmp_path):
    """Train three epochs of eight batches in a folder; ``stop`` is the epoch after which it is cut off."""
    loader = BatchLoader(digits.train.take(torch.arange(128)), digits.preprocessing, 16, seed=0)
    images = next(iter(loader))[0]

    def trained(name, *, stop=None, resume=False, **settings):
        qmodel = brfx.prepare_qat(small_net(), brfx.QATConfig(bits=2), images)
        brfx.calibrate(qmodel, [images], start="lsq")
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = TrainConfig(epochs=3, warmup_epochs=0, compile="off", seed=0, **settings)
        callbacks = [] if stop is None else [Stop(stop)]
        statistics = RunStatistics(qmodel, 0, folder, images[:4])
        fit(qmodel, loader, loader, config, statistics=statistics, run_dir=folder, resume=resume, callbacks=callbacks)
        return folder

    return trained


def test_each_epoch_is_written_once_and_alike_however_often_the_run_is_cut_off(run):
    whole = run("whole")
    lines = [json.loads(line) for line in (whole / FILE).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert all(list(line["weights"]) == ["0", "3", "8"] for line in lines)
    assert len(lines[0]["activations"]) == 4
    assert lines[0]["weights"]["0"]["counts"] != lines[3]["weights"]["0"]["counts"]
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run("parts", stop=epoch, resume=epoch > 1)
    ahead = run("parts", resume=True) / FILE
    assert ahead.read_text() == (whole / FILE).read_text()


def test_lines_of_epochs_that_are_run_again_are_replaced(run):
    whole = run("whole") / FILE
    path = whole.parent.parent / "parts" / FILE
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=1)
    text = path.read_text()
    line = text.splitlines(keepends=True)[1]
    lost = [line.replace('"epoch": 1', f'"epoch": {epoch}') for epoch in (2, 3)]  # their checkpoints are
    path.write_text("".join([text, *lost]))
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=2, resume=True)
    assert path.read_text() == "".join(whole.read_text().splitlines(keepends=True)[:3])
    run("parts", resume=True)
    assert path.read_text() == whole.read_text()


def test_the_run_is_the_same_without_histograms(run, monkeypatch):
    with_them = run("with")
    monkeypatch.setattr(RunStatistics, "_record", lambda self, epoch: None)
    without = run("without")
    states = [torch.load(folder / "last.pth", weights_only=True)["state_dict"] for folder in (with_them, without)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not (without / FILE).exists()


def test_a_model_that_draws_numbers_in_eval_mode_draws_the_same_ones(tmp_path):
    class Noisy(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x[:, :1])

    qmodel = brfx.prepare_qat(Noisy(torch.nn.Linear(4, 4), torch.nn.ReLU()), brfx.QATConfig(bits=2))
    brfx.calibrate(qmodel, [torch.randn(8, 4)])
    before = torch.get_rng_state()
    RunStatistics(qmodel, 0, tmp_path, torch.randn(8, 4, generator=torch.Generator())).begin()
    assert torch.equal(before, torch.get_rng_state())
    assert json.loads((tmp_path / FILE).read_text())["activations"]


def test_a_model_that_does_not_run_on_images_alone_is_trained_all_the_same(tmp_path, caplog):
    qmodel = brfx.prepare_qat(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), brfx.QATConfig(bits=2))
    brfx.calibrate(qmodel, [torch.randn(8, 4)])
    with caplog.at_level(logging.WARNING, "brfx"):
        RunStatistics(qmodel, 0, tmp_path, torch.randn(8, 5)).begin()
    assert "no histograms of activations (" in caplog.text
    line = json.loads((tmp_path / FILE).read_text())
    assert line["activations"] == {} and list(line["weights"]) == ["0"]


def test_a_damaged_file_is_begun_anew_and_a_folder_that_is_gone_is_named(run, caplog):
    path = run("whole").parent / "parts" / FILE
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=1)
    path.write_text("{")
    with caplog.at_level(logging.WARNING, "brfx"):
        run("parts", resume=True)
    assert "cannot be read" in caplog.text
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [2, 3]
    statistics = RunStatistics(brfx.prepare_qat(small_net()), 0, path.parent / "gone", torch.zeros(1, 3, 8, 8))
    with pytest.raises(TrainingError, match=FILE):
        statistics.begin()
