"""What bin regularization adds to the kernels around an activation quantizer, with its squares summed in forward
(``bin_sums``) or in backward (``deferred_bin_sums``, as in training).

    python benchmarks/bins.py

Maps of ResNet-20, ResNet-18 and MobileNetV2; batch norm, quantizer and bins are one compiled function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from brfx.fast.saved_codes import with_codes
from brfx.kernels.batch_norm import batch_norm
from brfx.kernels.inductor import compiled
from brfx.nn import QuantizedClippedReLU
from brfx.regularizers.bin_penalty import bins, deferred_bins
from brfx.regularizers.bin_regularizer import bin_loss

#: Maps and the clip of their ReLU.
MAPS = (
    ((128, 16, 32, 32), None),
    ((128, 64, 8, 8), None),
    ((8, 64, 112, 112), None),
    ((8, 144, 56, 56), 6.0),
    ((8, 384, 14, 14), 6.0),
)
ROUNDS, WARM_UP = 60, 5

#: ``(quantizer, values, logged) -> sums``
LOOKS: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "no bins": lambda quantizer, values, logged: (),
    "squares in forward": lambda quantizer, values, logged: bins(quantizer, values),
    "squares in backward": deferred_bins,
}


def case(
    look: Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, clip: float | None
) -> Callable[[], tuple[float, float]]:
    """Seconds of forward and of backward."""
    norm, quantizer = nn.BatchNorm2d(x.shape[1]), QuantizedClippedReLU(2, clip_value=clip)
    quantizer.step.data.fill_(0.7)
    quantizer.calibrated = True
    logged = torch.zeros((), requires_grad=True)

    def forward(x: Tensor, logged: Tensor) -> Any:
        values = batch_norm(norm, x)
        return with_codes(quantizer, values), look(quantizer, values, logged)

    run, above = compiled(forward), 1e-3 * torch.randn_like(x)

    def step() -> tuple[float, float]:
        start = perf_counter()
        made, sums = run(x, logged)
        middle = perf_counter()
        outputs, grads = [made.values], [above]
        if sums:
            outputs.append(bin_loss(*sums[:2]) + sum(sums[2:]))
            grads.append(torch.ones(()))
        torch.autograd.backward(outputs, grads)
        return middle - start, perf_counter() - middle

    return step


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    for shape, clip in MAPS:
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        cases = {name: case(look, x, clip) for name, look in LOOKS.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for index in range(ROUNDS + WARM_UP):
            for name, step in cases.items():
                found = step()
                if index >= WARM_UP:
                    times[name].append(found)
        print(" x ".join(map(str, shape)), "ReLU" if clip is None else f"ReLU{clip:g}")
        for name, own in times.items():
            pairs = list(zip(own, times["no bins"], strict=True))
            more = [median(1e9 * (a[part] - b[part]) / x.numel() for a, b in pairs) for part in (0, 1)]
            took = [1000 * median(time[part] for time in own) for part in (0, 1)]
            print(f"  {name:20} {took[0]:6.2f} + {took[1]:6.2f} ms, {more[0]:+.2f} {more[1]:+.2f} ns a value")


if __name__ == "__main__":
    main()
