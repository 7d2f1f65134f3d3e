"""Tables of paths (CSV or Parquet): one column of paths is a list of images, two are given pairs."""

from __future__ import annotations

import codecs
import csv
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from barlow.errors import UserError
from barlow.sources import ENDINGS, Found, find_files

ENDINGS_OF_TABLES = (".csv", ".tsv")
LOOKED_AT = 200  # rows by which a column of paths is told


def read_table(path: Path, all_columns: bool = False) -> dict[str, list[str]]:
    """Columns of a CSV file (with or without a line of names) or a Parquet file (``all_columns``: numbers too), as
    text. Raises UserError."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
            texts = [f.name for f in table.schema if all_columns or f.type in (pa.string(), pa.large_string())]
            return {name: ["" if v is None else str(v) for v in table[name].to_pylist()] for name in texts}
        with path.open(newline="", encoding=_encoding(path), errors="surrogateescape") as file:
            first = file.readline().strip()
            file.seek(0)
            lines = [line for line in csv.reader(file, delimiter=_delimiter(first, path)) if line]
    except (OSError, UnicodeError, pa.ArrowInvalid, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a table ({why})") from None
    if not lines:
        raise UserError(f"{path} is empty: it should hold one image path, or two, a row")
    if any(len(line) != len(lines[0]) for line in lines):
        wrong = next(k for k, line in enumerate(lines, 1) if len(line) != len(lines[0]))
        raise UserError(f"row {wrong} of {path} has another number of columns than the first")
    named = not any(map(is_path, lines[0]))
    names = [name.strip() for name in lines.pop(0)] if named else [str(k) for k in range(len(lines[0]))]
    return {name: [line[k] for line in lines] for k, name in enumerate(names)}


def _encoding(path: Path) -> str:
    """UTF-8, or UTF-16 where the file begins with its mark, as spreadsheets write it."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _delimiter(first: str, path: Path) -> str:
    """What stands between the columns, by the first line: a comma, else what spreadsheets write in other languages; in
    a .tsv a tab before all."""
    if path.suffix.lower() == ".tsv" and "\t" in first:
        return "\t"
    for other in ";\t":
        if "," not in first and other in first and (not is_path(first) or all(map(is_path, first.split(other)))):
            return other
    return ","


def is_path(text: str) -> bool:
    """True where the text ends like the name of an image file."""
    return text.lower().endswith(tuple(ending.decode() for ending in ENDINGS))


def path_columns(table: dict[str, list[str]]) -> list[str]:
    """The columns most of whose first entries are names of image files."""
    some = {name: values[:LOOKED_AT] for name, values in table.items()}
    return [name for name, values in some.items() if values and 2 * sum(map(is_path, values)) > len(values)]


def find_in_table(path: Path) -> tuple[Found, Found | None]:
    """(images, their partners or None), in the order of the rows, paths relative to the table. Raises UserError."""
    table = read_table(path)
    columns = path_columns(table)
    if len(columns) not in (1, 2):
        found = f"{len(columns)} ({', '.join(columns)})" if columns else "none"
        raise UserError(f"{path} should have one column of image paths, or two for pairs; it has {found}")
    first, *rest = (find_files(map(os.fsencode, table[c]), path.absolute().parent) for c in columns)
    return first, rest[0] if rest else None
