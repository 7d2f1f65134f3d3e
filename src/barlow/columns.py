"""Tables with a column of image bytes: Parquet files and Hugging Face data sets, in both of their layouts.

A row in the middle of a Parquet file cannot be read without the whole group of rows around it, so the bytes are copied
once into one plain file in the store, and from there on read by offset.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from barlow.errors import UserError
from barlow.progress import progress
from barlow.sources import Found
from barlow.store import content_name, free_bytes, made

NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "bytes")
LABELS = ("label", "labels", "cls", "class", "fine_label", "target")
BATCH = 256
NAMED = -1  # offset of an image that the table names instead of holding it
LAYOUT = 2  # of the folder in the store


def table_files(path: Path) -> tuple[list[Path], Counter[str]]:
    """The Parquet or Arrow files of a file or a Hugging Face folder, and what was passed over: where files are named
    after splits, only ``train`` is taken. Raises UserError."""
    if path.is_file():
        return [path], Counter()
    if (path / "dataset_dict.json").exists():
        if (path / "train").is_dir():
            return table_files(path / "train")
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path} has no split 'train' but {splits}: give the folder of one split")
    files = sorted(p for ending in ("parquet", "arrow") for p in path.rglob(f"*.{ending}") if ".cache" not in p.parts)
    files = [p for p in files if not p.name.startswith((".", "cache-"))]
    train = [p for p in files if p.name.startswith("train") or p.parent.name == "train"]
    chosen = train or files
    return chosen, Counter({"other splits": len(files) - len(chosen)} if len(files) > len(chosen) else {})


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may be image bytes (binary, or a struct with a field ``bytes``): the one with a usual name, else
    all of them."""
    fit = [field.name for field in schema if _is_bytes(field.type)]
    usual = [name for name in NAMES if name in fit]
    return usual[:1] or fit


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and _is_bytes(f.type) for f in (kind.field(k) for k in range(kind.num_fields)))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def find_in_tables(files: Sequence[Path], passed_over: Counter[str]) -> Found:
    """The images of these files, in the order of files and rows; copied out on first use. Raises UserError."""
    schema = _schema(files[0])
    found = image_columns(schema)
    if len(found) != 1:
        some = f"{len(found)} columns of bytes, {', '.join(found)}" if found else "no column of images among"
        names = "" if found else f" {', '.join(schema.names)}"
        raise UserError(f"{files[0]} has {some}{names}: name the one with the images 'image'")
    (column,) = found
    for file in files[1:]:
        if column not in (other := _schema(file)).names:
            raise UserError(f"{file} has no column {column!r} as {files[0]} has, but {', '.join(other.names)}: "
                            "give the folder of one data set, or rename it")  # fmt: skip
    label = next((n for n in LABELS if n in schema.names and pa.types.is_integer(schema.field(n).type)), None)
    called = _names(files)
    facts = [[name, p.stat().st_size, p.stat().st_mtime_ns] for name, p in zip(called, files, strict=True)]
    needed = sum(p.stat().st_size for p in files)

    def copy(folder: Path) -> None:
        if needed > free_bytes():
            raise UserError(f"the images of {files[0]} need {needed:,} bytes more: set BARLOW_CACHE to another disk")
        _copy_out(dict(zip(files, called, strict=True)), column, label, folder)

    folder = made(f"bytes-{content_name(facts, column, LAYOUT)}", copy)
    rows = _beside(pq.read_table(folder / "rows.parquet"), dict(zip(called, files, strict=True)))
    return Found("table", os.fsencode(folder), rows, passed_over)


def _names(files: Sequence[Path]) -> list[str]:
    """What images are called after, by file: its name, or where several have one name their paths in the data set."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([file.absolute().parent for file in files])
    return [file.absolute().relative_to(root).as_posix() for file in files]


def _beside(rows: pa.Table, files: Mapping[str, Path]) -> pa.Table:
    """The rows with the files that they name found from where their table lies now."""
    named = pc.equal(rows["offset"], NAMED)
    if not pc.any(named).as_py():
        return rows
    where = []
    for path, file, apart in zip(rows["path"].to_pylist(), rows["file"].to_pylist(), named.to_pylist(), strict=True):
        table = files[os.fsdecode(path).rpartition("/")[0]]
        where.append(os.fsencode(table.absolute().parent / os.fsdecode(file)) if apart else file)
    return rows.set_column(rows.column_names.index("file"), "file", pa.array(where, pa.binary()))


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file) if file.suffix == ".parquet" else _arrow(file).schema
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} cannot be read as a table ({str(error)[:100]}): fetch it again") from None


def _arrow(file: Path) -> Any:
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source)


def _count(file: Path) -> int:
    return int(pq.read_metadata(file).num_rows if file.suffix == ".parquet" else _arrow(file).read_all().num_rows)


def _batches(file: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            yield from table.iter_batches(BATCH, columns=names)
    else:
        yield from _arrow(file).read_all().select(names).to_batches(BATCH)


def _copy_out(files: Mapping[Path, str], column: str, label: str | None, folder: Path) -> None:
    parts: list[pa.Table] = []
    with (folder / "bytes.bin").open("wb") as out:
        names, number, last = [column, *([label] if label else [])], 0, next(iter(files))
        batches = ((file, batch) for file in files for batch in _batches(file, names))
        total = sum(map(_count, files))
        for file, batch in progress(batches, f"copying images out of tables, {BATCH} at a time", -(-total // BATCH)):
            number, last = number if file == last else 0, file
            parts.append(_copy_batch(batch, column, label, (file, files[file]), number, out))
            number += len(batch)
    table = pa.concat_tables(parts).combine_chunks()
    if label and table["label"].null_count:
        table = table.drop_columns("label")  # labels of some images are labels of none
    pq.write_table(table, folder / "rows.parquet")


def _copy_batch(
    batch: pa.RecordBatch, column: str, label: str | None, table: tuple[Path, str], number: int, out: IO[bytes]
) -> pa.Table:
    rows, (file, called) = [], table
    for k, value in enumerate(batch.column(column).to_pylist()):
        value = value if isinstance(value, dict) else {"bytes": value}
        data, elsewhere, offset = value.get("bytes"), value.get("path"), out.tell()
        name = os.fsencode(f"{called}/{number + k}")
        if data is None and elsewhere:  # the table names a file instead of holding it
            path = file.absolute().parent / elsewhere
            rows.append((name, path.stat().st_size if path.exists() else 0, os.fsencode(elsewhere), NAMED))
        else:
            out.write(data or b"")
            rows.append((name, len(data or b""), b"bytes.bin", offset))
    names, sizes, where, offsets = zip(*rows, strict=True)
    made = {
        "path": pa.array(names, pa.large_binary()),
        "bytes": pa.array(sizes, pa.int64()),
        "modified": pa.array([file.stat().st_mtime_ns] * len(rows), pa.int64()),
        "file": pa.array(where, pa.binary()),
        "offset": pa.array(offsets, pa.int64()),
    }
    if label:
        made["label"] = batch.column(label).cast(pa.int64())
    return pa.table(made)
