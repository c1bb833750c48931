"""What a training step costs on a device: FP32 and brfx, eager and compiled, FP32 and BF16, and Brevitas where it is.

    python benchmarks/device_step.py --device cuda [--model resnet20 --batch 512 --pixels 32 --rounds 30]

One step of each case in turn, so that a ratio compares steps that ran next to each other; a step is forward, loss,
backward and optimizer. Prints a table in Markdown: milliseconds, the ratio to FP32 eager, and on CUDA the peak memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import nn  # noqa: E402

import brfx  # noqa: E402
from benchmarks.train_step import brevitas_case, installed  # noqa: E402
from brfx.train.step import build_step  # noqa: E402
from brfx.train.update import Update  # noqa: E402

LAMBDAS = {"FP32": None, "brfx LSQ": (0.0, 0.0), "brfx LSQ + BR(W+A)": (0.1, 0.01)}


def step_of(name: str, how: str, precision: str, images: Any, labels: Any, options: Any) -> Callable[[], Any]:
    """One training step of a case."""
    torch.manual_seed(0)
    model: nn.Module = brfx.build_model(options.model, options.classes)
    penalty = None
    if name.startswith("Brevitas"):
        model, _ = brevitas_case(model, images.cpu(), "eager")
    elif (lambdas := LAMBDAS[name]) is not None:
        model = brfx.prepare_qat(model, brfx.QATConfig(bits=2), images[:2].cpu())
        brfx.calibrate(model, [images[:64].cpu()])
    model.to(images.device, memory_format=torch.channels_last).train()
    if not name.startswith("Brevitas") and lambdas is not None and any(lambdas):
        penalty = brfx.BinPenalty(model, weight=lambdas[0], act=lambdas[1])
    step = build_step(model, penalty, how, precision)
    update = Update(model, brfx.TrainConfig(device=str(images.device)), total=1_000_000)

    def run() -> None:
        update(step(images, labels)[0])

    return run


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def peak_mb(run: Callable[[], Any]) -> float:
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--forms", nargs="*", default=["none", "whole"], choices=["none", "kernels", "whole"])
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"])
    options = parser.parse_args()
    device = torch.device(options.device)
    images = torch.randn(options.batch, 3, options.pixels, options.pixels, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(options.classes, (options.batch,), device=device)
    names = [*LAMBDAS, *(["Brevitas, learned scales"] if installed("brevitas") else [])]
    cases = [
        (name, how, precision)
        for precision in options.precisions
        for how in options.forms
        for name in names
        if how == "none" or not name.startswith("Brevitas")
    ]
    runs, memory = {}, {}
    for case in cases:
        try:
            run = step_of(*case, images, labels, options)
            first = timed(run, device)
            run()
        except Exception as error:  # a case that does not run is a line of the table
            print(f"{case}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
            continue
        print(f"{case}: first step {first:.1f} s", file=sys.stderr)
        runs[case] = run
        memory[case] = peak_mb(run) if device.type == "cuda" else 0.0
    times: dict[tuple[str, str, str], list[float]] = {case: [] for case in runs}
    for _ in range(options.rounds):
        for case, run in runs.items():
            times[case].append(timed(run, device))
    base = times[cases[0]]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{options.model}, {options.pixels} px, batch {options.batch}, {where}, torch {torch.__version__}\n")
    print("| case | form | precision | ms | of FP32 eager | peak MB |\n|---|---|---|---|---|---|")
    for case, seconds in times.items():
        ratio = median(a / b for a, b in zip(seconds, base, strict=True))
        print(f"| {' | '.join(case)} | {1000 * median(seconds):.2f} | {ratio:.2f} | {memory[case]:.0f} |")


if __name__ == "__main__":
    main()
