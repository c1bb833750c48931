"""What sums line by line are worth: a batch norm forward and backward, eager, compiled as it is, and as brfx has it.

python benchmarks/tiles.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from brfx.kernels.batch_norm import batch_norm
from brfx.kernels.inductor import compiled

#: Maps of ResNet-20 at batch 128, and of MobileNetV2 and ResNet-18 at batch 8.
SHAPES = [(128, 16, 32, 32), (128, 64, 8, 8), (8, 96, 112, 112), (8, 64, 112, 112), (8, 192, 28, 28), (8, 960, 7, 7)]
ROUNDS = 30


def run(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    """Seconds of forward and backward."""
    start = perf_counter()
    torch.autograd.backward(forward(x), grad)
    return perf_counter() - start


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    print(f"{torch.backends.cpu.get_cpu_capability()}, ms forward and backward: eager, compiled, line by line")
    for shape in SHAPES:
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        grad = torch.randn_like(x)
        norms = [nn.BatchNorm2d(shape[1]) for _ in range(3)]
        cases = [norms[0], compiled(norms[1].forward), compiled(lambda x, norm=norms[2]: batch_norm(norm, x))]
        times = [[run(case, x, grad) for case in cases] for _ in range(ROUNDS + 3)][3:]
        found = [1000 * median(column) for column in zip(*times, strict=True)]
        ratio = median(a / b for _, a, b in times)
        print(f"{shape!s:20} {found[0]:7.2f} {found[1]:7.2f} {found[2]:7.2f}, {ratio:.2f} times as fast as compiled")


if __name__ == "__main__":
    main()
