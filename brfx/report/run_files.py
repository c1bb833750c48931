"""What a run folder holds, read for a report. Nothing here imports torch or matplotlib."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brfx.errors import ConfigError
from brfx.jobs.runs import Run, read_run

Line = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The files of one run. What a run kept none of is empty or ``None``.

    Attributes:
        label: what figures and tables call it.
        run: settings and figures that ``brfx runs`` prints.
        config: ``config.json``.
        metrics: the lines of ``metrics.jsonl``, an epoch each.
        histograms: those of ``histograms.jsonl``; the first is of before training.
        result: ``result.json``; ``None`` while the run is not complete.
        network: ``network.json``.
        sensitivity: ``sensitivity.json``, what `brfx sensitivity --json` prints.
        benchmark: ``benchmark.json``, which `brfx benchmark` leaves.
    """

    label: str
    run: Run
    config: Line
    metrics: list[Line]
    histograms: list[Line] = field(default_factory=list)
    result: Line | None = None
    network: Line | None = None
    sensitivity: Line | None = None
    benchmark: Line | None = None

    @property
    def before(self) -> Line | None:
        """The histograms of before training."""
        return next((line for line in self.histograms if line["epoch"] == 0), None)

    @property
    def after(self) -> Line | None:
        """Those of the epoch that was shipped, of an unfinished run of the last one so far; ``None`` before that."""
        shipped = self.run.epoch
        found = [line for line in self.histograms if line["epoch"] and shipped in (None, line["epoch"])]
        return found[-1] if found else None

    def bits_of(self, kind: str) -> dict[str, int]:
        """The bits of each layer's weights or of each quantizer of activations, as far as the run wrote them down."""
        line = self.after or self.before
        return {} if line is None else {name: figures["bits"] for name, figures in line[kind].items()}

    @property
    def metric(self) -> str:
        return "top-1 accuracy" if self.run.metric == "accuracy" else self.run.metric

    @property
    def float_test(self) -> float | None:
        """How good the FP32 network was on the test images, 0 to 1; ``None`` where nobody looked."""
        test = (self.result or {}).get("test_float")
        if not test:
            return None
        return float(test["value"] if "value" in test else test["correct"] / test["count"])

    def over_epochs(self, value: Callable[[Line], float | None]) -> tuple[list[int], list[float]]:
        """Epochs, and ``value`` of their lines, where there is one."""
        found = [(line["epoch"], number) for line in self.metrics if (number := value(line)) is not None]
        return [epoch for epoch, _ in found], [number for _, number in found]

    @property
    def boundary(self) -> int | None:
        """The last epoch of the warm-up, where the regularizers join behind it."""
        stages = [line["stage"] for line in self.metrics]
        return stages.count("warm-up") if "warm-up" in stages and "penalty" in stages else None


def mean_of_weights(line: Line, name: str) -> float | None:
    """A figure of ``metrics.jsonl`` that each weight has: its mean over the weights that have it in ``line``."""
    found = [value for figures in line.get("weights", {}).values() if (value := figures.get(name)) is not None]
    return sum(found) / len(found) if found else None


def read_run_files(path: Path, label: str = "") -> RunFiles:
    """Everything a report shows of the run in ``path``.

    Raises:
        ConfigError: it is no run, or one of its files is damaged; names the file.
    """
    run = read_run(path)
    network = _json(path / "network.json")
    return RunFiles(
        label=label or run.name,
        run=run,
        config=_json(path / "config.json") or {},
        metrics=_lines(path / "metrics.jsonl", {"epoch": int, "stage": str, "train": dict}),
        histograms=_lines(path / "histograms.jsonl", {"epoch": int, "weights": dict, "activations": dict}),
        result=_json(path / "result.json"),
        network=network,
        sensitivity=_sensitivity(path / "sensitivity.json", network),
        benchmark=_json(path / "benchmark.json"),
    )


def _sensitivity(path: Path, network: Line | None) -> Line | None:
    """What was measured; it must be of the run's own network, as nobody but the user puts it there."""
    found = _json(path)
    if found is None or network is None:
        return found
    here = {part for place in network["places"] for part in _enclosing(place["name"])}
    other = next((row["name"] for row in found["layers"] if row["kind"] == "weights" and row["name"] not in here), None)
    if other is not None:
        raise ConfigError(f"{path}: is of another network, as this run's has no layer {other}: take the file away")
    return found


def _enclosing(name: str) -> list[str]:
    """A place's module and those around it."""
    parts = name.partition("#")[0].split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _json(path: Path) -> Line | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged, no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: damaged, no table")
    return content


def _lines(path: Path, fields: dict[str, type]) -> list[Line]:
    """The lines of a file in the order of epochs; a last one that a crash cut off does not count."""
    if not path.is_file():
        return []
    found = []
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(texts):
                continue
            raise ConfigError(f"{path}: line {number}: damaged, no JSON ({error})") from error
        if line is None:
            continue
        wrong = [
            name for name, kind in fields.items() if not isinstance(line, dict) or not isinstance(line.get(name), kind)
        ]
        if wrong:
            raise ConfigError(f"{path}: line {number}: damaged, {wrong[0]} is missing")
        found.append(line)
    return found
