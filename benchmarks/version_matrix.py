"""The core of the tests with the oldest, a middle and the newest torch, each in an environment of its own.

    python benchmarks/version_matrix.py            # or `make test-matrix`; goes on where it was stopped
    python benchmarks/version_matrix.py 2.6.0      # that torch alone
    python benchmarks/version_matrix.py --table    # what docs/reference.md shows

An environment takes 1 GB (CPU builds) to 6 GB and lies in runs/matrix/, with a line of JSON for each part of the suite.
A part is not run again for the same commit. Each Python is looked for as python3.N, then below ~/.pyenv/versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "matrix"

#: Python, torch, torchvision.
PAIRS = [("3.10", "2.6.0", "0.21.0"), ("3.12", "2.9.1", "0.24.1"), ("3.13", "2.14.1", "0.29.1")]

#: Without compilation, without training to an accuracy: what depends on a version of Python or torch.
CORE = [
    "tests/graph",
    "tests/passes",
    "tests/export/test_operators.py tests/export/test_torch_export.py",
    "tests/test_compat.py tests/test_prepare.py tests/test_calibration.py",
    "tests/nn",
    "tests/regularizers",
    "tests/config",
    "tests/io",
    "tests/data",
    "tests/quant",
]
NEEDED = "pytest pytest-timeout hypothesis scikit-learn"


def folder_of(python: str, torch: str) -> Path:
    return FOLDER / f"python{python}-torch{torch}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torch", nargs="*", help="versions of torch; default all three")
    parser.add_argument("--table", action="store_true", help="print what was run, run nothing")
    parser.add_argument("--threads", default="1")
    asked = parser.parse_args()
    pairs = [pair for pair in PAIRS if not asked.torch or pair[1] in asked.torch]
    if unknown := set(asked.torch) - {pair[1] for pair in PAIRS}:
        parser.error(f"no pair has torch {', '.join(sorted(unknown))}: there are {', '.join(p[1] for p in PAIRS)}")
    if not asked.table:
        for pair in pairs:
            environment(*pair)
            for part in CORE:
                run(pair, part, asked.threads)
    print(table())
    if not asked.table and any(r["failed"] for pair in pairs for r in results(pair).values()):
        sys.exit(1)


def environment(python: str, torch: str, torchvision: str) -> None:
    """A venv with brfx as a checkout and what the core needs, unless it is there and whole."""
    folder = folder_of(python, torch)
    if (folder / "installed").exists():
        return
    shutil.rmtree(folder / "venv", ignore_errors=True)
    subprocess.run([interpreter(python), "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    subprocess.run([*pip, *index, f"torch=={torch}", f"torchvision=={torchvision}"], check=True)
    pinned = [f"torch=={torch}", f"torchvision=={torchvision}"]
    subprocess.run([*pip, "-e", f"{ROOT}[onnx]", *NEEDED.split(), *pinned], check=True)
    (folder / "installed").touch()


def interpreter(python: str) -> str:
    found = shutil.which(f"python{python}")
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:  # pyenv's shims may not run
        return found
    for path in sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python")):
        return str(path)
    sys.exit(f"Python {python} was not found: install it, or name the torch to run, such as {PAIRS[-1][1]}")


def run(pair: tuple[str, str, str], part: str, threads: str) -> None:
    """One process of pytest, and its counts as a line of the environment's results."""
    commit = said("git", "rev-parse", "HEAD")
    if results(pair).get(part, {}).get("commit") == commit:
        return
    folder = folder_of(*pair[:2])
    command = [folder / "venv/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "--timeout=900", *part.split()]
    print(f"python {pair[0]}, torch {pair[1]}: {part}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads}, text=True, stdout=-1)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + f"pytest ended with {done.returncode}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    print(*(f"  {line}" for line in [*failed, *last]), sep="\n", flush=True)
    line = {
        "part": part,
        "commit": commit,
        "date": date.today().isoformat(),
        "python": said(folder / "venv/bin/python", "-c", "import platform; print(platform.python_version())"),
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": failed,
    }
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def results(pair: tuple[str, str, str]) -> dict[str, dict]:
    """The last result of each part."""
    path = folder_of(*pair[:2]) / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {line["part"]: line for line in map(json.loads, lines)}
    return {part: found[part] for part in CORE if part in found}


def table() -> str:
    rows = ["| Python | torch | torchvision | date | passed | skipped | failed |", "|---|---|---|---|---|---|---|"]
    for pair in PAIRS:
        parts = list(results(pair).values())
        if not parts:
            continue
        sums = [sum(part[kind] for part in parts) for kind in ("passed", "skipped")]
        failed = sum(len(part["failed"]) for part in parts)
        some = "" if len(parts) == len(CORE) else f" ({len(parts)} of {len(CORE)} parts)"
        days = max(part["date"] for part in parts)
        rows.append(
            f"| {parts[-1]['python']} | {pair[1]} | {pair[2]} | {days} | {sums[0]}{some} | {sums[1]} | {failed} |"
        )
    return "\n".join(rows)


def said(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=-1).stdout.strip()


if __name__ == "__main__":
    main()
