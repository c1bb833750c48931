"""Stop between two batches on Ctrl-C or SIGTERM, or at once where nothing would be lost."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """``signal`` is the number of the signal that asked, 0 if none did."""

    def __init__(self) -> None:
        self.signal = 0
        self._waits = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a signal does not wait for the next batch: the block ends with KeyboardInterrupt, or does
        not begin.

        It ends so too where the signal ended a compiler that the block had started, which then failed.
        """
        if self.signal:
            raise KeyboardInterrupt
        self._waits = False
        try:
            yield
        except Exception as error:
            if self.signal:
                raise KeyboardInterrupt from error
            raise
        finally:
            self._waits = True

    def ask(self, number: int) -> None:
        """Note the signal, and say so at once."""
        self.signal = number
        if not self._waits:
            raise KeyboardInterrupt
        log.warning("Stopping when this batch or validation is over, to save it; Ctrl-C again stops at once")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request, and leave the second to whoever handled it before.

    Off the main thread, where Python allows no handlers, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        request.ask(number)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
