"""Being asked to stop: signals, and the time limit. Nothing is interrupted; the loop looks between two steps."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, final

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}


@final
class StopRequest:
    """``with StopRequest() as stop:`` … after each step: ``if stop.signal:`` save, and exit with its code.

    SIGTERM, SIGINT and SIGUSR1 only leave a note, the first one counts, so no signal can spoil a save; to abandon the
    save send SIGKILL. The handlers found are put back at the end. Outside the main thread nothing is installed.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None or os.getpid() != self._pid:  # a forked worker has nothing to say or to save
            return
        self.signal = signal.Signals(number)
        # print() could meet itself half way through a line; write() cannot.
        os.write(2, f"\nbarlow: {self.signal.name}: finishing this step, saving, then stopping\n".encode())

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in EXIT_CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)  # None: one not set from Python
        self._before = {}


def ignore_stop_signals() -> None:
    """For workers: the scheduler signals every process, and the last step needs them.

    A worker that ignores SIGTERM and hangs is ended by ``kill_workers`` only.
    """
    for each in EXIT_CODES:
        signal.signal(each, signal.SIG_IGN)


def kill_workers(spared: Collection[BaseProcess] = ()) -> None:
    """Ends the child processes of ``multiprocessing`` that are still there (SIGKILL), so that no exit waits for one;
    but not ``spared``, those of somebody else in this process."""
    for child in set(multiprocessing.active_children()) - set(spared):
        child.kill()
        child.join()


@final
class Deadline:
    """The time limit: ``near`` turns true while there is still time to finish a step and to save.

    ``seconds``: the limit, None for none; ``begun``: ``clock()`` when it began to count (default: now).
    """

    def __init__(
        self, seconds: float | None, begun: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._limit = math.inf if seconds is None else seconds
        self._end = (clock() if begun is None else begun) + self._limit

    def near(self, step: float, save: float) -> bool:
        """True when less is left than twice a step plus thrice a save (seconds, the slowest seen) plus 10 s.

        The fixed part of the margin is never more than a tenth of the limit: a short limit still trains.
        """
        return self._end - self._clock() < 2 * step + 3 * save + min(10.0, self._limit / 10)
