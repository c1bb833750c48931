"""A small real run, and what older and unfinished runs leave of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import brfx
from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.data import Dataset
from brfx.jobs.job import quantize

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + x).relu()
        return self.fc(x.mean((2, 3)))

def net(num_classes=10):
    return Net(num_classes)
"""


@pytest.fixture(scope="session")
def finished(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs of eight batches, the first without regularization."""
    root = tmp_path_factory.mktemp("runs")
    (root / "net.py").write_text(NET)
    model = f"{root / 'net.py'}:net"
    torch.manual_seed(0)
    torch.save(brfx.build_model(model, 10).state_dict(), root / "net.pth")
    train = TrainConfig(epochs=4, warmup_epochs=1, compile="off", seed=0)
    job = JobConfig(
        command="quantize",
        model=model,
        ckpt=root / "net.pth",
        data="digits",
        limit_batches=8,
        br_form="per_value",
        lambda_br=0.5,
        qat=QATConfig(bits=2, placement="deploy", overrides=(("conv1", {"bits": 4}),)),
        train=train,
        output_dir=root / "finished",
    )
    return quantize(job).run_dir


@pytest.fixture
def older(finished: Path, tmp_path: Path) -> Path:
    """The same run as a brfx that kept no histograms, no network and no machine would have left it."""
    folder = tmp_path / "older"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("histograms.jsonl", "network.json", "*.p*"))
    config = json.loads((folder / "config.json").read_text())
    del config["machine"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run after two epochs."""
    folder = tmp_path / "unfinished"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("result.json", "model.*"))
    for name, count in (("metrics.jsonl", 2), ("histograms.jsonl", 3)):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]))
    return folder


@pytest.fixture
def measured(measured_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(measured_once, tmp_path / "measured")


@pytest.fixture(scope="session")
def measured_once(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with what `brfx sensitivity` and `brfx benchmark` found."""
    folder = tmp_path_factory.mktemp("with") / "measured"
    shutil.copytree(finished, folder)
    losses = {"conv1": (0.5, 0.25, 0.0625), "conv2": (2.0, 0.5, 0.0), "fc": (0.125, 0.0005, 0.0001)}
    layers = [
        {"name": name, "kind": "weights", "bits": 3, "values": 100 * place, "assigned": None}
        | {"losses": dict(zip(("2", "4", "8"), found, strict=True))}
        for place, (name, found) in enumerate(losses.items(), start=1)
    ]
    (folder / "sensitivity.json").write_text(json.dumps({"images": 128, "layers": layers, "overrides": []}))
    timings = [
        {"name": "model.pt in FP32", "bytes": 8000, "milliseconds": 0.5, "images_per_second": 2000.0, "speed": 1.0},
        {"name": "model.onnx", "bytes": 4000, "milliseconds": 0.25, "images_per_second": 4000.0, "speed": 2.0},
    ]
    content = {"batch_size": 1, "threads": 2, "machine": {"processor": "a CPU"}, "timings": timings}
    (folder / "benchmark.json").write_text(json.dumps(content))
    return folder
