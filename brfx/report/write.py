"""Write a report's page and its figures from run folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from brfx.errors import ConfigError
from brfx.io.atomic import write_text_atomically
from brfx.report.run_files import RunFiles, read_run_files
from brfx.report.style import figure_style, require_matplotlib

if TYPE_CHECKING:
    from brfx.analysis.network import Place

#: What a figure is written as: for the web, for LaTeX, for slides.
SUFFIXES = (".svg", ".pdf", ".png")


def read(folders: Iterable[Path]) -> list[RunFiles]:
    """The runs in ``folders``, with labels that tell them apart.

    Raises:
        ConfigError: one is no run, is given twice, measures another metric, or a file of it is damaged.
    """
    folders = list(folders)
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ConfigError(f"{folder}: given twice; give each run once")
    names = [path.name for path in resolved]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    runs = [read_run_files(folder, label) for folder, label in zip(folders, labels, strict=True)]
    other = next((run for run in runs if run.run.metric != runs[0].run.metric), None)
    if other is not None:
        raise ConfigError(
            f"{other.run.path}: it measures {other.metric}, {runs[0].run.path} {runs[0].metric}: report them apart"
        )
    return runs


def write_page(runs: Sequence[RunFiles], path: Path) -> None:
    """One HTML page at ``path``, in the place of what was there.

    Raises:
        ConfigError: there is no matplotlib, no such folder, or a file of a run says something that brfx never writes.
        OSError: it cannot be written.
    """
    require_matplotlib()
    from brfx.report.page import page

    _require_folder(path.parent)
    with damage_named(runs):
        content = page(runs)
    write_text_atomically(path, content)


def write_network(panels: Mapping[str, Sequence[Place]], path: Path) -> None:
    """A picture of graphs side by side, ``{heading: places}``, as an SVG file.

    Raises:
        ConfigError: ``path`` is no .svg, or there is no such folder.
        OSError: it cannot be written.
    """
    from brfx.report.network_svg import network_svg

    if path.suffix != ".svg":
        raise ConfigError(f"{path}: the picture of a graph is an .svg: give a name that ends so")
    _require_folder(path.parent)
    plain = {heading: [asdict(place) for place in places] for heading, places in panels.items()}
    write_text_atomically(path, network_svg(plain, " and ".join(panels)))


def write_figures(runs: Sequence[RunFiles], folder: Path) -> int:
    """Every figure as SVG, PDF and PNG, under its name in ``folder``, which is made; returns how many figures.

    Raises:
        ConfigError, OSError: as :func:`write_page`.
    """
    require_matplotlib()
    from brfx.report.figures import figures
    from brfx.report.network_svg import network_svg

    _require_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    count = 0
    with damage_named(runs):
        for name, _, figure in figures(runs):
            with figure_style():
                for suffix in SUFFIXES:
                    figure.savefig(folder / f"{name}{suffix}", dpi=300, metadata=_WITHOUT_DATE[suffix])
            count += 1
        for number, run in enumerate(runs):
            if run.network is not None:
                name = f"{number + 1}-network" if len(runs) > 1 else "network"
                svg = network_svg({run.run.bits: run.network["places"]}, f"the network of {run.label}")
                write_text_atomically(folder / f"{name}.svg", svg)
                count += 1
    return count


_WITHOUT_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder to write into; make it first")


@contextmanager
def damage_named(runs: Sequence[RunFiles]) -> Iterator[None]:
    """Within the block, what a file lacks that brfx always writes is a ConfigError that names the runs."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        where = ", ".join(str(run.run.path) for run in runs)
        raise ConfigError(
            f"{where}: a file of the run is damaged, or of another brfx ({type(error).__name__}: {error})"
        ) from error
