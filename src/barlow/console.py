"""What people see while a run goes on: one live group of lines on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from barlow.progress import PLAIN_EVERY, duration, on_terminal


def say(text: str) -> None:
    """One line for the user, on standard error, so that standard output stays free for results.

    A reader that has left (a closed terminal, a full log disk) does not end a run.
    """
    with suppress(OSError, ValueError):  # ValueError: standard error is closed
        print(text, file=sys.stderr, flush=True)


def lines(state: Mapping[str, Any]) -> list[str]:
    """The state of a run as two or three lines of text.

    ``state``: step, steps, epoch, loss, floor, invariance, redundancy, lambda; then, once known, twins_found, verdict,
    images_per_s, data_wait (0..1), seconds_left.
    """
    first = [
        f"step {state['step']:,} of {state['steps']:,}",
        f"epoch {state['epoch']:.1f}",
        f"loss {state['loss']:.2f} (floor {state['floor']:.2f})",
        f"invariance {state['invariance']:.2f}",
        f"redundancy λ × {state['redundancy']:,.1f} = {state['lambda'] * state['redundancy']:.2f}",
    ]
    second = []
    if "twins_found" in state:
        second.append(f"twins found {state['twins_found']:.0%}")
    if "verdict" in state:
        second.append(state["verdict"])
    if "images_per_s" in state:
        second.append(f"{state['images_per_s']:,.0f} images/s")
        second.append(f"waiting for data {state['data_wait']:.1%}")
        second.append(f"{duration(state['seconds_left'])} left")
    return [" · ".join(first), " · ".join(second)]


@final
class Display:
    """Shows ``update``'s state: redrawn in place on a terminal, else a plain line every ten seconds and at the end."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: Live | None = None
        self._state: dict[str, Any] = {}
        self._shown = time.monotonic()

    def __enter__(self) -> Display:
        if on_terminal() and not self.quiet:
            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def update(self, **state: Any) -> None:
        """Takes what is new; cheap enough for every step."""
        self._state.update(state)
        now = time.monotonic()
        if self.quiet or "loss" not in self._state or now - self._shown < (0.25 if self._live else PLAIN_EVERY):
            return
        self._draw(now)

    def _draw(self, now: float) -> None:
        self._shown = now
        if self._live:
            self._live.update(Group(*(Text(line) for line in lines(self._state))))
        else:
            say(" · ".join(line for line in lines(self._state) if line))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not self.quiet and "loss" in self._state:
            self._draw(time.monotonic())
        if self._live:
            self._live.stop()
