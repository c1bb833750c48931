"""A run's figures in MLflow: a callback of ``fit`` is told of batches and epochs, and passes them on."""

import sys
from pathlib import Path

import mlflow

import brfx
from brfx.data import BatchLoader, load_dataset
from brfx.train import Callback, EpochMetrics, FitResult, Progress


class MlflowCallback(Callback):
    """Logs to the run that ``mlflow.start_run`` began."""

    def on_batch(self, progress: Progress) -> None:
        batch = (progress.epoch - 1) * progress.batches + progress.batch
        figures = {"train/loss": progress.means.loss, "lr": progress.lr}
        mlflow.log_metrics(figures | {f"penalty/{k}": v for k, v in progress.means.terms.items()}, step=batch)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        if metrics.val_metric is not None:
            mlflow.log_metric(f"val/{metrics.metric}", metrics.val_metric, step=metrics.epoch)


def main(epochs: int = 3) -> FitResult:
    data = load_dataset("digits", data_dir=Path("."))
    train = BatchLoader(data.train, data.preprocessing, 32, augment=True, flip=data.flip, drop_last=True)
    val = BatchLoader(data.val, data.preprocessing, 256)
    config = brfx.TrainConfig(epochs=epochs, lr=0.1)
    mlflow.set_experiment("brfx")
    with mlflow.start_run():
        mlflow.log_params(vars(config))
        return brfx.fit(brfx.build_model("resnet20", 10), train, val, config, callbacks=[MlflowCallback()])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
