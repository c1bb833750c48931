"""Files of a run in progress, written so that a crash leaves the old one or the new one, and read so that a damaged
one is noticed."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brfx.errors import CheckpointError, TrainingError, first_line
from brfx.io.atomic import replace_atomically, saved

log = logging.getLogger(__name__)

#: What a checkpoint begins with; the SHA-256 of the rest in hexadecimal, and a line break, follow.
_MAGIC = b"brfx checkpoint 1 "
_HEADER = len(_MAGIC) + 64 + 1

#: Where a run folder has its checkpoints.
FOLDER = "checkpoints"


@contextmanager
def written_into(run_dir: Path | None) -> Iterator[None]:
    """An error of writing names the file, and how the run goes on.

    Raises:
        TrainingError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or run_dir}: cannot write it ({error.strerror}); what was saved before is whole: "
            f"free some space, then go on with --resume {run_dir}"
        ) from error


def state_sha256(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a model's state dict: names, types, shapes and values, wherever they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write plain data and tensors behind their SHA-256, atomically.

    Raises:
        OSError: as :func:`brfx.io.atomic.write_atomically`.
    """
    content = saved(state)
    digest = hashlib.sha256(content).hexdigest().encode()
    replace_atomically(path, _MAGIC + digest + b"\n", content)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content that :func:`write_checkpoint` wrote; tensors and plain containers only, so that no file can run code.

    Raises:
        CheckpointError: absent, truncated, changed by as much as a bit, or holding pickled code, which is refused.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror})") from error
    header, payload = content[:_HEADER], memoryview(content)[_HEADER:]
    if not header.startswith(_MAGIC):
        raise CheckpointError(f"{path}: not a checkpoint of a run, or a damaged one")
    if header != _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path}: truncated or damaged, its checksum differs")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds Python objects besides tensors, and reading these could run code"
        ) from error
    except Exception as error:  # a checksum that fits proves no good intentions
        raise CheckpointError(f"{path}: not a checkpoint of a run ({first_line(error)})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint of a run (it holds a {type(state).__name__})")
    return state


class Checkpoints:
    """The checkpoints of one run: the newest ``keep`` of a folder, named by the batches that went before.

    Args:
        folder: made when the first is written.
        keep: how many stay; at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def write(self, batches: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        write_checkpoint(self.folder / f"{batches:09}.ckpt", state)
        for path in (*self.paths()[self.keep :], *self.folder.glob("*.partial")):  # a kill inside a write left these
            path.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest that is whole, with a warning for each damaged one; ``None`` where none was ever written.

        Raises:
            CheckpointError: there are some and all are damaged.
        """
        paths = self.paths()
        for path in paths:
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        if paths:
            raise CheckpointError(f"{self.folder}: none of {len(paths)} checkpoints is whole; start the run anew")
        return None

    def remove(self) -> None:
        """Remove all of them, and the folder if nothing else is in it."""
        for path in self.paths():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def paths(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("*.ckpt"), reverse=True)


def has_checkpoints(run_dir: Path) -> bool:
    """Whether a run that is resumed has anything to go on from."""
    return any((run_dir / FOLDER).glob("*.ckpt"))
