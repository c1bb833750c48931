import subprocess
import sys

import pytest
from torch import nn

import brfx
from brfx.train import EpochMetrics, Means, Progress, TensorBoard

pytest.importorskip("tensorboard", reason="the figures are written by tensorboard's package")


def progress(epoch, batch, loss, terms=None):
    return Progress(epoch, 3, batch, 20, "penalty" if terms else "warm-up", 0.5, Means(loss, 0.25, terms or {}))


def metrics(epoch, accuracy):
    return EpochMetrics(epoch, "penalty", 0.5, Means(1.0, 0.25), 1.5, accuracy, 1.0, 64.0)


def read(folder):
    """``{tag: [(x, value), ..]}`` of the event files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_batches_count_from_the_start_of_the_run_and_epochs_have_validation(tmp_path):
    board = TensorBoard(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    board.on_batch(progress(1, 10, 4.0))
    board.on_batch(progress(1, 20, 3.0))
    board.on_epoch(metrics(1, 0.5))
    board.on_batch(progress(2, 10, 2.0, {"weight": 0.5, "act": 8.0}))
    board.on_epoch(metrics(2, 0.75))  # what is there now is on disk, without close
    assert read(tmp_path / "run") == {
        "train/loss": [(10, 4.0), (20, 3.0), (30, 2.0)],
        "train/accuracy": [(10, 0.25), (20, 0.25), (30, 0.25)],
        "penalty/weight": [(30, 0.5)],
        "penalty/act": [(30, 8.0)],
        "lr": [(10, 0.5), (20, 0.5), (30, 0.5)],
        "val/loss": [(1, 1.5), (2, 1.5)],
        "val/accuracy": [(1, 0.5), (2, 0.75)],
    }
    board.close()


def test_another_task_has_its_metric_under_its_name(tmp_path):
    board = TensorBoard(tmp_path)
    board.on_batch(Progress(1, 3, 10, 20, "plain", 0.5, Means(2.0, None)))
    board.on_epoch(
        EpochMetrics(1, "plain", 0.5, Means(1.0, None), None, 0.5, 1.0, 64.0, metric="mAP50", further={"mAP": 0.25})
    )
    board.close()
    val = {"val/mAP50": [(1, 0.5)], "val/mAP": [(1, 0.25)]}
    assert read(tmp_path) == {"train/loss": [(10, 2.0)], "lr": [(10, 0.5)], **val}


def test_a_run_that_goes_on_replaces_what_it_does_again(tmp_path):
    for epochs in ((1, 2), (2, 3)):
        board = TensorBoard(tmp_path)
        for epoch in epochs:
            board.on_batch(progress(epoch, 20, float(10 * epochs[0] + epoch)))
        board.close()
    assert read(tmp_path)["train/loss"] == [(20, 11.0), (40, 22.0), (60, 23.0)]


def test_fit_calls_it(digits, tmp_path):
    from brfx.data import BatchLoader

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    val = BatchLoader(digits.val, digits.preprocessing, 64)
    model(next(iter(val))[0])
    board = TensorBoard(tmp_path)
    result = brfx.fit(model, val, val, brfx.TrainConfig(epochs=2, compile="off"), callbacks=[board])
    board.close()
    found = read(tmp_path)
    assert [x for x, _ in found["train/loss"]] == [len(val), 2 * len(val)]
    assert found["val/accuracy"] == [(m.epoch, pytest.approx(m.val_accuracy)) for m in result.history]


def test_without_the_package_the_error_says_so(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(brfx.BrfxError, match=r"TensorBoard: a package it needs is installed and cannot be imported"):
        TensorBoard(tmp_path)


def test_the_package_is_imported_only_when_wanted():
    code = "import brfx.train, sys; brfx.train.TensorBoard; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tensorboard" not in done.stdout.split()
