"""Folders on disk, made once from a source and used by every run after: named by content, complete or absent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from barlow.console import say
from barlow.errors import UserError

SILENT = 120.0  # seconds without a write after which a builder is taken for dead
POLL = 0.2  # seconds between two looks whether another builder is done
ABANDONED = 24 * 3600  # seconds after which a half-made folder that nobody touched belongs to a builder that died


def store_root() -> Path:
    """Where they lie: ``$BARLOW_CACHE``, else ``$XDG_CACHE_HOME/barlow``, else ``~/.cache/barlow``."""
    if own := os.environ.get("BARLOW_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "barlow"


def free_bytes() -> int:
    """Bytes free where the store lies (or will lie); 0 where nothing can be written."""
    folder = store_root().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def content_name(*parts: Any) -> str:
    """A name for what is made from these: bytes, buffers or plain JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        block = part if isinstance(part, bytes | memoryview) else json.dumps(part, sort_keys=True).encode()
        digest.update(str(len(block)).encode() + b":")
        digest.update(block)
    return digest.hexdigest()[:32]


def made(name: str, make: Callable[[Path], str | None]) -> Path:
    """The folder ``name`` of the store, made by ``make(empty folder)`` where it is not there yet.

    It appears under its name in one step, when it is complete and on disk. Whoever finds another process at the same
    work waits for it as long as it writes; should two begin all the same, the second throws the own work away.
    ``make`` may return another name, when it turns out to have made something else. Raises UserError where the store
    cannot be written.
    """
    final = store_root() / name
    if final.exists():
        return final
    temporary = store_root() / f".{name}.{time.time_ns():020}.{os.getpid()}"
    try:
        store_root().mkdir(parents=True, exist_ok=True)
        sweep()
        temporary.mkdir()
        if _found_after_waiting(final, temporary):
            return final
        final = store_root() / (make(temporary) or name)
        _to_disk(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():
                raise
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(f"{store_root()} cannot be written ({why}): set BARLOW_CACHE to another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _found_after_waiting(final: Path, mine: Path) -> bool:
    """Waits for those who began before; True when one of them has made what is wanted."""
    told = os.environ.get("RANK", "0") != "0"  # one of the processes of a run says it
    while any(other.name < mine.name and _age(other) < SILENT for other in store_root().glob(f".{final.name}.*.*")):
        if not told:
            say(f"waiting for another process that is making {final}")
        told = True
        time.sleep(POLL)
        mine.touch()  # whoever began after us must see that we are there
        if final.exists():
            return True
    return final.exists()


def _age(folder: Path) -> float:
    """Seconds since anything in a folder was written; endless where it is gone."""
    try:
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return math.inf


def _to_disk(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep() -> None:
    """Removes the half-made folders of builders that died more than a day ago."""
    for folder in store_root().glob(".*.*.*"):
        if ABANDONED < _age(folder) < math.inf:  # endless: another sweeper was at it
            shutil.rmtree(folder, ignore_errors=True)
