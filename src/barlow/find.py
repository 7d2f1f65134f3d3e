"""What a source is: a folder, a list, shards, a table … → its rows."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from barlow import columns, pairs, shards, sources
from barlow.errors import UserError
from barlow.sources import Found, shown


def find(path: Path) -> tuple[Found, Found | None]:
    """(images, their partners where the source is a table of pairs). Raises UserError, also where there are none."""
    found, partners = _find(path)
    if not len(found.rows):
        others = ", ".join(f"{count} {ending}" for ending, count in found.passed_over.most_common(5))
        passed = f" (passed over: {others}){sources.remedy(found.passed_over)}" if others else ""
        raise UserError(f"no images in {path}{passed}")
    return found, partners


def _find(path: Path) -> tuple[Found, Found | None]:
    ending = path.suffix.lower()
    if path.is_dir():
        return _find_in_folder(path), None
    if ending == ".tar":
        return shards.find_in_shards(shards.expand(str(path)), path.absolute().parent), None
    if not path.exists():
        raise UserError(f"there is no file or folder {path}: check the path (looked for from {Path.cwd()})")
    if ending == ".arrow" or (ending == ".parquet" and _holds_images(path)):
        return columns.find_in_tables(*columns.table_files(path)), None
    if ending in (*pairs.ENDINGS_OF_TABLES, ".parquet"):
        return pairs.find_in_table(path)
    if ending.encode() in sources.ENDINGS:
        return sources.find_files([os.fsencode(path.name)], path.absolute().parent), None
    return sources.find_in_list(path), None


def _holds_images(path: Path) -> bool:
    try:
        return bool(columns.image_columns(pq.read_schema(path)))
    except (OSError, pa.ArrowInvalid):
        return False


def _find_in_folder(path: Path) -> Found:
    """Loose images where there are any, else the tar shards or tables that lie in the folder."""
    if os.path.exists(path / "dataset_dict.json"):  # noqa: PTH110 - not an error where the folder is closed to us
        return columns.find_in_tables(*columns.table_files(path))
    found = sources.find_in_folder(path)
    if len(found.rows) or not found.packed:
        return found
    if all((path / name).exists() for name in ("config.toml", "index.parquet")):
        raise UserError(f"{path} is the folder of a run, not of images: give the images themselves")
    tars = [path / os.fsdecode(name) for name in found.packed if name.lower().endswith(b".tar")]
    if tars:
        return shards.find_in_shards(tars, path)
    return columns.find_in_tables(*columns.table_files(path))


def root_of(path: Path, kind: str) -> bytes:
    """The folder that the paths of an index are relative to, now."""
    if kind == "table":
        return find(path)[0].root
    if not path.is_dir() and (kind == "folder" or not path.absolute().parent.is_dir()):
        what = "folder" if kind == "folder" else "file or folder"
        raise UserError(
            f"there is no {what} {shown(os.fsencode(path))} (looked for from {Path.cwd()}): go to where the run began, "
            "bring the images back, or say where they are now (--images; to continue a run, barlow pretrain IMAGES "
            "--resume RUN --allow images)"
        )
    return os.fsencode(path if path.is_dir() else path.absolute().parent)
