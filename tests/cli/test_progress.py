"""What a bar and a line say, by a clock that the test turns."""

import io
import time

import pytest
from brfx_cli import progress as shown
from brfx_cli.progress import Status, figures
from brfx_cli.render import duration
from rich.console import Console

from brfx.train import EpochMetrics, Means, Phase, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def at(epoch, batch, **terms):
    return Progress(epoch, 3, batch, 100, "penalty" if terms else "warm-up", 0.1, Means(0.123456, 0.98765, terms))


def test_durations_are_short():
    seconds = (0, 38, 99, 125, 5 * 3600, 3725 * 60, 100 * 3600)
    assert [duration(each) for each in seconds] == [
        *("0 s", "38 s", "99 s", "2 min", "5 h 00 min", "2 d 14 h", "4 d 4 h")
    ]


def test_figures_have_three_digits_and_as_many_as_there_is_room_for():
    where = at(1, 10, weight=0.176919, act=19.234242)
    assert figures(where, 60) == "loss 0.123  acc 98.8 %  BR_W 0.177  BR_A 19.2"
    assert figures(where, 40) == "loss 0.123  acc 98.8 %  BR_W 0.177"
    assert figures(where, 3) == "loss 0.123"
    assert figures(Progress(1, 1, 1, 1, "plain", 0.1, Means(2.0, None)), 60) == "loss 2.00"
    assert figures(Progress(1, 1, 1, 1, "plain", 0.1, Means(0.1, 1.0)), 60) == "loss 0.100  acc 100 %"


def test_a_phase_is_named_with_its_share_and_its_time():
    clock = Clock()
    status = Status(clock)
    status.on_phase(Phase("calibrating"))
    clock.now += 12
    assert status.line() == "calibrating, 12 s"
    status.on_phase(Phase("compiling", note="usually 30 to 110 s"))
    assert status.line() == "compiling (usually 30 to 110 s), 0 s"
    status.on_phase(Phase("validating", 0, 40))
    clock.now += 10
    status.on_phase(Phase("validating", 10, 40))
    assert status.line() == "validating, 25 %, 30 s left"


def test_the_time_left_counts_from_the_first_batch_and_over_all_that_goes_on_in_between():
    clock = Clock()
    status = Status(clock)
    status.on_phase(Phase("compiling"))
    clock.now += 1000  # which are no measure of what follows
    status.on_phase(Phase("training", 0, 300))
    assert status.left is None
    status.on_batch(at(1, 10))
    assert (status.name, status.left) == ("epoch 1/3 [LSQ]", None)
    clock.now += 90
    status.on_batch(at(1, 100, weight=0.5))
    assert status.left == pytest.approx(200) and status.line() == "epoch 1/3 [BR], 33 %, 3 min left, " + figures(
        at(1, 100, weight=0.5), 60
    )
    clock.now += 50
    assert status.left == pytest.approx(150)  # it counts down until there is more to go by
    status.on_phase(Phase("validating"))
    clock.now += 40
    status.on_phase(Phase("training", 100, 300))
    assert status.left == pytest.approx(400)


def test_a_resumed_run_counts_its_own_batches_alone():
    clock = Clock()
    status = Status(clock)
    status.on_batch(at(3, 10))
    clock.now += 10
    status.on_batch(at(3, 20))
    assert status.left == pytest.approx(80)


def test_a_pipe_gets_a_line_now_and_then_and_one_an_epoch(monkeypatch):
    monkeypatch.setattr(shown, "LINE_EVERY", 0.05)
    console = Console(file=io.StringIO(), width=240)
    with shown.progress(console) as callback:
        callback.on_phase(Phase("compiling"))
        for _ in range(200):
            time.sleep(0.02)
            if console.file.getvalue().count("compiling") > 1:
                break
        callback.on_batch(at(1, 1))
        callback.on_epoch(EpochMetrics(1, "warm-up", 0.1, Means(1.0, 0.5), None, None, 1.0, 64.0))
    lines = console.file.getvalue().splitlines()
    assert (
        all(line.startswith(("compiling, ", "epoch  ", "1/3 [LSQ]", "epoch 1/3")) for line in lines) and len(lines) > 2
    )
    time.sleep(0.2)
    assert console.file.getvalue().splitlines() == lines


def test_the_names_of_columns_stand_above_the_first_epoch_and_where_they_change():
    console = Console(file=io.StringIO(), width=240)
    with shown.progress(console) as callback:
        for epoch, terms in ((1, {}), (2, {}), (3, {"weight": 0.5})):
            callback.on_batch(at(epoch, 1, **terms))
            stage = "penalty" if terms else "warm-up"
            callback.on_epoch(EpochMetrics(epoch, stage, 0.1, Means(1.0, 0.5, terms), None, None, 1.0, 64.0))
    first = [line.split()[0] for line in console.file.getvalue().splitlines()]
    assert first == ["epoch", "1/3", "2/3", "epoch", "3/3"]


def test_a_bar_fits_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with shown.progress(console) as callback:
        for event in (Phase("reading data"), Phase("compiling", note="usually 90 to 220 s"), Phase("validating", 3, 9)):
            callback.on_phase(event)
            callback.bar.refresh()
        callback.on_batch(at(2, 50, weight=0.176919, act=19.234242))
        callback.bar.refresh()
    text = console.file.getvalue()
    lines = [line for part in text.split("\n") for line in part.split("\r")]
    bars = [line.replace("\x1b[2K", "").rstrip() for line in lines]
    assert any("compiling (usually 90 to 220 s)" in line for line in bars)
    (last,) = {line for line in bars if "loss 0.123  acc 98.8 %" in line and line.startswith("epoch 2/3 [BR]")}
    assert len(last) <= 80 and "None" not in text and "\u2026" not in text
