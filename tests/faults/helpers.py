"""What the tests that break things share: starting runs, ending them, and comparing what they left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


class Runs:
    """Training runs of worker.py, one after the other."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        with errors.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=ENVIRONMENT,
            )  # fmt: skip

    def life(
        self,
        run_dir: Path,
        *arguments: object,
        kill_after: float | None = None,
        die: tuple[str, int, str] | None = None,
        file_size: int | None = None,
        fails: bool = False,
    ) -> int:
        """Start or resume a run, or `brfx` with these arguments, and return its exit code.

        Args:
            kill_after: seconds until SIGKILL.
            die: where the process kills itself, see worker.py.
            file_size: no file may grow beyond so many bytes.
            fails: another exit code than 0 and that of SIGKILL is expected.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        os.truncate(self.errors, 0)
        line = {"run_dir": str(run_dir), "arguments": list(map(str, arguments)), "die": die, "file_size": file_size}
        print(json.dumps(line), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it was done before
                os.kill(child, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        assert fails or code in (0, -signal.SIGKILL), self.said()
        return code

    def said(self) -> str:
        """What the last run printed."""
        return self.errors.read_text()


@contextmanager
def runs(folder: Path) -> Iterator[Runs]:
    started = Runs(folder / "errors.txt")
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        for pipe in (started.process.stdin, started.process.stdout):
            assert pipe is not None
            pipe.close()


def brfx(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """The command line, started."""
    command = [sys.executable, "-m", "brfx_cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=ENVIRONMENT
    )


def fingerprint(run_dir: Path) -> dict[str, object]:
    """What two runs must have alike: the hash of every tensor, and the epochs' figures but for their times."""
    found: dict[str, object] = {}
    for name in ("model.pt", "best.pth", "last.pth"):
        state = torch.load(run_dir / name, weights_only=True)["state_dict"]
        found |= {f"{name} {key}": digest(value) for key, value in state.items()}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["images_per_second"]
    if (run_dir / "histograms.jsonl").exists():  # of the command alone
        found["histograms"] = (run_dir / "histograms.jsonl").read_text()
    return found | {"metrics": lines}


def digest(value: Tensor) -> str:
    return hashlib.sha256(repr(value.dtype).encode() + value.cpu().contiguous().numpy().tobytes()).hexdigest()
