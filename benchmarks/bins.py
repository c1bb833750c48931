"""What the bins' sums add to the kernel that quantizes an activation, and which part of them it is.

    python benchmarks/bins.py

One map of ResNet-20's first stage at batch 128, forward, batch norm and quantizer compiled with each set of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from brfx.binreg import bin_sums
from brfx.compiling import compiled
from brfx.nn import QuantizedClippedReLU
from brfx.nn.codes import coded
from brfx.nn.norm import batch_norm

BITS, SHAPE, ROUNDS = 2, (128, 16, 32, 32), 200

Sums = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def members(code: Tensor) -> list[Tensor]:
    return [code == k for k in range(1 << BITS)]


#: ``(code, squared distance) -> sums``
PARTS: dict[str, Sums] = {
    "no sums": lambda code, square: (),
    "one sum of all values": lambda code, square: (square.sum(),),
    "counts of bins": lambda code, square: tuple(member.sum(dtype=torch.int32) for member in members(code)),
    "squares of bins": lambda code, square: tuple(torch.where(m, square, 0.0).sum() for m in members(code)),
}


def case(sums: Sums | None) -> Callable[[Tensor], object]:
    """A compiled function; ``None``: with what brfx itself sums."""
    norm, quantizer = nn.BatchNorm2d(SHAPE[1]), QuantizedClippedReLU(BITS)
    quantizer.step.data.fill_(0.7)
    quantizer.calibrated = True

    @torch.no_grad()
    def forward(x: Tensor) -> object:
        values = batch_norm(norm, x)
        made = coded(quantizer, values)
        inside, step = quantizer.prepare(values), quantizer.step
        if sums is None:
            return made, bin_sums(inside, step, quantizer.grid)
        code = quantizer.grid.encode(inside, step)
        return made, sums(code, (inside - code * step).square())

    return compiled(forward)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    cases = {name: case(sums) for name, sums in PARTS.items()} | {"brfx's bins": case(None)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(ROUNDS + 5):
        for name, run in cases.items():
            start = perf_counter()
            run(x)
            if index >= 5:
                times[name].append(perf_counter() - start)
    base = times["no sums"]
    for name, own in times.items():
        more = median(1e9 * (a - b) / x.numel() for a, b in zip(own, base, strict=True))
        print(f"{name:24} {1000 * median(own):.2f} ms, {more:+.2f} ns a value")


if __name__ == "__main__":
    main()
