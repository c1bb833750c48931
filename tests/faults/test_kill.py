"""Runs that are killed anywhere and go on end with the weights of one that was not."""

import json
import random
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from brfx.train.checkpoint import Checkpoints, read_checkpoint

from .helpers import WORKER, brfx, fingerprint


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_any_moment(worker, whole, tmp_path, count):
    expected, seconds = whole
    draw, kills, number = random.Random(count), 0, 0
    while kills < count:
        number += 1
        run_dir = tmp_path / str(number)
        for _ in range(draw.randint(1, 4)):
            if kills == count or worker.life(run_dir, kill_after=draw.uniform(0, seconds)) == 0:
                break
            kills += 1
        worker.life(run_dir)
        assert fingerprint(run_dir) == expected
        assert not list(run_dir.rglob("*.partial"))
    print(f"{kills} kills in {number} runs of {seconds:.2f} s")


#: The writes of a run, counted from 1: of checkpoints at nearly every batch, and of three files after each epoch.
PLACES = [(call, number, when) for call, when in (("fsync", "torn"), ("fsync", "before"), ("replace", "before"),
          ("replace", "after")) for number in (1, 2, 19, 20, 21, 22, 40, 63)]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "number", "when"),
    [pytest.param(*place, marks=[] if place[1] in (2, 21) else pytest.mark.slow) for place in PLACES],
)
def test_killed_inside_a_write_or_a_rename(worker, whole, tmp_path, call, number, when):
    run_dir = tmp_path / "run"
    assert worker.life(run_dir, die=(call, number, when)) == -signal.SIGKILL
    assert worker.life(run_dir) == 0
    assert fingerprint(run_dir) == whole[0]
    assert not list(run_dir.rglob("*.partial"))


def test_what_a_kill_inside_a_write_left_is_cleared_away(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.write(1, {"batch": 1})
    (tmp_path / "checkpoints" / "000000002.ckpt.partial").write_bytes(b"half")
    checkpoints.write(3, {"batch": 3})
    assert [path.name for path in checkpoints.paths()] == ["000000003.ckpt", "000000001.ckpt"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# The command line.


@pytest.fixture(scope="module")
def whole_command(start, tmp_path_factory):
    """The fingerprint of an undisturbed `brfx quantize`, and the seconds it took."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    started = time.monotonic()
    finish(brfx(*start, "--output-dir", run_dir))
    return fingerprint(run_dir), time.monotonic() - started


def finish(process):
    """Wait for a command that must succeed."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    return output


def begun_or_resumed(start, run_dir):
    """The command that a person gives after a crash: where there is no run yet, the same once more."""
    if (run_dir / "config.json").exists():
        return brfx("quantize", "--model", f"{WORKER}:net", "--resume", run_dir)
    return brfx(*start, "--output-dir", run_dir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [10])
def test_the_command_killed_at_any_moment(start, whole_command, tmp_path, count):
    expected, seconds = whole_command
    draw, kills, number = random.Random(count), 0, 0
    while kills < count:
        number += 1
        run_dir = tmp_path / str(number)
        complete = False
        for _ in range(draw.randint(1, 3)):
            process = begun_or_resumed(start, run_dir)
            time.sleep(draw.uniform(0, seconds))
            process.kill()
            _, errors = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), errors
            kills += process.returncode != 0
            complete = (run_dir / "result.json").exists()  # or killed between that and its end
            if complete or kills == count:
                break
        if not complete:
            finish(begun_or_resumed(start, run_dir))
        assert fingerprint(run_dir) == expected
    print(f"{kills} kills in {number} runs of {seconds:.2f} s")


#: What `brfx quantize` of one epoch puts in its place, in this order, and is killed before.
RENAMES = ("config.json", "network.json", "histograms.jsonl", "histograms.jsonl", "metrics.jsonl", "last.pth",
           "best.pth", "000000020.ckpt", "model.pt", "model.pt", "model.onnx", "result.json")  # fmt: skip


@pytest.mark.parametrize(
    ("number", "name"),
    [
        pytest.param(number, name, marks=[] if name == "config.json" else pytest.mark.slow)
        for number, name in enumerate(RENAMES, start=1)
    ],
)
def test_the_command_killed_before_each_rename(worker, one_epoch, whole_epoch, tmp_path, number, name):
    run_dir = tmp_path / "run"
    started = (*one_epoch, "--output-dir", run_dir)
    assert worker.life(run_dir, *started, die=("replace", number, "before")) == -signal.SIGKILL
    assert [path.name for path in run_dir.rglob("*.partial")] == [f"{name}.partial"]
    again = ("quantize", "--model", f"{WORKER}:net", "--resume", run_dir)
    assert worker.life(run_dir, *(started if name == "config.json" else again)) == 0
    assert fingerprint(run_dir) == whole_epoch
    assert not list(run_dir.rglob("*.partial"))
    left = {path.name for path in run_dir.rglob("*") if path.is_file()}
    report = {"report.html"} if find_spec("matplotlib") else set()
    assert left == set(RENAMES) - {"000000020.ckpt"} | report  # a complete run needs no checkpoint


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_stops_at_the_batch_with_a_checkpoint(start, whole_command, tmp_path, number, code):
    run_dir = tmp_path / "run"
    process = brfx(*start, "--output-dir", run_dir)
    while not len(list(run_dir.glob("checkpoints/*.ckpt"))) >= 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    epoch, batch = stopped_at(errors, run_dir)
    newest = max(run_dir.glob("checkpoints/*.ckpt"))
    state = read_checkpoint(newest)
    assert (state["epoch"], state["batch"]) == (epoch, batch)
    assert newest.stem == f"{(epoch - 1) * state['batches'] + batch:09}"
    finish(begun_or_resumed(start, run_dir))
    assert fingerprint(run_dir) == whole_command[0]
    assert json.loads((run_dir / "result.json").read_text())["epoch"]


def stopped_at(errors: str, run_dir: Path) -> tuple[int, int]:
    """The epoch and batch of the one line of an interrupted run."""
    found = re.fullmatch(
        rf"stopped at epoch (\d+), batch (\d+); go on with --resume {re.escape(str(run_dir))}\n", errors
    )
    assert found, errors
    return int(found[1]), int(found[2])
