"""Checks of an export's path and example inputs, shared by all formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from brfx.errors import ExportError, first_line


def destination(path: str | Path) -> Path:
    """``path``, in a folder that is there; ExportError otherwise."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}")
    return path


def as_inputs(example_inputs: Any) -> tuple[Tensor, ...]:
    """The example as a tuple of tensors on the CPU; ExportError where a model takes something else."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not all(isinstance(value, Tensor) for value in inputs):
        raise ExportError(
            "the exporter takes models of tensors; of a detection model export backbone and head (docs/export.md)"
        )
    return tuple(value.detach().cpu() for value in inputs)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place if all goes well and is gone if not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise ExportError(f"{path}: cannot write this model ({first_line(error)})") from error
