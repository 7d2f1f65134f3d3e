"""Progress of long jobs: one live line on a terminal, a plain line now and then in a pipe or under CI."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")
Tell = Callable[[str], None]  # is told what a long job is at, often; who shows it decides how often

PLAIN_EVERY = 10.0  # seconds between plain lines: a log file stays short, a watcher still sees life


def on_terminal() -> bool:
    """True when standard error is a terminal that a live line can be drawn on (never under CI)."""
    return (
        not sys.stderr.closed and sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
    )


def duration(seconds: float) -> str:
    """Seconds as people read them: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s" if s % 60 else f"{s // 60} min"
    return f"{s // 3600} h {s % 3600 // 60} min"


@contextmanager
def _line() -> Iterator[Callable[[Callable[[float], str]], None]]:
    """A function that is told again and again what there is to show, and asks for the text (of the seconds so far) when
    it is time: the live line on a terminal, elsewhere a plain line every ``PLAIN_EVERY`` seconds."""
    live, start = on_terminal(), time.monotonic()
    shown = start

    def show(text: Callable[[float], str]) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.1 if live else PLAIN_EVERY):
            return
        shown = now
        line = text(now - start)
        if live:  # a line that is broken would be drawn again and again below itself
            line = line[: shutil.get_terminal_size().columns - 1]
        with suppress(OSError, ValueError):  # nobody listens any more: the job goes on
            print(f"\r\033[K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if live and shown > start:
            with suppress(OSError, ValueError):
                print("\r\033[K", end="", file=sys.stderr, flush=True)


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields ``items`` and shows how many of ``total`` are done, the rate and the time left, on standard error.

    A job that ends within ``PLAIN_EVERY`` seconds prints nothing in a pipe.
    """
    done = 0

    def text(seconds: float) -> str:
        rate = done / seconds
        speed = f"{rate:,.0f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
        return f"{what}: {done:,} of {total:,} · {speed} · {duration(max(total - done, 0) / rate)} left"

    with _line() as show:
        for item in items:
            yield item
            done += 1
            show(text)


@contextmanager
def shown() -> Iterator[Tell]:
    """Shows what is told within, and how long it has taken so far: for jobs of which nobody knows the end."""
    with _line() as show:
        yield lambda words: show(lambda seconds: f"{words} · {duration(seconds)} so far")


def silent(_: str) -> None:
    """Where nobody asks what the job is at."""


def headed(tell: Tell, head: str) -> Tell:
    """The same, with ``head`` in front of all that is told."""
    return lambda text: tell(f"{head}, {text}")
