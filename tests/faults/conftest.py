"""Undisturbed runs, to compare others with."""

import time

import pytest
import torch

from .helpers import WORKER, fingerprint, runs
from .worker import SHORT, net, train


@pytest.fixture(scope="session")
def worker(digits, tmp_path_factory):
    with runs(tmp_path_factory.mktemp("worker")) as started:
        yield started


@pytest.fixture(scope="session")
def whole(worker, tmp_path_factory):
    """The fingerprint of a run that nothing disturbed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("runs")
    assert worker.life(folder / "first") == 0
    started = time.monotonic()
    assert worker.life(folder / "whole") == 0
    seconds = time.monotonic() - started
    assert fingerprint(folder / "first") == fingerprint(folder / "whole")
    return fingerprint(folder / "whole"), seconds


@pytest.fixture(scope="session")
def short(digits, tmp_path_factory):
    """The fingerprint of two undisturbed epochs in this process."""
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    train(run_dir, digits, SHORT)
    return fingerprint(run_dir)


@pytest.fixture(scope="session")
def start(digits, tmp_path_factory):
    """Arguments of `brfx quantize` without those of the run folder."""
    ckpt = tmp_path_factory.mktemp("fp32") / "net.pth"
    torch.save(net().state_dict(), ckpt)
    return (
        *("quantize", "--model", f"{WORKER}:net", "--data", "digits", "--ckpt", ckpt, "--compile", "off"),
        *("--qat-epochs", 3, "--warmup-epochs", 1, "--ema", 0.9, "--reestimate-bn", 2, "--clip-grad", 1),
        *("--checkpoint-minutes", 1e-9),
    )


@pytest.fixture(scope="session")
def one_epoch(start):
    often = start.index("--checkpoint-minutes")
    return (*start[:often], *start[often + 2 :], "--qat-epochs", 1, "--warmup-epochs", 0)


@pytest.fixture(scope="session")
def whole_epoch(worker, one_epoch, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "epoch"
    assert worker.life(run_dir, *one_epoch, "--output-dir", run_dir) == 0
    return fingerprint(run_dir)
