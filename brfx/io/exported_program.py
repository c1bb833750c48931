"""``.pt2`` files of ``torch.export``, read so that no code in them runs.

torch reads their pickles without ``weights_only``, evaluates the sizes in them as Python, looks up what a graph
calls by dotted name, ``torch.os.system`` included, imports the modules that a structure of inputs names, and loads the
compiled parts of a package. Here each is checked or switched off. torch gets a copy of the entries that were checked,
since its reader of archives may find another entry under a name than Python's does.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from brfx.errors import ExportError

#: The entries that a program is loaded from, behind the archive's folder: marks, graphs, weights; those of torch 2.6.
_ENTRY = re.compile(
    r"(\.data/)?\.?\w+|models/\w+\.json|data/(weights|constants)/\w+(\.json|\.pt)?|data/sample_inputs/\w+\.pt"
    r"|serialized_\w+\.(json|pt)"
)
#: What a graph may call besides operators: arithmetic of sizes, and operators that run a part of the graph.
_CALLS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_\w+|math\.[a-z]\w*"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|wrap_with_(set_grad_enabled|autocast))"
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|prim|brfx)\.(\w+)\.(\w+)")
#: A size: numbers, symbols such as ``s31``, and the functions of them that torch writes.
_SIZE_CHARACTERS = re.compile(r"[\w\s'(),=+\-*/<>]*")
_SIZE_WORD = re.compile(
    r"[a-z]{1,2}\d+|Symbol|Integer|positive|nonnegative|integer|real|True|False|Add|Mul|Pow|Max|Min|Mod|PythonMod"
    r"|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Eq|Ne|Lt|Le|Gt|Ge|oo|int_oo"
)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a ``.pt2`` file.

    Raises:
        ExportError: there is something in it that could run code, or read and write files.
        Exception: whatever torch, zip and JSON raise for a file that is damaged or of another kind.
    """
    plain = _plain_copy(path)
    with _weights_only():
        return torch.export.load(plain)


def read_extra(path: Path, name: str) -> str | None:
    """The text of an extra file in a ``.pt2``; ``None`` where there is none."""
    with zipfile.ZipFile(path) as archive:
        names = (entry for entry in archive.namelist() if _is_extra(entry))
        found = next((entry for entry in names if entry.endswith((f"/extra/{name}", f"extra_files/{name}"))), None)
        return None if found is None else archive.read(found).decode()


def _is_extra(entry: str) -> bool:
    return entry.split("/")[1:2] == ["extra"] or entry.startswith("extra_files/")  # the latter in torch 2.6


def _plain_copy(path: Path) -> io.BytesIO:
    """The archive in memory, without its extra files."""
    with zipfile.ZipFile(path) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as copy:
        for entry, content in contents.items():
            if _is_extra(entry):
                continue
            suspect = None if _ENTRY.fullmatch(entry.partition("/")[2] or entry) else entry
            if suspect is None and entry.endswith(".json"):
                graph = json.loads(content)
                suspect = next(chain(_suspects(graph), _IMPORTS.intersection(_keys(graph))), None)
            if suspect is not None:
                raise ExportError(f"{path}: {suspect[:60]!r} in it could run code, so it is not loaded")
            copy.writestr(entry, content)
    plain.seek(0)
    return plain


def _suspects(content: Any) -> Iterator[str]:
    """What torch would run or unpickle of JSON."""
    if isinstance(content, list):
        for value in content:
            yield from _suspects(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key not in _CHECKS or isinstance(value, dict) or value is None:  # a tensor may have the name of a key
                yield from _suspects(value)
            elif not (isinstance(value, str) and _CHECKS[key](value)):
                yield str(value)


def _keys(content: Any) -> Iterator[str]:
    """Each key in JSON, and in the JSON that its strings are: the structure of inputs is such a string."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError:
            return
    if isinstance(content, dict):
        yield from content
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _keys(value)


def _is_size(text: str) -> bool:
    words = re.findall(r"[^\W\d]\w*", text)
    return bool(_SIZE_CHARACTERS.fullmatch(text)) and all(map(_SIZE_WORD.fullmatch, words))


def _is_call(text: str) -> bool:
    named = _OPERATOR.fullmatch(text)
    if named is None:
        return bool(_CALLS.fullmatch(text))
    namespace, name, overload = named.groups()
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if operator is None:  # torch says that it does not know it
        return True
    return isinstance(operator, torch._ops.OpOverload) and all(
        argument.name != "filename" for argument in operator._schema.arguments
    )


def _is_tensor_entry(text: str) -> bool:
    return re.fullmatch(r"(weight|tensor)_\w+", text) is not None


#: Keys whose values torch evaluates, looks up or unpickles.
_CHECKS: dict[str, Callable[[str], bool]] = {"expr_str": _is_size, "target": _is_call, "path_name": _is_tensor_entry}
#: Keys in a structure of inputs and outputs that have modules imported.
_IMPORTS = frozenset({"__enum__", "default_factory_module"})


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
