"""Files written so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` to a file beside ``path``, flushed to disk, then renamed over it.

    Raises:
        OSError: no room, or no permission; names ``path``, and what was there still is.
    """
    replace_atomically(path, saved(content))


def write_text_atomically(path: Path, text: str) -> None:
    """``text`` to a file beside ``path``, flushed to disk, then renamed over it.

    Raises:
        OSError: as :func:`write_atomically`.
    """
    replace_atomically(path, text.encode())


def saved(content: Any) -> memoryview:
    """The bytes of ``torch.save``, which says nothing of a full disk when it writes to one itself."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def replace_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """``parts`` to a file beside ``path``, flushed to disk, then renamed over it.

    Raises:
        OSError: as :func:`write_atomically`.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
