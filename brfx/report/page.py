"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from brfx.report import text
from brfx.report.figures import KINDS, figures, headline
from brfx.report.network_svg import network_svg
from brfx.report.run_files import RunFiles
from brfx.report.style import DARK, LIGHT, SERIES, inline_svg
from brfx.report.text import Table


@dataclass(frozen=True)
class _Figure:
    name: str
    caption: str
    svg: str


def page(runs: Sequence[RunFiles]) -> str:
    """The report of one run, or of several side by side.

    Raises:
        ConfigError: there is no matplotlib.
    """
    drawn = [_Figure(name, caption, inline_svg(figure, caption)) for name, caption, figure in figures(runs)]
    title = "; ".join(run.label for run in runs)
    body = [_head(runs, title, drawn)]
    if len(runs) > 1:
        body.append(_section("Differences", _table(text.differences(runs), "differences")))
    shared = [figure for figure in drawn if not _of_one(figure.name, runs)]
    training = [figure for figure in shared if not figure.name.startswith(("weights-", "histograms-"))]
    compared = [figure for figure in shared if figure.name.startswith("histograms-")]
    weights = [figure for figure in shared if figure.name.startswith("weights-")]
    if len(runs) == 1:
        training += [figure for figure in drawn if figure.name.startswith("steps-")]
    body.append(_section("Training", _panels([figure for figure in training if figure.name != "metric"])))
    if len(runs) > 1:
        body.append(_section("Weights and their levels", _panels(weights) + "".join(map(_wide, compared))))
    for number, run in enumerate(runs):
        prefix = f"{number + 1}-" if len(runs) > 1 else ""
        own = {figure.name.removeprefix(prefix): figure for figure in drawn if figure.name.startswith(prefix)}
        several = len(runs) > 1
        inside = _run(run, own, [] if several else weights, several=several)
        body.append(_folded(run.label, inside) if len(runs) > 1 else inside)
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · brfx</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>{_style()}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _of_one(name: str, runs: Sequence[RunFiles]) -> bool:
    """Whether a figure is of one of several runs, or of one run alone."""
    return (
        name[:1].isdigit()
        if len(runs) > 1
        else name.startswith(("steps-", "histograms-", "over-time-", "sensitivity-"))
    )


def _head(runs: Sequence[RunFiles], title: str, drawn: Sequence[_Figure]) -> str:
    """The headline, the key figures and the picture beside them."""
    sentences = "".join(
        f'<p class="lead">{_swatch(number, run) if len(runs) > 1 else ""}{escape(text.sentence(run))}</p>'
        for number, run in enumerate(runs)
    )
    facts = ""
    if len(runs) == 1:
        pairs = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in text.facts(runs[0])
        )
        facts = f'<dl class="facts">{pairs}</dl>'
    pictures = [figure for figure in drawn if figure.name == "metric"]
    picture = headline(runs)
    if picture is not None:
        caption = "The largest layer's weights against their levels"
        pictures.append(_Figure("headline", caption, inline_svg(picture, caption)))
    return f"<header><h1>{escape(title)}</h1>{sentences}{facts}</header>" + _panels(pictures, "hero")


def _run(run: RunFiles, own: dict[str, _Figure], weights: Sequence[_Figure], *, several: bool) -> str:
    parts = []
    steps = [own[name] for name in ("steps-weights", "steps-activations") if name in own] if several else []
    parts.append(_section("Step sizes", _panels(steps)))
    parts.append(_section("Weights", _weights(run, own, weights)))
    if run.before or run.after:
        parts.append(_section("Activations", _kind(run, own, "activations", _ABOUT_ACTIVATIONS)))
    parts.append(_section("Sensitivity", _sensitivity(run, own)))
    parts.append(_section("The network", _network(run)))
    parts.append(_section("Files", _files(run)))
    parts.append(_section("To do it again", _again(run)))
    return "".join(parts)


_ABOUT_WEIGHTS = (
    "Values are divided by the layer's step, so that levels lie at fixed places. Error: mean (v \N{MINUS SIGN} level)² "
    "/ mean v². Effectiveness: 100 % when every weight is on its level, 50 % when they are spread evenly between them. "
    "Closed: the share of the distance to the levels that is gone since the warm-up. A dead channel lets nothing pass."
)
_ABOUT_ACTIVATIONS = (
    "Of one batch that is the same in every epoch, in eval mode, after ReLU and clip. A peak that would hide all else "
    "is cut off; its share is written beside it, before → after."
)


def _weights(run: RunFiles, own: dict[str, _Figure], weights: Sequence[_Figure]) -> str:
    if run.before or run.after:
        return _panels(weights) + _kind(run, own, "weights", _ABOUT_WEIGHTS)
    table = text.weights_only(run)
    if table is None:
        return ""
    note = "<p class='note'>This run kept no histograms. These figures are from its metrics.jsonl.</p>"
    return _panels(weights) + note + _table(table, "weights")


def _kind(run: RunFiles, own: dict[str, _Figure], kind: str, about: str) -> str:
    wide = [own[name] for name in (f"histograms-{kind}", f"over-time-{kind}") if name in own]
    return f'<p class="note">{escape(about)}</p>' + "".join(map(_wide, wide)) + _layer_table(run, kind)


def _layer_table(run: RunFiles, kind: str) -> str:
    """The table of layers, with a bar of the levels' shares in each row."""
    table = text.layers(run, kind)
    if table is None:
        return ""
    names, rows = table
    line = run.after or run.before
    assert line is not None
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*names, "share of values on each level"))
    bars = [_bar(text.shares(line[kind][row[0]])) for row in rows]
    body = "".join(f"<tr>{_cells(row)}<td>{bar}</td></tr>" for row, bar in zip(rows, bars, strict=True))
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _bar(shares: Sequence[float]) -> str:
    """Shares as parts of a bar, from the lowest level to the highest, each with its number where there is room."""
    if not shares:
        return '<span class="note">more than 16 levels</span>'
    parts, middle = [], (len(shares) - 1) / 2
    for number, share in enumerate(shares):
        strength = 22 + 33 * abs(number - middle) / max(middle, 1)
        label = f"{100 * share:.0f}" if share >= 0.07 else ""
        parts.append(f'<i style="width:{100 * share:.2f}%;--m:{strength:.0f}%" title="{100 * share:.2f} %">{label}</i>')
    return f'<span class="bar">{"".join(parts)}</span>'


_ABOUT_SENSITIVITY = (
    "What the bits of one layer cost alone: the Kullback-Leibler divergence of the classes' probabilities from the "
    "FP32 network's, in nats an image, where that layer is quantized and all else is in FP32. Ringed: the bits it has."
)


def _sensitivity(run: RunFiles, own: dict[str, _Figure]) -> str:
    tables = [(kind, table) for kind in KINDS if (table := text.sensitivity(run, kind)) is not None]
    if not tables:
        return ""
    wide = [own[name] for name in (f"sensitivity-{kind}" for kind, _ in tables) if name in own]
    shown = "".join(_table(table, f"sensitivity of {kind}", "figures") for kind, table in tables)
    return f'<p class="note">{escape(_ABOUT_SENSITIVITY)}</p>' + "".join(map(_wide, wide)) + shown


def _network(run: RunFiles) -> str:
    if run.network is None:
        return ""
    svg = network_svg({run.run.bits: run.network["places"]}, f"the network of {run.label} with its bits")
    exceptions = "".join(f'<li class="float">{escape(line)}</li>' for line in run.network.get("exceptions", ()))
    left = f"<ul>{exceptions}</ul>" if exceptions else ""
    caption = f"{run.network.get('footer', '')}. A row is a layer with what follows it; rows are joined on the left."
    return left + _wide(_Figure("network", caption, svg))


def _files(run: RunFiles) -> str:
    files, speeds = text.exported(run), text.speeds(run)
    shown = _table(files, "files") if files is not None else ""
    shown += "".join(f"<p>{escape(line)}</p>" for line in text.onnx(run))
    if speeds is not None:
        shown += _table(speeds, "speeds", "figures") + f'<p class="note">{escape(text.timed_how(run))}</p>'
    return shown


def _again(run: RunFiles) -> str:
    command = text.command(run)
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    surroundings: Table = (("", ""), text.surroundings(run))  # type: ignore[assignment]
    settings: Table = (("setting", "value"), list(text.settings(run).items()))  # type: ignore[assignment]
    around = _table(surroundings, "versions and machine") if surroundings[1] else ""
    return shown + around + f"<details><summary>All settings</summary>{_table(settings, 'settings')}</details>"


# Parts of a page.


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def _folded(title: str, inside: str) -> str:
    return f'<details class="run"><summary>{escape(title)}</summary>{inside}</details>'


def _panels(drawn: Sequence[_Figure], kind: str = "") -> str:
    return f'<div class="panels {kind}">{"".join(_figure(figure) for figure in drawn)}</div>' if drawn else ""


def _figure(figure: _Figure) -> str:
    return f"<figure>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _wide(figure: _Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f'<figure class="wide"><div class="scroll">{figure.svg}</div>{caption}</figure>'


def _table(table: Table, label: str, kind: str = "") -> str:
    names, rows = table
    head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr></thead>" if any(names) else ""
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    whole = f'<table class="{kind}" aria-label="{escape(label)}">{head}<tbody>{body}</tbody></table>'
    return f'<div class="scroll">{whole}</div>'


def _cells(row: Sequence[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _swatch(number: int, run: RunFiles) -> str:
    colour = f"var(--s{number % len(SERIES)})"
    return f'<span class="swatch" style="background: {colour}"></span><b>{escape(run.label)}:</b> '


def _style() -> str:
    def variables(colours: dict[str, str]) -> str:
        return "".join(f"{name}:{colour};" for name, colour in colours.items())

    text = Path(__file__).with_name("page.css").read_text(encoding="utf-8").partition("*/")[2]
    return text.replace("LIGHT", variables(LIGHT)).replace("DARK", variables(DARK))
