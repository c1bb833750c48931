import platform
import resource

import pytest
import torch
from torch import nn

import brfx
from brfx.data import BatchLoader
from brfx.train import Callback, fit
from brfx.train.memory import memory_kept

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory"
)

MB = 1 << 20


def pages_taken() -> int:
    """How many pages a tensor of 64 MB costs after others that took and freed whatever room there was."""
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(16 * MB)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_freed_memory_is_taken_again_without_a_page_fault():
    assert pages_taken() > 10
    with memory_kept():
        assert pages_taken() <= 10
    assert pages_taken() > 10


def test_at_the_end_memory_is_given_back():
    before = resident()
    with memory_kept():
        pages_taken()
        assert resident() > before + 48 * MB
    assert resident() < before + 16 * MB


def test_training_keeps_memory(digits):
    class Pages(Callback):
        taken: int | None = None

        def on_batch(self, progress):
            self.taken = pages_taken()

    seen = Pages()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    train, val = (BatchLoader(part, digits.preprocessing, 256) for part in (digits.train, digits.val))
    fit(model, train, val, brfx.TrainConfig(epochs=1), callbacks=[seen])
    assert seen.taken is not None
    assert seen.taken <= 10
