"""Training runs to be killed. Each line of JSON on stdin forks a process that trains in a folder, or goes on there:
its number comes out at once, and how it ended when it has. A fork saves importing torch each time."""

import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import brfx
from brfx.data import BatchLoader, Dataset, load_dataset
from brfx.train import Callback, FitResult, fit
from brfx.train.checkpoint import has_checkpoints


def net(num_classes: int = 10) -> nn.Module:
    """Batch norm and dropout, whose state a checkpoint must hold too."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, num_classes),
    )  # fmt: skip


SETTINGS = brfx.TrainConfig(
    epochs=3, warmup_epochs=1, compile="off", ema=0.9, clip_grad=1.0, reestimate_bn=2, checkpoint_minutes=1e-9
)
SHORT = replace(SETTINGS, epochs=2)


def train(
    run_dir: Path, digits: Dataset, settings: brfx.TrainConfig = SETTINGS, callbacks: Iterable[Callback] = ()
) -> FitResult:
    """What `brfx quantize` does from its calibration to its model.pt, from a checkpoint if there is one."""
    run_dir.mkdir(exist_ok=True)
    qmodel = brfx.prepare_qat(net(), brfx.QATConfig(bits=2))
    data = BatchLoader(digits.train, digits.preprocessing, 64, augment=True, flip=False, drop_last=True)
    if not has_checkpoints(run_dir):
        brfx.calibrate(qmodel, [next(iter(data))], start="mse", batch_statistics=True)
    val = BatchLoader(digits.val, digits.preprocessing, 256)
    penalty = brfx.BinPenalty(qmodel, weight=0.1, act=0.01)
    statistics = brfx.WeightStatistics(qmodel, after=settings.warmup_epochs or 0)
    result = fit(
        qmodel, data, val, settings, penalty=penalty, statistics=statistics, run_dir=run_dir, resume=True,
        callbacks=callbacks,
    )  # fmt: skip
    brfx.save(qmodel, run_dir / "model.pt")
    return result


def die(call: str, number: int, when: str) -> None:
    """SIGKILL this process at the ``number``-th ``os.fsync`` or ``os.replace``: ``before`` or ``after`` it, or before
    it with the second half of the file ``torn`` off."""
    original, calls = getattr(os, call), itertools.count(1)

    def call_or_die(*arguments: object) -> None:
        now = next(calls) == number
        if now and when == "torn":
            os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
        if now and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, call_or_die)


def command(arguments: list[str]) -> None:
    """`brfx` with these arguments, until its exit; what it prints goes where errors go."""
    from brfx_cli.main import main

    os.dup2(2, 1)
    sys.argv = ["brfx", *arguments]
    main()
    sys.exit()


def main() -> None:
    torch.set_num_threads(1)
    digits = load_dataset("digits", data_dir=Path("unused"))
    with tempfile.TemporaryDirectory() as folder:  # what is imported and read when first used is so for all forks
        train(Path(folder), digits, SHORT)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            try:
                if asked["die"]:
                    die(*asked["die"])
                if asked["file_size"]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_size"],) * 2)
                if asked["arguments"]:
                    command(asked["arguments"])
                train(Path(asked["run_dir"]), digits)
            except SystemExit as error:
                os._exit(error.code or 0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
