"""What it is worth that ``brfx.fit`` keeps memory from step to step: the same steps in turn with and without.

python benchmarks/kept_memory.py --model resnet20
"""

from __future__ import annotations

import argparse
import gc
import resource
import warnings
from statistics import median

import torch
from train_step import MODELS, Runner, interval

from brfx.train.memory import memory_kept

CASES = ("FP32", "brfx LSQ", "brfx LSQ + BR(W+A)")
STEPS = 3  # of which the first, which takes the memory, is not counted


def steps(runner: Runner) -> tuple[float, int]:
    """Median seconds of a step, and page faults of the last."""
    times = []
    for _ in range(STEPS):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times.append(runner())
    return median(times[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


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
    for runner in runners.values():
        runner()
    with memory_kept():  # leave the settings as they are after a run, in both
        pass
    gc.collect()
    gc.disable()
    found: dict[str, list[tuple[tuple[float, int], tuple[float, int]]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case, runner in runners.items():
            given_back = steps(runner)
            with memory_kept():
                kept = steps(runner)
            found[case].append((given_back, kept))
    print(f"{options.model}, {options.form}: ms a step and page faults, given back and kept")
    for case, rounds in found.items():
        ratios = [kept[0] / given_back[0] for given_back, kept in rounds]
        low, high = interval(ratios)
        columns = [
            f"{1000 * median(each[way][0] for each in rounds):7.1f} {median(each[way][1] for each in rounds):6.0f}"
            for way in range(2)
        ]
        print(f"{case:20} {'   '.join(columns)}   {median(ratios):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
