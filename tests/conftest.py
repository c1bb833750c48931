"""What tests share: small models and data, and the real checkpoint and images where they are beside the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.data import BatchLoader, Dataset, Preprocessing, Split, load_dataset

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_CHECKPOINT = SHARED_DATA / "resnet20-12fca82f.th"


def _require_shared() -> None:
    if not REAL_CHECKPOINT.is_file():
        pytest.skip(f"needs the real checkpoint and CIFAR-10 images, which are not at {SHARED_DATA}")


class TinyNet(nn.Module):
    """One of everything that paper placement rewrites: functional, method, shared and module ReLUs, a residual add."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6()
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.conv2(x))
        x = self.relu(x + y).relu()
        x = self.relu6(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def tiny() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def digits() -> Dataset:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return load_dataset("digits", data_dir=Path("unused"))


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    _require_shared()
    return REAL_CHECKPOINT


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 60 test images of each class, as a folder of PNGs."""
    _require_shared()
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, SHARED_DATA / "unpack.py", root, "--limit", "60"], check=True, capture_output=True)
    return root


@pytest.fixture(scope="session")
def cifar10_test() -> Split:
    """All 10,000 test images, read from the sheets."""
    _require_shared()
    return _read_sheets("test", 1000)


@pytest.fixture(scope="session")
def cifar10_batches(cifar10_test: Split) -> BatchLoader:
    return BatchLoader(cifar10_test, Preprocessing(32), 500)


def _read_sheets(part: str, each: int) -> Split:
    import numpy as np
    from PIL import Image

    images, labels = [], []
    for path in sorted((SHARED_DATA / "cifar10").glob(f"{part}-*-0.webp")):
        sheet = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
        tiles = sheet.reshape(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)[:each]
        images.append(tiles)
        labels.append(torch.full((len(tiles),), int(path.stem.split("-")[1])))
    return Split(torch.cat(images).contiguous(), torch.cat(labels))
