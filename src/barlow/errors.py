"""The four ways a run can end early, each with its exit code and one sentence for the user."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake: one sentence that names the thing and the remedy. Exit code 2."""

    exit_code = 2


class DataError(RuntimeError):
    """The images cannot be used (too many, or all, are broken). Exit code 3."""

    exit_code = 3


class NumbersError(ArithmeticError):
    """A loss or a gradient is not finite, or the encoder collapsed and was to be stopped then. Exit code 4."""

    exit_code = 4


class Stopped(RuntimeError):
    """Stopped cleanly after saving; the same command continues. Exit code 75, 130 or 143."""

    def __init__(self, sentence: str, exit_code: int = 75) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, its first line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
