"""The end of a run: what it came to, its files, and what to do with them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from brfx.config import DATA_DIR, JobConfig, code_file

from .render import console, duration, evaluation, exported, size, stage_mark

if TYPE_CHECKING:
    from brfx.jobs.run_folder import JobResult


def show(result: JobResult, job: JobConfig) -> None:
    """Print all of it."""
    if result.fit is not None:
        how = {"whole": "compiled", "kernels": "compiled kernels", "none": "eager"}[result.fit.compiled]
        kept, epochs = result.fit, len(result.fit.history)
        on_validation = "no validation" if kept.val_metric is None else f"{kept.val_metric:.2%} on validation"
        console.print(
            f"Shipped: epoch {kept.epoch} of {epochs}{stage_mark(kept.stage)}, {on_validation} ({how} training)",
            markup=False,
        )
    if result.test_float is not None:
        console.print(f"Test: FP32 {evaluation(result.test_float)}")
    console.print(f"Test: {result.kind} {evaluation(result.test)}")
    if result.onnx_problem:
        console.print(f"No model.onnx: {result.onnx_problem}", style="yellow", markup=False)
    if result.onnx is not None:
        exported(result.onnx)
    console.print("Files:")
    for path in sorted(path for path in result.run_dir.iterdir() if path.is_file()):
        console.print(f"  {path}  {size(path.stat().st_size)}", markup=False)
    console.print(came_to(result), markup=False, style="bold")
    console.print("Next:")
    for command in next_commands(result, job):
        console.print(f"  {command}", markup=False)


def came_to(result: JobResult) -> str:
    """The result in a line: ``FP32 98.89 % -> W2A2 99.44 %; 1.08 MB -> 86.2 kB, 12.5 times smaller; 25 s``."""
    metric = "" if result.test.metric == "accuracy" else f" {result.test.metric}"
    parts = [f"{result.kind} {100 * result.test.value:.2f} %{metric}"]
    if result.test_float is not None:
        parts[0] = f"FP32 {100 * result.test_float.value:.2f} % -> {parts[0]}"
    if result.onnx is not None and result.float_bytes:
        factor = result.float_bytes / result.onnx.bytes
        parts.append(f"{size(result.float_bytes)} -> {size(result.onnx.bytes)}, {factor:.3g} times smaller")
    trained = 0.0 if result.fit is None else sum(metrics.seconds for metrics in result.fit.history)
    parts.append(f"trained in {duration(trained)}" if trained else "nothing trained")
    return f"Result: {'; '.join(parts)}"


def next_commands(result: JobResult, job: JobConfig) -> list[str]:
    """Three commands to go on with, as they can be copied."""
    own = ["--model", job.model] if code_file(job.model) else []
    data = [] if job.data is None else ["--data", job.data]
    data += [] if job.data_dir == DATA_DIR.expanduser() else ["--data-dir", str(job.data_dir)]
    if job.command == "train":
        best = result.run_dir / "best.pth"
        ckpt = best if job.train.keep == "best" and best.is_file() else result.run_dir / "last.pth"
        model = ["--model", job.model, *_given(job, "cifar_stem")]
        same = [*model, "--ckpt", str(ckpt), *data, *_given(job, "task", "image_size", "mean", "std")]
        commands = [["inspect", *model, "--bits", "2"], ["quantize", *same, "--bits", "2", "--dry-run"]]
        return [shlex.join(["brfx", *command]) for command in (*commands, ["quantize", *same, "--bits", "2"])]
    pt, onnx = result.run_dir / "model.pt", result.run_dir / "model.onnx"
    evaluate = ["evaluate", "--ckpt", str(pt), *own, *data, *_given(job, "task")]
    if result.onnx is None:
        commands = [evaluate, ["inspect", "--ckpt", str(pt), *own]]
    else:
        compared = data if result.test.metric == "accuracy" else []
        commands = [["verify", str(pt), str(onnx), *own, *compared], ["benchmark", str(pt), str(onnx), *own]]
    packed = ["export", "--ckpt", str(pt), *own, "--output", str(result.run_dir / "model.safetensors")]
    return [shlex.join(["brfx", *command]) for command in (*commands, packed)]


def _given(job: JobConfig, *names: str) -> list[str]:
    """The flags of settings that are not the defaults."""
    found: list[str] = []
    for name in names:
        value, flag = getattr(job, name), f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
        elif value not in (None, False):
            found += [flag, ",".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)]
    return found
