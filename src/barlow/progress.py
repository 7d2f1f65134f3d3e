"""Progress of long jobs: one live line on a terminal, a plain line now and then in a pipe or under CI."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

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


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields ``items`` and shows how many of ``total`` are done, the rate and the time left, on standard error.

    A job that ends within ``PLAIN_EVERY`` seconds prints nothing in a pipe.
    """
    live, start = on_terminal(), time.monotonic()
    shown, done = start, 0
    try:
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - shown < (0.1 if live else PLAIN_EVERY):
                continue
            shown = now
            rate = done / (now - start)
            left = duration(max(total - done, 0) / rate)
            speed = f"{rate:,.0f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
            text = f"{what}: {done:,} of {total:,} · {speed} · {left} left"
            if live:  # a line that is broken would be drawn again and again below itself
                text = text[: shutil.get_terminal_size().columns - 1]
            with suppress(OSError, ValueError):  # nobody listens any more: the job goes on
                print(f"\r\033[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
    finally:
        if live and done:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
