"""Export a trained file, compare two files, time several."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from brfx.config import DATA_DIR, code_file
from brfx.data import DEFAULTS, BatchLoader, Preprocessing, load_dataset
from brfx.errors import ExportError
from brfx.export import OnnxReport
from brfx.export.benchmark import Timing, benchmark, float_onnx, int8_onnx
from brfx.export.table import exporter_for
from brfx.export.verify import Verification, runner, verify
from brfx.extras import missing, needed
from brfx.io.model_file import load
from brfx.metadata import metadata_of
from brfx.models import build_model


def export_file(ckpt: Path, output: Path, model: str = "", profile: str = "compact") -> OnnxReport | None:
    """Write ``model.pt`` in the form that ``output``'s suffix names; one that exists is an error.

    :data:`brfx.export.table.EXPORTERS` has the suffixes.

    Returns:
        The report of an ONNX file, else ``None``.

    Raises:
        ExportError: ``output`` exists or has another suffix, or the exporter failed.
        CheckpointError: ``ckpt`` is not a model that brfx saved.
    """
    if output.exists():
        raise ExportError(f"{output} exists already: choose another --output")
    exporter = exporter_for(output)
    qmodel = _load_own(ckpt, model)
    example = _random_images(_image_size(qmodel), 2, _channels(qmodel))
    report = exporter.write(qmodel, output, example, profile)
    return report if isinstance(report, OnnxReport) else None


def verify_files(
    first: Path, second: Path, data: str = "", data_dir: Path = DATA_DIR, images: int = 0, integer: bool = False
) -> Verification:
    """Compare two files of one model, on the test images of ``data`` or, where none is named, on random ones.

    Args:
        first, second: ``.onnx`` or brfx's ``.pt``.
        data, data_dir: as in :class:`~brfx.config.JobConfig`.
        images: how many at most; 0 for all there are, or 64 random ones.
        integer: run a ``.pt`` in its integer form.
    """
    trained = next((_load_own(path) for path in (first, second) if path.suffix == ".pt" and path.is_file()), None)
    preprocessing = metadata_of(trained).preprocessing if trained is not None else None
    if data:
        preprocessing = preprocessing or DEFAULTS.get(data) or Preprocessing(224)
        split = load_dataset(data, data_dir=data_dir.expanduser(), preprocessing=preprocessing).test
        count = min(images or len(split), len(split))
        loader = BatchLoader(split.take(torch.arange(count)), preprocessing, 128)
        batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]] = loader
    else:
        size = preprocessing.image_size if preprocessing else 224
        channels = preprocessing.channels if preprocessing else 3
        batches = [(_random_images(size, images or 64, channels), None)]
    runners = [runner(path, _load_own, integer=integer) for path in (first, second)]
    return verify(runners[0], runners[1], batches, trained)


def benchmark_files(files: list[Path], batch_size: int, rounds: int, threads: int, size: int | None) -> list[Timing]:
    """Time ONNX files; a ``model.pt`` among them adds its FP32 export and ONNX Runtime's INT8 of that, in front."""
    if missing("onnx"):
        raise ExportError(needed("timing", "onnx"))
    with tempfile.TemporaryDirectory() as folder:
        named: list[tuple[str, Path]] = []
        channels = 3
        for path in files:
            if not path.is_file():
                raise ExportError(f"{path}: no such file")
            if path.suffix != ".pt":
                named.append((str(path), path))
                continue
            qmodel = _load_own(path)
            size, channels = size or _image_size(qmodel), _channels(qmodel)
            fp32, int8 = Path(folder) / f"{len(named)}-fp32.onnx", Path(folder) / f"{len(named)}-int8.onnx"
            float_onnx(qmodel, fp32, _random_images(size, 2, channels))
            int8_onnx(fp32, int8, [_random_images(size, 4, channels)])
            named = [(f"{path} in FP32", fp32), (f"{path}: ONNX Runtime's INT8", int8), *named]
        return benchmark(named, _random_images(size or 224, batch_size, channels), rounds, threads)


def _load_own(path: Path, model: str = "") -> nn.Module:
    return load(path, build_model(model) if code_file(model) else None)


def _image_size(qmodel: nn.Module) -> int:
    preprocessing = metadata_of(qmodel).preprocessing
    return preprocessing.image_size if preprocessing else 224


def _channels(qmodel: nn.Module) -> int:
    preprocessing = metadata_of(qmodel).preprocessing
    return preprocessing.channels if preprocessing else 3


def _random_images(size: int, count: int, channels: int) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))
