"""Everything that reaches the terminal."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from brfx.export import OnnxReport
    from brfx.export.benchmark import Timing
    from brfx.export.verify import Verification
    from brfx.jobs.bits import BitsReport
    from brfx.train import EpochMetrics, Evaluation, Score

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 240  # a table in a file or a pipe is not cut to an imagined screen
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _LogLines(logging.Handler):
    def __init__(self, where: Console) -> None:
        super().__init__()
        self.where = where

    def emit(self, record: logging.LogRecord) -> None:
        self.where.print(record.getMessage(), markup=False)


def show_log(*, beside: bool = False) -> None:
    """Print what the library says at INFO, but the passes' counts; ``beside`` the output, on stderr."""
    logger = logging.getLogger("brfx")
    logger.handlers = [_LogLines(errors if beside else console)]
    logger.setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of no CUDA at every compile
    logging.getLogger("brfx.prepare").setLevel(logging.WARNING)


def error(message: str) -> None:
    errors.print(message, style="bold red", markup=False)


def epoch_lines(metrics: EpochMetrics, epochs: int) -> tuple[str, str]:
    """An epoch's figures in a line, and the names to stand above it; 80 columns hold those of the default options.

    All figures of an epoch are in ``metrics.jsonl``. What the task or the stage does not count has no column.
    """
    name = "val" if metrics.metric == "accuracy" else f"val {metrics.metric}"
    accuracy = metrics.train.accuracy
    cells = [
        ("rate", f"{metrics.lr:.3g}", 8),
        ("loss", f"{metrics.train.loss:.3g}", 7),
        *([] if accuracy is None else [("train", f"{accuracy:.2%}", 7)]),
        (name, or_blank(".2%", metrics.val_metric, "-"), 7),
        *((term_name(term), f"{value:.3g}", 7) for term, value in metrics.train.terms.items()),
        ("time", duration(metrics.seconds), 6),
    ]
    width = len(f"{epochs}/{epochs}{stage_mark('warm-up')}")
    names, figures = f"{'epoch':<{width}}", f"{f'{metrics.epoch}/{epochs}{stage_mark(metrics.stage)}':<{width}}"
    for title, figure, least in cells:
        width = 2 + max(least, len(title))
        names, figures = names + title.rjust(width), figures + figure.rjust(width)
    return names, figures


def stage_mark(stage: str | None) -> str:
    """Behind an epoch: what it is trained with, where it has stages."""
    return {"warm-up": " [LSQ]", "penalty": " [BR]"}.get(stage or "", "")


def term_name(term: str) -> str:
    """A regularizer's term as it is shown: ``BR_W`` and ``BR_A`` of the bin regularizers, another's own name."""
    return {"weight": "BR_W", "act": "BR_A"}.get(term, term)


def exported(report: OnnxReport) -> None:
    """What was written, what runs in integers, and how it compares."""
    console.print(f"{report.path}  {size(report.bytes)}", markup=False)
    console.print(
        f"{report.integer_layers} layers on integer kernels, sums up to {report.largest_sum:,} of 2,147,483,647"
    )
    for name, reason in (report.float_layers or {}).items():
        console.print(f"  stays in floating point: {name} ({reason})", style="yellow", markup=False)
    flipped, codes = report.flipped
    if codes:
        console.print(f"PyTorch against integers: {flipped:,} of {codes:,} codes differ ({flipped / codes:.4%})")
        for site in sorted(report.sites, key=lambda site: site.flipped / site.codes, reverse=True)[:3]:
            if site.flipped:
                console.print(f"  {site.site}: {site.flipped:,} of {site.codes:,}, by {site.largest}", markup=False)
    if report.reference_difference is not None:
        exact = "bit for bit" if report.reference_difference == 0 else f"difference {report.reference_difference:.2g}"
        style = "red" if report.wrong else None
        console.print(f"ONNX Runtime against the integer reference: {'WRONG, ' * report.wrong}{exact}", style=style)
        same = "" if report.same_top1 is None else f", same class for {report.same_top1:.0%} of the example"
        console.print(f"ONNX Runtime against PyTorch: largest difference {report.max_difference:.2g}{same}")


def verification(result: Verification) -> None:
    exact = "bit for bit" if result.bit_for_bit else f"largest difference {result.max_difference:.3g}"
    console.print(f"{result.images:,} images: outputs {exact}, {result.different:,} decided differently")
    if result.listed:
        more = " ..." if result.different > len(result.listed) else ""
        console.print(f"  images {', '.join(map(str, result.listed))}{more}")
    if result.accuracy is not None:
        console.print(f"Accuracy {result.accuracy[0]:.2%} and {result.accuracy[1]:.2%}")
    flipped, codes = sum(site.flipped for site in result.sites), sum(site.codes for site in result.sites)
    if codes:
        console.print(f"PyTorch against integers: {flipped:,} of {codes:,} codes differ ({flipped / codes:.4%})")
        differ = [site for site in result.sites if site.flipped]
        console.print(f"{len(result.sites) - len(differ)} of {len(result.sites)} quantizers give the same codes")
        table = Table(box=None, pad_edge=False)
        for name in ("quantizer", "codes", "differ", "by at most"):
            table.add_column(name, justify="left" if name == "quantizer" else "right", overflow="fold")
        for site in differ:
            table.add_row(Text(site.site), f"{site.codes:,}", f"{site.flipped:,}", str(site.largest))
        if differ:
            console.print(table)


def sensitivity(report: BitsReport, as_json: bool) -> None:
    """A table for weights and one for activations, or JSON alone."""
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    for kind, of in (("weights", "layer"), ("activations", "quantizer")):
        layers = [layer for layer in report.layers if layer.kind == kind]
        if not layers:
            continue
        budget = kind == "weights" and any(report.assigned(layer) for layer in layers)
        table = Table(box=None, pad_edge=False)
        table.add_column(of, overflow="fold")
        for name in (kind, *(f"{width} bits" for width in layers[0].losses), "budget" if budget else "bits"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in layers:
            losses = [f"{loss:.1e}" if loss < 0.001 else f"{loss:.4f}" for loss in layer.losses.values()]
            bits = report.assigned(layer) or layer.bits
            table.add_row(Text(layer.name), f"{layer.values:,}", *losses, str(bits))
        console.print(table)
        console.print()
    console.print(f"Divergence from the FP32 network in nats an image, of {report.images:,} training images.")


def timings(rows: list[Timing]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("file", "size", "ms/batch", "images/s", "x the first"):
        table.add_column(name, justify="left" if name == "file" else "right", no_wrap=name != "file", overflow="fold")
    for row in rows:
        speed = f"{row.speed:.2f}"
        table.add_row(Text(row.name), size(row.bytes), f"{row.milliseconds:.2f}", f"{row.images_per_second:.0f}", speed)
    console.print(table)


def or_blank(form: str, value: float | None, absent: str = "") -> str:
    """``value`` in a format, or ``absent`` where there is none."""
    return absent if value is None else format(value, form)


def evaluation(result: Evaluation | Score) -> str:
    from brfx.train import Evaluation

    if isinstance(result, Evaluation):
        return f"{100 * result.accuracy:.2f} % ({result.correct} of {result.count})"
    further = "".join(f", {100 * value:.2f} % {name}" for name, value in result.further.items())
    return f"{100 * result.value:.2f} % {result.metric}{further} ({result.count} images)"


def size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """``38 s``, ``12 min``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
