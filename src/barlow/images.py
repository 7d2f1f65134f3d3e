"""``open_images``: what a source is, its index, and once, from all headers, the kind of array that every image becomes.

How many channels, which numbers, which range of float values: ``barlow.convert`` decides, ``Images.read`` converts.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from barlow import arrays, sources
from barlow import index as tables
from barlow.arrays import Held
from barlow.convert import beyond, choose, convert, find_range, misfit
from barlow.decode import RULE, Header, mode_kind
from barlow.errors import DataError, UserError
from barlow.find import find, root_of
from barlow.guard import BadImage
from barlow.kinds import as_path, as_whole
from barlow.reading import Array, Bad, Images
from barlow.samples import Items, Pairs, Samples, as_samples, many_images
from barlow.sources import Found, shown

__all__ = ["Bad", "Images", "Source", "open_images", "write_index"]

Source = str | os.PathLike[str] | Array | Sequence[Any] | Pairs | Samples
Kind = tuple[int, str]  # channels, dtype

SAMPLE = Path(__file__).parent / "sample" / "train.npz"
SECOND = "second_"  # before the columns of the other images of pairs, in one table
LOOKED_AT = 32  # images by which the range of float values, and whether an array is still the same, are told


def open_images(
    source: Source,
    *,
    channels: int | None = None,
    channels_b: int | None = None,
    index: str | os.PathLike[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Images:
    """Opens a folder (recursive), a text file of paths, an image file, a ``.npy`` or ``.npz`` file, ``sample``, tar
    shards (a file, ``set-{000..012}.tar``, a folder of them), a Parquet or Arrow file or Hugging Face data set with a
    column of images, a CSV or Parquet table of paths or of pairs of paths, an array (n, h, w) or (n, h, w, c), a
    tensor (n, c, h, w), a list of arrays, tensors, Pillow images or paths, a torch Dataset, ``Pairs`` of these, or
    ``Samples``.

    ``channels``: None decides from the data: 1 where all images are grey, 3 where grey and colour meet, else what most
    have. ``channels_b``: the same for the second images of pairs. ``index``: an index that ``write_index`` wrote; the
    images are then those of that table, as they were read then, whatever the folder holds by now. ``value_range``: of
    float and 16-bit images, that of an earlier run.

    Raises UserError, and DataError where not one of many images can be read.
    """
    for number in (channels, channels_b):
        if number is not None:
            as_whole(number, "channels", 1)
    if not isinstance(source, (str, os.PathLike)):
        return _given(source, channels, channels_b, value_range, None if index is None else Path(index))
    path = SAMPLE if source == "sample" else as_path(source, "images")
    if path.suffix.lower() in (".npy", ".npz") and path.is_file() and arrays.holds_many(path):
        held = arrays.from_file(path)
        if index is not None:
            return _recalled_array(held, Path(index), *_read_index(Path(index)))
        return _from_held(held, str(path), channels, value_range)
    if index is not None:
        images = _from_index(path, Path(index))
    else:
        images = _from_found(*find(path), channels, value_range, channels_b)
    pa.default_memory_pool().release_unused()  # of a million rows, what was read or filtered on the way is 150 MB
    return images


def _given(
    source: Any, channels: int | None, channels_b: int | None, value_range: tuple[float, float] | None,
    index: Path | None,
) -> Images:  # fmt: skip
    """What Python hands over: one source, or two of one kind as pairs."""
    if source is None:
        raise UserError("The images of this run were given from Python: go on from there, pretrain(config, images=…).")
    if isinstance(source, Samples):
        parts = [as_samples(data) for data in (source.data, source.data_b) if data is not None]
        opened = [_of_samples(part) for part in parts]
    else:
        both = (source.images, source.images_b) if isinstance(source, Pairs) else (source,)
        many = [many_images(part) for part in both]
        if all(part is None for part in many):
            if index is not None:
                return _from_index(Path("/"), index)
            first, *partners = [_listed(part) for part in both]
            return _from_found(first, partners[0] if partners else None, channels, value_range, channels_b)
        if any(part is None for part in many):
            raise UserError("of pairs one is a list of paths and the other is not: give both in one way")
        given = [arrays.from_memory(part) for part in many if part is not None]
        spans = zip(given, (channels, channels_b), (value_range, None), strict=False)
        opened = [_from_held(held, "array", of, span) for held, of, span in spans] if index is None else []
        if index is not None:
            parts_of = _of_index(index)
            if len(parts_of) != len(given):
                raise UserError(f"{index} was made from other images (pairs, or not): start a new run")
            return _joined([_recalled_array(held, index, *of) for held, of in zip(given, parts_of, strict=True)])
    if index is not None:
        _unchanged(opened, index)
    return _joined(opened)


def _listed(paths: Any) -> Found:
    if not len(paths):
        raise UserError("no images: the list is empty")
    named = [as_path(path, f"item {k} of the list of images") for k, path in enumerate(paths)]
    return sources.find_files([os.fsencode(path.absolute()) for path in named], Path("/"))


def _of_samples(data: Array) -> Images:
    table = arrays.numbered(len(data), Header(0, 0, "float32x1"))
    return replace(_images(Found("samples", b"", table), table, (1, "float32"), (0.0, 1.0)), array=data)


def _joined(opened: Sequence[Images]) -> Images:
    """One source as it is, or two as pairs."""
    first, *rest = opened
    if rest and len(first) != len(rest[0]):
        raise UserError(f"pairs need as many of both: {len(first):,} and {len(rest[0]):,} are given")
    return replace(first, second=rest[0]) if rest else first


def _unchanged(opened: Sequence[Images], index: Path) -> None:
    """UserError where samples are not those of an index."""
    then = [(len(table), settings.get("content")) for table, settings in _of_index(index)]
    if [(len(images), _content(images)) for images in opened] != then:
        raise UserError(f"the samples have changed since {index} was made: give the same, or start a new run")


def _from_found(
    found: Found, partners: Found | None, channels: int | None, value_range: tuple[float, float] | None,
    channels_b: int | None,
) -> Images:  # fmt: skip
    table, kind = _judged(found, channels)
    if partners is None:
        return _images(found, table, kind, value_range)
    other, other_kind = _judged(partners, channels_b)
    table, other = tables.as_pairs(table, other)
    second = _images(partners, other, other_kind, None)
    if not len(second):
        raise DataError(f"of {len(table):,} pairs there is none of which both images can be read")
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
        raise UserError(f"no image in {name} can have {channels} channels: they have {chosen}; leave channels out, or "
                        "take an encoder of such images")  # fmt: skip
    if any(misfits.values()):
        table = tables.with_status(table, [misfits.get(mode, "") for mode in table["mode"].to_pylist()])
    return table, (channels or chosen, dtype)


def _images(
    found: Found, table: pa.Table, kind: Kind, value_range: tuple[float, float] | None, held: Held | None = None
) -> Images:
    rows, bad = tables.usable(table)
    sizes = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1).astype(np.int64)
    labels = rows["label"].to_numpy().astype(np.int64) if "label" in rows.column_names else None
    images = Images(found.kind, found.root, rows, bad, sizes, *kind, labels=labels, held=held)
    images = replace(images, passed_over=found.passed_over, value_range=value_range or (0.0, 1.0))
    modes = [(mode, mode_kind(mode)[1]) for mode in tables.modes(rows)]
    deep = [mode for mode, dtype in modes if dtype == "float32"]
    if not deep and images.dtype == "uint16":
        deep = [mode for mode, dtype in modes if dtype == "uint16"]
    if value_range is None and deep:
        images = replace(images, value_range=find_range(_some_of(images, deep)))
    return images


def _some_of(images: Images, modes: list[str]) -> list[Array]:
    """Images of these modes as they are before scaling."""
    return _read_some(images.decoded, [i for i, mode in enumerate(images.rows["mode"].to_pylist()) if mode in modes])


def _read_some(read: Callable[[int], Array], numbers: Sequence[int]) -> list[Array]:
    """Up to LOOKED_AT of these images, evenly spread; bad ones left out."""
    some = []
    for i in numbers[:: max(1, len(numbers) // LOOKED_AT)][:LOOKED_AT]:
        with contextlib.suppress(BadImage):
            some.append(read(i))
    return some


def write_index(images: Images, path: str | os.PathLike[str]) -> None:
    """Writes what ``open_images(source, index=path)`` needs to find the same images again, bad ones included."""
    table, settings = _record(images)
    if images.second is not None:
        other, settings["second"] = _record(images.second)
        for name in other.column_names:
            table = table.append_column(SECOND + name, other[name])
    tables.write(table, settings | {"rule": RULE}, Path(path))


def _content(images: Images) -> int:
    """A checksum of an array, to tell whether it is still the same: of all images where they are in memory, else of
    some."""
    if images.array is not None:
        return zlib.crc32(np.ascontiguousarray(images.array).data)
    return zlib.crc32(b"".join(array.tobytes() for array in _read_some(images.read, range(len(images)))))


def _record(images: Images) -> tuple[pa.Table, dict[str, Any]]:
    facts = {"kind": images.kind, "channels": images.channels, "dtype": images.dtype, "value_range": images.value_range}
    if images.kind in ("array", "samples"):
        facts["content"] = _content(images)
    return pa.concat_tables([images.rows, images.bad]), facts


def _from_index(path: Path, index: Path) -> Images:
    (own, settings), *rest = _of_index(index)
    images = _recalled(path, own, settings)
    return replace(images, second=_recalled(path, *rest[0])) if rest else images


def _of_index(index: Path) -> list[tuple[pa.Table, dict[str, Any]]]:
    """(rows, settings) of the images of an index, and of given pairs also of the second ones."""
    table, settings = _read_index(index)
    own = [name for name in table.column_names if not name.startswith(SECOND)]
    parts = [(table.select(own), settings)]
    if "second" in settings:
        other = table.select([name for name in table.column_names if name.startswith(SECOND)])
        other = other.rename_columns([name.removeprefix(SECOND) for name in other.column_names])
        parts.append((other, settings["second"]))
    return parts


def _read_index(index: Path) -> tuple[pa.Table, dict[str, Any]]:
    table, settings = tables.read(index)
    if settings["rule"] != RULE:
        raise UserError(f"{index} was made by another version of barlow, whose images differ: start a new run")
    return table, settings


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
            how = " ([..., :3])" if chosen == 4 and channels in (1, 3) else ""
            raise UserError(
                f"{name} {why}: convert the images{how}, leave channels out, or take an encoder of such images"
            )
    whole = arrays.all_at_once(held)
    images = _images(Found("array", b"", table), table, (channels, dtype), value_range, held)
    images = replace(images, labels=held.labels)
    if whole is None:
        return images
    flat = convert(whole.reshape(len(whole), -1, whole.shape[3]), channels, dtype, images.value_range)
    clipped = np.array([beyond(image, images.value_range) for image in whole])
    return replace(images, array=flat.reshape(*whole.shape[:3], channels), held=None, beyond=clipped)


def _recalled_array(held: Held, index: Path, table: pa.Table, settings: dict[str, Any]) -> Images:
    """Arrays are read anew; the index says what they became, and whether they are still the same."""
    if len(held) == len(table):
        low, high = settings["value_range"]
        images = _from_held(held, "the array", settings["channels"], (low, high))
        if images.dtype == settings["dtype"] and _content(images) == settings.get("content"):
            return images
        if isinstance(held.parts, Items):
            raise UserError(f"the data set does not bring the same images twice: it is another than that of {index}, "
                            "or there are random transforms in it, which belong into views=…")  # fmt: skip
    raise UserError(f"the array has changed since {index} was made ({len(table):,} images then): start a new run")
