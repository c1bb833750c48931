"""Models that brfx was not written against: timm's, which is in none of its dependencies.

    pip install timm && python benchmarks/strangers.py --page docs/coverage.md [NAME ...]

Prepares each at 2 bits with random weights, and writes a table between the marker lines of the page.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch.fx import GraphModule  # noqa: E402

import brfx  # noqa: E402
from benchmarks.dispatch_count import DistinctValues  # noqa: E402
from brfx.graph.torch_ops import words  # noqa: E402

BEGIN, END = "<!-- strangers: begin -->", "<!-- strangers: end -->"
NAMES = words(
    """
    resnet18d seresnet18 resnetv2_50 resnext50_32x4d regnetz_b16 efficientnet_lite0 tf_efficientnet_b0
    mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050 mobileone_s0 repvgg_a0 ghostnet_050
    convnextv2_atto convmixer_768_32 nfnet_l0 hrnet_w18_small dla34 vit_tiny_patch16_224 deit_tiny_patch16_224
    swin_s3_tiny_224 pit_ti_224 levit_128s poolformer_s12 mixer_s32_224 gmlp_ti16_224 cait_xxs24_224
    xcit_nano_12_p16_224 edgenext_xx_small coat_tiny crossvit_tiny_240 beit_base_patch16_224 eva02_tiny_patch14_224
    vovnet39a densenet121 inception_v4 xception41 tinynet_e fastvit_t8
    """
)


@torch.no_grad()
def row(name: str) -> str:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    size = model.default_cfg["input_size"][-1]
    images = torch.randn(1, 3, size, size)
    try:
        qmodel = brfx.prepare_qat(model).eval()
        with brfx.quantization_disabled(qmodel):
            difference = float((qmodel(images) - model(images)).abs().max())
        brfx.calibrate(qmodel, [images])
        report = brfx.audit(qmodel, images)
        with DistinctValues() as seen:
            qmodel(images)
    except Exception as error:
        return f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:150]} ||||"
    whole = "whole" if isinstance(qmodel, GraphModule) else "islands"
    equal = "equal" if difference == 0 else f"{difference:.0e}"
    return f"| {name} | {whole} | {report.mac_share:.2%} | {seen.share:.2%} | {equal} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = ["| model | traced | MACs on a grid: audit | values | FP32 eval |", "|---|---|---|---|---|"]
    for name in given.names or sorted(NAMES):
        lines.append(row(name))
        print(lines[-1], flush=True)
    if given.page:
        before, _, rest = given.page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        given.page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
