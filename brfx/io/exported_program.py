"""``.pt2`` files of ``torch.export``, read so that no code in them runs.

torch reads their pickles without ``weights_only``, evaluates the sizes in them as Python, and looks up what a graph
calls by dotted name, ``torch.os.system`` included. Here each is checked or switched off before torch sees the file.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from brfx.errors import ExportError

#: What a graph may call: operators, arithmetic of sizes.
_CALLS = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order|brfx)\.[\w.]+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_\w+|math\.\w+"
)
#: A size: numbers, symbols such as ``s31``, and the functions of them that torch writes.
_SIZE_CHARACTERS = re.compile(r"[\w\s'(),=+\-*/<>]*")
_SIZE_WORD = re.compile(
    r"[a-z]{1,2}\d+|Symbol|Integer|positive|nonnegative|integer|real|True|False|Add|Mul|Pow|Max|Min|Mod|PythonMod"
    r"|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Eq|Ne|Lt|Le|Gt|Ge|oo|int_oo"
)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a ``.pt2`` file.

    Raises:
        ExportError: there is something in it that could run code.
        Exception: whatever torch, zip and JSON raise for a file that is damaged or of another kind.
    """
    _require_plain(path)
    with _weights_only():
        return torch.export.load(path)


def read_extra(path: Path, name: str) -> str | None:
    """The text of an extra file in a ``.pt2``; ``None`` where there is none."""
    with zipfile.ZipFile(path) as archive:
        found = next((entry for entry in archive.namelist() if entry.endswith(f"/extra/{name}")), None)
        return None if found is None else archive.read(found).decode()


def _require_plain(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if entry.endswith(".json") and "/extra/" not in entry:
                for kind, text in _strings(json.loads(archive.read(entry))):
                    if not (_is_size(text) if kind == "expr_str" else _CALLS.fullmatch(text)):
                        raise ExportError(f"{path}: {text[:60]!r} in it could run code, so it is not loaded")


def _strings(content: Any) -> Iterator[tuple[str, str]]:
    """Each size and each name of a function in what JSON holds."""
    if isinstance(content, list):
        for value in content:
            yield from _strings(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key in ("expr_str", "target") and isinstance(value, str):
                yield key, value
            else:
                yield from _strings(value)


def _is_size(text: str) -> bool:
    words = re.findall(r"[^\W\d]\w*", text)
    return bool(_SIZE_CHARACTERS.fullmatch(text)) and all(map(_SIZE_WORD.fullmatch, words))


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within the block ``torch.load`` reads tensors and plain values alone, whatever it is asked."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        os.environ.pop(names[0], None)
        os.environ.update({name: value for name, value in before.items() if value is not None})
