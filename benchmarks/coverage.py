"""Check brfx on torchvision's models, and write the table of docs/coverage.md.

    python benchmarks/coverage.py [NAME ...] [--page docs/coverage.md] [--again]

Each model runs in a process of its own, one after the other, and leaves a line in ``runs/coverage.jsonl``; a model that
has one is not run again. The table of all lines replaces what stands between the two marker lines of the page.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of this folder, whose coverage.py would hide the package of that name

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.fx import GraphModule, symbolic_trace  # noqa: E402

import brfx  # noqa: E402
from benchmarks.dispatch_count import DistinctValues  # noqa: E402
from benchmarks.model_inputs import (  # noqa: E402
    build_without_weights,
    example_inputs,
    is_detection,
    model_names,
    outputs,
    settle,
)
from brfx.analysis.sqnr import sqnr as decibels  # noqa: E402
from brfx.calibration import quantizers  # noqa: E402
from brfx.graph.trace import trace_islands  # noqa: E402

BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
LINES = Path("runs/coverage.jsonl")
TIMEOUT = 600

Inputs = tuple[Any, ...]


class _Bound(nn.Module):
    """A model with its inputs, for callers that pass exactly one."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, _: Tensor) -> Any:
        return self.model(*self.inputs)


def calibrate_on(qmodel: nn.Module, inputs: Inputs, **options: Any) -> None:
    """``brfx.calibrate`` on one batch for models with any number and kind of inputs."""
    brfx.calibrate(_Bound(qmodel, inputs), [torch.zeros(())], **options)


def calibrate(name: str, qmodel: nn.Module, inputs: Inputs, training: Inputs) -> None:
    """On the example; a detector as in training, where it has boxes to look at even if it finds none."""
    if is_detection(name):
        brfx.calibrate(qmodel, [training], forward=_as_in_training)
    else:
        calibrate_on(qmodel, inputs)


def _as_in_training(qmodel: nn.Module, inputs: Inputs) -> Any:
    for module in qmodel.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    return qmodel(*inputs)


def islands(qmodel: nn.Module) -> int:
    """How many graphs the model has instead of one; 0: it is one graph."""
    if isinstance(qmodel, GraphModule):
        return 0
    return sum(1 if isinstance(child, GraphModule) else islands(child) for child in qmodel.children())


def preparation(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, float]:
    """The quantized model, and the time for it in units of one plain trace and one forward pass."""
    brfx.prepare_qat(nn.Sequential(nn.Linear(1, 1)))  # what is imported or set up once is nobody's time
    torch_seconds, _ = _timed(lambda: (_plain_trace(model), _run(model, inputs)))
    seconds, qmodel = _timed(lambda: brfx.prepare_qat(model, brfx.QATConfig(bits=2)))
    return qmodel.eval(), seconds / torch_seconds


def _plain_trace(model: nn.Module) -> None:
    try:
        symbolic_trace(model)
    except Exception:  # whatever a model's forward raises when fed with proxies
        trace_islands(model)


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def difference(model: nn.Module, qmodel: nn.Module, inputs: Inputs, *, train: bool = False) -> float:
    """Largest difference of the outputs with quantization off, both run from one seed; 0.0: they are equal."""
    results = []
    for module, context in ((model, nullcontext()), (qmodel, brfx.quantization_disabled(qmodel))):
        torch.manual_seed(0)
        results.append(_run(module.train(train), inputs, context))
        module.eval()
    return _largest_difference(*results)


def _run(module: nn.Module, inputs: Inputs, context: AbstractContextManager[Any] | None = None) -> list[Tensor]:
    with context or nullcontext(), torch.no_grad():
        return outputs(module(*inputs))


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    return max(
        (
            0.0 if torch.equal(x, y) else float((x.double() - y.double()).abs().max().nan_to_num(math.inf))
            for x, y in zip(a, b, strict=True)
        ),
        default=0.0,
    )


def mac_shares(qmodel: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the values beneath the modules say, without brfx's own account."""
    with DistinctValues() as seen:
        _run(qmodel, inputs)
    return {"share_values": seen.share, "macs_values": seen.macs, "misses": seen.misses()[:20]}


def audit(qmodel: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """brfx's own account."""
    report = brfx.audit(qmodel, *inputs)  # type: ignore[attr-defined]
    return {
        "share_audit": report.mac_share,
        "macs_audit": report.macs,
        "exceptions": [str(exception) for exception in report.exceptions],
        "never_hit": list(report.never_hit),
    }


def sqnr(model: nn.Module, inputs: Inputs) -> float | None:
    """Signal to quantization noise of W8A8 in dB, of the worst float output; of detectors what the heads give.

    Steps are those of least squared error; RAFT's are LSQ's: a search at each of 12 flow updates takes minutes.
    """
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=8)).eval()
    calibrate_on(qmodel, inputs, start="lsq" if isinstance(model, torchvision.models.optical_flow.RAFT) else "mse")
    pairs = zip(_signals(model, inputs), _signals(qmodel, inputs), strict=True)
    ratios = [
        decibels(reference, quantized)
        for reference, quantized in pairs
        if reference.is_floating_point() and reference.shape == quantized.shape and reference.any()
    ]
    return min(ratios, default=None)


def _signals(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    modules = dict(model.named_modules())
    head = modules.get("rpn.head", modules.get("head") if "transform" in modules else None)
    if head is None:
        return _run(model, inputs)
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.extend(outputs(output)))
    try:
        _run(model, inputs)
    finally:
        handle.remove()
    return seen


def gradients(model: nn.Module, qmodel: nn.Module, inputs: Inputs) -> list[str]:
    """Parameters that have a gradient in FP32, and at 2 bits none or one that is not finite."""
    wanted = _gradients(model, inputs)
    finite = _gradients(qmodel, inputs)
    return sorted(name for name in wanted if not finite.get(name, False))


def _gradients(model: nn.Module, inputs: Inputs) -> dict[str, bool]:
    """Parameter -> whether its gradient is finite, for those that have one."""
    torch.manual_seed(0)
    try:
        results = outputs(model.train()(*inputs))
        sum(x.square().mean() for x in results if x.requires_grad).backward()  # type: ignore[union-attr]
        found = {
            name: bool(parameter.grad.isfinite().all())
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    finally:
        model.eval().zero_grad(set_to_none=True)
    return found


def reload(model: nn.Module, qmodel: nn.Module, inputs: Inputs) -> bool:
    """Whether a saved and loaded model gives the same outputs."""
    before = _run(qmodel, inputs)
    with tempfile.TemporaryDirectory() as folder:
        brfx.save(qmodel, Path(folder) / "model.pt")
        loaded = brfx.load(Path(folder) / "model.pt", model=model)
    return _largest_difference(before, _run(loaded, inputs)) == 0.0


def check_model(name: str) -> dict[str, Any]:
    """All checks of one model; what raises is told under ``errors`` by the name of the check, and the rest goes on.

    Keys: model, parameters, quantizers, islands, ratio, share_audit, macs_audit, exceptions, never_hit, share_values,
    macs_values, misses, sqnr, fp32_eval, fp32_train (largest differences), grads (names that lack one), reload, errors,
    seconds, memory_gb. A check that raised leaves its keys out.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name, "errors": {}}

    def attempt(check: str, action: Callable[[], Any]) -> Any:
        try:
            result = action()
        except Exception as error:  # told in the row
            row["errors"][check] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return None
        row.update(result if isinstance(result, dict) else {check: result})
        return result

    model = build_without_weights(name)
    inputs, training = example_inputs(name), example_inputs(name, 2, train=True)
    settle(model, training)
    _run(model, inputs)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    prepared = attempt("prepare", lambda: preparation(model, inputs))
    if prepared is not None:
        qmodel, row["ratio"] = prepared
        del row["prepare"], prepared
        row.update(quantizers=len(quantizers(qmodel)), islands=islands(qmodel))
        attempt("fp32_eval", lambda: difference(model, qmodel, inputs))
        attempt("fp32_train", lambda: difference(model, qmodel, training, train=True))
        attempt("calibrate", lambda: calibrate(name, qmodel, inputs, training) or {})
        attempt("audit", lambda: audit(qmodel, inputs))
        attempt("values", lambda: mac_shares(qmodel, inputs))
        attempt("reload", lambda: reload(model, qmodel, inputs))
        attempt("sqnr", lambda: sqnr(model, inputs))
        attempt("grads", lambda: gradients(model, qmodel, training))  # last: RAFT cannot be copied after it
    row["seconds"] = time.perf_counter() - start
    row["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def in_process(name: str) -> dict[str, Any]:
    """``check_model`` in a process of its own: so is its memory, and what ends it does not end this one."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"model": name, "errors": {"process": f"stopped after {TIMEOUT} s"}}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1][:300]
        return {"model": name, "errors": {"process": f"exit status {done.returncode}: {last}"}}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each model."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def table(rows: list[dict[str, Any]]) -> str:
    """The page's table, and below it what raised."""
    titles = [
        "model",
        "parameters",
        "MACs on a grid: audit",
        "values",
        "quantizers",
        "islands",
        "prepare ratio",
        "memory",
        "W8A8 SQNR",
        "FP32 eval",
        "FP32 train",
        "grads",
        "reload",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            row["model"],
            _cell(row, "parameters", lambda n: f"{n / 1e6:.1f} M"),
            _cell(row, "share_audit", _percent),
            _cell(row, "share_values", _percent),
            _cell(row, "quantizers", str),
            _cell(row, "islands", lambda n: str(n or "whole")),
            _cell(row, "ratio", lambda r: f"{r:.1f}"),
            _cell(row, "memory_gb", lambda g: f"{g:.1f} GB"),
            _cell(row, "sqnr", lambda db: "n/a" if db is None else f"{db:.1f} dB"),
            _cell(row, "fp32_eval", _equal),
            _cell(row, "fp32_train", _equal),
            _cell(row, "grads", lambda lacking: f"{len(lacking)} lack" if lacking else "all"),
            _cell(row, "reload", lambda same: "same" if same else "differs"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    raised = [f"- {row['model']}, {check}: {text}" for row in rows for check, text in row["errors"].items()]
    return "\n".join([*lines, "", *(["What raised:", "", *raised] if raised else ["No check raised."])])


def _cell(row: dict[str, Any], key: str, show: Callable[[Any], str]) -> str:
    return show(row[key]) if key in row else "error"


def _percent(share: float) -> str:
    return f"{math.floor(share * 1e4) / 100:.2f} %"  # 100 % only where it is all


def _equal(difference: float) -> str:
    return "equal" if difference == 0 else f"{difference:.1e}"


def write_page(page: Path, rows: list[dict[str, Any]]) -> None:
    text = page.read_text() if page.is_file() else f"# Coverage\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all 109")
    parser.add_argument("--page", type=Path, help="markdown file with the two marker lines")
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--again", action="store_true", help="run models that have a line, too")
    parser.add_argument("--one", metavar="NAME", help="check this model here and print its line")
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(check_model(options.one)))
        return
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    done = {} if options.again else read_lines(options.lines)
    for name in options.names or model_names():
        if name in done:
            continue
        row = in_process(name)
        with options.lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {row.get('seconds', 0):.0f} s, {len(row['errors'])} errors", flush=True)
    if options.page:
        rows = read_lines(options.lines)
        write_page(options.page, [rows[name] for name in sorted(rows)])


if __name__ == "__main__":
    main()
