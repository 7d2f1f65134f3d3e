"""The cores of the processor: how many this process may use, and how long it stood waiting for one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, final

BUSY = 0.2  # of the time: beyond, waiting for a core is worth a word
LONG = 5.0  # seconds; what was seen in less says little
TASKS = Path("/proc/self/task")


def cores() -> int:
    """Cores this process may use: those it is bound to, or fewer where its container has a share of them only."""
    from joblib import cpu_count  # here, because --version has no time for it

    return int(cpu_count())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, torch computes with so many threads in this process; after it, with as many as before."""
    import torch  # here, because --version has no time for it

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Wait(NamedTuple):
    """What ``CoreWait`` saw: shares of ``seconds`` in which threads were ready to run and had no core."""

    seconds: float
    worst: float  # of the thread that waited longest, 0 to 1: about what the whole run stood still
    total: float  # of all threads together; one other program that is always busy makes half of one

    def advice(self, threads: int) -> str:
        """What is wrong and what to do, where ``threads`` compute; nothing where little was waited, or seen."""
        if self.worst < BUSY or self.seconds < LONG:
            return ""
        fewer = max(1, threads - max(1, round(2 * self.total)))
        way = f", or leave them a core: --threads {fewer}, in a new --out" if fewer < threads else ""
        return (f"other programs, or a limit on its share of the processor, keep this run waiting for a core "
                f"{self.worst:.0%} of the time: end them{way}")  # fmt: skip


@final
class CoreWait:
    """How long this process waits for a core, as Linux counts it for each thread; elsewhere nothing is known, and 0.

    A program that shares one of our cores slows a step by far more than its share, as all threads wait for the one
    that has none.
    """

    def __init__(self) -> None:
        self._since, self._before = time.monotonic(), _waited()

    def look(self) -> Wait:
        """The wait since the last look."""
        now, waited = time.monotonic(), _waited()
        seconds = max(now - self._since, 1e-9)
        shares = [(waited[task] - self._before.get(task, 0)) / 1e9 / seconds for task in waited]
        self._since, self._before = now, waited
        return Wait(seconds, min(1.0, max(shares, default=0.0)), sum(shares))


def _waited() -> Mapping[str, int]:
    """Nanoseconds that each thread of this process has waited for a core so far, by its number."""
    waited = {}
    for task in TASKS.iterdir() if TASKS.is_dir() else ():
        try:
            waited[task.name] = int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
            continue
    return waited
