"""Read the runs under a folder: settings, progress, accuracy. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from brfx.errors import BrfxError, ConfigError, first_line


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder. What its files do not say is ``None``.

    Attributes:
        path: the folder.
        name: the same below the folder that was read.
        state: ``"complete"`` (with ``result.json``), ``"unfinished"`` (running, or stopped), or ``"unreadable"``.
        why: what is wrong with the files of an unreadable one.
        changed: when ``config.json``, ``metrics.jsonl`` or ``result.json`` last changed.
        command: ``"train"`` or ``"quantize"``.
        model: as ``--model`` had it.
        weight_bits, act_bits: as asked for, 32 for FP32.
        kind: what came of them, ``"W2.53A2"`` where layers differ in bits; ``None`` of a run that wrote none down.
        epochs, epochs_done: how many were asked for, and are in ``metrics.jsonl``.
        lambda_br, lambda_br_act: ``None`` for ``train``.
        lr, seed: of the training.
        epoch, stage: the epoch that was shipped, and what it was trained with (``"warm-up"``, ``"penalty"``,
            ``"plain"``); of a run that is complete.
        val_accuracy: of that epoch, 0 to 1; of an unfinished run, of the last epoch so far.
        test_accuracy: of the trained network, 0 to 1.
        metric: what these two are of, ``"accuracy"`` or another task's, such as ``"mIoU"``.
        seconds: spent in training batches.
    """

    path: Path
    name: str
    state: str
    why: str = ""
    changed: datetime
    command: str | None = None
    model: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    kind: str | None = None
    epochs: int | None = None
    epochs_done: int | None = None
    lambda_br: float | None = None
    lambda_br_act: float | None = None
    lr: float | None = None
    seed: int | None = None
    epoch: int | None = None
    stage: str | None = None
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    metric: str = "accuracy"
    seconds: float | None = None

    @property
    def bits(self) -> str:
        """``"W2A2"``, ``"W2.53A2"``, ``"FP32"``, or nothing where it is not known."""
        if self.kind is not None:
            return self.kind
        if self.weight_bits is None or self.act_bits is None:
            return ""
        return "FP32" if self.weight_bits == self.act_bits == 32 else f"W{self.weight_bits}A{self.act_bits}"


def read_runs(folder: Path) -> list[Run]:
    """Every run in ``folder`` and below, by name: each folder with a ``config.json`` that brfx wrote.

    One with a damaged file is listed as unreadable, and so is a ``config.json`` that nobody can tell the writer of.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; give the one that holds the runs")
    found = sorted(Path(root) for root, _, _ in os.walk(folder) if os.path.isfile(os.path.join(root, "config.json")))
    runs = [run for path in found if (run := _read_run(folder, path)) is not None]
    if not runs:
        raise ConfigError(f"{folder}: there is no run in it (`brfx train` and `brfx quantize` leave a config.json)")
    return runs


def read_run(path: Path) -> Run:
    """The run in a folder.

    Raises:
        ConfigError: there is no such folder, it holds no run, or a file of it is damaged.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder; give a run's")
    run = _read_run(path, path) if (path / "config.json").is_file() else None
    if run is None:
        raise ConfigError(f"{path}: this is no run's folder (`brfx train` and `brfx quantize` leave a config.json)")
    if run.state == "unreadable":
        raise ConfigError(f"{path}: {run.why}")
    return run


def _read_run(folder: Path, path: Path) -> Run | None:
    """One run; ``None`` where ``config.json`` is not of brfx."""
    known: dict[str, Any] = {} if os.path.isfile(path / "metrics.jsonl") else {"epochs_done": 0}
    problems, changed = [], 0.0
    for file, read in _FILES.items():
        if not os.path.isfile(path / file):
            continue
        changed = max(changed, os.path.getmtime(path / file))
        try:
            found = read(path / file)
        except (BrfxError, OSError) as error:
            problems.append(f"{file}: {first_line(error)}")
            continue
        if found is None:
            return None
        known |= found
    state = "complete" if os.path.isfile(path / "result.json") else "unfinished"
    return Run(
        path=path,
        name=str(path.relative_to(folder)) if path != folder else path.resolve().name,
        state="unreadable" if problems else state,
        why="; ".join(problems),
        changed=datetime.fromtimestamp(changed),
        **known,
    )


def _settings(path: Path) -> dict[str, Any] | None:
    """What ``config.json`` says; ``None`` where it is somebody else's."""
    content = _parse(path.read_bytes())
    if not isinstance(content, dict) or not isinstance(content.get("versions"), dict):
        return None
    if "brfx" not in content["versions"]:
        return None
    command = _word(content, "command")
    quantized = command != "train"
    qat, train = _table(content, "qat"), _table(content, "train")
    return {
        "command": command,
        "model": _word(content, "model"),
        "weight_bits": _whole(qat, "weight_bits") if quantized else 32,
        "act_bits": _whole(qat, "act_bits") if quantized else 32,
        "kind": _word(content, "kind") if "kind" in content else None,
        "epochs": _whole(train, "epochs"),
        "lambda_br": _number(content, "lambda_br") if quantized else None,
        "lambda_br_act": _number(content, "lambda_br_act") if quantized else None,
        "lr": _number(train, "lr"),
        "seed": _whole(train, "seed", -(2**63)),
    }


def _progress(path: Path) -> dict[str, Any] | None:
    """What ``metrics.jsonl`` says; a last line that a crash cut off does not count."""
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()
    epochs = [_epoch(line, f"line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    with suppress(ConfigError):
        epochs.append(_epoch(last, "the last line"))
    return {
        "epochs_done": max((epoch for epoch, _, _ in epochs), default=0),
        **(epochs[-1][1] if epochs else {"val_accuracy": None}),
        "seconds": sum(seconds for _, _, seconds in epochs),
    }


def _epoch(line: bytes, where: str) -> tuple[int, dict[str, Any], float]:
    """Epoch, figures on validation and seconds of a line of ``metrics.jsonl``."""
    try:
        content = _parse(line)
        return _whole(content, "epoch"), _validation(content), _number(content, "seconds")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _validation(content: Any) -> dict[str, Any]:
    """The task's metric on validation (``None``: there is none), and its name; it is the first of the figures."""
    names = [name for name in content if name.startswith("val_") and name != "val_loss"]
    name = names[0] if names else "val_accuracy"
    return {"val_accuracy": _share_or_none(content, name), "metric": name.removeprefix("val_")}


def _result(path: Path) -> dict[str, Any] | None:
    """What ``result.json`` says."""
    content = _parse(path.read_bytes())
    test = _table(content, "test")
    count = _whole(test, "count")
    if not count:
        raise ConfigError("count is 0, it takes a number of images")
    found: dict[str, Any]
    if "metric" in test:
        found = {"test_accuracy": _share(_number(test, "value")), "metric": _word(test, "metric")}
    else:
        found = {"test_accuracy": _share(_whole(test, "correct") / count)}
    if _get(content, "epoch") is not None:  # it is where no epoch was trained
        found |= {"epoch": _whole(content, "epoch"), **_validation(content), "stage": _word(content, "stage")}
    return found


_FILES = {"config.json": _settings, "metrics.jsonl": _progress, "result.json": _result}


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"damaged, no JSON ({first_line(error)})") from error


def _get(table: Any, name: str) -> Any:
    if not isinstance(table, Mapping) or name not in table:
        raise ConfigError(f"{name} is missing")
    return table[name]


def _table(table: Any, name: str) -> Mapping[str, Any]:
    value = _get(table, name)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r:.40}, no table")
    return value


def _word(table: Any, name: str) -> str:
    value = _get(table, name)
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r:.40}, no text")
    return value


def _number(table: Any, name: str) -> float:
    value = _get(table, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ConfigError(f"{name} is {value!r:.40}, no number")
    return float(value)


def _whole(table: Any, name: str, least: int = 0) -> int:
    value = _get(table, name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**64:
        raise ConfigError(f"{name} is {value!r:.40}, no whole number from {least}")
    return value


def _share_or_none(table: Any, name: str) -> float | None:
    return None if _get(table, name) is None else _share(_number(table, name))


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"an accuracy is {value:g}, it takes 0 to 1")
    return value
