"""The run folder: who may write in it, and metrics.jsonl, which after a resume reads as if the run never stopped.

metrics.jsonl holds one JSON object a line with ``kind`` and ``step`` (steps done). Lines of the kinds ``train`` and
``health`` follow from config, seed and images alone; ``speed`` and ``event`` tell of clock and world.
A float that is not finite is written as null: JSON has no NaN, and readers of tables make it a missing value.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np

from barlow import __version__
from barlow.console import say
from barlow.errors import UserError
from barlow.files import atomic_write, sweep
from barlow.lock import Lock

KINDS = ("train", "health", "speed", "event")
SWEPT = ("snapshots", "encoder", "encoder_b")  # where atomic_write writes, too
Line = dict[str, Any]
SNAPSHOT = re.compile(r"step-(\d+)\.npz")


def open_run(out: Path) -> Run:
    """Creates the run folder ``out``, or opens the run that is there, and locks it. Use as a context manager.

    Raises UserError, and touches nothing, when ``out`` is a file or holds something that is not a run, or when another
    process writes in it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a folder")
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.exists() else []
    strange = [name for name in there if name != "run.lock"]
    ours = "barlow" in read_environment(out) or all((out / name).is_file() for name in ("config.toml", "index.parquet"))
    if strange and not ours:
        raise UserError(f"{out} holds {strange[0]!r} and is no run of barlow: give --out a new or an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Run(out)
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror or error}") from error


def check_place(out: Path) -> None:
    """Before the images are looked at, which may take hours: UserError where the folder ``out`` could not be made."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    why = errno.ENOTDIR if not above.is_dir() else 0 if os.access(above, os.W_OK | os.X_OK) else errno.EACCES
    if why:
        raise UserError(f"cannot write in {out}: {above}: {os.strerror(why)}")


def check_text(**paths: object) -> None:
    """UserError for a path that config.toml cannot hold, by the name of its setting."""
    for word, path in paths.items():
        try:
            str(path).encode()
        except UnicodeEncodeError:
            name = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
            raise UserError(f"{word} = {name} is no UTF-8, and cannot stand in config.toml: rename it, or make a link "
                            "of another name") from None  # fmt: skip


def read_environment(out: Path) -> dict[str, Any]:
    """environment.json of a run folder; empty when there is none that can be read."""
    try:
        about = json.loads((out / "environment.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


@final
class Run:
    """An open run folder, made by ``open_run``. ``folder``: its path; ``held``: a run was there, with its config.
    ``copies``: what else is given each line of metrics.jsonl, quickly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock(folder / "run.lock")
        try:
            self.held = (folder / "config.toml").is_file()
            if not read_environment(folder):  # from the first moment on the folder can be known as ours
                atomic_write(folder / "environment.json", json.dumps({"barlow": __version__}) + "\n")
            for place in (folder, *(folder / name for name in SWEPT)):
                if place.is_dir():
                    sweep(place)
            mend(folder / "metrics.jsonl")
            self._metrics = (folder / "metrics.jsonl").open("ab", buffering=0)
        except BaseException:
            self._lock.release()
            raise
        self._pending = bytearray()
        self.copies: list[Callable[[Line], None]] = []

    @property
    def checkpoints(self) -> Path:
        """Where ``checkpoint.save`` and ``checkpoint.latest`` look."""
        return self.folder / "checkpoints"

    def write_config(self, text: str) -> None:
        """Writes config.toml: the resolved config."""
        atomic_write(self.folder / "config.toml", text)

    def write_environment(self, about: Mapping[str, Any]) -> list[str]:
        """Writes environment.json; of a resumed run only what has changed, under ``resumed``, one entry a resume.

        Returns the names of the packages and devices that are others than at the first start: to the bit no more.
        """
        first = read_environment(self.folder)
        if "started" not in first:
            atomic_write(self.folder / "environment.json", json.dumps(about, indent=1) + "\n")
            return []
        changed = {key: value for key, value in about.items() if first.get(key) != value}
        first["resumed"] = [*first.get("resumed", []), changed]
        atomic_write(self.folder / "environment.json", json.dumps(first, indent=1) + "\n")
        return sorted(changed.keys() - {"started", "command", "host"})

    def log(self, kind: str, step: int, **values: object) -> None:
        """Appends one line to metrics.jsonl; a process killed right after has not lost it. A disk that is full or fails
        does not stop the run: the line waits in memory for the next call.

        Write all lines of a step before the checkpoint of that step. Raises ValueError for a kind not in ``KINDS``.
        """
        if kind not in KINDS:
            raise ValueError(f"no kind of line {kind!r}; there are {KINDS}")
        full = bool(self._pending)
        line = {key: jsonable(value) for key, value in {"kind": kind, "step": int(step), **values}.items()}
        self._pending += json_line(line)
        for copy in self.copies:
            copy(line)
        try:
            self._flush()
        except OSError as error:
            if not full:
                say(f"barlow: metrics.jsonl waits for the disk ({error.strerror})")

    def _flush(self) -> None:
        while self._pending:
            written = self._metrics.write(self._pending)
            del self._pending[:written]

    def sync(self) -> None:
        """Forces metrics.jsonl to the disk; call it before a checkpoint, or a power cut may lose lines before it.

        Raises OSError, in a sentence, when the disk does not take it.
        """
        try:
            self._flush()
            os.fsync(self._metrics.fileno())
        except OSError as error:
            what = f"could not write {self.folder / 'metrics.jsonl'} ({error.strerror})"
            raise OSError(f"{what}, so there is no new checkpoint") from error

    def rewind(self, step: int) -> int:
        """Removes what the run that goes on from ``step`` writes again: lines and snapshots of later steps.

        Of step 0 the look that training begins with is written again too, so only its events stay; -1 leaves nothing.
        Damaged lines go as well; returns how many stood before the last line that stays.
        """
        self._flush()
        self._metrics.close()
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        values = [parse(line) for line in lines]
        at = [i for i, value in enumerate(values) if value and stays(value, step)]
        if len(at) < len(lines):
            atomic_write(path, b"".join(lines[i] for i in at))
        self._metrics = path.open("ab", buffering=0)
        for snapshot in (self.folder / "snapshots").glob("step-*.npz"):
            numbered = SNAPSHOT.fullmatch(snapshot.name)
            if numbered and int(numbered[1]) > step:
                snapshot.unlink()
        return values[: at[-1]].count(None) if at else 0

    def snapshot(self, name: str, **arrays: np.ndarray[Any, Any]) -> Path:
        """Writes snapshots/``name``.npz as ``write_arrays`` does."""
        return write_arrays(self.folder / "snapshots" / f"{name}.npz", **arrays)

    def close(self) -> None:
        """Closes the files and releases the lock. Raises OSError when lines that waited for room are lost."""
        try:
            if not self._metrics.closed:
                self._flush()
        finally:
            self._metrics.close()
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Lines that are lost here came after the last checkpoint: a resume writes them again, or they are events."""
        try:
            self.close()
        except OSError as error:
            say(f"warning: the last lines of {self.folder / 'metrics.jsonl'} found no room ({error.strerror})")


def stays(line: Mapping[str, Any], step: int) -> bool:
    """Whether a line of metrics.jsonl is not written again by a run that goes on from ``step``."""
    return line["step"] <= step and (step > 0 or line["kind"] == "event")


def json_line(record: Mapping[str, object]) -> bytes:
    """One strict JSON object and a newline. Names of files that are no Unicode come back as they were."""
    text = json.dumps({key: jsonable(value) for key, value in record.items()}, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def jsonable(value: object) -> object:
    """Numbers of numpy and torch as Python's, not finite ones as None, inside lists and mappings too."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    item = getattr(value, "item", None)
    if item is not None:
        value = item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line, with its kind and step; None for a torn or damaged one."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    ours = isinstance(value, dict) and value.get("kind") in KINDS and type(value.get("step")) is int
    return value if ours else None


def mend(path: Path) -> None:
    """Cuts off what a crash left at the end of a file of lines: a torn line, or a block of zeros after a power cut."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = len(lines)
    while whole and parse(lines[whole - 1]) is None:
        whole -= 1
    if whole < len(lines):
        atomic_write(path, b"".join(lines[:whole]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order they were written; see the head of this file.

    An absent file has none, a torn last line does not count. Raises UserError naming any other line that is damaged.
    """
    if not path.exists():
        return []
    values = [parse(line) for line in path.read_bytes().splitlines(keepends=True)]
    if values and values[-1] is None:
        values.pop()
    if None in values:
        raise UserError(f"line {values.index(None) + 1} of {path} is damaged: remove it")
    return [value for value in values if value is not None]


def write_arrays(path: Path, **arrays: np.ndarray[Any, Any]) -> Path:
    """Writes an .npz file, whole or not at all. Raises TypeError for arrays of Python objects."""
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {key} holds Python objects, which only pickle could write")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return path


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an .npz file; none where it is not there, or damaged."""
    try:
        # numpy leaves a file open that it opened itself and found to be torn
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
