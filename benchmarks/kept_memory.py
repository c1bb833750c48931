"""What it is worth that ``brfx.fit`` keeps memory from step to step: steps without it, then steps with it.

Not in turn: once told anything, glibc no longer adapts to what a process frees, as it does by itself.

python benchmarks/kept_memory.py --model resnet20
"""

from __future__ import annotations

import argparse
import gc
import resource
import warnings
from statistics import median

import torch
from train_step import MODELS, Runner

from brfx.train.memory import memory_kept

CASES = ("FP32", "brfx LSQ", "brfx LSQ + BR(W+A)")


def rounds(runners: dict[str, Runner], count: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds and page faults of a step of each case; two rounds more at first, which take the memory."""
    found: dict[str, list[tuple[float, int]]] = {case: [] for case in runners}
    for _ in range(count + 2):
        for case, runner in runners.items():
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds = runner()
            found[case].append((1000 * seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    columns = {case: list(zip(*each[2:], strict=True)) for case, each in found.items()}
    return {case: (median(times), median(faults)) for case, (times, faults) in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet20")
    parser.add_argument("--form", choices=("eager", "compiled"), default="compiled")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    setting = MODELS[options.model]
    runners = {
        case: Runner(options.model, case, options.form, batch=setting.batch, pixels=setting.pixels) for case in CASES
    }
    gc.collect()
    gc.disable()
    own = rounds(runners, options.rounds)
    with memory_kept():
        kept = rounds(runners, options.rounds)
    print(f"{options.model}, {options.form}: ms a step and page faults, as glibc does and kept")
    for case in CASES:
        columns = "   ".join(f"{ms:7.1f} {faults:6.0f}" for ms, faults in (own[case], kept[case]))
        print(f"{case:20} {columns}   {kept[case][0] / own[case][0]:.3f} of the time")


if __name__ == "__main__":
    main()
