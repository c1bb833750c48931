"""Which room may know which: an arrow that points up is a defect of design, and a circle waiting to be one."""

import ast
import configparser
from pathlib import Path

import pytest

import brfx

PACKAGE = Path(brfx.__file__).parent

#: A module or room, and what it must not import when it is loaded.
FORBIDDEN = {
    "errors": ("brfx",),
    "compat": ("brfx", "torch"),
    "kernels": ("brfx.nn", "brfx.graph", "brfx.passes", "brfx.train", "brfx.fast", "brfx.regularizers"),
    "kernels/channel_sums": ("brfx",),
    "quant": ("brfx.kernels.batch_norm", "brfx.distributed", "brfx.nn", "brfx.graph", "brfx.fast", "brfx.train"),
    "nn": ("brfx.graph", "brfx.passes", "brfx.fast", "brfx.train", "brfx.distributed"),
    "graph": ("brfx.passes", "brfx.fast", "brfx.train", "brfx.export", "brfx.regularizers", "brfx.data"),
    "passes": ("brfx.fast", "brfx.train", "brfx.export", "brfx.regularizers"),
    "train": ("brfx.nn", "brfx.graph", "brfx.passes", "brfx.fast", "brfx.export", "brfx.quant", "brfx.jobs"),
    "io": ("brfx.train", "brfx.jobs", "brfx.fast", "brfx.export"),
    "metadata": ("brfx.data", "brfx.train", "brfx.models"),
    "export": ("brfx.train", "brfx.fast", "brfx.jobs", "brfx.regularizers"),
    "jobs": ("brfx.report",),
    "report": ("torch", "brfx.nn", "brfx.quant", "brfx.graph", "brfx.train", "brfx.analysis", "brfx.export"),
}


def imports(path):
    """Modules that ``path`` imports when it is loaded, those for type checkers left out."""

    def of(nodes):
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.Try):
                yield from of(node.body)

    return list(of(ast.parse(path.read_text()).body))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_arrow_points_up(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).glob("*.py"))
    assert files
    found = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        for name in imports(path)
        for forbidden in FORBIDDEN[room]
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert not found


def test_every_room_is_in_the_package():
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    rooms = {".".join(("brfx", *path.parent.relative_to(PACKAGE).parts)) for path in PACKAGE.rglob("__init__.py")}
    assert set(settings["options"]["packages"].split()) == rooms | {"brfx_cli"}
