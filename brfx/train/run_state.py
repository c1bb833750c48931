"""What decides how a run goes on: its state between two batches, to a checkpoint and from one."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from brfx.config import TrainConfig
from brfx.distributed import all_gather_object, broadcast_object, rank, world_size
from brfx.errors import CheckpointError, ConfigError, first_line
from brfx.io.state_dict import versioned
from brfx.train.checkpoint import FOLDER, Checkpoints, state_sha256, written_into
from brfx.train.ema import WeightAverage
from brfx.train.random_state import generators_of, random_state, set_random_state
from brfx.train.report import EpochMetrics, Sums
from brfx.train.step import Shapes
from brfx.train.update import Update

log = logging.getLogger(__name__)


class Statistics(Protocol):
    """Figures of the model's weights after each epoch, and what the next ones are measured against, as plain data and
    tensors. :class:`brfx.WeightStatistics` is one."""

    def begin(self) -> None: ...
    def __call__(self, epoch: int, batches: int) -> dict[str, dict[str, float | None]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunState:
    """A run between two batches: everything that decides how it goes on.

    Args:
        model: on its device, in its memory layout.
        data: what it is trained on, whose generators of random numbers are part of the state.
        batches: of an epoch.
        compiled: how its steps are compiled; a resumed run goes on as it was begun.
        metric: the name of what validation measures.
        teacher: whose weights a resumed run must have too.
        run_dir: where its checkpoints are; ``None``: it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        data: Any,
        batches: int,
        compiled: str,
        metric: str,
        teacher: nn.Module | None,
        statistics: Statistics | None,
        run_dir: Path | None,
    ) -> None:
        self.model, self.config, self.statistics, self.run_dir = model, config, statistics, run_dir
        self.batches, self.compiled, self.metric = batches, compiled, metric
        self.checkpoints = None if run_dir is None else Checkpoints(run_dir / FOLDER, config.keep_checkpoints)
        self.generators = generators_of(data)
        self.update = Update(model, config, config.epochs * -(-batches // config.accumulate))
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.epoch, self.batch = 1, 0  # the epoch from 1, and how many of its batches are done
        self.shapes: Shapes | None = None  # of the first batch, for which the step is compiled
        self.epoch_random = self.random = random_state(self.generators)  # when the epoch began, and now
        self.sums, self.seconds = Sums(), 0.0
        self.history: list[EpochMetrics] = []
        self.best = -math.inf  # the metric of best.pth
        self.kept, self.kept_weights = 0, dict[str, Tensor]()  # the epoch that would be the result now
        self.skipped = 0
        self.teacher_sha256 = None if teacher is None else state_sha256(teacher)

    def as_dict(self) -> dict[str, Any]:
        """Plain data and tensors, from which :meth:`restore` makes this run again."""
        return {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "batch": self.batch,
            "batches": self.batches,
            "model": self.model.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "scheduler": self.update.scheduler.state_dict(),
            "scaler": self.update.scaler.state_dict(),
            "average": self.average and {"values": self.average.average, "updates": self.average.updates},
            "random": all_gather_object((self.epoch_random, random_state(self.generators))),
            "compiled": self.compiled,
            "metric": self.metric,
            "shapes": self.shapes and [list(map(list, shapes)) for shapes in self.shapes],
            "sums": vars(self.sums),
            "seconds": self.seconds,
            "history": [metrics.as_dict() for metrics in self.history],
            "best": self.best,
            "kept": self.kept,
            "kept_weights": self.kept_weights,
            "skipped": self.skipped,
            "teacher_sha256": self.teacher_sha256,
            "statistics": None if self.statistics is None else self.statistics.state_dict(),
        }

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        state = None
        if self.run_dir is not None and rank() == 0:
            assert self.checkpoints is not None
            state = self.checkpoints.newest()
        state = broadcast_object(state)
        if state is None:
            return
        try:
            self._check(state)
            self.restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(
                f"{self.run_dir}: the checkpoint does not fit this model ({first_line(error)})"
            ) from error
        log.info("Resumed at epoch %d, batch %d of %d", self.epoch, self.batch, self.batches)

    def _check(self, state: dict[str, Any]) -> None:
        """What may change between the parts of a run: where it runs, and how often it is saved."""
        free = {"device", "checkpoint_minutes", "keep_checkpoints"}
        now = asdict(self.config) | {"batches": self.batches, "world_size": world_size(), "metric": self.metric}
        then = state["config"] | {"batches": state["batches"], "world_size": len(state["random"])}
        then["metric"] = state["metric"]
        for name in now:
            if name not in then:
                raise ConfigError(f"{self.run_dir}: begun by an older brfx, which had no {name!r}: begin a new run")
            if name not in free and now[name] != then[name]:
                raise ConfigError(
                    f"{self.run_dir}: the run was begun with {name}={then[name]!r}, now it is {now[name]!r}: "
                    "resume with the settings of the start, or begin a new run"
                )
        if self.teacher_sha256 != state["teacher_sha256"]:
            raise ConfigError(
                f"{self.run_dir}: the run was begun with another teacher, whose weights differ: give that"
            )
        if self.statistics is not None and state.get("statistics") is None:
            raise ConfigError(f"{self.run_dir}: the run was begun without statistics: resume without them")

    def restore(self, state: dict[str, Any]) -> None:
        device = self.config.device
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.model.load_state_dict(versioned(state["model"], self.model))
        self.update.optimizer.load_state_dict(state["optimizer"])
        self.update.scheduler.load_state_dict(state["scheduler"])
        self.update.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.updates = state["average"]["updates"]
            self.average.average = {k: v.to(device) for k, v in state["average"]["values"].items()}
        self.epoch_random, self.random = state["random"][rank()]
        set_random_state(self.random, self.generators)
        self.compiled = state["compiled"]
        shapes = state["shapes"]
        self.shapes = shapes and tuple(tuple(map(torch.Size, found)) for found in shapes)
        self.sums = Sums(**state["sums"]).to(device)
        self.seconds = float(state["seconds"])
        self.history = [EpochMetrics.from_dict(metrics) for metrics in state["history"]]
        self.best = float(state["best"])
        self.kept = int(state["kept"])
        self.kept_weights = {k: v.to(device) for k, v in state["kept_weights"].items()}
        self.skipped = int(state["skipped"])
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])

    def save(self) -> None:
        state = self.as_dict()
        if self.checkpoints is not None and rank() == 0:
            with written_into(self.run_dir):
                self.checkpoints.write((self.epoch - 1) * self.batches + self.batch, state)

    def keep(self, metrics: EpochMetrics, weights: dict[str, Tensor]) -> bool:
        """Keep the weights if they would be the result now. Whether they are the best so far, the later of equals.

        An epoch of the warm-up has another objective, so it does not compete.
        """
        value = metrics.val_metric
        best = metrics.stage != "warm-up" and value is not None and value >= self.best
        if best:
            assert value is not None
            self.best = value
        if best or self.config.keep == "last":
            self.kept, self.kept_weights = metrics.epoch, weights
        return best

    def out_of_patience(self) -> bool:
        """Whether the last ``config.patience`` epochs of the final objective did no better than one before them."""
        measured = (metrics.val_metric for metrics in self.history if metrics.stage != "warm-up")
        scores = [-math.inf if score is None else score for score in measured]
        if self.config.patience is None or not scores:
            return False
        waited = len(scores) - 1 - scores.index(max(scores))
        if waited >= self.config.patience:
            log.info("Stopped after epoch %d: none better on validation in %d epochs", len(self.history), waited)
        return waited >= self.config.patience

    def where(self, more: int = 0) -> str:
        """The place of a batch, ``more`` after the last that is done."""
        return f"epoch {self.epoch}, batch {self.batch + more}"
