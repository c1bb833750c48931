"""Read and restore the state of all random generators, as plain data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def parts_of(data: Any) -> list[Any]:
    """What an epoch of ``data`` may be drawn by, each once: itself, and of a ``DataLoader`` its samplers and its data
    set."""
    batch_sampler = getattr(data, "batch_sampler", None)
    inner = getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    parts = (data, *inner, getattr(data, "dataset", None))
    return list({id(part): part for part in parts if part is not None}.values())


def generators_of(data: Any) -> list[torch.Generator]:
    """The generators of :func:`parts_of`."""
    found = [getattr(part, "generator", None) for part in parts_of(data)]
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Of Python, NumPy, torch on the CPU and every CUDA device, and ``generators``."""
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    keys = torch.from_numpy(np.asarray(words, np.int64))
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            keys,
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "data": [generator.get_state() for generator in generators],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Be where :func:`random_state` was."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, own in zip(generators, state.get("data", ()), strict=False):
        generator.set_state(own)
    if torch.backends.mps.is_available() and state.get("mps") is not None:
        torch.mps.set_rng_state(state["mps"])
