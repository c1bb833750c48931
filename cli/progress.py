"""What a command is doing: a bar on a terminal, a line a minute in a file or a pipe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from brfx.train import Callback, EpochMetrics, Phase, Progress

from .render import duration, epoch_lines, stage_mark, term_name

#: Seconds between two lines where there is no terminal.
LINE_EVERY = 60.0


def figures(where: Progress, room: int) -> str:
    """Loss, accuracy and penalties with three digits, as many of them as ``room`` letters hold."""
    found = [f"loss {_three(where.means.loss)}"]
    if where.means.accuracy is not None:
        found.append(f"acc {_three(100 * where.means.accuracy)} %")
    found += [f"{term_name(name)} {_three(value)}" for name, value in where.means.terms.items()]
    line = found[0]
    for each in found[1:]:
        if len(line) + 2 + len(each) > room:
            break
        line += f"  {each}"
    return line


def _three(value: float) -> str:
    """Three digits, zeros too, so that a figure keeps its width."""
    return f"{value:#.3g}".rstrip(".")


class Status(Callback):
    """What is going on now, told by the library and asked for by a bar or a line.

    Attributes:
        name: of the phase, or the epoch.
        done, total: batches; ``total`` is ``None`` where nobody knows.
        where: the last batch of training that was told of.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.name, self.note = "starting", ""
        self.done, self.total = 0, None  # type: int, int | None
        self.where: Progress | None = None
        self.began = self.told = clock()
        self._training: tuple[float, int] | None = None  # when the first batch was over that this process trained

    def on_phase(self, phase: Phase) -> None:
        self.told = self.clock()
        if phase.name != self.name:
            self.began = self.told
        self.name, self.note, self.done, self.total = phase.name, phase.note, phase.done, phase.total

    def on_batch(self, progress: Progress) -> None:
        done = (progress.epoch - 1) * progress.batches + progress.batch
        self.told = self.clock()
        self._training = self._training or (self.told, done)
        self.name, self.note = f"epoch {progress.epoch}/{progress.epochs}{stage_mark(progress.stage)}", ""
        self.done, self.total, self.where = done, progress.epochs * progress.batches, progress

    @property
    def trains(self) -> bool:
        return self.name.startswith("epoch ") or self.name == "training"

    @property
    def left(self) -> float | None:
        """Seconds until ``total``, from the batches so far; of training with all that goes on in between. They count
        down until the next batch is told of."""
        began, before = (self._training or (self.began, self.done)) if self.trains else (self.began, 0)
        if self.total is None or self.done <= before:
            return None
        then = (self.total - self.done) * (self.told - began) / (self.done - before)
        return max(0.0, then - (self.clock() - self.told))

    @property
    def time(self) -> str:
        """How long it still takes, or has been going on."""
        left = self.left
        return f"{duration(self.clock() - self.began)}" if left is None else f"{duration(left)} left"

    @property
    def title(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name

    def line(self) -> str:
        """All of it in a line."""
        parts = [self.title]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} %")
        parts.append(self.time)
        if self.trains and self.where is not None:
            parts.append(figures(self.where, 60))
        return ", ".join(parts)


class _Time(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, status: Status) -> None:
        super().__init__()
        self.status = status

    def render(self, task: Task) -> Text:
        return Text(self.status.time.rjust(8))


class _Shown(Status):
    """Keeps a bar, and prints a line an epoch, the columns' names above the first and wherever they change."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console, self.printed = console, monotonic()
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _Time(self),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(self.title, total=None, figures="")
        self.epochs, self.names = 0, ""

    def on_phase(self, phase: Phase) -> None:
        super().on_phase(phase)
        self._update()

    def on_batch(self, progress: Progress) -> None:
        super().on_batch(progress)
        self.epochs = progress.epochs
        self._update()

    def on_epoch(self, metrics: EpochMetrics) -> None:
        names, figures = epoch_lines(metrics, self.epochs)
        for line in (figures,) if names == self.names else (names, figures):
            self.console.print(line, markup=False)
        self.names = names
        self.printed = monotonic()

    def _update(self) -> None:
        shown = ""
        if self.trains and self.where is not None:
            shown = figures(self.where, self.console.width - len(self.title) - 24)  # the bar and the time have these
        self.bar.update(self.task, description=self.title, completed=self.done, total=self.total, figures=shown)


@contextmanager
def progress(console: Console) -> Iterator[Callback]:
    """A callback that shows phases and epochs while the block lasts."""
    shown = _Shown(console)
    over = threading.Event()
    lines = threading.Thread(target=_print_lines, args=(shown, over), daemon=True)
    if not console.is_terminal:
        lines.start()
    try:
        with shown.bar:
            yield shown
    finally:
        over.set()


def _print_lines(shown: Any, over: threading.Event) -> None:
    """Say what goes on whenever nothing was printed for a while; even where the main thread compiles."""
    while not over.wait(max(0.01, shown.printed + LINE_EVERY - monotonic())):
        if monotonic() - shown.printed >= LINE_EVERY:
            shown.console.print(shown.line(), markup=False)
            shown.printed = monotonic()
