"""Export a trained file, compare two files, time several."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from brfx.config import DATA_DIR, code_file
from brfx.data import DEFAULTS, BatchLoader, Preprocessing, load_dataset
from brfx.errors import ConfigError, ExportError
from brfx.export import OnnxReport
from brfx.export.benchmark import Timing, benchmark, float_onnx, int8_onnx
from brfx.export.reading import preprocessing_of, runner
from brfx.export.table import exporter_for
from brfx.export.verify import Verification, verify
from brfx.extras import needed
from brfx.io.atomic import write_text_atomically
from brfx.io.model_file import load, source_of
from brfx.jobs.machine import machine
from brfx.jobs.runs import read_run
from brfx.metadata import metadata_of
from brfx.models import ModelSource, build_model
from brfx.modes import eval_mode

#: In a run's folder, how fast its files are.
BENCHMARK_FILE = "benchmark.json"


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
    first: Path,
    second: Path,
    data: str = "",
    data_dir: Path = DATA_DIR,
    images: int = 0,
    integer: bool = False,
    model: str = "",
) -> Verification:
    """Compare two files of one model, on the test images of ``data`` or, where none is named, on random ones.

    Images are preprocessed as the files say.

    Args:
        first, second: ``.onnx``, ``.pt2``, packed ``.safetensors`` or brfx's ``.pt``.
        data, data_dir: as in :class:`~brfx.config.JobConfig`.
        images: how many at most; 0 for all there are, or 64 random ones.
        integer: run a ``.pt`` in its integer form.
        model: of the user's own, ``path/to/file.py:factory``.

    Raises:
        ExportError: no such file; or the two want images of different preprocessing.
    """
    for path in (first, second):
        _require(path)
    own = {path: _load_own(path, model) for path in dict.fromkeys((first, second)) if path.suffix in (".pt", ".pth")}
    trained = next(iter(own.values()), None)
    preprocessing = _common_preprocessing((first, second), own)
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
    runners = [runner(path, own.__getitem__, integer=integer) for path in (first, second)]
    return verify(runners[0], runners[1], batches, trained)


def _common_preprocessing(files: tuple[Path, ...], own: dict[Path, nn.Module]) -> Preprocessing | None:
    """What the files say that images go through; ``None`` where none says."""
    said = {path: found for path in files if (found := preprocessing_of(path, own.get(path))) is not None}
    if len(set(said.values())) > 1:
        (one, first), (other, second) = said.items()
        raise ExportError(f"{one} wants images of {first}, {other} of {second}: these are not files of one model")
    return next(iter(said.values()), None)


def _require(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")


def benchmark_files(
    files: list[Path], batch_size: int, rounds: int, threads: int, size: int | None, model: str = ""
) -> list[Timing]:
    """Time ONNX files; a ``model.pt`` among them adds its FP32 export and ONNX Runtime's INT8 of that, in front.

    ``size`` is that of the images, by default what the files say; ``model`` is as in :func:`verify_files`.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportError(needed("timing", "onnx"))
    with tempfile.TemporaryDirectory() as folder:
        named: list[tuple[str, Path]] = []
        channels = 3
        for path in files:
            _require(path)
            if path.suffix not in (".pt", ".onnx"):
                raise ExportError(f"{path}: is not timed; give .onnx files, and a model.pt to compare them with")
            if path.suffix == ".onnx":
                said = preprocessing_of(path)
                if said is not None:
                    size, channels = size or said.image_size, said.channels
                named.append((str(path), path))
                continue
            qmodel = _load_own(path, model)
            size, channels = size or _image_size(qmodel), _channels(qmodel)
            fp32, int8 = Path(folder) / f"{len(named)}-fp32.onnx", Path(folder) / f"{len(named)}-int8.onnx"
            float_onnx(qmodel, fp32, _random_images(size, 2, channels))
            int8_onnx(fp32, int8, [_random_images(size, 4, channels)])
            named = [(f"{path} in FP32", fp32), (f"{path}: ONNX Runtime's INT8", int8), *named]
        return benchmark(named, _random_images(size or 224, batch_size, channels), rounds, threads)


def keep_timings(files: Sequence[Path], timings: Sequence[Timing], batch_size: int, threads: int) -> Path | None:
    """Write ``benchmark.json`` beside ``files``, for the run's report, in the place of an older one.

    Returns:
        The file; ``None`` where ``files`` are not all of one run's folder.
    """
    folder = files[0].parent
    if any(path.parent.resolve() != folder.resolve() for path in files):
        return None
    try:
        read_run(folder)
    except ConfigError:
        return None
    rows = [asdict(row) | {"name": row.name.removeprefix(f"{folder}{os.sep}")} for row in timings]
    content = {"batch_size": batch_size, "threads": threads, "machine": machine("cpu"), "timings": rows}
    path = folder / BENCHMARK_FILE
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def load_built(path: Path, model: str = "") -> nn.Module:
    """A ``model.pt``, on what ``model`` builds if that is ``path/to/file.py:factory``, for the classes of the file."""
    if not code_file(model):
        return load(path)
    source = source_of(path) or ModelSource(model)
    return load(path, build_model(model, source.num_classes, cifar_stem=source.cifar_stem))


def _load_own(path: Path, model: str = "") -> nn.Module:
    qmodel = load_built(path, model)
    if not isinstance(qmodel, GraphModule) and _gives_boxes(qmodel):
        raise ExportError(
            f"{path} is a detector, which chooses its boxes in Python code: that is in no file but model.pt, which "
            "brfx.load reads and `brfx evaluate` measures; its backbone and head alone can be exported (docs/export.md)"
        )
    return qmodel


def _gives_boxes(qmodel: nn.Module) -> bool:
    try:
        with eval_mode(qmodel), torch.no_grad():
            found = qmodel(list(_random_images(_image_size(qmodel), 1, _channels(qmodel))))
    except Exception:  # it takes something else than a list of images
        return False
    return isinstance(found, list) and all(isinstance(of, dict) and "boxes" in of for of in found)


def _image_size(qmodel: nn.Module) -> int:
    preprocessing = metadata_of(qmodel).preprocessing
    return preprocessing.image_size if preprocessing else 224


def _channels(qmodel: nn.Module) -> int:
    preprocessing = metadata_of(qmodel).preprocessing
    return preprocessing.channels if preprocessing else 3


def _random_images(size: int, count: int, channels: int) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))
