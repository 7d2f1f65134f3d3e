"""What the command line reads and writes besides the verbs: words as values, errors and results as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cyclopts import CycloptsError, Token, UnusedCliTokensError, convert

from barlow import __version__

# On a terminal of 80 columns no line of it is broken.
HELP = """\
Self-supervised learning with Barlow Twins: unlabelled images in, an encoder
that can be trusted and a report out.

Exit codes:
  0    done
  2    a mistake in the command, a setting, a path or a file: the message says
  3    the images cannot be used: too many are broken, or all that there are
  4    numbers that are not finite; a collapse, with --stop-on-collapse;
       an export whose features differ
  75   stopped: time limit, SIGUSR1, disk full, worker or process lost
  130  interrupted by Ctrl-C
  143  terminated by SIGTERM

Training saves before it ends with 75, 130 or 143; the same command goes on.
"""


def typed(kind: Any, tokens: Sequence[Token]) -> Any:
    """The words of one option as a value of its type. A whole number is written as one: 9.5 is not rounded."""
    if kind in (int, int | None) and not all(token.value.strip().lstrip("+-").isdecimal() for token in tokens):
        raise ValueError(f"{tokens[0].value!r} is not a whole number")
    return convert(kind, tokens)


def version_line() -> str:
    """The version of barlow and of torch, and the device that a run would use; torch itself is not imported."""
    from barlow.environment import accelerators, cpu_model, torch_version

    found = accelerators()
    device = f"{len(found)} × {found[0]}" if found else f"{cpu_model()} (no GPU)"
    return f"barlow {__version__}, torch {torch_version()}, {device}"


def misread(error: CycloptsError) -> str:
    """In one sentence, what on the command line could not be understood."""
    if isinstance(error, UnusedCliTokensError):
        return f"Nothing is done with {' '.join(error.unused_tokens or [])!r}: is there an option missing before it?"
    return " ".join(str(error).split())


def as_json(result: object) -> str:
    """The result as text for machines."""
    return json.dumps(result, indent=2)
