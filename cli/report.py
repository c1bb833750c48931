"""``brfx report``: a page, figures, or a short form on the terminal, of runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from brfx.errors import first_line

from . import render
from .help import Command

if TYPE_CHECKING:
    from brfx.analysis.network import Place
    from brfx.report.run_files import RunFiles


@click.command(
    cls=Command,
    examples=[
        "brfx report runs/resnet20-w2a2",
        "brfx report runs/a runs/b --output compared.html",
    ],
)
@click.argument("folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Page to write.  [default: report.html in RUN, or here]"
)
@click.option(
    "--figures", type=click.Path(path_type=Path), help="Write every figure as SVG, PDF and PNG to this folder."
)
@click.option("--terminal", is_flag=True, help="Print a short form; write a page only with --output.")
def report(folders: tuple[Path, ...], output: Path | None, figures: Path | None, terminal: bool) -> None:
    """Show what became of runs, on a page.

    It has their curves, histograms, network, files and settings. Several runs are laid over each other, with a table of
    where they differ.
    """
    from brfx.report.write import damage_named, read, write_figures, write_page

    runs = read(folders)
    if terminal:
        for run in runs:
            with damage_named([run]):
                _short_form(run)
    if figures is not None:
        count = write_figures(runs, figures)
        render.console.print(f"{figures}  {count} figures", markup=False)
    if output is None and not terminal and figures is None:
        output = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    if output is not None:
        write_page(runs, output)
        render.console.print(f"{output}  {render.size(output.stat().st_size)}", markup=False)


def report_of_finished(run_dir: Path) -> None:
    """Write ``report.html`` into a run's folder, or say in a line why not; a run is not lost for it."""
    if os.environ.get("RANK", "0") != "0":  # of processes that torchrun started, the first one writes
        return
    again = f"`brfx report {run_dir}` makes it from the run's files"
    if importlib.util.find_spec("matplotlib") is None:
        render.console.print(
            f"No report.html: it needs matplotlib (pip install 'matplotlib>=3.9'); {again}", markup=False
        )
        return
    from brfx.report.write import read, write_page

    try:
        write_page(read([run_dir]), run_dir / "report.html")
    except Exception as error:
        render.console.print(f"No report.html: {first_line(error)}; {again}", style="yellow", markup=False)


def write_graph(before: Sequence[Place], after: Sequence[Place], path: Path) -> None:
    """A picture of a model's graph beside that of what it was rewritten to."""
    from brfx.report.write import write_network

    write_network({"before": before, "after": after}, path)
    render.console.print(f"{path}  {render.size(path.stat().st_size)}", markup=False)


def _short_form(run: RunFiles) -> None:
    """The result, each curve in a line, and a line a layer."""
    from brfx.report import text

    render.console.print(text.sentence(run), markup=False)
    for name, epochs, values in text.curves(run):
        first, last = (f"{value:.4g}" for value in (values[0], values[-1]))
        render.console.print(
            f"  {name:<22.22} {_spark(values)}  {first} → {last}  (epochs {epochs[0]} to {epochs[-1]})", markup=False
        )
    for kind in ("weights", "activations"):
        found = text.layers(run, kind) or (text.weights_only(run) if kind == "weights" else None)
        if found is None:
            continue
        names, rows = found
        shown = [place for place, name in enumerate(names) if name not in ("step", "levels used")]
        table = Table(box=None, pad_edge=False)
        for place in shown:
            name = kind if place == 0 else _SHORT.get(names[place], names[place])
            table.add_column(name, justify="right" if place else "left")
        for row in rows:
            table.add_row(*(row[place] for place in shown))
        render.console.print(table)
    for found in (*(text.sensitivity(run, kind) for kind in ("weights", "activations")), text.speeds(run)):
        if found is not None:
            render.console.print(_plain_table(found))
    if run.benchmark is not None:
        render.console.print(text.timed_how(run), markup=False)


def _plain_table(found: tuple[tuple[str, ...], list[tuple[str, ...]]]) -> Table:
    names, rows = found
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


#: Names of columns that leave the others room on 80 columns.
_SHORT = {"error before": "before", "effectiveness": "effective", "dead channels": "dead", "codes changed": "changed"}


def _spark(values: Sequence[float], most: int = 24) -> str:
    """A line of bars, each the mean of its share of ``values``."""
    count = min(most, len(values))
    parts = [values[place * len(values) // count : (place + 1) * len(values) // count] for place in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low)) if high > low else 3] for mean in means)
