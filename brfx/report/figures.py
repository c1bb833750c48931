"""The figures of a report; each is a matplotlib ``Figure``, for a page as for a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from brfx.report.run_files import Line, RunFiles, mean_of_weights
from brfx.report.style import DASHES, INK, MUTED, PAPER, SERIES, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches: of a single panel, and of a figure as wide as the page.
PANEL, WIDE = (4.3, 2.7), 9.2
_COLUMNS = 4

#: What activations and weights are called.
KINDS = {"weights": "latent weights", "activations": "activations"}


def figures(runs: Sequence[RunFiles]) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of all that ``runs`` kept figures of: their curves laid over each other, then each run's
    own."""
    with figure_style():
        yield from _curves(runs)
        if len(runs) > 1:
            yield from (found for kind in KINDS if (found := _histograms(runs, kind)) is not None)
        for number, run in enumerate(runs):
            prefix = f"{number + 1}-" if len(runs) > 1 else ""
            for name, caption, figure in _of_run(run):
                yield prefix + name, caption, figure


# Curves over epochs.


def _curves(runs: Sequence[RunFiles]) -> Iterator[tuple[str, str, Figure]]:
    yield from (
        found
        for found in (
            _metric(runs),
            _curve(runs, "loss", "Training loss", "loss of the task", lambda line: line["train"]["loss"]),
            _term(runs, "weight", "BR_W", "Bin regularization of weights"),
            _term(runs, "act", "BR_A", "Bin regularization of activations"),
            _term(runs, "kurtosis", "kurtosis", "Kurtosis regularization"),
            _curve(runs, "rate", "Learning rate", "rate of the last batch", lambda line: line["lr"]),
            _distance(runs, "distance", "Distance to the levels", "mean |v \N{MINUS SIGN} level| / half a step"),
            _distance(runs, "mse", "Quantization error", "mean (v \N{MINUS SIGN} level)² / mean v²"),
            _distance(runs, "closed", "Distance closed since the warm-up", "share of the distance / %", scale=100),
            _distance(runs, "flips", "Codes that change", "of 1,000 weights, a batch"),
        )
        if found is not None
    )


def _metric(runs: Sequence[RunFiles]) -> tuple[str, str, Figure] | None:
    """The task's metric on validation, and of the shipped epoch and the FP32 network on test."""
    metric = runs[0].metric
    figure, axes = _panel(metric[0].upper() + metric[1:], f"{metric} / %")
    curves = [
        run.over_epochs(lambda line, name=f"val_{run.run.metric}": _scaled(line.get(name), 100))  # type: ignore[misc]
        for run in runs
    ]
    if not any(epochs for epochs, _ in curves):
        return None
    alone = len(runs) == 1
    for number, (run, (epochs, values)) in enumerate(zip(runs, curves, strict=True)):
        look = {"color": SERIES[number % len(SERIES)], "ls": DASHES[number % len(DASHES)], **_dots(epochs)}
        axes.plot(epochs, values, label="validation" if alone else run.label, **look)
    star: dict[str, Any] = {"marker": "*", "ms": 11, "mec": "none", "ls": "none", "zorder": 5}
    tested = [
        (run.run.epoch, run.run.test_accuracy, SERIES[1] if alone else SERIES[number % len(SERIES)])
        for number, run in enumerate(runs)
        if run.run.epoch and run.run.test_accuracy is not None
    ]
    for epoch, accuracy, colour in tested:
        axes.plot([epoch], [100 * accuracy], color=colour, **star)
    if tested:
        axes.plot([], [], color=SERIES[1] if alone else MUTED, label="test, epoch shipped", **star)
    tests = {value for run in runs if (value := run.float_test) is not None}
    if len(tests) == 1:
        axes.axhline(100 * tests.pop(), color=MUTED, lw=1, ls=(0, (4, 2)), label="test, FP32 network")
    _finish(axes, runs)
    return "metric", f"{metric}, epoch by epoch", figure


def _curve(
    runs: Sequence[RunFiles], name: str, title: str, unit: str, value: Callable[[Line], float | None]
) -> tuple[str, str, Figure] | None:
    figure, axes = _panel(title, unit)
    found = [run.over_epochs(value) for run in runs]
    if not any(epochs for epochs, _ in found):
        return None
    for number, (run, (epochs, values)) in enumerate(zip(runs, found, strict=True)):
        if not epochs:
            continue
        style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "ls": DASHES[number % len(DASHES)]}
        axes.plot(epochs, values, label=run.label if len(runs) > 1 else None, **_dots(epochs), **style)
    _finish(axes, runs)
    return name, f"{title}: {unit}", figure


def _term(runs: Sequence[RunFiles], name: str, short: str, title: str) -> tuple[str, str, Figure] | None:
    return _curve(runs, f"term-{name}", title, short, lambda line: line["train"].get("terms", {}).get(name))


def _distance(
    runs: Sequence[RunFiles], name: str, title: str, unit: str, scale: float = 1
) -> tuple[str, str, Figure] | None:
    """A figure of ``metrics.jsonl`` of each weight: of one run a line a layer, of several their means over layers."""
    if len(runs) > 1:
        what = f"{title}, mean of layers"
        return _curve(runs, f"weights-{name}", what, unit, lambda line: _scaled(mean_of_weights(line, name), scale))
    layers = list(runs[0].metrics[0].get("weights", {})) if runs[0].metrics else []
    lines = {
        layer: runs[0].over_epochs(lambda line, layer=layer: _scaled(line["weights"].get(layer, {}).get(name), scale))  # type: ignore[misc]
        for layer in layers
    }
    found = _lines(runs, {layer: line for layer, line in lines.items() if line[0]}, title, unit)
    return None if found is None else (f"weights-{name}", f"{title}: {unit}, a line a layer", found)


def _lines(
    runs: Sequence[RunFiles], lines: dict[str, tuple[list[int], list[float]]], title: str, unit: str
) -> Figure | None:
    """One line a layer, from the first to the last in colours between blue and orange, and their mean."""
    if not lines:
        return None
    figure, axes = _panel(title, unit)
    for number, (layer, (epochs, values)) in enumerate(lines.items()):
        colour = _between(number / max(1, len(lines) - 1))
        label = f"{layer} (first)" if number == 0 else f"{layer} (last)" if number == len(lines) - 1 else None
        axes.plot(epochs, values, color=colour, lw=1.5 if label else 0.9, alpha=1 if label else 0.7, label=label)
    _finish(axes, runs)
    return figure


def _steps(run: RunFiles, kind: str) -> tuple[str, str, Figure] | None:
    """Each step over the epochs, relative to where it started."""
    if run.before is None or len(run.histograms) < 2:
        return None
    start = {name: figures["step"] for name, figures in run.before[kind].items() if figures["step"] > 0}
    lines = {
        name: (
            [line["epoch"] for line in run.histograms if name in line[kind]],
            [line[kind][name]["step"] / first for line in run.histograms if name in line[kind]],
        )
        for name, first in start.items()
    }
    title = f"Step sizes of {kind}"
    figure = _lines([run], lines, title, "step / step before training")
    return None if figure is None else (f"steps-{kind}", f"{title}, relative to their start", figure)


# Histograms.


def _of_run(run: RunFiles) -> Iterator[tuple[str, str, Figure]]:
    for kind in KINDS:
        yield from (found for found in _figures_of(run, kind) if found)


def _figures_of(run: RunFiles, kind: str) -> tuple[tuple[str, str, Figure] | None, ...]:
    return _steps(run, kind), _histograms([run], kind), _over_time(run, kind), _sensitivity(run, kind)


def headline(runs: Sequence[RunFiles]) -> Figure | None:
    """The picture beside the headline: the largest layer's weights against their levels."""
    layers = _in_all(runs, "weights")
    if not layers:
        return None
    first = runs[0].after or runs[0].before
    assert first is not None
    name = max(layers, key=lambda name: _total(first["weights"][name]))
    with figure_style():
        figure, axes = _panel(f"Weights of {name}", "density / step⁻¹")
        _draw_histogram(axes, _series(runs, "weights"), name)
        axes.set_xlabel("weight / step; dotted: levels")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        axes.legend(*_legend(_series(runs, "weights")), loc="upper right")
    return figure


@dataclass(frozen=True)
class _Series:
    """Histograms of one time and run, and how they are drawn."""

    name: str
    layers: Line
    colour: str
    dashes: Any = "-"
    fill: float = 0.22


def _series(runs: Sequence[RunFiles], kind: str) -> list[_Series]:
    """Of one run before and after training; of several after it."""
    found = []
    if len(runs) == 1 and runs[0].before is not None:
        name = "before training" + " (FP32 weights)" * (kind == "weights")
        found.append(_Series(name, runs[0].before[kind], MUTED, fill=0.35))
    for number, run in enumerate(runs):
        if run.after is not None:
            name = f"after epoch {run.after['epoch']}" if len(runs) == 1 else run.label
            look: dict[str, Any] = {"colour": SERIES[number % len(SERIES)], "dashes": DASHES[number % len(DASHES)]}
            found.append(_Series(name, run.after[kind], fill=0.22 if len(runs) == 1 else 0.12, **look))
    return found


def _in_all(runs: Sequence[RunFiles], kind: str) -> list[str]:
    """Layers that every run has histograms of, on the same grid."""
    lines = [run.after or run.before for run in runs]
    tables = [line[kind] for line in lines if line is not None]
    if len(tables) < len(runs) or (len(runs) > 1 and any(run.after is None for run in runs)):
        return []
    return [
        name
        for name, figures in tables[0].items()
        if all(name in table and table[name]["levels"] == figures["levels"] for table in tables)
    ]


def _histograms(runs: Sequence[RunFiles], kind: str) -> tuple[str, str, Figure] | None:
    layers, series = _in_all(runs, kind), _series(runs, kind)
    if not layers:
        return None
    figure, panels = _grid(layers, legend=True)
    for name, axes in panels.items():
        _draw_histogram(axes, series, name)
        axes.set_title(name, fontsize=7.5, pad=3)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    figure.legend(*_legend(series), loc="upper left", ncols=len(series), borderaxespad=0.1)
    _around(figure, "value / step, dotted: levels; height: density")
    return f"histograms-{kind}", f"Histograms of {KINDS[kind]} against the levels", figure


def _draw_histogram(axes: Axes, series: Sequence[_Series], name: str) -> None:
    """One over the other; a peak that would hide the rest is cut, and its share written beside it."""
    drawn = [(one, one.layers[name]) for one in series if name in one.layers]
    for number, (one, figures) in enumerate(drawn):
        density, edges = _density(figures)
        axes.stairs(density, edges, fill=True, color=one.colour, alpha=one.fill, lw=0, zorder=2 + number)
        width = 0.7 if one.colour == MUTED else 1.2
        axes.stairs(density, edges, color=one.colour, lw=width, ls=one.dashes, zorder=3 + number)
    shown = [figures for _, figures in drawn]
    _level_axis(axes.xaxis, axes.axvline, shown[-1])
    axes.set_xlim(*_extent(shown))
    top, peak = _top([_density(figures)[0] for figures in shown])
    axes.set_ylim(0, top)
    axes.grid(False)
    if peak is not None:
        at = shown[-1]["start"] + (peak + 0.5) * shown[-1]["width"]
        shares = [f"{100 * figures['counts'][peak] / _total(figures):.0f} %" for figures in shown]
        text = (" → " if series[0].colour == MUTED else ", ").join(dict.fromkeys(shares))
        axes.annotate(text, (at, top), xytext=(4, -1), textcoords="offset points", va="top", fontsize=7, color=INK)


def _over_time(run: RunFiles, kind: str) -> tuple[str, str, Figure] | None:
    """Each layer's histogram as a column an epoch."""
    lines = run.histograms
    if len(lines) < 3 or not lines[-1][kind]:
        return None
    import numpy as np

    epochs = [line["epoch"] for line in lines]
    figure, panels = _grid([name for name in lines[-1][kind] if all(name in line[kind] for line in lines)], left=0.38)
    for name, axes in panels.items():
        shown = [line[kind][name] for line in lines]
        density = np.array([_density(figures)[0] for figures in shown]).T
        start, width = shown[0]["start"], shown[0]["width"]
        top, _ = _top(list(density.T))
        extent = (epochs[0] - 0.5, epochs[-1] + 0.5, start, start + width * len(density))
        axes.imshow(
            np.sqrt(np.minimum(density / top, 1)),
            cmap="cividis",
            aspect="auto",
            origin="lower",
            extent=extent,
            vmin=0,
            vmax=1,
        )
        _level_axis(axes.yaxis, None, shown[-1])
        axes.set_ylim(*_extent(shown))
        axes.set_title(name, fontsize=7.5, pad=3)
        axes.grid(False)
        if run.boundary:
            axes.axvline(run.boundary + 0.5, color="white", lw=0.8, ls=(0, (3, 2)))
        axes.xaxis.set_major_locator(_whole_epochs(4))
    _around(figure, "epoch (0: before training)", "value / step, ticks: levels")
    return f"over-time-{kind}", f"Histograms of {KINDS[kind]} over the epochs; light: many values", figure


def _density(figures: Line) -> tuple[list[float], list[float]]:
    total, width = _total(figures), figures["width"]
    edges = [figures["start"] + width * number for number in range(len(figures["counts"]) + 1)]
    return [count / total / width for count in figures["counts"]], edges


def _total(figures: Line) -> int:
    return max(1, int(sum(figures["counts"]) + figures["below"] + figures["above"]))


def levels_of(figures: Line) -> list[float]:
    """The levels of a quantizer, in steps."""
    first, last, apart = figures["levels"]
    return [first + apart * number for number in range(round((last - first) / apart) + 1)]


def _extent(shown: list[Line]) -> tuple[float, float]:
    """All of a histogram of few levels; of one of many what holds values."""
    figures = shown[-1]
    start, width, bins = figures["start"], figures["width"], len(figures["counts"])
    if len(levels_of(figures)) <= 16:
        return start, start + width * bins
    filled = [place for found in shown for place, count in enumerate(found["counts"]) if count]
    return start + width * min(filled, default=0), start + width * (max(filled, default=bins - 1) + 1)


def _top(densities: Sequence[Sequence[float]]) -> tuple[float, int | None]:
    """Where the axis ends, and the one bin, if there is one, that is cut there: thrice as high as all the others."""
    peak = max(range(len(densities[0])), key=lambda place: max(density[place] for density in densities))
    highest = max(density[peak] for density in densities)
    others = max((value for density in densities for place, value in enumerate(density) if place != peak), default=0.0)
    if others > 0 and highest > 3 * others:
        return 1.25 * others, peak
    return 1.08 * highest or 1.0, None


def _level_axis(axis: Any, line: Any, figures: Line) -> None:
    """Ticks at the levels, or at some of many; and dotted lines through them where they are few."""
    levels = levels_of(figures)
    shown = (
        levels if len(levels) <= 4 else [levels[0], levels[len(levels) // 2], levels[-1]] if len(levels) <= 16 else None
    )
    if shown is not None:
        axis.set_ticks(shown, [f"{level:g}".replace("-", "\N{MINUS SIGN}") for level in shown])
    if len(levels) <= 16:
        axis.set_ticks(levels, minor=True)
        for level in levels if line is not None else ():
            line(level, color=INK, lw=0.7, ls=(0, (1, 2)), zorder=1.5)


def _legend(series: Sequence[_Series]) -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    looks = [{"fc": (one.colour, 0.5), "ec": one.colour, "ls": one.dashes} for one in series]
    return [Patch(**look) for look in looks], [one.name for one in series]  # type: ignore[arg-type]


# Sensitivity.


def _sensitivity(run: RunFiles, kind: str) -> tuple[str, str, Figure] | None:
    """A line a layer, a point a width; a ring around the bits that the layer has."""
    rows = [row for row in (run.sensitivity or {}).get("layers", ()) if row["kind"] == kind]
    if not rows:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(WIDE, 0.9 + 0.17 * len(rows)), layout="constrained")
    axes = figure.subplots()
    widths, has = list(rows[0]["losses"]), run.bits_of(kind)
    least = min((loss for row in rows for loss in row["losses"].values() if loss > 0), default=1.0)
    for number, width in enumerate(widths):
        losses = [max(row["losses"][width], least) for row in rows]
        colour = _between(number / max(1, len(widths) - 1))
        axes.plot(losses, range(len(rows)), ls="none", marker="o", ms=4, color=colour, label=f"{width} bits", zorder=3)
    for place, row in enumerate(rows):
        loss = row["losses"].get(str(has.get(row["name"])))
        if loss is not None:
            axes.plot(max(loss, least), place, ls="none", marker="o", ms=8, mfc="none", mec=INK, mew=0.9, zorder=4)
    axes.set_xscale("log")
    axes.set_xlabel("divergence from FP32 / nats an image")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(loc="outside upper right", ncols=len(widths), fontsize=7.5)
    return f"sensitivity-{kind}", f"What the bits of each layer's {kind} cost alone; ringed: what it has", figure


# Parts of figures.


def _panel(title: str, unit: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_ylabel(unit)
    return figure, axes


def _grid(names: list[str], *, left: float = 0.0, legend: bool = False) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each name, at fixed places, as finding these takes long; with ``left`` inches beside each for its
    axis, and room above all for a ``legend``."""
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(names) / _COLUMNS))
    above, below, between, tall = 0.5 if legend else 0.24, 0.42, 0.42, 0.72
    height = above + rows * tall + (rows - 1) * between + below
    margin, gap = 0.25 if left else 0.0, left + 0.15
    wide = (WIDE - margin - _COLUMNS * gap) / _COLUMNS
    figure = Figure(figsize=(WIDE, height))
    panels = {}
    for number, name in enumerate(names):
        row, column = divmod(number, _COLUMNS)
        x, y = margin + column * (gap + wide) + left + 0.05, height - above - (row + 1) * tall - row * between
        panels[name] = figure.add_axes((x / WIDE, y / height, wide / WIDE, tall / height))
        panels[name].tick_params(labelsize=7, length=2)
    return figure, panels


def _around(figure: Figure, below: str, left: str = "") -> None:
    """What the axes of all panels are."""
    width, height = figure.get_size_inches()
    figure.text(0.5, 0.06 / height, below, fontsize=8.5, ha="center", va="bottom")
    figure.text(0.08 / width, 0.5, left, fontsize=8.5, ha="left", va="center", rotation="vertical")


def _finish(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """The epochs' axis, the stage boundary, a legend where something has a name."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(_whole_epochs(8))
    boundaries = {run.boundary: number for number, run in enumerate(runs) if run.boundary}
    for boundary, number in boundaries.items():
        colour = MUTED if len(boundaries) == 1 else SERIES[number % len(SERIES)]
        axes.axvline(boundary + 0.5, color=colour, lw=0.9, ls=(0, (2, 2)), zorder=0.5)
    if len(boundaries) == 1:
        at = (next(iter(boundaries)) + 0.5, 1.0)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 7.5}
        box = {"fc": PAPER, "ec": "none", "pad": 0.6}
        whose = "" if len(runs) == 1 or all(run.boundary for run in runs) else _labels_of(runs)
        axes.annotate(f"{whose}regularized from here", at, xytext=(4, 3), color=MUTED, bbox=box, **where)  # type: ignore[arg-type]
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    axes.margins(y=0.12)


def _labels_of(runs: Sequence[RunFiles]) -> str:
    """Those that have a stage boundary, as the beginning of a sentence."""
    return ", ".join(run.label for run in runs if run.boundary) + " "


def _whole_epochs(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, min_n_ticks=1)


def _dots(epochs: list[int]) -> dict[str, Any]:
    """Points on a line of few epochs, where a line alone would show one or none."""
    return {"marker": "o", "ms": 3.5} if len(epochs) < 15 else {}


def _between(share: float) -> str:
    """A colour from blue to orange; all of them stand out on white and on black."""
    first, last = ([int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in ("#2f86c9", "#e08a1e"))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(first, last, strict=True))


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value
