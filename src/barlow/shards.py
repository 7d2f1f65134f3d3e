"""Tar shards in WebDataset layout: indexed once, read by offset. The tar files are never unpacked."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from barlow.console import say
from barlow.errors import UserError
from barlow.sources import ENDINGS, Found, shown


def expand(pattern: str) -> list[Path]:
    """``set-{000..012}.tar`` → thirteen paths, as WebDataset writes them; a name without braces → itself."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if not match:
        return [Path(pattern)]
    start, first, last, end = match.groups()
    return [Path(f"{start}{k:0{len(first)}d}{end}") for k in range(int(first), int(last) + 1)]


def find_in_shards(shards: Sequence[Path], root: Path) -> Found:
    """Every image in the shards, in the order of the shards and of the members.

    The label is that of the member ``….cls`` with the same name up to the first dot, where all images have one.
    Raises UserError for a shard that is missing, compressed or broken.
    """
    passed: Counter[str] = Counter()
    rows: list[tuple[bytes, int, int, bytes, int]] = []
    labels: list[int | None] = []
    for shard in shards:
        file = os.fsencode(os.path.relpath(shard, root))
        classes, samples = {}, []
        for name, offset, size in _members(shard):
            folder, _, base = name.rpartition(b"/")
            sample = folder + b"/" + base.split(b".")[0]
            ending = b"." + base.rpartition(b".")[2].lower()
            if base.startswith(b"."):
                continue
            if ending == b".cls":
                classes[sample] = _label(shard, offset, size)
            elif ending in ENDINGS:
                rows.append((file + b"/" + name, size, int(shard.stat().st_mtime_ns), file, offset))
                samples.append(sample)
            else:
                passed[shown(ending)] += 1
        labels += [classes.get(sample) for sample in samples]
    path, size_, modified, file_, offset_ = zip(*rows, strict=True) if rows else ((),) * 5
    table = pa.table(
        {
            "path": pa.array(path, pa.large_binary()),
            "bytes": pa.array(size_, pa.int64()),
            "modified": pa.array(modified, pa.int64()),
            "file": pa.array(file_, pa.binary()).dictionary_encode(),
            "offset": pa.array(offset_, pa.int64()),
        }
    )
    if rows and None not in labels:
        table = table.append_column("label", pa.array(labels, pa.int64()))
    return Found("tar", os.fsencode(root), table, passed)


def _members(shard: Path) -> list[tuple[bytes, int, int]]:
    """(name, offset of the data, size) of every regular file in a tar."""
    try:
        with tarfile.open(shard, "r:", errors="surrogateescape") as tar:
            members = [(os.fsencode(m.name), m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is not a whole, uncompressed tar file ({error}): unpack or copy it again") from None
    if members and max(offset + size for _, offset, size in members) > shard.stat().st_size:
        raise UserError(f"{shard} ends in the middle of an image: copy it again")
    _look_at_end(shard, end)
    return members


def _look_at_end(shard: Path, end: int) -> None:
    """tarfile takes half a header for the end, and so would drop the images behind a cut: a block of zeros must be
    there. Some writers leave it out, and a cut between two images looks the same: that is only said."""
    with shard.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if 0 < len(block) < tarfile.BLOCKSIZE:
        raise UserError(f"{shard} ends in the middle of a name: copy it again")
    if not block:
        say(
            f"note: {shard} has no end mark; compare its length with the original: where it was cut, images are missing"
        )


def _label(shard: Path, offset: int, size: int) -> int | None:
    with shard.open("rb") as file:
        file.seek(offset)
        text = file.read(min(size, 32)).strip()
    return int(text) if re.fullmatch(rb"\d{1,9}", text) else None
