"""Whether a value is of a type, and both in words: what people give, settings and arguments, is checked with this."""

from __future__ import annotations

import math
import numbers
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from barlow.errors import UserError

SHOWN = 80  # letters of a value in a sentence
UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
PART = re.compile(r"(\d+(?:\.\d*)?)\s*(d(?:ays?)?|h(?:(?:ou)?rs?)?|m(?:in(?:ute)?s?)?|s(?:ec(?:ond)?s?)?)(?![a-z])\s*")
CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")  # SLURM's days-hours:minutes:seconds


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain ``value`` is of a type as it stands in a dataclass; true and false are no numbers."""
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(v, get_args(kind)[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def plain(value: Any) -> Any:
    """What Python programs hold, such as lists, paths and numbers of numpy, as tuples, texts and numbers; within a
    table as lists, which is what comes back from a file."""
    if isinstance(value, dict):
        return {key: _listed(plain(each)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(each) for each in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def in_words(kind: Any) -> str:
    """The type as a sentence can say it: ``a number``, ``one of lars, adamw``, ``a text or a list, each a table``."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(in_words(k) for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        words = in_words(of)
        return words.replace("one of", "one or more of") if get_origin(of) is Literal else f"a list, each {words}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, "a table")


def as_path(value: Any, what: str) -> Path:
    """A path that somebody gave as ``what``; UserError where it is none."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not text or not isinstance(text, str):
        raise UserError(f"{what} is a path, such as 'photos/one', not {shown(value)}.")
    return Path(text)


def as_whole(value: Any, what: str, least: int, most: int | None = None) -> int:
    """A whole number that somebody gave as ``what``; UserError where it is none, or outside ``least`` to ``most``."""
    number = plain(value)
    if not fits(number, int) or number < least or number > (number if most is None else most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{what} = {shown(value)} is not a whole number {span}.")
    return int(number)


def shown(value: Any) -> str:
    """The value on one line that is not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def parse_duration(text: str) -> float:
    """Seconds in ``2h``, ``90m``, ``45s``, ``1h30m``, ``1.5 hours``, ``1:30:00``, ``1-00:00:00`` or ``5400``.

    Raises UserError for anything else, for ``1:30`` (hours or minutes?), and for no time at all.
    """
    plain = text.strip().lower()
    if clock := CLOCK.fullmatch(plain):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        total = 86400.0 * days + 3600.0 * hours + 60.0 * minutes + seconds
    elif re.fullmatch(r"\d+(\.\d*)?", plain):
        total = float(plain)
    else:
        parts = [(float(number), unit[0]) for number, unit in PART.findall(plain)]
        units = [unit for _, unit in parts]
        if not parts or PART.sub("", plain) or units != sorted(set(units), key=list(UNITS).index):
            raise UserError(f"{text!r} is no length of time: write 2h, 90m, 45s, 1h30m, 1:30:00 or seconds")
        total = sum(number * UNITS[unit] for number, unit in parts)
    if not 0 < total < math.inf:
        raise UserError(f"{text!r} is no time at all: write 2h, 90m, 45s, 1h30m, 1:30:00 or seconds")
    return total
