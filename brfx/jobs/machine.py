"""The machine that a run is on: what it is, for ``config.json``, and whether a device can be used."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from brfx.errors import ConfigError, first_line


def machine(device: str) -> dict[str, Any]:
    """The operating system, the processor and how many cores of it may be used, and the GPU where ``device`` is one."""
    found: dict[str, Any] = {"system": platform.platform(), "processor": _processor(), "cores": _cores()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def require_device(device: str) -> None:
    """Raise ConfigError unless a tensor can be made on ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: not usable here ({first_line(error)})") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Its name, which only Linux has in a file; elsewhere what Python knows."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
