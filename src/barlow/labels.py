"""Labels, for evaluation only: from class folders, or from a table of paths and labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from barlow.errors import UserError
from barlow.pairs import read_table
from barlow.reading import Images
from barlow.sources import shown

IntArray = np.ndarray[Any, np.dtype[np.int64]]


def labels_from_folders(images: Images) -> tuple[IntArray, list[str]]:
    """(int64 (n,), class names): the class of an image is the first folder below the source. Raises UserError."""
    names = [images.key(i).partition("/") for i in range(len(images))]
    loose = [first for first, slash, _ in names if not slash]
    if images.kind != "folder":
        raise UserError(f"classes by folder need a folder of images, not a source of kind {images.kind}: give a CSV")
    if loose:
        raise UserError(
            f"{len(loose):,} of {len(images):,} images lie in no class folder, for example {loose[0]}: "
            "put each into a folder named after its class, or give a CSV of path,label"
        )
    return _numbered([first for first, _, _ in names])


def labels_from_csv(path: Path, images: Images, column: str | None = None) -> tuple[IntArray, list[str]]:
    """(int64 (n,), class names) by a CSV (or Parquet) table of paths and labels, or what stands in another ``column``.

    A path is matched as a whole (relative to the source, or absolute below it), else by its file name where only one
    image has that. Classes are numbered in the order of their names (of their values where all are whole numbers).
    Raises UserError when an image has no label or a row belongs to no image.
    """
    found, unknown = _matched(path, images, column)
    missing = [images.key(i) for i in range(len(images)) if i not in found]
    if missing or unknown:
        parts = [f"{len(missing):,} images have no label, for example {missing[0]}"] if missing else []
        parts += [f"{len(unknown):,} labels belong to no image, for example {unknown[0]}"] if unknown else []
        raise UserError(f"{path} is not the table of labels of these images: " + " and ".join(parts))
    return _numbered([found[i] for i in range(len(images))])


def named_in_csv(path: Path, images: Images) -> IntArray:
    """Numbers of the images that a table of labels names, in the order of the images: it may label a few of many.

    Raises UserError when there are none.
    """
    found, unknown = _matched(path, images, None)
    if not found:
        first = f", such as {unknown[0]}," if unknown else ""
        raise UserError(
            f"none of the paths in {path}{first} is one of the {len(images):,} images: "
            "give the folder that they lie in as images"
        )
    return np.array(sorted(found), np.int64)


def _matched(path: Path, images: Images, column: str | None) -> tuple[dict[int, str], list[str]]:
    """(what the table says of the images that it names, paths that belong to no image)."""
    given = _given(path, column)
    keys = [images.key(i) for i in range(len(images))]
    by_key = {key: i for i, key in enumerate(keys)}
    bases = Counter(PurePosixPath(key).name for key in keys)
    by_base = {PurePosixPath(key).name: i for i, key in enumerate(keys) if bases[PurePosixPath(key).name] == 1}
    root = shown(images.root).rstrip("/") + "/"
    found: dict[int, str] = {}
    unknown = []
    bad = {shown(name) for name in images.bad["path"].to_pylist()}
    for name, label in given:
        short = name.removeprefix(root).removeprefix("./")
        i = by_key.get(short, by_base.get(PurePosixPath(short).name))
        if i is None:
            if short not in bad:
                unknown.append(name)
        elif found.setdefault(i, label) != label:
            raise UserError(f"{path} gives {keys[i]} two labels, {found[i]} and {label}")
    return found, unknown


def _given(path: Path, column: str | None) -> list[tuple[str, str]]:
    """(path, label) of every row: the columns named so, else the first and the second."""
    table = read_table(path, all_columns=True)
    names = list(table)
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} column: it should have two, path and label")
    key = next((n for n in names if n.lower() in ("path", "file", "filename", "image", "key")), names[0])
    value = column or next((n for n in names if n.lower() in ("label", "class", "target")), names[1])
    return list(zip((_printable(name) for name in table[key]), table[value], strict=True))


def _printable(name: str) -> str:
    return shown(name.encode("utf-8", "surrogateescape").replace(b"\\", b"/"))


def _numbered(labels: list[str]) -> tuple[IntArray, list[str]]:
    names = sorted(set(labels))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    number = {name: k for k, name in enumerate(names)}
    return np.array([number[label] for label in labels], np.int64), names
