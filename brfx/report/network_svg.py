"""A picture of a network: a row a layer with what follows it, joined by a rail, bits as colour, FP32 in red."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from brfx.report.style import DARK, LIGHT

#: Of one to eight bits, dark to light (viridis); few bits are dark.
BITS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
FLOAT = "#d0342c"

Place = Mapping[str, Any]

_ROW, _BOX, _LETTER, _GAP, _LANE = 30, 20, 6.4, 12, 10
#: Where a row ends, and goes on in the next; and how long a reason may be.
_WIDTH, _REASON = 560, 60

_STYLE = """
.brfx-net { --ink: LIGHT_INK; --muted: LIGHT_MUTED; --rule: LIGHT_RULE; --paper: LIGHT_PAPER; }
@media (prefers-color-scheme: dark) {
  .brfx-net { --ink: DARK_INK; --muted: DARK_MUTED; --rule: DARK_RULE; --paper: DARK_PAPER; }
}
@media print {
  .brfx-net { --ink: LIGHT_INK; --muted: LIGHT_MUTED; --rule: LIGHT_RULE; --paper: LIGHT_PAPER; }
}
.brfx-net text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
.brfx-net .head { font-weight: 600; font-size: 13px; }
.brfx-net .box { fill: none; stroke: var(--muted); }
.brfx-net .dashed { stroke-dasharray: 3 2; }
.brfx-net .line { fill: none; stroke: var(--muted); stroke-width: 1.3; }
.brfx-net .dot { fill: var(--paper); stroke: var(--muted); stroke-width: 1.3; }
.brfx-net .observer { fill: var(--paper); stroke: #e69f00; stroke-width: 2; }
.brfx-net .why { fill: RED; }
"""


@dataclass
class _Row:
    """Places one behind the other, none of which but the last has another reader than the next."""

    places: list[Place]
    sources: set[int] = field(default_factory=set)  #: rows that the first one reads


def network_svg(panels: Mapping[str, Sequence[Place]], label: str) -> str:
    """An ``<svg>`` with a column for each of ``panels``: ``{heading: places}``, which
    :func:`brfx.analysis.network.network` gave, as dicts. It is a file of its own, or part of a page; on a dark screen
    its lines are light."""
    x, height, parts = 0.0, 0.0, []
    for heading, places in panels.items():
        drawn, width, tall = _panel(places, heading, x)
        parts.append(drawn)
        x, height = x + width + 24, max(height, tall)
    legend = _legend([place for places in panels.values() for place in places], height + 14)
    width, height = max(x, 420.0), height + 44
    style = _STYLE
    for theme, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        for name in ("ink", "muted", "rule", "paper"):
            style = style.replace(f"{theme}_{name.upper()}", colours[f"--{name}"])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="brfx-net" role="img" aria-label="{escape(label)}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"<style>{style.replace('RED', FLOAT)}</style>{''.join(parts)}{legend}</svg>"
    )


def rows_of(places: Sequence[Place]) -> list[_Row]:
    """``places`` as rows in order of execution; a layer begins one, and so does what is read from several places."""
    readers: dict[str, int] = {}
    for place in places:
        for source in place["inputs"]:
            readers[source] = readers.get(source, 0) + 1
    rows: list[_Row] = []
    row_of: dict[str, int] = {}
    for place in places:
        inputs = [source for source in place["inputs"] if source in row_of]
        before = row_of[inputs[0]] if len(inputs) == 1 else None
        if before is not None and _continues(rows[before], place, readers[inputs[0]]):
            rows[before].places.append(place)
            row_of[place["id"]] = before
        else:
            rows.append(_Row([place], {row_of[source] for source in inputs}))
            row_of[place["id"]] = len(rows) - 1
    return rows


def _continues(row: _Row, place: Place, readers: int) -> bool:
    last, has_layer = row.places[-1], any(part["role"] == "layer" for part in row.places)
    full = sum(_width(part) + _GAP for part in (*row.places, place)) > _WIDTH
    return last["id"] in place["inputs"] and readers == 1 and not full and not (has_layer and place["role"] == "layer")


def _lanes(rows: list[_Row]) -> dict[int, int]:
    """For each row that one other than the next reads, the lane left of the rail down which its value goes."""
    until: dict[int, int] = {}
    for index, row in enumerate(rows):
        for source in row.sources:
            if index > source + 1:
                until[source] = index
    lanes: dict[int, int] = {}
    busy: list[int] = []  # of each lane, the row up to which it is taken
    for source in sorted(until):
        lane = next((lane for lane, end in enumerate(busy) if end <= source), len(busy))
        busy[lane : lane + 1] = [until[source]]
        lanes[source] = lane
    return lanes


def _panel(places: Sequence[Place], heading: str, left: float) -> tuple[str, float, float]:
    """The drawing, its width and its height."""
    rows = rows_of(places)
    lanes = _lanes(rows)
    rail = left + 12 + _LANE * (max(lanes.values(), default=-1) + 1)
    top = 34.0
    parts = [f'<text class="head" x="{left + 4:.0f}" y="14">{escape(heading)}</text>']

    def middle(index: int) -> float:
        return top + index * _ROW + _ROW / 2 - 6

    for index, row in enumerate(rows):
        for source in row.sources:
            if source == index - 1:
                parts.append(f'<path class="line" d="M{rail:.0f} {middle(source):.0f}V{middle(index):.0f}"/>')
            else:
                lane = rail - _LANE * (lanes[source] + 1)
                start, end, bend = middle(source), middle(index), 8
                parts.append(
                    f'<path class="line" d="M{rail:.0f} {start:.0f}C{lane:.0f} {start:.0f} {lane:.0f} {start:.0f} '
                    f"{lane:.0f} {start + bend:.0f}V{end - bend:.0f}C{lane:.0f} {end:.0f} {lane:.0f} {end:.0f} "
                    f'{rail:.0f} {end:.0f}"/>'
                )
    widest = 0.0
    for index, row in enumerate(rows):
        x, y = rail + 16, middle(index)
        parts.append(f'<path class="line" d="M{rail:.0f} {y:.0f}H{x:.0f}"/>')
        parts.append(f'<circle class="dot" cx="{rail:.0f}" cy="{y:.0f}" r="3.5"/>')
        for number, place in enumerate(row.places):
            if number:
                parts.append(f'<path class="line" d="M{x - _GAP:.1f} {y:.0f}H{x:.1f}"/>')
            parts.append(_box(place, x, y))
            x += _width(place) + _GAP
        why = "; ".join(place["reason"] for place in row.places if place["quantized"] is False)
        if why:
            short = why if len(why) <= _REASON else why[: _REASON - 2] + " …"
            parts.append(
                f'<text class="why" x="{x:.0f}" y="{y + 4:.0f}">{escape(short)}<title>{escape(why)}</title></text>'
            )
            x += len(short) * 5.8
        widest = max(widest, x)
    return "".join(parts), widest - left, top + len(rows) * _ROW


def _text(place: Place) -> str:
    role = place["role"]
    if role == "quantizer":
        bits = f"W{place['weight_bits']}" if place["weight_bits"] else f"A{place['act_bits']}"
        return f"ReLU {bits}" if place["relu"] else bits
    if role == "layer":
        return " ".join([place["name"], *_operands(place)])
    if role in ("add", "observer"):
        return ""
    last = str(place["name"]).rpartition(".")[2]
    return str(place["kind"]) if last.partition("#")[0].isdigit() else last


def _operands(place: Place) -> list[str]:
    """``W2``, ``A8``; 32 for an operand in FP32."""
    if place["quantized"] is None:
        return []
    weight = place["weight_bits"]
    act = place["act_bits"]
    if weight is None and act is not None and place["quantized"]:
        return [f"A{act}"]  # a product of two activations
    return [f"W{weight or 32}", f"A{act or 32}"]


def _width(place: Place) -> float:
    role = place["role"]
    return 10.0 if role == "observer" else 18.0 if role == "add" else 14 + _LETTER * len(_text(place))


def _box(place: Place, x: float, y: float) -> str:
    role, width = place["role"], _width(place)
    title = f"<title>{escape(_title(place))}</title>"
    if role == "observer":
        return f'<circle class="observer" cx="{x + 5:.1f}" cy="{y:.0f}" r="4">{title}</circle>'
    if role == "add":
        at = f"{x + 9:.1f}"
        return (
            f'<circle class="dot" cx="{at}" cy="{y:.0f}" r="9">{title}</circle>'
            f'<path class="line" d="M{x + 4:.1f} {y:.0f}h10m-5 -5v10"/>'
        )
    fill, ink = _colours(place)
    rounded = 10 if role == "quantizer" else 3
    shape = f'x="{x:.1f}" y="{y - _BOX / 2:.0f}" width="{width:.1f}" height="{_BOX}" rx="{rounded}"'
    dashed = " dashed" if role in ("input", "output") else ""
    paint = f'fill="{fill}"' if fill else f'class="box{dashed}"'
    style = f' style="fill: {ink}"' if ink else ""
    text = f'<text x="{x + width / 2:.1f}" y="{y + 4:.0f}" text-anchor="middle"{style}>{escape(_text(place))}</text>'
    return f"<g>{title}<rect {shape} {paint}/>{text}</g>"


def _colours(place: Place) -> tuple[str, str]:
    """Of the box and of its text; empty where nothing is to be said."""
    if place["role"] == "layer" and place["quantized"] is False:
        return FLOAT, "#ffffff"
    bits = place["weight_bits"] or place["act_bits"]
    if bits is None or not 1 <= bits <= len(BITS):
        return "", ""
    return BITS[bits - 1], "#ffffff" if bits < 6 else "#101010"


def _title(place: Place) -> str:
    about = [f"{place['name']} ({place['kind']})" if place["kind"] else str(place["name"])]
    if place["macs"]:
        about.append(f"{place['macs']:,} multiply-accumulates")
    if place["reason"]:
        about.append(place["reason"])
    return "; ".join(about)


def _legend(places: Sequence[Place], y: float) -> str:
    """What the colours mean, of those that are there."""
    bits = sorted({place["weight_bits"] or place["act_bits"] for place in places} - {None})
    entries = [(BITS[count - 1], f"{count} bit{'s' * (count > 1)}") for count in bits if 1 <= count <= len(BITS)]
    if any(place["quantized"] is False for place in places):
        entries.append((FLOAT, "floating point, with the reason"))
    x, parts = 6.0, []
    for colour, text in entries:
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 19:.0f}" y="{y + 11:.0f}">{escape(text)}</text>')
        x += 19 + _LETTER * len(text) + 16
    if any(place["role"] == "quantizer" for place in places):
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="24" height="14" rx="7" class="box"/>')
        parts.append(f'<text x="{x + 29:.0f}" y="{y + 11:.0f}">quantizer</text>')
        x += 29 + _LETTER * 9 + 16
    if any(place["role"] == "observer" for place in places):
        parts.append(f'<circle class="observer" cx="{x + 5:.0f}" cy="{y + 7:.0f}" r="4"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="{y + 11:.0f}">observer (bin regularization sees it)</text>')
    return "".join(parts)
