"""What the data loader costs, beside a training step of ResNet-20.

    python benchmarks/loader.py [--batch 128] [--jpegs 256] [--jpeg-batch 32] [--busy-ms 250] [--threads 2] [--cpu-time]

prints milliseconds a batch (median): a plain FP32 step, eager, of ResNet-20 at 32 px and of ResNet-18 at 224 px; the
loader on 45,000 random CIFAR-sized images in memory, shifted and mirrored, and its share; the same with more
augmentation; and generated JPEGs of 256x256 at 224 px, as the square of evaluation and as a crop of each, without and
with worker processes: one batch straight after the other, and the wait for a batch where each keeps its consumer
(asleep) busy for --busy-ms. With --cpu-time, of the processor's time of this process, which others on the machine do
not change; what workers take is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.nn import functional as F

import brfx
from brfx.config import Augmentation
from brfx.data import BatchLoader, ImageFiles, Preprocessing, Split

Clock = Callable[[], float]


def waits(batches: Iterable[object], work: float = 0.0, most: int = 50, clock: Clock = time.perf_counter) -> float:
    """Median seconds that ``batches`` takes to give one, with ``work`` seconds slept after each; the first is left out.

    Its ``most`` first batches are taken, two at least.
    """
    iterator, seconds = iter(batches), []
    while len(seconds) < most:
        started = clock()
        if next(iterator, None) is None:
            break
        seconds.append(clock() - started)
        time.sleep(work)
    return median(seconds[1:])


def step_seconds(name: str, batch: int, size: int, repeats: int = 7, clock: Clock = time.perf_counter) -> float:
    """Median seconds of a forward, a backward and an SGD update of a model on ``(batch, 3, size, size)``."""
    model = brfx.build_model(name, 10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))
    seconds = []
    for _ in range(repeats):
        started = clock()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - started)
    return median(seconds[1:])


def make_jpegs(folder: Path, count: int) -> list[Path]:
    """Smooth pictures with some noise, which decode about as slowly as photographs."""
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        coarse = 255 * torch.rand(1, 3, 16, 16, generator=generator)
        smooth = F.interpolate(coarse, size=(256, 256), mode="bicubic")[0]
        noisy = smooth + 8 * torch.randn(3, 256, 256, generator=generator)
        Image.fromarray(noisy.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path, quality=90)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--jpegs", type=int, default=256)
    parser.add_argument("--jpeg-batch", type=int, default=32)
    parser.add_argument("--busy-ms", type=float, default=250, help="what a training step on the JPEGs takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others use the machine too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    clock = time.process_time if given.cpu_time else time.perf_counter
    step = step_seconds("resnet20", given.batch, 32, clock=clock)
    print(f"ResNet-20 step, 32 px, batch {given.batch}, FP32, {given.threads} threads: {1e3 * step:.1f} ms")
    images = torch.randint(0, 256, (45_000, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.zeros(45_000, dtype=torch.int64))
    for augment in (
        Augmentation(),
        Augmentation(mixup=0.2),
        Augmentation(erasing=0.25),
        Augmentation(crop="resized"),
        Augmentation(rand_augment=9),
    ):
        loader = BatchLoader(split, Preprocessing(32), given.batch, augment=augment, num_classes=10)
        wait = waits(loader, clock=clock)
        share = f"{wait / (wait + step):.2%} of step and loader"
        print(f"32 px in memory, batch {given.batch}, {augment}: {1e3 * wait:.2f} ms, {share}")

    step = step_seconds("resnet18", given.jpeg_batch, 224, 3, clock)
    print(f"ResNet-18 step, 224 px, batch {given.jpeg_batch}, FP32, {given.threads} threads: {1e3 * step:.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        paths = make_jpegs(Path(folder), given.jpegs)
        for augment in (Augmentation(), Augmentation(crop="resized"), Augmentation(crop="resized", rand_augment=9)):
            for workers in (0, 2):
                files = ImageFiles(paths, Preprocessing(224), workers)
                split = Split(files, torch.zeros(len(paths), dtype=torch.int64))
                loader = BatchLoader(split, Preprocessing(224), given.jpeg_batch, augment=augment)
                alone, beside = waits(loader, clock=clock), waits(loader, work=given.busy_ms / 1e3, clock=clock)
                print(
                    f"224 px JPEGs, batch {given.jpeg_batch}, {augment}, {workers} workers: {1e3 * alone:.1f} ms "
                    f"({alone / (alone + step):.2%} of step and loader); {1e3 * beside:.1f} ms beside a step of "
                    f"{given.busy_ms:g} ms"
                )


if __name__ == "__main__":
    main()
