"""What a report says in words and numbers, on a page as on a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from brfx.report.figures import levels_of
from brfx.report.run_files import Line, RunFiles, mean_of_weights

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def sentence(run: RunFiles) -> str:
    """The result in a sentence."""
    what = f"{run.run.model or 'a model'} {'in FP32' if run.run.bits == 'FP32' else 'at ' + run.run.bits}".strip()
    if run.result is None:
        done, wanted = run.run.epochs_done, run.run.epochs
        shown = "" if run.run.val_accuracy is None else f": {_percent(run.run.val_accuracy)} {run.metric} on validation"
        return f"{what}, unfinished, {done} of {wanted} epochs{shown}."
    test, images = run.run.test_accuracy, run.result["test"].get("count")
    assert test is not None
    on = f" on {images:,} test images" if images else " on test"
    text = f"{what} reaches {_percent(test)} {run.metric}{on}"
    before = run.float_test
    if before is not None:
        text += f", {points(test - before)} its FP32 network ({_percent(before)})"
    size, times = run.result.get("bytes", {}).get("model.onnx"), smaller(run)
    if size:
        text += f"; model.onnx is {file_size(size)}" + (
            f", {times:.1f} times smaller than FP32 weights" if times else ""
        )
    return text + "."


def points(difference: float) -> str:
    """``1.20 points below``; of shares of 1."""
    if round(100 * difference, 2) == 0:
        return "as much as"
    return f"{abs(100 * difference):.2f} points {'above' if difference > 0 else 'below'}"


def smaller(run: RunFiles) -> float | None:
    """How many times ``model.onnx`` is smaller than the network's parameters in 32 bits."""
    size = (run.result or {}).get("bytes", {}).get("model.onnx")
    parameters = (run.network or {}).get("parameters")
    return 4 * parameters / size if size and parameters else None


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """The key figures: name and value."""
    found: list[tuple[str, str]] = []
    if run.run.test_accuracy is not None:
        found.append((f"{run.metric}, test", _percent(run.run.test_accuracy)))
    if (before := run.float_test) is not None:
        found.append(("FP32, test", _percent(before)))
    if run.run.val_accuracy is not None:
        found.append((f"{run.metric}, validation", _percent(run.run.val_accuracy)))
    found.append(("epochs", f"{run.run.epochs_done} of {run.run.epochs}"))
    if run.run.epoch is not None:
        found.append(("epoch shipped", str(run.run.epoch)))
    if run.run.seconds:
        found.append(("time in training batches", duration(run.run.seconds)))
    speeds = [line["images_per_second"] for line in run.metrics if line.get("images_per_second")]
    if speeds:
        found.append(("training speed, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f} images/s"))
    if run.network and run.network.get("footer"):
        found.append(("arithmetic", run.network["footer"].partition(";")[0]))
    return found


def curves(run: RunFiles) -> Iterator[tuple[str, list[int], list[float]]]:
    """Name, epochs and values of what a short form shows, where there is any."""
    values: dict[str, Callable[[Line], float | None]] = {
        f"{run.metric}, val": lambda line: line.get(f"val_{run.run.metric}"),
        "loss": lambda line: line["train"]["loss"],
        "BR_W": lambda line: line["train"].get("terms", {}).get("weight"),
        "BR_A": lambda line: line["train"].get("terms", {}).get("act"),
        "distance to levels": lambda line: mean_of_weights(line, "distance"),
        "quantization error": lambda line: mean_of_weights(line, "mse"),
    }
    for name, value in values.items():
        epochs, found = run.over_epochs(value)
        if epochs:
            yield name, epochs, found


def layers(run: RunFiles, kind: str) -> Table | None:
    """A row a layer: bits, step, shares of the levels, error, and for weights what became of their distances."""
    line = run.after or run.before
    if line is None or not line[kind]:
        return None
    last = next((found for found in reversed(run.metrics) if found["epoch"] == line["epoch"]), {})
    weights = kind == "weights"
    names = ("layer", "bits", "step", "levels used", "error before", "error", "effectiveness")
    rows = []
    for name, figures in line[kind].items():
        before = (run.before or {}).get(kind, {}).get(name)
        closed = last.get("weights", {}).get(name, {}).get("closed")
        row = [
            name,
            str(figures["bits"]),
            _step(figures),
            f"{figures['used']} of {len(levels_of(figures))}",
            "" if before is None else f"{before['mse']:.3g}",
            f"{figures['mse']:.3g}",
            f"{100 * (1 - figures['distance']):.1f} %",
        ]
        if weights:
            row.append(_signed(closed))
            row.append(f"{figures['dead']} of {figures['channels']}" if "dead" in figures else "")
        rows.append(tuple(row))
    return (*names, *(("closed", "dead channels") if weights else ())), rows


def shares(figures: Line) -> list[float]:
    """The share of values that each level has, 0 to 1; empty for grids of many levels."""
    codes = figures.get("codes", [])
    total = sum(codes)
    return [count / total for count in codes] if total else []


def _step(figures: Line) -> str:
    if "step_range" in figures:
        low, high = figures["step_range"]
        return f"{low:.3g} to {high:.3g}"
    return f"{figures['step']:.4g}"


def weights_only(run: RunFiles) -> Table | None:
    """What ``metrics.jsonl`` says of each weight in the shipped epoch, for a run that kept no histograms."""
    lines = [line for line in run.metrics if run.run.epoch in (None, line["epoch"])]
    if not lines or not lines[-1].get("weights"):
        return None
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{found['mse']:.3g}",
            f"{100 * (1 - found['distance']):.1f} %",
            _signed(found.get("closed")),
            f"{found['flips']:.3f}",
        )
        for name, found in lines[-1]["weights"].items()
    ]
    return ("layer", "error", "effectiveness", "closed", "codes changed"), rows


def sensitivity(run: RunFiles, kind: str) -> Table | None:
    """What each layer's bits cost alone: a row a layer, a column a width, then the bits that it has."""
    rows = [row for row in (run.sensitivity or {}).get("layers", ()) if row["kind"] == kind]
    if not rows:
        return None
    widths, has = list(rows[0]["losses"]), run.bits_of(kind)
    names = ("layer" if kind == "weights" else "quantizer", kind, *(f"{width} bits" for width in widths), "has")
    return names, [
        (
            row["name"],
            f"{row['values']:,}",
            *(_nats(row["losses"][width]) for width in widths),
            str(has.get(row["name"], "")),
        )
        for row in rows
    ]


def _nats(loss: float) -> str:
    return f"{loss:.1e}" if loss < 0.001 else f"{loss:.4f}"


def speeds(run: RunFiles) -> Table | None:
    """Each file that was timed: its size, and how fast ONNX Runtime runs it."""
    if run.benchmark is None:
        return None
    return ("file", "size", "ms/batch", "images/s", "x the first"), [
        (
            row["name"],
            file_size(row["bytes"]),
            f"{row['milliseconds']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{row['speed']:.2f}",
        )
        for row in run.benchmark["timings"]
    ]


def timed_how(run: RunFiles) -> str:
    """Under what the speeds were measured."""
    found = run.benchmark or {}
    images, threads = (_counted(found[name], of) for name, of in (("batch_size", "image"), ("threads", "thread")))
    return f"ONNX Runtime, batches of {images}, {threads}, {found['machine']['processor']}."


def _counted(count: int, of: str) -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"


def exported(run: RunFiles) -> Table | None:
    """Each file that the run left, and its size."""
    sizes = (run.result or {}).get("bytes")
    if not sizes:
        return None
    return ("file", "size"), [(name, file_size(size)) for name, size in sizes.items()]


def onnx(run: RunFiles) -> list[str]:
    """What the comparison of ``model.onnx`` with the trained model came to, a sentence each."""
    found = (run.result or {}).get("onnx")
    if not found:
        return []
    flipped, codes = (sum(site[name] for site in found.get("sites") or []) for name in ("flipped", "codes"))
    lines = [f"{found['integer_layers']} layers of model.onnx run on integer kernels."]
    lines += [
        f"{name} stays in floating point: {reason}." for name, reason in (found.get("float_layers") or {}).items()
    ]
    if codes:
        lines.append(f"Integers against PyTorch: {flipped:,} of {codes:,} codes differ.")
    if found.get("reference_difference") is not None:
        same = found["reference_difference"] == 0
        how = "the same bit for bit" if same else f"different by up to {found['reference_difference']:.2g}"
        lines.append(f"ONNX Runtime's outputs and the integer reference's are {how}.")
    return lines


def command(run: RunFiles) -> str:
    """The command that began the run, as a shell takes it."""
    words = [str(word) for word in run.config.get("command_line", [])]
    if not words:
        return ""
    first = Path(words[0]).name
    return shlex.join(["brfx" if first in ("__main__.py", "brfx") else first, *words[1:]])


def settings(run: RunFiles) -> dict[str, str]:
    """Every setting by its dotted name, without what says where and by what it ran."""
    found: dict[str, str] = {}

    def walk(prefix: str, table: Mapping[str, Any]) -> None:
        for name, value in table.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{name}.", value)
            else:
                found[prefix + name] = value if isinstance(value, str) else json.dumps(value)

    walk("", {name: value for name, value in run.config.items() if name not in _BESIDE})
    return found


_BESIDE = ("kind", "versions", "python", "command_line", "machine")


def surroundings(run: RunFiles) -> list[tuple[str, str]]:
    """Versions and machine, as far as the run wrote them down."""
    found = [(name, str(value)) for name, value in run.config.get("versions", {}).items()]
    if "python" in run.config:
        found.append(("python", str(run.config["python"])))
    return found + [(name, str(value)) for name, value in run.config.get("machine", {}).items()]


def differences(runs: Sequence[RunFiles]) -> Table:
    """What the runs came to, and the settings in which they differ; a column a run."""
    rows = [(name, *values) for name, values in _results(runs)]
    tables = [settings(run) for run in runs]
    for name in dict.fromkeys(name for table in tables for name in table):
        values = tuple(table.get(name, "") for table in tables)
        if len(set(values)) > 1 and name != "output_dir":
            rows.append((name, *values))
    return ("", *(run.label for run in runs)), rows


def _results(runs: Sequence[RunFiles]) -> Iterator[tuple[str, tuple[str, ...]]]:
    tables = [dict(facts(run)) for run in runs]
    for name in dict.fromkeys(name for table in tables for name in table):
        yield name, tuple(table.get(name, "") for table in tables)
    sizes = tuple((run.result or {}).get("bytes", {}).get("model.onnx") for run in runs)
    if any(sizes):
        yield "model.onnx", tuple(file_size(size) if size else "" for size in sizes)


def file_size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """``1 h 12 min``, ``3.4 min``, ``12 s``."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.0f} s"


def _signed(share: float | None) -> str:
    """A share that may be negative, in percent."""
    return "" if share is None else f"{round(100 * share, 1) + 0.0:.1f} %".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
