"""A run's figures for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brfx.errors import ConfigError
from brfx.extras import needed
from brfx.train.report import Callback, EpochMetrics, Progress


class TensorBoard(Callback):
    """Writes event files into ``folder``, for ``tensorboard --logdir folder``; the first figure makes the folder.

    Every few batches, over the batches since the run began: ``train/loss``, ``train/accuracy``, ``penalty/NAME`` for
    each term, ``lr``. Over the epochs, where there is validation: ``val/loss``, ``val/accuracy`` or the task's metric,
    and what else it tells, such as ``val/mAP``.
    A run that goes on in the same folder replaces what was logged after the batch it goes on from.

    Raises:
        ConfigError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._writer: Any = None
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(needed("TensorBoard", "tensorboard", error)) from error

    def on_batch(self, progress: Progress) -> None:
        before = (progress.epoch - 1) * progress.batches
        batch, means = before + progress.batch, progress.means
        writer = self._open(before + 1)
        writer.add_scalar("train/loss", means.loss, batch)
        if means.accuracy is not None:
            writer.add_scalar("train/accuracy", means.accuracy, batch)
        for name, value in means.terms.items():
            writer.add_scalar(f"penalty/{name}", value, batch)
        writer.add_scalar("lr", progress.lr, batch)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        writer = self._open()
        main = ("loss", metrics.val_loss), (metrics.metric, metrics.val_metric)
        for name, value in (*main, *metrics.further.items()):
            if value is not None:
                writer.add_scalar(f"val/{name}", value, metrics.epoch)
        writer.flush()

    def close(self) -> None:
        """Write what is left; after each epoch nothing is."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, first_batch: int | None = None) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder, purge_step=first_batch)  # type: ignore[no-untyped-call]
        return self._writer
