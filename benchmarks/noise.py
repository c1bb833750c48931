"""How a network itself magnifies noise, beside what 8 bits add: the figures behind the SQNR column of docs/coverage.md.

python benchmarks/noise.py resnet50 mobilenet_v2            # random weights, no quantizer: SNR in and out
python benchmarks/noise.py --ckpt resnet20.th --data DIR    # W8A8 of the trained CIFAR-10 ResNet-20
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

import brfx  # noqa: E402
from benchmarks.model_inputs import build_without_weights, example_inputs, settle  # noqa: E402
from brfx.analysis.sqnr import sqnr as decibels  # noqa: E402
from brfx.data import BatchLoader, Preprocessing, load_dataset  # noqa: E402
from brfx.io.float_checkpoint import load_float  # noqa: E402


@torch.no_grad()
def perturbed(name: str) -> None:
    model = build_without_weights(name)
    settle(model, example_inputs(name, 2, train=True))
    (images,) = example_inputs(name)
    for snr in (60, 40):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        noise *= 10 ** (-snr / 20) * images.norm() / noise.norm()
        print(f"{name}: {snr} dB in, {decibels(model(images), model(images + noise)):.1f} dB out")


@torch.no_grad()
def trained(ckpt: Path, folder: str) -> None:
    model = brfx.build_model("resnet20", 10).eval()
    load_float(model, ckpt)
    data = load_dataset(folder, data_dir=Path(), preprocessing=Preprocessing(32))
    *batches, last = (images for images, _ in islice(BatchLoader(data.test, data.preprocessing, 128), 6))
    for placement in ("deploy", "paper"):
        qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=8, placement=placement)).eval()
        brfx.calibrate(qmodel, batches[:4], start="mse")
        print(f"resnet20 W8A8 {placement}: {decibels(model(last), qmodel(last)):.1f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--data")
    given = parser.parse_args()
    for name in given.names:
        perturbed(name)
    if given.ckpt:
        trained(given.ckpt, given.data)
