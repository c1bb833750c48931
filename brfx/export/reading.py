"""Read exported files back: what they say of themselves, and their network as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brfx.data import Preprocessing
from brfx.errors import BrfxError, ExportError, first_line
from brfx.export.integer import integer_model
from brfx.export.onnx import onnx_runner, tensors
from brfx.export.packed_reader import read_packed
from brfx.export.packed_runner import packed_runner
from brfx.extras import needed
from brfx.io.exported_program import load_program, read_extra
from brfx.metadata import metadata_of

#: Suffixes of exported files that can be run.
EXPORTED = (".onnx", ".pt2", ".safetensors")


def is_exported(path: Path) -> bool:
    """Whether a file is one that was exported, and no checkpoint."""
    if path.suffix != ".safetensors":
        return path.suffix in EXPORTED
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            return "brfx" in (file.metadata() or {})
    except Exception:  # whoever reads it as a checkpoint says what is wrong
        return False


def entries_of(path: Path) -> dict[str, Any]:
    """What :func:`brfx.metadata.metadata_entries` wrote into an exported file; empty for a file of another program.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return read_packed(path).header
        if path.suffix == ".pt2":
            return dict(json.loads(read_extra(path, "brfx.json") or "{}"))
        import onnx

        found = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
        return {key: json.loads(value) for key, value in found.items()} if "brfx" in found else {}
    except BrfxError:
        raise
    except ImportError as error:
        raise ExportError(needed("reading an ONNX file", "onnx", error)) from error
    except Exception as error:  # protocol buffers, zip and JSON each have their own
        raise ExportError(f"{path}: damaged, or no {path.suffix} file ({first_line(error)})") from error


def preprocessing_in(path: Path, entries: dict[str, Any]) -> Preprocessing | None:
    """The preprocessing among the entries of a file; ``None`` where there is none.

    Raises:
        ExportError: it is not what this brfx writes.
    """
    stored = entries.get("preprocessing")
    if stored is None:
        return None
    try:
        return Preprocessing.from_dict(stored)
    except BrfxError as error:
        raise ExportError(f"{path}: its preprocessing is not what this brfx knows ({first_line(error)})") from error


def runner(path: Path, load: Callable[[Path], nn.Module], *, integer: bool = False) -> Callable[..., list[Tensor]]:
    """A file as a function of tensors on the CPU: ``.onnx`` in ONNX Runtime, ``.pt`` and ``.pt2`` in PyTorch, packed
    codes by their own operations. No file can run code.

    Args:
        path: the file.
        load: reads a ``.pt``.
        integer: run a ``.pt`` in its integer form, the reference interpreter.

    Raises:
        ExportError: no such file, or no reader for it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    if path.suffix == ".onnx":
        try:
            return onnx_runner(path)
        except ImportError as error:
            raise ExportError(needed("running an ONNX file", "onnx", error)) from error
    if path.suffix == ".safetensors":
        return packed_runner(path)
    if path.suffix == ".pt2":
        return _torch_runner(path)
    if path.suffix not in (".pt", ".pth"):
        raise ExportError(f"{path}: takes brfx's .pt, {', '.join(EXPORTED[:-1])} or {EXPORTED[-1]}")
    model = load(path).eval()
    if integer:
        model = integer_model(model).model
    return lambda *inputs: tensors(model(*inputs))


def _torch_runner(path: Path) -> Callable[..., list[Tensor]]:
    try:
        module = load_program(path).module()
    except BrfxError:
        raise
    except Exception as error:  # zip, JSON and torch each have their own
        raise ExportError(f"{path}: torch.export does not load this file ({first_line(error)})") from error

    def run(*inputs: Tensor) -> list[Tensor]:
        try:
            return tensors(module(*inputs))
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
            raise ExportError(f"{path}: does not run on {shapes} ({first_line(error)})") from error

    return run


def preprocessing_of(path: Path, model: nn.Module | None = None) -> Preprocessing | None:
    """The preprocessing of a file, or of the ``model`` that was read from it; ``None`` where nobody said."""
    if model is not None:
        return metadata_of(model).preprocessing  # type: ignore[return-value]
    return preprocessing_in(path, entries_of(path)) if is_exported(path) else None


class AsModule(nn.Module):
    """A function of images as a module that can be evaluated: its first output, on the CPU."""

    def __init__(self, run: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.run = run
        self.here = nn.Parameter(torch.zeros(()), requires_grad=False)  # by which its device is told

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)[0]
