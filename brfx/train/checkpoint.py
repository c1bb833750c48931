"""Checkpoints of a run in progress, written so that a crash leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` to a file beside ``path``, flushed to disk, then renamed over it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
