"""A run's figures in Weights & Biases: a callback of ``fit`` is told of batches and epochs, and passes them on."""

import sys
from pathlib import Path
from typing import Any

import wandb

import brfx
from brfx.data import BatchLoader, load_dataset
from brfx.train import Callback, EpochMetrics, FitResult, Progress


class WandbCallback(Callback):
    """Logs to ``run``, which ``wandb.init`` gave."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_batch(self, progress: Progress) -> None:
        batch = (progress.epoch - 1) * progress.batches + progress.batch
        figures = {"train/loss": progress.means.loss, "lr": progress.lr, "epoch": progress.epoch}
        self.run.log(figures | {f"penalty/{name}": value for name, value in progress.means.terms.items()}, step=batch)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.run.summary[f"val/{metrics.metric}"] = metrics.val_metric
        self.run.log({f"val/{metrics.metric}": metrics.val_metric, "val/loss": metrics.val_loss})


def main(epochs: int = 3) -> FitResult:
    data = load_dataset("digits", data_dir=Path("."))
    train = BatchLoader(data.train, data.preprocessing, 32, augment=True, flip=data.flip, drop_last=True)
    val = BatchLoader(data.val, data.preprocessing, 256)
    config = brfx.TrainConfig(epochs=epochs, lr=0.1)
    with wandb.init(project="brfx", config=vars(config)) as run:
        return brfx.fit(brfx.build_model("resnet20", 10), train, val, config, callbacks=[WandbCallback(run)])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
