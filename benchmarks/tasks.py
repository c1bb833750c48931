"""Other tasks than classification: FP32 networks trained on small sets of real images, and their 4- and 2-bit forms.

    python benchmarks/tasks.py run nuclei --data ../shared/data/nuclei --runs RUNS [--only fp32 w4a4] [--seed 0]
    python benchmarks/tasks.py page docs/results.md

``run`` goes on with runs that were cut off and leaves out complete ones. What a run told is copied to
``docs/results/TABLE/VARIANT-seedN``; ``page`` writes the tables from these files alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accuracy import EVIDENCE, NO_BR, SYMMETRIC, completed, interval, keep_evidence, write_tables

#: All training images train: the sets are too small to hold some out, and nothing is chosen.
COMMON = ("--val-fraction", "0", "--keep", "last", "--compile", "off", "--batch-size", "8")


@dataclass(frozen=True)
class Table:
    """One set: the model, flags of every run, of the FP32 network's training, and of each quantized form of it."""

    model: str
    common: tuple[str, ...]
    fp32: tuple[str, ...]
    quantized: dict[str, tuple[str, ...]]


TABLES = {
    "nuclei": Table(
        "examples/unet.py:unet",
        ("--task", "segmentation", "--image-size", "192"),
        ("--epochs", "100", "--lr", "0.05"),
        {
            "w4a4": ("--bits", "4", "--qat-epochs", "50", *NO_BR),
            "w2a2": ("--bits", "2", "--qat-epochs", "100", *SYMMETRIC, *NO_BR),
            "w2a2-distilled": ("--bits", "2", "--qat-epochs", "100", *SYMMETRIC, *NO_BR, "--distill", "0.5"),
        },
    ),
    "raccoon": Table(
        "ssdlite320_mobilenet_v3_large",
        (),
        ("--epochs", "40", "--lr", "0.02"),
        {
            "w4a4": ("--bits", "4", "--qat-epochs", "20", "--lr", "0.005", *NO_BR),
            "w2a2": ("--bits", "2", "--qat-epochs", "40", "--lr", "0.005", *SYMMETRIC, *NO_BR),
        },
    ),
}


def start(name: str, variant: str, given: argparse.Namespace) -> str:
    """Run one variant to its end; what became of it in a line."""
    table, folder = TABLES[name], f"{variant}-seed{given.seed}"
    run, evidence = given.runs / name / folder, EVIDENCE / name / folder
    command = [sys.executable, "-m", "brfx_cli", "train" if variant == "fp32" else "quantize", "--model", table.model]
    if (run / "config.json").is_file():
        command += ["--resume", str(run)]
    else:
        command += [*table.common, *COMMON, "--data", str(given.data), "--seed", str(given.seed)]
        if variant == "fp32":
            command += table.fp32
        else:
            command += ["--ckpt", str(given.runs / name / f"fp32-seed{given.seed}" / "last.pth")]
            command += table.quantized[variant]
        command += ["--output-dir", str(run)]
    if not completed(command, run, given.threads):
        return f"{name}/{folder}: failed, see {run}.log"
    keep_evidence(run, evidence)
    return f"{name}/{folder}: done"


def run(given: argparse.Namespace) -> None:
    for variant in ("fp32", *TABLES[given.table].quantized):
        if not given.only or variant in given.only:
            print(start(given.table, variant, given), flush=True)


def rows(name: str) -> Iterator[str]:
    """The lines of a table, of the variants that have runs."""
    results = {
        variant: [
            json.loads((folder / "result.json").read_text())
            for folder in sorted(EVIDENCE.glob(f"{name}/{variant}-seed*"))
            if (folder / "result.json").is_file()
        ]
        for variant in ("fp32", *TABLES[name].quantized)
    }
    if not results["fp32"]:
        return
    metric, count = (results["fp32"][0]["test"][key] for key in ("metric", "count"))
    yield f"| | flags | runs | {metric} of {count} test images | less than its FP32 network | model.onnx |"
    yield "|---|---|---|---|---|---|"
    for variant, found in results.items():
        if not found:
            continue
        flags = TABLES[name].fp32 if variant == "fp32" else TABLES[name].quantized[variant]
        lost = [100 * (r["test_float"]["value"] - r["test"]["value"]) for r in found if r["test_float"]]
        size = found[0]["bytes"].get("model.onnx")
        cells = [
            variant.upper(),
            f"`{' '.join(flags)}`",
            str(len(found)),
            interval([100 * r["test"]["value"] for r in found]),
        ]
        cells += [interval(lost), "-" if size is None else f"{size / 1e3:.0f} kB"]
        yield "| " + " | ".join(cells) + " |"


def page(given: argparse.Namespace) -> None:
    tables = {}
    for name, table in TABLES.items():
        flags = " ".join(("--model", table.model, *table.common, *COMMON))
        tables[name] = f"Every run: `{flags}`.", list(rows(name))
    write_tables(given.page, "task", tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("table", choices=TABLES)
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--runs", type=Path, required=True, help="where the run folders lie; outside the repository")
    running.add_argument("--only", nargs="*", help="variants, of which fp32 comes first")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--threads", type=int, default=2)
    running.set_defaults(command=run)
    writing = commands.add_parser("page")
    writing.add_argument("page", type=Path)
    writing.set_defaults(command=page)
    given = parser.parse_args()
    given.command(given)


if __name__ == "__main__":
    main()
