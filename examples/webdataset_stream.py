"""Train on shards of WebDataset, a stream that has no length: the settings say how many batches an epoch has."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import webdataset
from torch import Tensor

import brfx
from brfx.data import Preprocessing
from brfx.data.image_files import pixels
from brfx.train import FitResult


def stream(shards: list[str], batch: int, sample: Callable[..., tuple[Tensor, int]], shuffle: int = 0) -> Any:
    """Batches of the pairs ``NAME.png`` and ``NAME.cls`` in tar files; without end where they are shuffled."""
    data = webdataset.WebDataset(shards, shardshuffle=False, seed=0, resampled=shuffle > 0)
    pairs = data.shuffle(shuffle).decode("pilrgb").to_tuple("png", "cls").map_tuple(*sample)
    return webdataset.WebLoader(pairs.batched(batch, partial=not shuffle), batch_size=None)


def main(train: list[str], test: list[str], epochs: int = 2, batches: int = 8, size: int = 32) -> FitResult:
    """``train``, ``test``: paths of shards; ``batches``: of an epoch."""
    preprocessing = Preprocessing(size)

    def image(picture: Any) -> Tensor:
        return preprocessing.normalize(pixels(preprocessing.square(picture))[None])[0]

    sample = (image, int)
    train_data, test_data = stream(train, 16, sample, shuffle=100), stream(test, 64, sample)
    model = brfx.build_model("resnet20", num_classes=10)
    config = brfx.TrainConfig(epochs=epochs, epoch_batches=batches, lr=0.05)
    return brfx.fit(model, train_data, test_data, config)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(main(sys.argv[1:-1], sys.argv[-1:]))
