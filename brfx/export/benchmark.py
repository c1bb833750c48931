"""Latency of ONNX files in ONNX Runtime, interleaved, beside the FP32 export and ONNX Runtime's own INT8."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from brfx.calibration import quantization_disabled
from brfx.errors import ExportError, first_line
from brfx.export.onnx import onnx_session, quiet


@dataclass(frozen=True)
class Timing:
    """One file. ``speed`` is the median of paired ratios: how many times as fast as the first file of the list."""

    name: str
    bytes: int
    milliseconds: float  #: median of a batch
    images_per_second: float
    speed: float


def float_onnx(qmodel: nn.Module, path: Path, example: Tensor) -> None:
    """The same network in FP32: its quantizers let values through."""
    model = copy.deepcopy(qmodel).eval().cpu()
    with quantization_disabled(model), quiet(), torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=21
        )
        assert program is not None
        program.save(str(path))


def int8_onnx(source: Path, path: Path, batches: Sequence[Tensor]) -> None:
    """ONNX Runtime's static INT8 of an FP32 file: QDQ, one scale a channel, calibrated on ``batches``."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    name = onnx_session(source).get_inputs()[0].name
    prepared = path.with_name(f"{path.name}.prepared")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(str(prepared), str(path), Reader(), per_channel=True)
    prepared.unlink()


def benchmark(files: Sequence[tuple[str, Path]], example: Tensor, rounds: int, threads: int) -> list[Timing]:
    """Time one batch in each file, one after the other, ``rounds`` times.

    Args:
        files: names and ONNX files; the first is what the others are compared with.
        example: a batch of images.
        rounds: how often each is timed, after three runs that are not.
        threads: of ONNX Runtime; their spinning is off, since several sessions share the processor.

    Raises:
        ExportError: a file does not load, or takes other inputs.
    """
    runs = []
    for name, path in files:
        session = onnx_session(path, threads)
        feeds = {session.get_inputs()[0].name: example.numpy()}
        try:
            for _ in range(3):
                session.run(None, feeds)
        except Exception as error:
            raise ExportError(f"{path}: does not run on {tuple(example.shape)} ({first_line(error)})") from error
        runs.append((name, path, session, feeds))
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for place in range(len(runs)):
            index = (place + turn) % len(runs)
            _, _, session, feeds = runs[index]
            start = perf_counter()
            session.run(None, feeds)
            seconds[index].append(perf_counter() - start)
    return [
        Timing(
            name,
            path.stat().st_size,
            1000 * statistics.median(times),
            len(example) / statistics.median(times),
            statistics.median(base / own for base, own in zip(seconds[0], times, strict=True)),
        )
        for (name, path, _, _), times in zip(runs, seconds, strict=True)
    ]
