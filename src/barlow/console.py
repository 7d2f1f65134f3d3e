"""What people see while a run goes on: one live group of lines on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from barlow.cores import BUSY
from barlow.progress import PLAIN_EVERY, duration, on_terminal

WORD = 17  # columns for the name of a setting
BAR = 60  # columns of the bar that fills while a run goes on


def say(text: str) -> None:
    """One line for the user, on standard error, so that standard output stays free for results.

    A reader that has left (a closed terminal, a full log disk) does not end a run.
    """
    with suppress(OSError, ValueError):  # ValueError: standard error is closed
        print(text, file=sys.stderr, flush=True)


def say_choice(word: str, value: object, reason: str) -> None:
    """One setting and why it is so, on a line of its own, the value as it would be typed; wrapped on a terminal."""
    text = f"{word:<{WORD}} {spelled(value)}: {reason}"
    width = shutil.get_terminal_size().columns
    say(textwrap.fill(text, width, subsequent_indent=" " * (WORD + 1)) if on_terminal() else text)


def spelled(value: object) -> str:
    """A setting as people type it: ``true``, ``0.00212``, ``512-512-256``, ``{"layers": [1, 1]}``."""
    if isinstance(value, bool | dict):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        between = "-" if all(isinstance(each, int) for each in value) else " "
        return between.join(spelled(each) for each in value)
    return str(value)


def in_shell(path: object) -> str:
    """A path as it stands in a command that people copy: quoted where it holds spaces or the like."""
    return shlex.quote(str(path))


def lines(state: Mapping[str, Any]) -> list[str]:
    """The state of a run as three lines of text that fit a terminal of 80 columns.

    ``state``: step, steps, epoch, loss, floor, invariance, redundancy, lambda; then, once known, twins_found, verdict,
    images_per_s, data_wait (0..1), seconds_left, core_wait (0..1).
    """
    where = [f"step {state['step']:,} of {state['steps']:,}", f"epoch {state['epoch']:.1f}"]
    if "images_per_s" in state:
        where.append(f"{duration(state['seconds_left'])} left")
    if state.get("core_wait", 0.0) >= BUSY:
        where.append(f"waiting for a core {state['core_wait']:.0%}")
    loss = [
        f"loss {short(state['loss'])} (floor {short(state['floor'])})",
        f"invariance {short(state['invariance'])}",
        f"redundancy {short(state['lambda'] * state['redundancy'])} (λ × {short(state['redundancy'])})",
    ]
    seen = []
    if "twins_found" in state:
        seen.append(f"twins found {state['twins_found']:.0%}")
    if "verdict" in state:
        seen.append(state["verdict"])
    if "images_per_s" in state:
        seen += [f"{state['images_per_s']:,.0f} images/s", f"waiting for data {state['data_wait']:.1%}"]
    return [" · ".join(part) for part in (where, loss, seen)]


def short(value: float) -> str:
    """A term of the loss, with no more decimals than its size deserves."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10_000 else f"{value:,.0f}"


@final
class Display:
    """Shows ``update``'s state: redrawn in place on a terminal, else a plain line every ten seconds and at the end."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: Live | None = None
        self._state: dict[str, Any] = {}
        self._stale = False  # something is known that is not shown
        self._shown = time.monotonic()

    def __enter__(self) -> Display:
        if on_terminal() and not self.quiet:
            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def update(self, **state: Any) -> None:
        """Takes what is new; cheap enough for every step."""
        self._state.update(state)
        now, self._stale = time.monotonic(), True
        if self.quiet or "loss" not in self._state or now - self._shown < (0.25 if self._live else PLAIN_EVERY):
            return
        self._draw(now)

    def _draw(self, now: float) -> None:
        self._shown, self._stale = now, False
        if self._live:
            wide = min(BAR, shutil.get_terminal_size().columns)
            filled = wide * self._state["step"] // self._state["steps"]
            bar = Text.assemble(("━" * filled, "green"), ("━" * (wide - filled), "bright_black"))
            where, *rest = lines(self._state)
            self._live.update(Group(bar, Text(where, style="bold"), *(Text(line) for line in rest)))
        else:
            say(" · ".join(line for line in lines(self._state) if line))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not self.quiet and "loss" in self._state and self._stale:
            self._draw(time.monotonic())
        if self._live:
            self._live.stop()
