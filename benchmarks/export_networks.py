"""Write the table of networks at their own size into docs/export.md: sizes, speed in ONNX Runtime, parity.

    python benchmarks/export_networks.py --page docs/export.md resnet20=runs/w2a2/model.pt resnet18 mobilenet_v2 \
        --data cifar10

NAME=FILE is a run's ``model.pt``; a name alone is that model with random weights at 2 bits, calibrated on four random
images. The files are exported, timed in turns with the FP32 export and ONNX Runtime's INT8 of the same network, and
those with a FILE are compared with it on the test images of ``--data``. What stands between the two marker lines is
replaced.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torchvision

import brfx
from brfx.export import OnnxReport
from brfx.export.benchmark import Timing
from brfx.jobs.files import benchmark_files, export_file, verify_files
from brfx.train import reestimate_batch_norm

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def random_model(name: str, path: Path) -> None:
    """Save ``name`` with random weights at 2 bits, so that only its shape means anything."""
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(brfx.build_model(name), brfx.QATConfig(bits=2))
    images = torch.randn(4, 3, 224, 224)
    brfx.calibrate(qmodel, [images], batch_statistics=True)
    reestimate_batch_norm(qmodel, [images])
    brfx.save(qmodel.eval(), path)


def row(name: str, weights: str, report: OnnxReport, timings: list[Timing]) -> str:
    fp32, int8, own = timings
    flipped, codes = report.flipped
    exact = "bit for bit" if report.reference_difference == 0 else f"{report.reference_difference:.1e}"
    cells = [
        f"{name}, {weights}",
        *(f"{timing.bytes / 1e6:.2f}" for timing in (fp32, int8)),
        f"{own.bytes / 1e6:.3f}",
        f"{fp32.bytes / own.bytes:.1f}",
        f"{int8.speed:.2f}",
        f"{own.speed:.2f}",
        f"{len(report.float_layers or {})} of {len(report.float_layers or {}) + report.integer_layers}",
        f"{flipped / codes:.4%}" if codes else "",
        exact,
    ]
    return "| " + " | ".join(cells) + " |"


def measure(spec: str, args: argparse.Namespace, folder: Path) -> tuple[str, list[str]]:
    """A row of the table, and what is to be said of the test images."""
    name, _, file = spec.partition("=")
    model, output = Path(file) if file else folder / f"{name}.pt", folder / f"{name}.onnx"
    if not file:
        random_model(name, model)
    report = export_file(model, output)
    assert report is not None
    line = row(name, "trained" if file else "random", report, benchmark_files([model, output], 1, args.rounds, 2, None))
    print(line, flush=True)
    if not file or not args.data:
        return line, []
    found: Any = verify_files(model, output, args.data, args.data_dir)
    flipped, codes = sum(site.flipped for site in found.sites), sum(site.codes for site in found.sites)
    return line, [
        f"`brfx verify {name}.pt {name}.onnx` on {found.images:,} test images: {flipped:,} of {codes:,} codes differ "
        f"({flipped / codes:.4%}) where each layer is given the trained model's own input. In the whole network a "
        f"flipped code goes on through the layers behind it: {found.different:,} images are decided otherwise, and the "
        f"accuracy is {found.accuracy[0]:.2%} in PyTorch and {found.accuracy[1]:.2%} in ONNX Runtime."
    ]


def _parted(spec: str) -> tuple[str, str, str]:
    return spec.partition("=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NAME[=FILE]")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--data", default="", help="test images for networks with a FILE")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = [measure(spec, args, Path(folder)) for spec in args.networks]
    shown = " ".join(f"{name}=model.pt" if file else name for name, _, file in map(_parted, args.networks))
    text = [
        "## Networks at their own size",
        "",
        f"`python benchmarks/export_networks.py {shown}`, {date.today()}; torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}. W2A2, placement `deploy`, profile `compact`; sizes in MB; speed is "
        f"the median of {args.rounds} paired ratios to FP32, batch 1, two threads. FP32 is the network exported with "
        "its quantizers letting values through, INT8 ONNX Runtime's own static quantization of that.",
        "",
        "| network, weights | FP32 | INT8 | brfx | times smaller | INT8's speed | brfx's speed | float layers | "
        "codes flipped | ONNX Runtime against the reference |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line for line, _ in measured),
    ]
    for _, said in measured:
        text += ["", *said] if said else []
    page = args.page.read_text()
    page = re.sub(f"{BEGIN}.*?{END}", lambda _: "\n".join([BEGIN, *text, END]), page, flags=re.DOTALL)
    args.page.write_text(page)


if __name__ == "__main__":
    main()
