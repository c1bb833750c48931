"""In processes of their own: what a tensor costs depends on what was allocated before."""

import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import nn

import brfx
from brfx.train import Callback, fit
from brfx.train.memory import memory_kept

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory"
)

MB = 1 << 20


def pages_taken(size: int = 64 * MB) -> int:
    """How many pages a tensor of so many bytes costs after others that took and freed whatever room there was."""
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def in_a_new_process(function):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


def pages_without_with_and_after() -> tuple[int, int, int]:
    without = pages_taken()
    with memory_kept():
        kept = pages_taken()
    return without, kept, pages_taken(512 * MB)  # more than the heap can have kept room for


def test_freed_memory_is_taken_again_without_a_page_fault():
    without, kept, after = in_a_new_process(pages_without_with_and_after)
    assert without > 10
    assert kept <= 10
    assert after > 10


def resident_before_with_and_after() -> tuple[int, int, int]:
    before = resident()
    with memory_kept():
        pages_taken()
        kept = resident()
    return before, kept, resident()


def test_at_the_end_memory_is_given_back():
    before, kept, after = in_a_new_process(resident_before_with_and_after)
    assert kept > before + 48 * MB
    assert after < before + 16 * MB


def pages_before_and_in_training() -> tuple[int, int]:
    class Pages(Callback):
        taken = -1

        def on_batch(self, progress):
            self.taken = pages_taken()

    before, seen = pages_taken(), Pages()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8))]
    fit(model, batches, batches, brfx.TrainConfig(epochs=1), callbacks=[seen])
    return before, seen.taken


def test_training_keeps_memory():
    before, taken = in_a_new_process(pages_before_and_in_training)
    assert before > 10
    assert 0 <= taken <= 10
