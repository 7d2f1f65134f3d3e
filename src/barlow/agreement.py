"""What one process of a run meets, all do: one flag, one error, one ending. Alone, all of this is nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from barlow import ranks
from barlow.errors import DataError, NumbersError, Stopped, UserError


def agree(*flags: bool) -> list[bool]:
    """Each flag as any process holds it: all stop, or save, at the same step."""
    rows = ranks.integers([int(flag) for flag in flags])
    return [any(row[i] for row in rows) for i in range(len(flags))]


def share(error: Exception | None) -> None:
    """Ends all processes with the error that one of them met; does nothing where none did.

    The first process with an error raises it, and so says it; the others leave quietly with its exit code.
    """
    rows = ranks.integers([0 if error is None else getattr(error, "exit_code", 1)])
    codes = [row[0] for row in rows]
    speaker = next((number for number, code in enumerate(codes) if code), None)
    if speaker is None:
        return
    if speaker == ranks.rank() and error is not None:
        raise error
    raise SystemExit(codes[speaker])


@contextmanager
def together() -> Iterator[None]:
    """Around work of some processes that the others wait for (with no message between them inside)."""
    try:
        yield
    except Exception as error:
        share(error)
    else:
        share(None)


def leave(error: UserError | DataError | NumbersError | Stopped) -> NoReturn:
    """Ends all processes with an error that all know: the first one says it."""
    if ranks.rank() == 0:
        raise error
    raise SystemExit(error.exit_code)
