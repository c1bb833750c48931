"""Keep freed memory in the process from one training step to the next."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Names and numbers of malloc.h: free memory to keep at the heap's end, what the heap grows by, and from what size
# on and how many blocks are mappings of their own.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 << 20}
#: The most that glibc's own settings come to in a process that frees large tensors.
_GIVE_BACK = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10, _M_MMAP_THRESHOLD: 32 << 20}


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let glibc keep what a step frees, for the next to take; at the end it is given back.

    By default it hands freed memory to the kernel and asks for it anew, and the kernel clears each page and maps it
    when it is touched: thousands of page faults a step (``python benchmarks/kept_memory.py``). This is the whole
    process's setting, and takes the place of what ``MALLOC_...`` variables say. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    try:
        _set(libc, _KEEP)
        yield
    finally:
        _set(libc, _GIVE_BACK)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, settings: dict[int, int]) -> None:
    for name, value in settings.items():
        libc.mallopt(name, value)
