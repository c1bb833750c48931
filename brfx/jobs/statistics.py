"""What a run keeps of its weights and activations: figures in ``metrics.jsonl``, histograms in ``histograms.jsonl``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brfx.analysis.histograms import activation_histograms, weight_histograms
from brfx.analysis.weight_statistics import WeightStatistics
from brfx.distributed import rank
from brfx.errors import first_line
from brfx.io.atomic import write_text_atomically
from brfx.train.checkpoint import written_into
from brfx.train.tasks import to_device

log = logging.getLogger(__name__)

FILE = "histograms.jsonl"


class RunStatistics(WeightStatistics):
    """:class:`brfx.WeightStatistics` that also writes ``histograms.jsonl``: a line of before training, with epoch 0,
    and one of each epoch's end, of the weights that are validated.

    A line that is there already of this epoch or a later one is replaced: a run that is resumed writes each once.

    Args:
        qmodel, after: as in :class:`brfx.WeightStatistics`.
        run_dir: where the file is.
        images: what activations are seen on, the same at each epoch.
    """

    def __init__(self, qmodel: nn.Module, after: int, run_dir: Path, images: Any) -> None:
        super().__init__(qmodel, after)
        self.run_dir, self.images = run_dir, images
        self._lines: dict[int, str] | None = None

    def begin(self) -> None:
        super().begin()
        self._record(0)

    def __call__(self, epoch: int, batches: int) -> dict[str, dict[str, float | None]]:
        self._record(epoch)
        return super().__call__(epoch, batches)

    def _record(self, epoch: int) -> None:
        if rank() > 0:
            return
        path = self.run_dir / FILE
        if self._lines is None:
            self._lines = _lines(path) if epoch else {}
        line = {"epoch": epoch, "weights": weight_histograms(self.qmodel), "activations": self._activations()}
        self._lines = {number: text for number, text in self._lines.items() if number < epoch}
        self._lines[epoch] = json.dumps(line) + "\n"
        with written_into(self.run_dir):
            write_text_atomically(path, "".join(self._lines.values()))

    def _activations(self) -> dict[str, Any]:
        """Nothing, and a warning, where the model does not run on images alone: that is no reason to lose a run."""
        device = next(self.qmodel.parameters()).device
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # a model that draws numbers draws the same ones without this
                return activation_histograms(self.qmodel, to_device(self.images, device))
        except Exception as error:
            log.warning("%s: no histograms of activations (%s)", FILE, first_line(error))
            return {}


def _lines(path: Path) -> dict[int, str]:
    """The lines that are there, by epoch; none where they cannot be read."""
    if not path.exists():  # begun by a brfx that wrote none
        return {}
    try:
        lines = path.read_text().splitlines(keepends=True)
        return {int(json.loads(line)["epoch"]): line for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s: what is there cannot be read, the lines before this epoch are lost (%s)", FILE, error)
        return {}
