"""Export torchvision's models to ONNX, and write the table of docs/export.md.

    python benchmarks/export_table.py --results PATH [--page docs/export.md] [--jobs N] [NAME ...]

Each model runs in a process of its own, small ones first, and leaves a line in the file of results as it ends; a model
that has one is not run again. The table of all lines replaces what stands between the two marker lines of the page.
``--jobs 0`` runs no model.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of this folder, whose coverage.py would hide the package of that name

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import brfx  # noqa: E402
from benchmarks.coverage import _Bound, calibrate, read_lines  # noqa: E402
from benchmarks.model_inputs import (  # noqa: E402
    build_without_weights,
    example_inputs,
    is_detection,
    model_names,
    outputs,
    settle,
)
from brfx.export import OnnxReport, export_onnx  # noqa: E402
from brfx.nn import LSQActivationQuantizer  # noqa: E402
from brfx.train import reestimate_batch_norm  # noqa: E402

BEGIN, END = "<!-- export: begin -->", "<!-- export: end -->"
TIMEOUT = 400
SMALL = 1e-3  # a difference to the reference, relative to the largest output


class Network(nn.Module):
    """The layers of a detection model: images as one tensor ``(N, 3, H, W)`` to what its head, or that of its region
    proposals, says of every anchor. Resizing the images and choosing boxes, which no exporter takes, are left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.meta = model, model.meta

    def forward(self, images: Tensor) -> Any:
        features = self.model.backbone(images)
        head = self.model.rpn.head if hasattr(self.model, "rpn") else self.model.head
        return head(list(features.values()) if isinstance(features, dict) else [features])


def parameters(name: str) -> int:
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def check_model(name: str) -> dict[str, Any]:
    """Export one model; a row of results.

    Keys: model, revision (of git), parameter_bytes, outcome (exact, close, differs, not run: ONNX Runtime did not take
    the file, failed), stage, reason, brfx_error, traceback (of what failed), integer_layers, float_layers (reason ->
    count), flipped, codes, bytes, reference_difference, output_size, max_difference, same_top1, one_ulp
    (:func:`_moved_by_one_ulp`, of what differs), whole (why a detection model was exported as :class:`Network`),
    export_seconds, seconds, memory_gb.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name, "revision": _revision()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            _export(name, path, row)
        except Exception as error:  # told in the row
            row.update(outcome="not run" if path.is_file() else "failed", **_told(error))
            if path.is_file():
                row["bytes"] = path.stat().st_size
    row.update(
        seconds=time.perf_counter() - start, memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    return row


def _revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _export(name: str, path: Path, row: dict[str, Any]) -> None:
    _stage(row, "build")
    torch.manual_seed(0)
    model = build_without_weights(name)
    inputs, training = example_inputs(name, 2), example_inputs(name, 2, train=True)
    row["parameter_bytes"] = 4 * sum(parameter.numel() for parameter in model.parameters())
    settle(model, training)
    _stage(row, "prepare")
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=2)).eval()
    del model
    _stage(row, "calibrate")
    calibrate(name, qmodel, inputs, training)
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in qmodel.modules())
    if norms and not is_detection(name):
        with torch.no_grad():
            reestimate_batch_norm(_Bound(qmodel, inputs), [torch.zeros(())])
    qmodel.eval()
    brfx.snap_biases(qmodel)
    _stage(row, "export")
    start = time.perf_counter()
    try:
        report = export_onnx(qmodel, path, inputs, profile="compact")
    except Exception as error:
        if not is_detection(name):
            raise
        row["whole"] = str(_told(error)["reason"])
        images, _ = qmodel.transform(inputs[0])
        qmodel, inputs = Network(qmodel).eval(), (images.tensors,)
        report = export_onnx(qmodel, path, inputs, profile="compact")
    row["export_seconds"] = time.perf_counter() - start
    with torch.no_grad():
        row["output_size"] = max(float(x.abs().max()) for x in outputs(qmodel(*inputs)) if x.numel())
    row.update(_summary(report, row["output_size"]))
    if row["outcome"] == "differs":
        row["one_ulp"] = _moved_by_one_ulp(qmodel, inputs)


@torch.no_grad()
def _moved_by_one_ulp(qmodel: nn.Module, inputs: tuple[Any, ...]) -> float:
    """How far the model's own outputs move if every step of an activation moves by one unit in the last place."""
    before = outputs(qmodel(*inputs))
    for module in qmodel.modules():
        if isinstance(module, LSQActivationQuantizer):
            module.step.copy_(torch.nextafter(module.step, torch.tensor(math.inf)))
    return max(float((x - y).abs().max()) for x, y in zip(outputs(qmodel(*inputs)), before, strict=True) if x.numel())


def _stage(row: dict[str, Any], stage: str) -> None:
    row["stage"] = stage
    print(json.dumps(row), flush=True)  # what a process that is stopped leaves


def _summary(report: OnnxReport, output_size: float) -> dict[str, Any]:
    difference = report.reference_difference
    if difference is None:
        outcome = "not run"
    elif difference == 0.0:
        outcome = "exact"
    else:
        outcome = "close" if difference <= SMALL * output_size else "differs"
    flipped, codes = report.flipped
    return {
        "outcome": outcome,
        "integer_layers": report.integer_layers,
        "float_layers": dict(Counter((report.float_layers or {}).values()).most_common()),
        "flipped": flipped,
        "codes": codes,
        "bytes": report.bytes,
        "reference_difference": difference,
        "max_difference": report.max_difference,
        "same_top1": report.same_top1,
    }


def _told(error: BaseException) -> dict[str, str]:
    """What was raised, and what raised it first."""
    text = "".join(traceback.format_exception(error))
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    return {
        "reason": f"{type(first).__name__}: {_line(str(first))}",
        "brfx_error": f"{type(error).__name__}: {_line(str(error))}",
        "traceback": text[-6000:],
    }


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def in_process(name: str) -> dict[str, Any]:
    """``check_model`` in a process of its own: so is its memory, and what ends it does not end this one."""
    command = [sys.executable, __file__, "--one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as stopped:
        printed, errors, reason = stopped.stdout or b"", stopped.stderr or b"", f"stopped after {TIMEOUT} s"
    else:
        printed, errors, reason = done.stdout, done.stderr, f"exit status {done.returncode}"
        if not done.returncode:
            return _last(printed, name)
    row = {**_last(printed, name), "outcome": "failed", "reason": reason, "traceback": errors.decode()[-6000:]}
    return {**row, "seconds": time.perf_counter() - start}


def _last(printed: bytes, name: str) -> dict[str, Any]:
    lines = [line for line in printed.decode().splitlines() if line.startswith('{"model"')]
    return json.loads(lines[-1]) if lines else {"model": name, "stage": "start"}  # type: ignore[no-any-return]


def table(rows: list[dict[str, Any]], total: int) -> str:
    """The page's summary and table."""
    count = Counter(row["outcome"] for row in rows)
    revisions = ", ".join(sorted({row["revision"] for row in rows if row.get("revision")}))
    parts = sum(row["outcome"] in ("exact", "close") and "whole" in row for row in rows)
    summary = (
        f"Of {total} models, {count['exact'] + count['close']} are exported and verified ({count['exact']} of them bit "
        f"for bit; {parts} are detection models without the choice of boxes), "
        f"{count['differs'] + count['not run']} exported and not verified, {count['failed']} failed, and "
        f"{total - len(rows)} are not measured. Revision: {revisions}."
    )
    titles = ["model", "outcome", "integer / float layers", "float because", "codes flipped", "file", "FP32", "seconds"]
    lines = [summary, "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join([row["model"], _outcome(row), *_figures(row)]) + " |" for row in rows]
    return "\n".join(lines)


def _outcome(row: dict[str, Any]) -> str:
    part = "; without the choice of boxes" if "whole" in row else ""
    if row["outcome"] == "exact":
        return f"verified bit for bit{part}"
    if row["outcome"] in ("close", "differs"):
        difference, size = row["reference_difference"], row["output_size"]
        share = difference / size if size else math.inf
        word = "verified, difference" if row["outcome"] == "close" else "not verified: difference"
        if "one_ulp" in row:
            part += f"; PyTorch's own outputs move by {row['one_ulp']:.1e} where every step moves by one ulp"
        return f"{word} {difference:.1e} ({share:.0e} of the largest output){part}"
    reason = row.get("reason", "ONNX Runtime is not installed")[:120]
    reason = reason.replace("|", "\\|")
    return f"{'not verified' if row['outcome'] == 'not run' else 'failed, ' + row['stage']}: {reason}"


def _figures(row: dict[str, Any]) -> list[str]:
    reasons: dict[str, int] = row.get("float_layers", {})
    layers = f"{row['integer_layers']} / {sum(reasons.values())}" if "integer_layers" in row else ""
    most = next((f"{reason} ({count})" for reason, count in reasons.items()), "")
    flipped = f"{row['flipped'] / row['codes']:.4%}" if row.get("codes") else ""
    sizes = [f"{row[key] / 1e6:.2f} MB" if key in row else "" for key in ("bytes", "parameter_bytes")]
    return [layers, most, flipped, *sizes, f"{row['seconds']:.0f}"]


def write_page(page: Path, rows: list[dict[str, Any]], total: int) -> None:
    text = page.read_text() if page.is_file() else f"# Export\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(rows, total)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all 109")
    parser.add_argument("--results", type=Path, help="file of JSON lines")
    parser.add_argument("--page", type=Path, help="markdown file with the two marker lines")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--one", metavar="NAME", help="export this model here and print its row")
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        faulthandler.dump_traceback_later(TIMEOUT - 5)
        print(json.dumps(check_model(options.one)))
        return
    if options.results is None:
        parser.error("--results is needed")
    names = model_names()
    done = read_lines(options.results)
    left = sorted((name for name in options.names or names if name not in done), key=parameters)
    if options.jobs:
        with ThreadPoolExecutor(options.jobs) as pool, options.results.open("a") as file:
            for future in as_completed([pool.submit(in_process, name) for name in left]):
                row = future.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                reason = row.get("reason", "")
                print(f"{row['model']}: {row['outcome']}, {row['seconds']:.0f} s {reason}", flush=True)
    if options.page:
        rows = read_lines(options.results)
        write_page(options.page, [rows[name] for name in names if name in rows], len(names))


if __name__ == "__main__":
    main()
