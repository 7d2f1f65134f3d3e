"""Files that hold the old content or the new, never half: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from barlow.errors import UserError
from barlow.kinds import as_path

Block = bytes | memoryview

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems cannot fsync a folder
READ = 1 << 22  # bytes read at a time while hashing
LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # what atomic_write leaves behind when the machine dies under it


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replaces ``path`` by ``data`` (text as UTF-8) so that after a crash it holds the old content or the new, whole.

    Raises OSError as the file system does (disk full, no permission), about ``path``; the old file is then untouched.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(beside, [data.encode() if isinstance(data, str) else data])
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = os.fspath(path)  # nobody knows the name of the file beside it
        raise
    sync_folder(path.parent)


def check_output(given: str | os.PathLike[str]) -> Path:
    """The path of an output, before long work: UserError where it could not be written in the end."""
    output = as_path(given, "the output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"The folder {output.parent} of the output does not exist; make it first.")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"This user may not write in the folder {output.parent} of the output; give -o another one.")
    return output


def keep_foreign(output: Path, former: Callable[[Path], bool]) -> None:
    """UserError where a file is there that is no earlier output of the same command: ``former`` tells, which may fail
    on what it cannot read. An earlier one may be replaced, so that a command can be repeated."""
    if not output.is_file() or not output.stat().st_size:
        return
    try:
        ours = former(output)
    except Exception:  # whatever a reader makes of a file that is something else
        ours = False
    if not ours:
        raise UserError(f"{output} is there already, and is no earlier output of this command: give -o another name, "
                        "or move it away.")  # fmt: skip


def in_the_way(path: Path) -> Path:
    """``path``, or the first folder on the way to it that this user may not enter."""
    closed = (folder for folder in reversed(path.parents) if folder.is_dir() and not os.access(folder, os.X_OK))
    return next(closed, path)


def write_synced(path: Path, blocks: Iterable[Block]) -> tuple[int, str]:
    """Writes a new file (it must not exist yet) and forces it to the disk. Returns its size in bytes and its sha256."""
    size, digest = 0, hashlib.sha256()
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that reading it back asks the disk, not our own memory of it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size, digest.hexdigest()


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file, read a few MB at a time."""
    size, sha256 = 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ):
            size += len(block)
            sha256.update(block)
    return size, sha256.hexdigest()


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk: a rename is only durable after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, pattern: re.Pattern[str] = LEFT_OVER) -> None:
    """Removes what a crash left half done in ``folder``: files and folders whose whole name fits ``pattern``."""
    for path in folder.iterdir():
        if not pattern.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
