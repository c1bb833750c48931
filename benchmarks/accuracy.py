"""Accuracy runs: named tables of variants, each for several seeds, and the tables of a page from what they leave.

    python benchmarks/accuracy.py run TABLE --ckpt FILE --data DIR --runs DIR [--seeds 0 1 2] [--jobs N] [--device cuda]
    python benchmarks/accuracy.py page docs/results.md

``run`` starts `brfx quantize` for each variant and seed of a table, several at a time. It goes on with runs that were
cut off, and leaves out complete ones. What a run told (`config.json`, `metrics.jsonl`, `result.json`) is copied to
``docs/results/TABLE/VARIANT-seedN``. ``page`` writes every table of the page from these files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "results"
FILES = ("config.json", "metrics.jsonl", "result.json")

NO_BR = ("--lambda-br", "0", "--lambda-br-act", "0")
SYMMETRIC = ("--weight-grid", "symmetric")
SIGNED = ("--weight-grid", "signed")


@dataclass(frozen=True)
class Table:
    """Variants by name, with the flags that each adds to the common ones. Differences are to ``control``."""

    what: str
    common: tuple[str, ...]
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    control: str | None = None


TABLES = {
    "w2a2-30": Table(
        "30 epochs, every layer at 2 bits",
        ("--bits", "2", "--qat-epochs", "30", *NO_BR),
        {"symmetric": SYMMETRIC, "signed": SIGNED, "symmetric-distilled": (*SYMMETRIC, "--distill", "0.5")},
        control="symmetric",
    ),
    "goals": Table(
        "100 epochs, every layer at the bits named",
        ("--qat-epochs", "100", *NO_BR),
        {
            "w2a2": ("--bits", "2", *SYMMETRIC),
            "w2a2-narrow-stream": ("--bits", "2", "--stream-bits", "2", *SYMMETRIC),
            "w3a3": ("--bits", "3"),
            "w4a4": ("--bits", "4"),
        },
    ),
    "structure": Table(
        "ten epochs: the stream's bits and the weights' grid",
        ("--bits", "2", "--qat-epochs", "10", *NO_BR),
        {
            "stream-8-symmetric": ("--stream-bits", "8", *SYMMETRIC),
            "stream-8-signed": ("--stream-bits", "8", *SIGNED),
            "stream-4-symmetric": ("--stream-bits", "4", *SYMMETRIC),
            "stream-2-symmetric": ("--stream-bits", "2", *SYMMETRIC),
            "stream-2-signed": ("--stream-bits", "2", *SIGNED),
            "revived": ("--dead-filters", "revive", *SYMMETRIC),
        },
        control="stream-8-symmetric",
    ),
    "untrained": Table(
        "calibrated, not trained",
        ("--qat-epochs", "0"),
        {
            "w8a8": ("--bits", "8"),
            "w8a8-per-channel": ("--bits", "8", "--per-channel"),
            "w4a4": ("--bits", "4"),
            "w4a4-per-channel": ("--bits", "4", "--per-channel"),
            "w4a4-symmetric": ("--bits", "4", *SYMMETRIC),
            "w4a4-symmetric-per-channel": ("--bits", "4", *SYMMETRIC, "--per-channel"),
            "w2a2-symmetric": ("--bits", "2", *SYMMETRIC),
        },
    ),
    "reconstructed": Table(
        "calibrated, not trained: nearest codes, weights rounded for outputs, bits by layer",
        ("--qat-epochs", "0"),
        {
            f"{name}{how}": (*flags, *more)
            for name, flags in {
                "w4a4": ("--bits", "4"),
                "w4a4-symmetric": ("--bits", "4", *SYMMETRIC),
                "w3a3": ("--bits", "3"),
                "w3a3-symmetric": ("--bits", "3", *SYMMETRIC),
                "w3a3-budget": ("--bits", "3", "--bit-budget", "3"),
                "w2a2-symmetric": ("--bits", "2", *SYMMETRIC),
            }.items()
            for how, more in {"": (), "-reconstructed": ("--reconstruct",)}.items()
        },
    ),
    "budget": Table(
        "30 epochs: bits by layer against as many, or fewer, everywhere",
        ("--qat-epochs", "30", *NO_BR),
        {
            "w3a3": ("--bits", "3"),
            "w3a3-budget": ("--bits", "3", "--bit-budget", "3"),
            "w2a2": ("--bits", "2", *SYMMETRIC),
            "w2.25a2-budget": ("--bits", "2", "--bit-budget", "2.25", *SYMMETRIC),
        },
        control="w3a3",
    ),
    "ablation": Table(
        "30 epochs at 2 bits, bin regularization from the 10th on: what it adds to LSQ",
        ("--bits", "2", "--qat-epochs", "30", "--warmup-epochs", "9", *SYMMETRIC),
        {
            "lsq": NO_BR,
            **{f"weights-mean-{w}": ("--lambda-br", w, "--lambda-br-act", "0") for w in ("0.1", "1", "4", "16")},
            **{
                f"weights-per-value-{w}": ("--br-form", "per_value", "--lambda-br", w, "--lambda-br-act", "0")
                for w in ("0.0003", "0.001", "0.003")
            },
            **{f"activations-{w}": ("--lambda-br", "0", "--lambda-br-act", w) for w in ("0.003", "0.01", "0.03")},
            "both": ("--lambda-br", "1", "--lambda-br-act", "0.01"),
            "late": ("--lambda-br", "4", "--lambda-br-act", "0", "--warmup-epochs", "24"),
            "lower-rate": (*NO_BR, "--lr", "0.01"),
        },
        control="lsq",
    ),
}


def start(table: str, variant: str, seed: int, given: argparse.Namespace) -> str:
    """Run one variant with one seed to its end; what became of it in a line."""
    name = f"{variant}-seed{seed}"
    run, evidence = given.runs / table / name, EVIDENCE / table / name
    if (evidence / "result.json").is_file():
        return f"{table}/{name}: complete"
    command = [sys.executable, "-m", "brfx_cli", "quantize"]
    if (run / "config.json").is_file() and not (run / "result.json").is_file():
        command += ["--resume", str(run)]
    elif not run.exists():
        flags = (*TABLES[table].common, *TABLES[table].variants[variant])
        command += ["--model", given.model, "--ckpt", str(given.ckpt), "--data", given.data, "--seed", str(seed)]
        command += ["--compile", given.compile, "--device", given.device, *flags, "--output-dir", str(run)]
    if not completed(command, run, given.threads):
        return f"{table}/{name}: failed, see {run}.log"
    keep_evidence(run, evidence)
    return f"{table}/{name}: done"


def completed(command: list[str], run: Path, threads: int) -> bool:
    """Run ``command`` unless the folder ``run`` has its result already; what it prints goes to ``RUN.log``."""
    if (run / "result.json").is_file():
        return True
    run.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(f"{run}.log", "a") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment).returncode == 0


def keep_evidence(run: Path, evidence: Path) -> None:
    """Copy what a run told; of paths on this machine their last part."""
    evidence.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (run / file).is_file():
            lines = (run / file).read_text()
            (evidence / file).write_text(re.sub(r'"/[^"]*/([^"/]*)"', r'"\1"', lines))


def run(given: argparse.Namespace) -> None:
    variants = [name for name in TABLES[given.table].variants if not given.only or name in given.only]
    with ThreadPoolExecutor(given.jobs) as pool:
        pairs = [(variant, seed) for seed in given.seeds for variant in variants]
        for line in pool.map(lambda pair: start(given.table, pair[0], pair[1], given), pairs):
            print(line, flush=True)


@dataclass(frozen=True)
class Run:
    """What a complete run came to: accuracies in per cent, and its last epoch (``None``: it was not trained)."""

    seed: int
    test: float
    float_test: float
    last: dict | None
    onnx_bytes: int

    @classmethod
    def read(cls, folder: Path) -> Run:
        result = json.loads((folder / "result.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        metrics = folder / "metrics.jsonl"
        last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.is_file() else None
        test, float_test = (100 * result[key]["correct"] / result[key]["count"] for key in ("test", "test_float"))
        return cls(config["train"]["seed"], test, float_test, last, result["bytes"].get("model.onnx", 0))

    def of_weights(self, key: str) -> float | None:
        """A figure of the last epoch's weights, its mean over layers."""
        layers = (self.last or {}).get("weights") or {}
        values = [figures[key] for figures in layers.values() if figures.get(key) is not None]
        return fmean(values) if values else None


def interval(values: list[float]) -> str:
    """The mean with its 95 % interval by Student's t; of one value the value."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.2f} ± {half:.2f}"


def rows(name: str) -> Iterator[str]:
    """The lines of a table, of the variants that have runs."""
    table = TABLES[name]
    runs: dict[str, list[Run]] = {}
    for variant in table.variants:
        folders = sorted(EVIDENCE.glob(f"{name}/{variant}-seed*"))
        runs[variant] = [Run.read(folder) for folder in folders if (folder / "result.json").is_file()]
    if not any(runs.values()):
        return
    columns = ["variant", "flags", "seeds", "FP32", "test", "difference", "training loss", "validation"]
    columns += ["weight error", "effectiveness", "closed", "flips", "model.onnx"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    control = {run.seed: run.test for run in runs.get(table.control or "", [])}
    for variant, found in runs.items():
        if not found:
            continue
        paired = [run.test - control[run.seed] for run in found if run.seed in control]
        cells = [variant, " ".join(table.variants[variant]) or "-", ", ".join(str(run.seed) for run in found)]
        cells += [f"{found[0].float_test:.2f}", interval([run.test for run in found])]
        cells += [interval(paired) if variant != table.control else "-"]
        cells += [mean([run.last and run.last["train"]["loss"] for run in found], "{:.4f}")]
        cells += [mean([run.last and run.last["val_accuracy"] for run in found], "{:.2%}")]
        cells += [mean([run.of_weights("mse") for run in found], "{:.4f}")]
        cells += [mean([1 - d if (d := run.of_weights("distance")) is not None else None for run in found], "{:.1%}")]
        cells += [mean([run.of_weights("closed") for run in found], "{:.1%}")]
        cells += [mean([run.of_weights("flips") for run in found], "{:.3f}"), f"{found[0].onnx_bytes / 1e3:.0f} kB"]
        yield "| " + " | ".join(cells) + " |"


def mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(fmean(known)) if known else "-"


def write_tables(page: Path, kind: str, tables: dict[str, tuple[str, list[str]]]) -> None:
    """Write each table, a sentence and its lines, between the two markers ``<!-- KIND NAME: begin -->`` and ``end``."""
    text = page.read_text()
    for name, (sentence, lines) in tables.items():
        begin, end = f"<!-- {kind} {name}: begin -->", f"<!-- {kind} {name}: end -->"
        if begin in text and lines:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{sentence}\n\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}"
    page.write_text(text)


def page(given: argparse.Namespace) -> None:
    sentences = {name: f"{table.what.capitalize()}: `{' '.join(table.common)}`." for name, table in TABLES.items()}
    write_tables(given.page, "accuracy", {name: (sentences[name], list(rows(name))) for name in TABLES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("table", choices=TABLES)
    running.add_argument("--model", default="resnet20")
    running.add_argument("--ckpt", type=Path, required=True)
    running.add_argument("--data", required=True)
    running.add_argument("--runs", type=Path, required=True, help="where the run folders lie; outside the repository")
    running.add_argument("--only", nargs="*", help="variants")
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--jobs", type=int, default=1, help="runs side by side")
    running.add_argument("--threads", type=int, default=2, help="of each run")
    running.add_argument("--device", default="cpu")
    running.add_argument("--compile", default="auto")
    running.set_defaults(command=run)
    writing = commands.add_parser("page")
    writing.add_argument("page", type=Path)
    writing.set_defaults(command=page)
    given = parser.parse_args()
    given.command(given)


if __name__ == "__main__":
    main()
