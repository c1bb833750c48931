"""Exceptions. Every message says what is wrong, where, and what to do."""

from __future__ import annotations

import errno


class BrfxError(Exception):
    """Base of every error that brfx raises on purpose."""


class ConfigError(BrfxError, ValueError):
    """A setting is out of range or contradicts another one."""


class TraceError(BrfxError):
    """``torch.fx`` could not turn the model into a graph."""


class RewriteError(BrfxError):
    """The rewritten model, quantizers off, does not compute what the float model does."""


class CheckpointError(BrfxError):
    """A checkpoint cannot be read, or does not belong to the model."""


class DataError(BrfxError):
    """A data set is absent, empty or does not fit the model."""


class NotCalibratedError(BrfxError, RuntimeError):
    """A quantizer was asked to quantize before its step was set."""


class TrainingError(BrfxError, RuntimeError):
    """Training cannot go on, or would not mean anything."""


class Interrupted(BrfxError):
    """Ctrl-C or SIGTERM stopped a run between two batches; ``signal`` is its number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class ExportError(BrfxError):
    """A model cannot be written in the format asked for."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut to what fits into one of ours; of an OSError what it means."""
    if isinstance(error, OSError):
        return explained(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [repr(error)])[0][:200]


_ADVICE = {
    errno.ENOENT: "no such file or folder",
    errno.EEXIST: "exists already",
    errno.EACCES: "permission denied: choose another place, or change its permissions",
    errno.EPERM: "permission denied: choose another place, or change its permissions",
    errno.EROFS: "the disk can only be read: choose another place",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
    errno.EMFILE: "too many open files: raise `ulimit -n`, or lower --workers",
    errno.ENAMETOOLONG: "the name is too long",
}


def explained(error: OSError) -> str:
    """``file: what is wrong`` instead of Python's ``[Errno 2] No such file or directory: 'file'``."""
    if isinstance(reason := getattr(error, "reason", None), OSError):  # of a URLError
        return explained(reason)
    what = _ADVICE.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    where = error.filename2 if error.filename2 is not None else error.filename
    return what if where is None else f"{where}: {what}"
