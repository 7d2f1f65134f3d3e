"""The index: a table of all images of a source, made once from their headers and used from there on.

Columns: path (bytes), bytes, modified (ns), width, height (after EXIF), mode (``barlow.decode.Header``), status ("ok"
or the reason why the image cannot be used), and where the source has them file, offset and label. It lies in the run
folder as Parquet, so files that come or go later do not change a run. Arrow holds it in memory: a million paths are two
blocks of memory, not a million Python objects that every worker process would copy.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from barlow.cores import cores
from barlow.decode import Header, header
from barlow.errors import UserError
from barlow.files import atomic_write
from barlow.guard import BadImage, warnings_raise
from barlow.progress import progress
from barlow.sources import Found, read_bytes, with_file

T = TypeVar("T")

OK = "ok"
ITS_PARTNER = "its partner: "  # before the reason why the other image of a pair cannot be used
COLUMNS = ("path", "bytes", "modified", "width", "height", "mode", "status")
WORDS = pa.dictionary(pa.int32(), pa.string())
METADATA = b"barlow"
REMEDY = "bring it back, or let --allow index make a new one of the images that are there now"
SHORT = 0.2  # seconds that a chunk may take: longer ones would come all at once after a long silence
READERS = 16  # threads: over a network the wait for each file is what takes the time, so more than cores


def in_threads(function: Callable[[int], T], count: int, what: str, workers: int = 0, chunk: int = 64) -> Iterator[T]:
    """``function(0)``, ``function(1)`` … in order, computed in threads (0: one a core) a bounded way ahead, with
    progress. A thread computes up to ``chunk`` at a time, and no more than take it about ``SHORT``."""
    workers = workers or cores()

    def some(start: int, end: int) -> tuple[list[T], float]:
        begin = time.monotonic()
        return [function(k) for k in range(start, end)], (time.monotonic() - begin) / (end - start)

    def all_of_them() -> Iterator[T]:
        waiting: deque[Future[tuple[list[T], float]]] = deque()
        at, many = 0, 1
        try:
            while at < count or waiting:
                if at < count:
                    end = min(at + many, count)
                    waiting.append(pool.submit(some, at, end))
                    at = end
                if at == count or len(waiting) > 2 * workers:
                    made, each = waiting.popleft().result()
                    many = min(chunk, max(1, int(SHORT / max(each, 1e-9))))
                    yield from made
        finally:
            pool.shutdown(cancel_futures=True)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="barlow")
    return progress(all_of_them(), what, count)


def place(rows: pa.Table, root: bytes, i: int) -> tuple[bytes, int, int]:
    """(file, offset, length) of row ``i``; length -1 where the image is the whole file."""
    if "file" not in rows.column_names:
        return os.path.join(root, rows["path"][i].as_py()), 0, -1  # noqa: PTH118 - bytes
    offset = rows["offset"][i].as_py()
    file = os.path.join(root, rows["file"][i].as_py())  # noqa: PTH118 - bytes
    return (file, 0, -1) if offset < 0 else (file, offset, rows["bytes"][i].as_py())


def read_row(rows: pa.Table, root: bytes, i: int) -> bytes:
    """The bytes of image ``i``. Raises BadImage."""
    return read_bytes(*place(rows, root, i))


def build(found: Found) -> pa.Table:
    """Opens every image of a source as far as its header and returns the index, bad images included."""
    rows, count = found.rows.combine_chunks(), len(found.rows)
    facts = np.stack([rows["bytes"].to_numpy(), rows["modified"].to_numpy()], 1)
    width, height = np.zeros(count, np.int32), np.zeros(count, np.int32)
    mode, status = [""] * count, [OK] * count

    def look(i: int) -> None:
        def whole(opened: IO[bytes], size: int) -> Header:
            facts[i] = size, os.fstat(opened.fileno()).st_mtime_ns
            return header(opened)

        file, offset, length = place(rows, found.root, i)
        try:
            seen = with_file(file, whole) if length < 0 else header(read_bytes(file, offset, length))
            width[i], height[i], mode[i] = seen.width, seen.height, seen.mode
        except BadImage as bad:
            status[i] = bad.reason

    with warnings_raise:
        for _ in in_threads(look, count, "reading headers", READERS):
            pass
    made = {"bytes": pa.array(facts[:, 0]), "modified": pa.array(facts[:, 1])}
    made |= {"width": pa.array(width), "height": pa.array(height)}
    made |= {"mode": pa.array(mode, WORDS), "status": pa.array(status, WORDS)}
    kept = [name for name in rows.column_names if name not in made]
    return pa.table({name: rows[name] for name in kept} | made)


def usable(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(rows that are ok, the others)."""
    ok = _is_ok(rows)
    if pc.all(ok).as_py():
        return rows.combine_chunks(), rows.slice(0, 0)
    return rows.filter(ok).combine_chunks(), rows.filter(pc.invert(ok)).combine_chunks()


def _is_ok(rows: pa.Table) -> pa.ChunkedArray:
    """One truth value a row, found word by word of the column's dictionary, not by spelling out a million rows."""
    chunks = rows["status"].unify_dictionaries().chunks
    return pa.chunked_array([pc.equal(c.dictionary, OK).take(c.indices) for c in chunks], pa.bool_())


def modes(rows: pa.Table) -> dict[str, int]:
    """How many usable images have each mode."""
    counts = pc.value_counts(rows["mode"].filter(_is_ok(rows)).cast(pa.string()))
    return {pair["values"]: pair["counts"] for pair in counts.to_pylist()}


def with_status(rows: pa.Table, reasons: Iterable[str]) -> pa.Table:
    """The rows, with a reason in place of "ok" wherever one is given ("" leaves the status as it is)."""
    both = zip(rows["status"].to_pylist(), reasons, strict=True)
    status = pa.array([new if old == OK and new else old for old, new in both], WORDS)
    return rows.set_column(rows.column_names.index("status"), "status", status)


def as_pairs(first: pa.Table, second: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Both tables, a row being ok in both or in neither."""
    states = [[s if s != OK else "" for s in table["status"].to_pylist()] for table in (first, second)]
    because = [[f"{ITS_PARTNER}{s}" if s else "" for s in state] for state in states]
    return with_status(first, because[1]), with_status(second, because[0])


def write(rows: pa.Table, settings: dict[str, Any], path: Path) -> None:
    """Writes the index with ``settings`` (plain JSON values) beside it in the metadata; replaces ``path`` at once."""
    made = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({METADATA: json.dumps(settings)}), made, compression="zstd")
    atomic_write(path, made.getvalue().to_pybytes())


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """(index, settings). Raises UserError where the file is not an index."""
    try:
        rows = pq.read_table(path, memory_map=False)
        settings = json.loads((rows.schema.metadata or {})[METADATA])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UserError(f"{path} is not an index of images ({error}): {REMEDY}") from None
    if missing := set(COLUMNS) - set(rows.column_names):
        raise UserError(f"{path} lacks the columns {', '.join(sorted(missing))}: {REMEDY}")
    return rows.replace_schema_metadata(None).combine_chunks(), settings
