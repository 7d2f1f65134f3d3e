"""``open_images``: what a source is, its index, and once, from all headers, the kind of array that every image becomes.

How many channels, which numbers, which range of float values: ``barlow.convert`` decides, ``Images.read`` converts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from barlow import arrays, sources
from barlow import index as tables
from barlow.arrays import Held
from barlow.convert import choose, convert, find_range, misfit
from barlow.decode import RULE, mode_kind
from barlow.errors import DataError, UserError
from barlow.find import find, root_of
from barlow.guard import BadImage
from barlow.reading import Array, Bad, Images
from barlow.sources import Found, shown

__all__ = ["Bad", "Images", "Source", "open_images", "write_index"]

Source = str | os.PathLike[str] | Array | Sequence[Array] | Sequence[str] | Sequence[os.PathLike[str]]
Kind = tuple[int, str]  # channels, dtype

SAMPLE = Path(__file__).parent / "sample" / "train.npz"
SECOND = "second_"  # before the columns of the other images of pairs, in one table
RANGE_IMAGES = 32  # float images looked at for the range of their values


def open_images(
    source: Source,
    *,
    channels: int | None = None,
    index: str | os.PathLike[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Images:
    """Opens a folder (recursive), a text file of paths, an image file, a ``.npy`` or ``.npz`` file, ``sample``, tar
    shards (a file, ``set-{000..012}.tar``, a folder of them), a Parquet or Arrow file or Hugging Face data set with a
    column of images, a CSV or Parquet table of paths or of pairs of paths, an array (n, h, w) or (n, h, w, c), or a
    list of arrays or of paths.

    ``channels``: None decides from the data: 1 where all images are grey, 3 where grey and colour meet, else what most
    have. ``index``: an index that ``write_index`` wrote; the images are then those of that table, as they were read
    then, whatever the folder holds by now. ``value_range``: of float images, that of an earlier run.

    Raises UserError, and DataError where not one of many images can be read.
    """
    if channels is not None and channels < 1:
        raise UserError(f"channels must be 1 or more, not {channels}")
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, np.ndarray) or (len(source) and isinstance(source[0], np.ndarray)):
            return _from_held(arrays.from_memory(source), "array", channels, value_range)  # type: ignore[arg-type]
        if not len(source):
            raise UserError("no images: the list is empty")
        names = [os.fsencode(Path(path).absolute()) for path in source]  # type: ignore[arg-type]
        return _from_found(sources.find_files(names, Path("/")), None, channels, value_range)
    path = SAMPLE if source == "sample" else Path(source)
    if path.suffix.lower() in (".npy", ".npz") and path.is_file() and arrays.holds_many(path):
        images = _from_held(arrays.from_file(path), str(path), channels, value_range)
        return images if index is None else _same_as(images, Path(index))
    if index is not None:
        images = _from_index(path, Path(index))
    else:
        images = _from_found(*find(path), channels, value_range)
    pa.default_memory_pool().release_unused()  # of a million rows, what was read or filtered on the way is 150 MB
    return images


def _from_found(
    found: Found, partners: Found | None, channels: int | None, value_range: tuple[float, float] | None
) -> Images:
    table, kind = _judged(found, channels)
    if partners is None:
        return _images(found, table, kind, value_range)
    other, other_kind = _judged(partners, None)
    table, other = tables.as_pairs(table, other)
    second = _images(partners, other, other_kind, None)
    return replace(_images(replace(found, kind="pairs"), table, kind, value_range), second=second)


def _judged(found: Found, channels: int | None) -> tuple[pa.Table, Kind]:
    """(index, kind of array); images that cannot have that many channels are marked as bad."""
    table, name = tables.build(found), shown(found.root)
    modes = tables.modes(table)
    if not modes:
        first = f"{shown(table['path'][0].as_py())}: {table['status'][0].as_py()}"
        gone = all(reason.startswith("cannot be read: No such file") for reason in table["status"].to_pylist())
        mistake = gone or len(table) == 1  # a list read from the wrong place, or a file that was named
        kind = UserError if mistake else DataError
        raise kind(f"none of the {len(table):,} images in {name} can be read; the first, {first}")
    chosen, dtype = choose(modes)
    misfits = {mode: misfit(mode, channels or chosen) for mode in modes}
    if all(misfits.values()):
        raise UserError(f"no image in {name} can have {channels} channels: they have {chosen}; leave channels out")
    if any(misfits.values()):
        table = tables.with_status(table, [misfits.get(mode, "") for mode in table["mode"].to_pylist()])
    return table, (channels or chosen, dtype)


def _images(found: Found, table: pa.Table, kind: Kind, value_range: tuple[float, float] | None) -> Images:
    rows, bad = tables.usable(table)
    sizes = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1).astype(np.int64)
    labels = rows["label"].to_numpy().astype(np.int64) if "label" in rows.column_names else None
    images = Images(found.kind, found.root, rows, bad, sizes, *kind, labels=labels)
    images = replace(images, passed_over=found.passed_over, value_range=value_range or (0.0, 1.0))
    floats = [mode for mode in tables.modes(rows) if mode_kind(mode)[1] == "float32"]
    if value_range is None and floats:
        images = replace(images, value_range=find_range(_some_of(images, floats)))
    return images


def _some_of(images: Images, modes: list[str]) -> list[Array]:
    """Up to RANGE_IMAGES images of these modes, evenly spread, before scaling."""
    such = [i for i, mode in enumerate(images.rows["mode"].to_pylist()) if mode in modes]
    some = []
    for i in such[:: max(1, len(such) // RANGE_IMAGES)][:RANGE_IMAGES]:
        with contextlib.suppress(BadImage):
            some.append(images.decoded(i))
    return some


def write_index(images: Images, path: str | os.PathLike[str]) -> None:
    """Writes what ``open_images(source, index=path)`` needs to find the same images again, bad ones included."""
    table, settings = _record(images)
    if images.second is not None:
        other, settings["second"] = _record(images.second)
        for name in other.column_names:
            table = table.append_column(SECOND + name, other[name])
    tables.write(table, settings | {"rule": RULE}, Path(path))


def _record(images: Images) -> tuple[pa.Table, dict[str, Any]]:
    facts = {"kind": images.kind, "channels": images.channels, "dtype": images.dtype, "value_range": images.value_range}
    return pa.concat_tables([images.rows, images.bad]), facts


def _from_index(path: Path, index: Path) -> Images:
    table, settings = tables.read(index)
    if settings["rule"] != RULE:
        raise UserError(f"{index} was made by another version of barlow, whose images differ: start a new run")
    own = table.select([name for name in table.column_names if not name.startswith(SECOND)])
    images = _recalled(path, own, settings)
    if "second" not in settings:
        return images
    other = table.select([name for name in table.column_names if name.startswith(SECOND)])
    other = other.rename_columns([name.removeprefix(SECOND) for name in other.column_names])
    return replace(images, second=_recalled(path, other, settings["second"]))


def _recalled(path: Path, table: pa.Table, settings: dict[str, Any]) -> Images:
    found = Found(settings["kind"], root_of(path, settings["kind"]), table)
    low, high = settings["value_range"]
    return _images(found, table, (settings["channels"], settings["dtype"]), (low, high))


def _from_held(held: Held, name: str, channels: int | None, value_range: tuple[float, float] | None) -> Images:
    table = arrays.rows_of(held)
    modes = tables.modes(table)
    chosen, dtype = choose(modes)
    channels = channels or chosen
    for mode in modes:
        if why := misfit(mode, channels):
            raise UserError(f"{name} {why}: give another number of channels")
    whole = arrays.all_at_once(held)
    if value_range is None and dtype == "float32":
        step = max(1, len(held) // RANGE_IMAGES)
        value_range = find_range(held[i] for i in range(0, len(held), step))
    images = _images(Found("array", b"", table), table, (channels, dtype), value_range or (0.0, 1.0))
    images = replace(images, labels=held.labels)
    if whole is None:
        return replace(images, held=held)
    flat = convert(whole.reshape(len(whole), -1, whole.shape[3]), channels, dtype, images.value_range)
    return replace(images, array=flat.reshape(*whole.shape[:3], channels))


def _same_as(images: Images, index: Path) -> Images:
    """Array sources are read anew; the index says whether they are still the same."""
    table, settings = tables.read(index)
    if len(table) != len(images) or settings["channels"] != images.channels or settings["dtype"] != images.dtype:
        raise UserError(f"the array has changed since {index} was made ({len(table):,} images then): start a new run")
    low, high = settings["value_range"]
    return replace(images, value_range=(low, high))
