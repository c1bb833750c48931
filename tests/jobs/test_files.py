"""Files of one model, exported, measured and compared, also where the model is the user's own."""

import json

import pytest
import torch

from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.errors import CheckpointError, DataError, ExportError
from brfx.jobs.evaluate import evaluate_file
from brfx.jobs.files import benchmark_files, export_file, keep_timings, verify_files
from brfx.jobs.job import quantize

NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )
"""


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run's folder with the model in four forms, and the model's name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "net.py").write_text(NET)
    torch.manual_seed(0)
    from brfx.models import build_model

    name = f"{folder}/net.py:net"
    torch.save(build_model(name, 10).state_dict(), folder / "net.pth")
    job = JobConfig(
        command="quantize",
        model=name,
        ckpt=folder / "net.pth",
        data="digits",
        qat=QATConfig(bits=4),
        train=TrainConfig(epochs=1, warmup_epochs=0, compile="off"),
        output_dir=folder / "run",
    )
    quantize(job)
    for suffix in ("pt2", "safetensors"):
        export_file(folder / "run" / "model.pt", folder / "run" / f"model.{suffix}", name)
    return folder / "run", name


def evaluated(path, **settings):
    return evaluate_file(JobConfig(command="evaluate", ckpt=path, data="digits", **settings))


def test_every_form_of_a_model_is_measured_alike(run):
    folder, name = run
    kind, expected = evaluated(folder / "model.pt", model=name)
    assert kind == "W4A4" and expected.count == 360
    for suffix in ("onnx", "pt2", "safetensors"):
        kind, found = evaluated(folder / f"model.{suffix}")
        assert kind == "W4A4" and found.count == 360 and abs(found.correct - expected.correct) <= 2
    onnx, packed = (evaluated(folder / f"model.{suffix}")[1] for suffix in ("onnx", "safetensors"))
    assert onnx.correct == packed.correct


def test_a_file_wants_its_own_classes(run, tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / split / kind / f"{number}.png")
    with pytest.raises(DataError, match=r"model\.onnx knows 10 classes .*, the data has 2 \(cat, dog"):
        evaluate_file(JobConfig(command="evaluate", ckpt=run[0] / "model.onnx", data=str(tmp_path)))


def test_a_model_of_ones_own_is_compared_and_timed(run, tmp_path):
    folder, name = run
    result = verify_files(folder / "model.pt", folder / "model.onnx", "digits", images=50, model=name, integer=True)
    assert result.images == 50 and result.bit_for_bit and result.accuracy is not None
    assert verify_files(folder / "model.onnx", folder / "model.safetensors").bit_for_bit
    assert verify_files(folder / "model.pt2", folder / "model.onnx", images=4).images == 4
    rows = benchmark_files([folder / "model.pt", folder / "model.onnx"], 1, 2, 1, None, name)
    assert len(rows) == 3
    kept = keep_timings([folder / "model.pt", folder / "model.onnx"], rows, 1, 2)
    content = json.loads(kept.read_text())
    assert kept == folder / "benchmark.json" and (content["batch_size"], content["threads"]) == (1, 2)
    names = [row["name"] for row in content["timings"]]
    assert names == ["model.pt in FP32", "model.pt: ONNX Runtime's INT8", "model.onnx"]
    assert content["timings"][2]["bytes"] == (folder / "model.onnx").stat().st_size and content["machine"]["processor"]
    kept.unlink()
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    assert keep_timings([tmp_path / "model.onnx"], rows, 1, 2) is None  # beside no run
    assert keep_timings([folder / "model.onnx", tmp_path / "model.onnx"], rows, 1, 2) is None  # of two folders
    assert keep_timings([tmp_path / "model.onnx", folder / "model.onnx"], rows, 1, 2) is None
    assert not kept.exists() and [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert len(benchmark_files([folder / "model.onnx"], 1, 2, 1, None)) == 1  # at the size that the file says
    with pytest.raises(CheckpointError, match="no code is run"):
        verify_files(folder / "model.pt", folder / "model.onnx")
    with pytest.raises(ExportError, match=r"model\.pt2: is not timed"):
        benchmark_files([folder / "model.pt2"], 1, 2, 1, None)
    with pytest.raises(ExportError, match="is a folder, not a file"):
        verify_files(folder, folder / "model.onnx")


def test_files_of_different_preprocessing_are_not_compared(run, tmp_path):
    import onnx

    other = onnx.load(run[0] / "model.onnx")
    for entry in other.metadata_props:
        if entry.key == "preprocessing":
            entry.value = json.dumps(json.loads(entry.value) | {"image_size": 12})
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"wants images of 3x16x16 .* of 3x12x12 .* of one model"):
        verify_files(run[0] / "model.onnx", tmp_path / "other.onnx")
