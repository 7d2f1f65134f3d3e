"""A large collection embedded by many processes, none of which knows the others: each writes its part, a Parquet file.

A part is there whole or not at all, and says in its metadata what it was made from. Repeating a command keeps the part
that fits and makes anew the one that does not: after a crash, with another encoder, when images have come or gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from barlow import __version__
from barlow.embedding import (
    BATCH,
    Part,
    check_part,
    embed_images,
    embed_to_file,
    load_on_device,
    numbers,
    open_for,
    write_parquet,
)
from barlow.encoder import CONFIG, WEIGHTS, encoder_folder
from barlow.errors import Stopped, UserError
from barlow.files import check_output, digest, sync_folder
from barlow.guard import BadImage
from barlow.images import Images
from barlow.lock import kernel_lock

ABOUT = b"barlow"  # the key in the metadata of a part
NAME = re.compile(r"part-(\d+)-of-(\d+)\.parquet")
ROWS = 1 << 16  # of the index that are hashed at a time


@dataclass(frozen=True)
class Written:
    """A part that is there: its file, its rows, whether it was ``kept`` as it was, and how many parts are ``done``."""

    path: Path
    rows: int
    kept: bool
    done: int


def parse_part(text: str) -> Part:
    """``2/8`` → (2, 8). UserError for anything else."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if not found:
        raise UserError(f"--part {text!r} is not a part such as 2/8: the second of eight.")
    part = int(found[1]), int(found[2])
    check_part(part)
    return part


def embed_as_told(run: str | Path, images: Any, output: Path, part: str | None) -> str:
    """``barlow embed``: the file or the part, and what there is to say of it."""
    if part is None:
        return f"{output}: {embed_to_file(run, images, output):,} rows"
    which = parse_part(part)
    done = embed_part(run, images, output, which)
    kept = " as it was" if done.kept else ""
    return f"{done.path}: {done.rows:,} rows{kept}; {done.done} of {which[1]} parts are there"


def embed_part(run: str | Path, images: Any, folder: str | Path, part: Part, *, batch_size: int = BATCH) -> Written:
    """Writes the k-th of n parts of the images to ``folder``/part-k-of-n.parquet, or keeps the one that is there.

    ``part``: (k, n), k from 1 to n. The columns are those of ``embed_to_file``; the parts, joined in the order of their
    names, are to the bit what it writes, whoever wrote which part, when, in which order and how often. A part is kept
    where all of it can be read, with its checksums, and it was made by this encoder from these images.

    Raises UserError where ``folder`` is none, or holds parts of another number of parts.
    """
    check_part(part)
    folder = check_output(folder)
    _check_folder(folder, part[1])
    encoder = load_on_device(run)
    source = open_for(encoder, images, part)
    about = {
        "barlow": __version__, "part": list(part), "batch_size": batch_size, "images": _digest(source),
        "content": _content(source, numbers(len(source), batch_size, part)),
        "encoder": [digest(encoder_folder(run) / name)[1] for name in (CONFIG, WEIGHTS)],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / _name(part)
    rows = _rows_of(path, about)
    if rows is not None:
        return Written(path, rows, True, _done(folder, about))
    _remove_torn(path)
    with _beside(path) as beside:
        features = embed_images(encoder, source, batch_size, f"part {part[0]} of {part[1]}", part)
        rows = write_parquet(beside, features, encoder.features, {ABOUT.decode(): json.dumps(about)})
    return Written(path, rows, False, _done(folder, about))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file to write, which afterwards is at ``path``, whole; locked meanwhile, so that others know it is in use."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("wb") as held:
            if kernel_lock(held.fileno()) is False or not beside.exists():  # another one has just taken it for torn
                raise Stopped(f"{path} is being written by another process too: give the same command again")
            yield beside
            os.fsync(held.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _remove_torn(path: Path) -> None:
    """Removes what was left of earlier tries by processes that are gone; another one may be at the same part now."""
    for torn in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError, PermissionError), torn.open("r+b") as file:
            if kernel_lock(file.fileno()):
                torn.unlink(missing_ok=True)


def _name(part: Part) -> str:
    """Names that sort in the order of the parts."""
    width = max(3, len(str(part[1])))
    return f"part-{part[0]:0{width}}-of-{part[1]:0{width}}.parquet"


def _check_folder(folder: Path, count: int) -> None:
    if folder.suffix in (".parquet", ".npy") or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--part writes files into a folder: give -o a folder, not {folder}.")
    if folder.exists():
        check_output(folder / "part")
    for there in sorted(folder.iterdir()) if folder.exists() else ():
        named = NAME.fullmatch(there.name)
        if named and int(named[2]) != count:
            raise UserError(
                f"{folder} holds parts of {int(named[2])}, not of {count}: give another folder, or remove them."
            )


def _digest(images: Images) -> str:
    """sha256 of the index: which images there are, in which order, of which size and time, and what is read of them."""
    facts = [images.kind, images.channels, images.dtype, list(images.value_range), list(images.shape), len(images)]
    seen = hashlib.sha256(json.dumps(facts).encode())
    for at in range(0, len(images.rows), ROWS):
        seen.update(repr(images.rows.slice(at, ROWS).to_pydict()).encode())
    return seen.hexdigest()


def _content(images: Images, mine: range) -> str:
    """sha256 of the images of a part where they are arrays, which have no file whose time would tell of a change."""
    seen = hashlib.sha256()
    for i in mine if not images.root else ():
        try:
            seen.update(images.read(i).tobytes())
        except BadImage as error:
            seen.update(error.reason.encode())
    return seen.hexdigest()


def _about(file: pq.ParquetFile) -> Any:
    return json.loads((file.schema_arrow.metadata or {}).get(ABOUT, b"null"))


def _rows_of(path: Path, about: dict[str, Any]) -> int | None:
    """The number of rows of a part that is whole and was made from this, else None."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if _about(file) != about:
                return None
            for k in range(file.num_row_groups):
                file.read_row_group(k)
            return int(file.metadata.num_rows)
    except (OSError, ValueError, pa.ArrowException):
        return None


def _done(folder: Path, about: dict[str, Any]) -> int:
    """How many parts of the same encoder and images there are, by what they say of themselves."""
    count = 0
    for path in folder.glob("part-*.parquet"):
        try:
            with pq.ParquetFile(path) as file:
                theirs = _about(file)
        except (OSError, ValueError, pa.ArrowException):
            continue
        alike = ("barlow", "batch_size", "images", "encoder")
        count += isinstance(theirs, dict) and all(theirs.get(word) == about[word] for word in alike)
    return count
