"""Tables: folded to fit a screen, whole, or as JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .folding import broken, fold, grouped, that_fit
from .render import or_blank, stage_mark

if TYPE_CHECKING:
    from brfx.analysis.audit import Audit, LayerAudit
    from brfx.jobs.runs import Run

#: How a command prints its table.
FORMATS = ("folded", "wide", "json", "csv")


def audit(console: Console, report: Audit, form: str = "folded", *, regularized: bool = False) -> None:
    """What is quantized, layer by layer, in one of :data:`FORMATS`; ``regularized``: tell what bin regularizers see."""
    if form == "json":
        sums = {"parameters": report.parameters, "macs": report.macs, "quantized_macs": report.quantized_macs}
        _json({"layers": list(map(_plain_data, report.layers)), **sums, "never_hit": list(report.never_hit)})
        return
    if form == "csv":
        _csv(map(_plain_data, report.layers))
        return
    if form == "wide":
        _print_whole(console, _whole_audit(report))
    else:
        layers, room = [row for row in report.layers if row.macs], max(20, console.width * 2 // 5)
        console.print(_layers(layers, report, room, regularized=regularized))
        acts = [row for row in report.layers if not row.macs]
        if acts:
            console.print()
            console.print(_activations(acts, room, regularized=regularized))
        for reason in dict.fromkeys(row.reason for row in layers if row.reason):
            left = [row.name or "the model" for row in layers if row.reason == reason]
            console.print(f"in FP32: {_listed(left)}: {reason}", markup=False, soft_wrap=False)
    if report.never_hit:
        console.print(f"never reached by the example: {_listed(report.never_hit)}", markup=False, soft_wrap=False)
    console.print(report.footer, markup=False, soft_wrap=False)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(pattern for pattern, _ in fold(names))


def _layers(rows: list[LayerAudit], report: Audit, room: int, *, regularized: bool) -> Table:
    """Layers that are alike in a line, with the sum of their parameters and MACs."""
    from brfx.analysis.audit import percent, scaled

    calibrated = any(_has_step(row) for row in rows)
    whole = report.macs == report.quantized_macs
    columns = {"layer": "left", "type": "left", "W": "right", "A": "right"}
    columns |= {"step": "right"} if calibrated else {}
    columns |= {"params": "right", "MACs": "right"}
    columns |= {} if whole else {"quantized": "right"}
    columns |= {"BR": "left"} if regularized else {}
    table = _table(columns)

    def rest(row: LayerAudit) -> Hashable:
        bits = row.weight_bits, row.act_bits
        return row.type, bits, row.parameters, row.macs, row.quantized_macs, row.regularized, row.reason

    for name, places in grouped([(row.name, rest(row)) for row in rows]):
        alike = [rows[place] for place in places]
        first, count = alike[0], len(alike)
        cells = {
            "layer": broken(name, room),
            "type": first.type.removeprefix("Quantized"),
            "W": str(first.weight_bits or 32),
            "A": str(first.act_bits or 32),
            "step": _steps(alike),
            "params": scaled(first.parameters * count) if first.parameters else "",
            "MACs": scaled(first.macs * count),
            "quantized": percent(first.quantized_macs, first.macs),
            "BR": "on" if first.regularized else "",
        }
        table.add_row(*(Text(cells[column]) for column in columns))
    total = {"layer": "total", "params": scaled(report.parameters), "MACs": scaled(report.macs)}
    if not whole:
        total["quantized"] = percent(report.quantized_macs, report.macs)
    table.add_section()
    table.add_row(*(total.get(column, "") for column in columns))
    return table


def _activations(rows: list[LayerAudit], room: int, *, regularized: bool) -> Table:
    calibrated = any(_has_step(row) for row in rows)
    columns = {"quantizer": "left", "bits": "right", "sign": "left"}
    columns |= {"step": "right"} if calibrated else {}
    columns |= {"BR": "left"} if regularized else {}
    columns |= {"where": "left"}
    table = _table(columns)
    rests = [(row.type, row.act_bits, row.signed, row.regularized, row.reason) for row in rows]
    for name, places in grouped([(row.name, rest) for row, rest in zip(rows, rests, strict=True)]):
        alike = [rows[place] for place in places]
        first = alike[0]
        cells = {
            "quantizer": broken(name, room),
            "bits": str(first.act_bits or ""),
            "sign": _sign(first),
            "step": _steps(alike),
            "BR": "on" if first.regularized else "",
            "where": first.reason or "ReLU",
        }
        table.add_row(*(Text(cells[column]) for column in columns))
    return table


def _table(columns: dict[str, Any]) -> Table:
    """A table that gives way in its last column, uncut, where the screen is narrow."""
    table = Table(box=None, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, no_wrap=name != "where", overflow="fold")
    return table


def _sign(row: LayerAudit) -> str:
    return {None: "", True: "signed", False: "unsigned"}[row.signed]


def _has_step(row: LayerAudit) -> bool:
    return row.step is not None and not math.isnan(row.step)


def _steps(rows: list[LayerAudit]) -> str:
    steps = [row.step for row in rows if row.step is not None and _has_step(row)]
    if not steps:
        return ""
    least, most = f"{min(steps):.3g}", f"{max(steps):.3g}"
    return least if least == most else f"{least}..{most}"


def _whole_audit(report: Audit) -> Table:
    from brfx.analysis.audit import percent

    table = Table(box=None, pad_edge=False)
    calibrated = any(map(_has_step, report.layers))
    columns = ["layer", "type", "W", "A", "sign", *(["step"] if calibrated else []), "parameters", "MACs", "quantized"]
    for name in (*columns, "BR", "why"):
        right = name in ("W", "A", "step", "parameters", "MACs", "quantized")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in report.layers:
        fp32 = "32" if row.macs else ""
        cells = [row.name, row.type, str(row.weight_bits or fp32), str(row.act_bits or fp32), _sign(row)]
        cells += [f"{row.step:.5f}" if _has_step(row) else ""] if calibrated else []
        cells += [f"{count:,}" if count else "" for count in (row.parameters, row.macs)]
        cells += [percent(row.quantized_macs, row.macs) if row.macs else "", "on" if row.regularized else "off"]
        table.add_row(*map(Text, (*cells, row.reason)))
    total = {"layer": "total", "parameters": f"{report.parameters:,}", "MACs": f"{report.macs:,}"}
    table.add_section()
    table.add_row(*(total.get(column, "") for column in columns))
    return table


def runs(console: Console, found: list[Run], form: str = "folded") -> None:
    """A line a run, and below them what is wrong with those that cannot be read."""
    if form == "json":
        _json(list(map(_plain_data, found)))
        return
    if form == "csv":
        _csv(map(_plain_data, found))
        return
    rows = [_run_cells(run) for run in found]
    columns = list(rows[0])
    if form == "wide":
        _print_whole(console, _runs_table(columns, rows))
    else:
        _print_folded_runs(console, rows)
    for run in found:
        if run.why:
            console.print(Text(_printable(f"{run.name}: {run.why}")), style="yellow", soft_wrap=False)


#: Columns of ``runs`` that stay whatever they say; the others by how soon they give way on a narrow screen.
_KEPT = ("run", "bits", "epochs", "val", "test")
_COMMON = ("state", "model", "BR_W", "BR_A", "lr", "seed")
_GIVE_WAY = ("state", "model", "BR_W", "BR_A", "lr", "seed", "shipped", "time", "changed")


def _print_folded_runs(console: Console, rows: list[dict[str, str]]) -> None:
    """What all runs have in common in a line above, and no column that says nothing or has no room."""
    columns = list(rows[0])
    said = [column for column in columns if any(row[column] for row in rows)]
    common = [
        column for column in said if column in _COMMON and len(rows) > 1 and len({row[column] for row in rows}) == 1
    ]
    shown = [column for column in said if column not in common]
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in shown]
    room = max(16, console.width // 3)
    widths[0] = min(widths[0], room)  # the run's name goes on in the next line
    order = sorted(range(len(shown)), key=lambda place: (*_KEPT, *_GIVE_WAY).index(shown[place]))
    chosen = [shown[place] for place in that_fit(widths, order, console.width)]
    if common:
        line = ", ".join(f"{column} {rows[0][column]}" for column in common)
        console.print(Text(f"all: {line}"), soft_wrap=False)
    console.print(_runs_table(chosen, [row | {"run": broken(row["run"], room)} for row in rows]))
    hidden = [column for column in shown if column not in chosen]
    if hidden:
        console.print(f"no room for {', '.join(hidden)}: --wide shows all", soft_wrap=False)


def _runs_table(columns: list[str], rows: list[dict[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    left = ("run", "model", "bits", "state", "changed")
    for name in columns:
        justify: Any = "left" if name in left else "right"
        table.add_column(name, justify=justify, no_wrap=name != "run", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    return table


def _run_cells(run: Run) -> dict[str, str]:
    return {
        "run": _printable(run.name),
        "model": _printable(run.model or ""),
        "bits": run.bits,
        "epochs": f"{or_blank('d', run.epochs_done, '?')}/{or_blank('d', run.epochs, '?')}",
        "BR_W": or_blank("g", run.lambda_br or None),
        "BR_A": or_blank("g", run.lambda_br_act or None),
        "lr": or_blank("g", run.lr),
        "seed": or_blank("d", run.seed),
        "shipped": or_blank("d", run.epoch) + stage_mark(run.stage),
        "val": or_blank(".2%", run.val_accuracy, "-" if run.epochs_done else ""),
        "test": or_blank(".2%", run.test_accuracy) + ("" if run.metric == "accuracy" else f" {_printable(run.metric)}"),
        "time": or_blank(".0f", run.seconds) + (" s" if run.seconds is not None else ""),
        "state": run.state,
        "changed": f"{run.changed:%Y-%m-%d %H:%M}",
    }


def _print_whole(console: Console, table: Table) -> None:
    """Print every cell in one line, whatever the screen's width."""
    table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table)


def _printable(text: str) -> str:
    """Text from a file or a file's name without what steers the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _plain_data(row: Any) -> dict[str, Any]:
    """A row's fields, with ``None`` for what is no number and text for paths and times."""
    found = asdict(row)
    for field in fields(row):
        value = found[field.name]
        if isinstance(value, float) and not math.isfinite(value):
            found[field.name] = None
        elif not isinstance(value, (str, int, float, type(None))):
            found[field.name] = str(value)
    return found


def _json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _csv(rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
