"""Batch norms' statistics in a calibrated network that is not trained: the FP32 network's, or new ones of some images.

    python benchmarks/norm_statistics.py --ckpt FILE --data DIR [--page docs/results.md]

The error is that of the logits to the FP32 network's on augmented training images that nothing is estimated of:
``sum (quantized - float)^2 / sum float^2``. The test images are not read.
"""

from __future__ import annotations

import argparse
import copy
import re
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import brfx
from brfx.data import DEFAULTS, BatchLoader, load_dataset
from brfx.io.float_checkpoint import load_float
from brfx.train import reestimate_batch_norm

BATCH, CALIBRATION, HELD_OUT = 64, 8, 10  # images a batch; batches that steps start from, and that are compared on
ESTIMATED_OF = (0, CALIBRATION, 64)  # batches; 0: the FP32 network's statistics stay


@torch.no_grad()
def error(qmodel: nn.Module, images: list[Tensor], wanted: list[Tensor]) -> float:
    qmodel.eval()
    lost = sum(float((qmodel(batch) - target).square().sum()) for batch, target in zip(images, wanted, strict=True))
    return lost / sum(float(target.square().sum()) for target in wanted)


def table(ckpt: Path, data: str) -> str:
    model = brfx.build_model("resnet20", 10)
    load_float(model, ckpt)
    model.eval()
    dataset = load_dataset(data, data_dir=Path("data"), preprocessing=DEFAULTS["cifar10"])

    def batches(count: int, seed: int) -> list[Tensor]:
        loader = BatchLoader(dataset.train, dataset.preprocessing, BATCH, augment=True, seed=seed)
        return [images for images, _ in islice(iter(loader), count)]

    training, held_out = batches(max(ESTIMATED_OF), 0), batches(HELD_OUT, 1)
    with torch.no_grad():
        wanted = [model(images) for images in held_out]
    names = ("the FP32 network's", *(f"of {count * BATCH:,} images" for count in ESTIMATED_OF[1:]))
    lines = [f"| relative squared error of the logits | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for bits in (8, 4):
        prepared = brfx.prepare_qat(model, brfx.QATConfig(bits=bits), held_out[0][:2])
        found = []
        for count in ESTIMATED_OF:
            qmodel = copy.deepcopy(prepared)
            brfx.calibrate(qmodel, training[:CALIBRATION], batch_statistics=count > 0)
            if count:
                reestimate_batch_norm(qmodel, training[:count])
            found.append(error(qmodel, held_out, wanted))
        lines.append(f"| W{bits}A{bits} | {' | '.join(f'{value:.4f}' for value in found)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    text = table(given.ckpt, given.data)
    print(text)
    if given.page is not None:
        begin, end = "<!-- norms: begin -->\n", "<!-- norms: end -->"
        page = re.sub(f"{begin}.*?{end}", lambda _: begin + text + end, given.page.read_text(), flags=re.DOTALL)
        given.page.write_text(page)


if __name__ == "__main__":
    main()
