"""Train on a data set of Hugging Face's ``datasets``: its rows become batches, and ``fit`` takes the loader."""

import sys
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

import brfx
from brfx.data import Preprocessing
from brfx.data.image_files import pixels
from brfx.train import FitResult


def main(folder: str, epochs: int = 2, size: int = 32) -> FitResult:
    """``folder`` has pictures as ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""
    data = datasets.load_dataset("imagefolder", data_dir=folder)
    preprocessing = Preprocessing(size)

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([pixels(preprocessing.square(row["image"].convert("RGB"))) for row in rows])
        return preprocessing.normalize(images), torch.tensor([row["label"] for row in rows])

    train = DataLoader(data["train"], 16, shuffle=True, drop_last=True, collate_fn=collate)
    test = DataLoader(data["test"], 64, collate_fn=collate)
    model = brfx.build_model("resnet20", num_classes=data["train"].features["label"].num_classes)
    brfx.fit(model, train, test, brfx.TrainConfig(epochs=epochs, lr=0.05))

    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=4))
    brfx.calibrate(qmodel, [images for images, _ in train], batch_statistics=True)
    penalty = brfx.BinPenalty(qmodel, weight=0.1, act=0.01)
    return brfx.fit(qmodel, train, test, brfx.TrainConfig(epochs=epochs, warmup_epochs=1), penalty=penalty)


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
