"""A signal is answered at once, and ends at once what loses nothing."""

import logging
import os
import signal
import threading

import pytest
import torch
from torch import nn

import brfx
from brfx.errors import Interrupted
from brfx.train import Callback, fit
from brfx.train.stopping import stop_requests


@pytest.fixture
def python_handles_sigint():
    """A shell starts what is in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_is_acknowledged_and_waits_for_the_batch(caplog, python_handles_sigint):
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and record.getMessage().startswith("Stopping when this batch")
        with pytest.raises(KeyboardInterrupt):  # the second one is not caught
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_ends_at_once_what_loses_nothing():
    with stop_requests() as stop:
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt), stop.at_once():  # nor is it begun by one who was asked before
            pytest.fail("begun")


def test_a_compiler_that_the_signal_ended_too_is_no_error_of_its_own():
    with stop_requests() as stop, pytest.raises(KeyboardInterrupt), stop.at_once():
        stop.signal = signal.SIGINT
        raise RuntimeError("g++ failed")
    with stop_requests() as stop, pytest.raises(RuntimeError), stop.at_once():
        raise RuntimeError("g++ failed")


class Phases(Callback):
    def __init__(self, stop_in=None):
        self.seen, self.stop_in = [], stop_in

    def on_phase(self, phase):
        self.seen.append((phase.name, phase.done, phase.total))
        if phase.name == self.stop_in:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def tiny_run(callback, monkeypatch=None, **settings):
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8)) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    where = {name: settings.pop(name) for name in ("run_dir", "resume") if name in settings}
    return fit(model, batches, batches, brfx.TrainConfig(epochs=2, **settings), callbacks=[callback], **where)


def test_phases_are_told_in_their_order():
    phases = Phases()
    tiny_run(phases, compile="off")
    assert phases.seen == [("training", 0, 6), ("validating", 0, None), ("training", 3, 6), ("validating", 0, None)]


def test_a_signal_while_the_step_compiles_ends_it_and_the_run_goes_on_afterwards(monkeypatch, tmp_path):
    def slow(*args, **kwargs):  # what a compiler does: it blocks, and then there is a step
        threading.Event().wait(20)

    monkeypatch.setattr("brfx.train.loop.how_to_compile", lambda *args: "whole")
    monkeypatch.setattr("brfx.train.loop.build_step", lambda *args, **kwargs: slow)
    phases = Phases(stop_in="compiling")
    with pytest.raises(Interrupted, match="stopped at epoch 1, batch 0; go on with --resume") as caught:
        tiny_run(phases, compile="on", run_dir=tmp_path)
    assert caught.value.signal == signal.SIGINT
    assert [name for name, _, _ in phases.seen] == ["training", "compiling"]
    monkeypatch.undo()
    assert len(tiny_run(Phases(), compile="off", run_dir=tmp_path, resume=True).history) == 2
