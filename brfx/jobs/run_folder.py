"""The folder of a run: where it is, what is written into it, what came of the run."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from brfx.analysis.audit import audit
from brfx.analysis.network import network
from brfx.config import JobConfig, code_file
from brfx.data import Dataset
from brfx.distributed import broadcast_object, rank
from brfx.errors import BrfxError, ConfigError, Interrupted, TrainingError, first_line
from brfx.export import OnnxReport, export_onnx
from brfx.io.atomic import write_text_atomically
from brfx.io.model_file import save
from brfx.jobs.machine import machine
from brfx.train import Callback, Evaluation, FitResult, Score, TensorBoard
from brfx.train.checkpoint import FOLDER, Checkpoints, written_into

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """What a run came to. ``test`` and ``test_float`` are on the test images, looked at once, at the end."""

    run_dir: Path
    fit: FitResult | None
    test: Evaluation | Score
    test_float: Evaluation | Score | None = None
    kind: str = "FP32"  #: ``"W2A2"``, say; see :func:`brfx.jobs.bits.kind_of`
    onnx: OnnxReport | None = None
    onnx_problem: str | None = None
    float_bytes: int = 0  #: of the FP32 network's parameters


@contextmanager
def resumable(run_dir: Path) -> Iterator[None]:
    """Around the work of a run whose folder there is: Ctrl-C then says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGINT, f"stopped; go on with --resume {run_dir}") from error


def write_network(model: nn.Module, qmodel: nn.Module, run_dir: Path, example: Any) -> None:
    """Write ``network.json``, the graph with its bits, which the report draws; none where the audit fails. ``model`` is
    in FP32."""
    if rank() > 0 or (run_dir / "network.json").exists():
        return
    try:
        found = audit(qmodel, example)
        content = {
            "footer": found.footer,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "exceptions": found.exceptions,
            "places": [asdict(place) for place in network(qmodel, found)],
        }
    except Exception as error:  # a picture is no reason to lose a run
        log.warning("no network.json: %s", first_line(error))
        return
    with written_into(run_dir):
        write_text_atomically(run_dir / "network.json", json.dumps(content) + "\n")


def write_model(qmodel: nn.Module, run_dir: Path) -> None:
    """Write ``model.pt``; rank 0 alone."""
    if rank() == 0:
        with written_into(run_dir):
            save(qmodel, run_dir / "model.pt")


def write_onnx(qmodel: nn.Module, run_dir: Path, example: Tensor) -> tuple[OnnxReport | None, str | None]:
    """Write ``model.onnx``; the report, or why there is no such file, whatever went wrong."""
    try:
        return export_onnx(qmodel, run_dir / "model.onnx", example), None
    except Exception as error:
        if isinstance(error.__cause__, OSError):  # a full disk says nothing of the model
            raise TrainingError(f"{error}; free some space, then go on with --resume {run_dir}") from error
        return None, str(error) if isinstance(error, BrfxError) else f"{type(error).__name__}: {first_line(error)}"


def with_tensorboard(job: JobConfig, run_dir: Path, callbacks: tuple[Callback, ...]) -> tuple[Callback, ...]:
    if not job.tensorboard or rank() > 0:
        return callbacks
    return (*callbacks, TensorBoard(run_dir / "tensorboard"))


def folder_for(job: JobConfig, resume: bool, kind: str = "") -> Path:
    """The folder of this run, the same on all ranks. Nothing is written yet.

    Args:
        job: the settings.
        resume: whether the folder holds the run already.
        kind: ``"W2A2"``, say, for the name of a folder that the user did not name.

    Raises:
        ConfigError: a new run's folder holds something already; one to resume is not there, or complete.
    """
    return broadcast_object(_resumed_run_dir(job) if resume else _free_run_dir(job, kind))


def _resumed_run_dir(job: JobConfig) -> Path:
    run_dir = job.output_dir
    if run_dir is None or not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run to resume")
    if (run_dir / "result.json").exists():
        raise ConfigError(f"{run_dir}: this run is complete, there is nothing to resume")
    return run_dir


def _free_run_dir(job: JobConfig, kind: str) -> Path:
    """The folder named, or a free name under ``runs/``."""
    run_dir = job.output_dir
    if run_dir is None:
        code = code_file(job.model)
        name = f"runs/{job.model if code is None else Path(code[0]).stem}-{kind.lower()}"
        return next(path for i in count(1) if not (path := Path(name if i == 1 else f"{name}-{i}")).exists())
    begun = {"config.json.partial"}  # all that a run leaves that is killed while it is opened
    if rank() == 0 and run_dir.exists() and (not run_dir.is_dir() or {p.name for p in run_dir.iterdir()} - begun):
        raise ConfigError(
            f"{run_dir} is not empty: choose another --output-dir, or move it away; nothing was changed "
            "(an unfinished run goes on with --resume)"
        )
    return run_dir


def open_run(job: JobConfig, run_dir: Path, resume: bool, kind: str) -> None:
    """Make the run folder and write ``config.json``; of a run that is resumed the first one stays. ``kind`` is
    ``"W2A2"``, say."""
    if rank() > 0 or resume:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = asdict(job) | {
        "kind": kind,
        "versions": {name: version(name) for name in ("brfx", "torch", "torchvision")},
        "python": sys.version.split()[0],
        "command_line": sys.argv,
        "machine": machine(job.train.device),
    }
    write_text_atomically(run_dir / "config.json", json.dumps(settings, indent=2, default=str) + "\n")


def about_run(job: JobConfig, dataset: Dataset) -> dict[str, Any]:
    """What a run writes beside its weights, for :func:`brfx.io.float_checkpoint.read_about`."""
    seen = dataset.preprocessing and dataset.preprocessing.as_dict()
    return {"brfx": version("brfx"), "model": job.model, "preprocessing": seen, "classes": list(dataset.classes)}


def close_run(result: JobResult) -> JobResult:
    """Write ``result.json``: accuracies on the test images, the epoch that they are of, and what each file weighs.

    The run is then complete, and its checkpoints go.
    """
    if rank() > 0:
        return result
    run_dir = result.run_dir
    files = [path for path in sorted(run_dir.iterdir()) if path.is_file()]
    content = {
        "test": result.test.as_dict(),
        "test_float": result.test_float and result.test_float.as_dict(),
        "epoch": result.fit and result.fit.epoch,
        "stage": result.fit and result.fit.stage,
        f"val_{result.test.metric}": result.fit and result.fit.val_metric,
        "compiled": result.fit and result.fit.compiled,
        "skipped_batches": result.fit and result.fit.skipped,
        "teacher_sha256": result.fit and result.fit.teacher_sha256,
        "onnx": result.onnx and asdict(result.onnx),
        "bytes": {path.name: path.stat().st_size for path in files},
    }
    with written_into(run_dir):
        write_text_atomically(run_dir / "result.json", json.dumps(content, indent=2, default=str) + "\n")
    Checkpoints(run_dir / FOLDER, keep=1).remove()
    return result
