"""The look of figures: colours that the colour-blind tell apart, and SVG whose colours follow the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from brfx.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1b1f24", "#68707a", "#d5d9de", "#fefefe"
#: Okabe and Ito's colours.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), (0, (8, 2)))

#: ``{colour in a file: its name in the page's style sheet}``
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    colour: f"--s{number}" for number, colour in enumerate(SERIES)
}
#: The same on a dark page.
DARK = {
    "--ink": "#e6e9ed",
    "--muted": "#9aa3ad",
    "--rule": "#3a4048",
    "--paper": "#15181c",
    "--s0": "#5aaee8",
    "--s1": "#f0894a",
    "--s2": "#39c99c",
    "--s3": "#e6a3c8",
    "--s4": "#f2bd55",
    "--s5": "#9ad6f7",
}
LIGHT = {name: colour for colour, name in VARIABLES.items()}

_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "brfx",
    "pdf.fonttype": 42,
}


def require_matplotlib() -> None:
    """Raise ConfigError where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'matplotlib>=3.9'") from error


@contextmanager
def figure_style() -> Iterator[None]:
    """Within the block figures have this look."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        yield


def inline_svg(figure: Figure, label: str) -> str:
    """``figure`` as an ``<svg>`` for a page that defines :data:`VARIABLES`; ``label`` is what a screen reader says."""
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"|font-family: [^;]*; | version="1.1"', "", svg)
    used = set(re.findall(r'(?:xlink:href="|href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var({name})")
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    size = f'width="{width:g}pt" height="{height:g}pt"'
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).removeprefix("<svg ")
    return f'<svg role="img" aria-label="{escape(label)}" {size} {svg.strip()}'
