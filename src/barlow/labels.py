"""Labels, for evaluation only: from class folders, or from a table of paths and labels."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import final

import numpy as np

from barlow.console import say
from barlow.draws import IntArray
from barlow.errors import UserError
from barlow.pairs import is_path, path_columns, read_table
from barlow.reading import Images
from barlow.sources import shown

PATH_WORDS = ("path", "file", "filename", "image", "key")  # names of columns, the first that is there
CLASS_WORDS, SEVERAL, VALUE_WORDS = ("label", "class", "target"), "labels", ("value", "values")
LABEL_WORDS = (*CLASS_WORDS, SEVERAL, *VALUE_WORDS)


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

    A path is matched as a whole (relative to the source, or absolute below it), else where it ends like one image
    alone, else by its file name where only one image and one row have that; without its ending, where it ends like one
    image alone. Spaces around a label do not count, and a row without one says nothing. Classes are numbered in the
    order of their names (of their values where all are whole numbers). Raises UserError when an image has no label or a
    row belongs to no image.
    """
    found, unknown, _ = _matched(path, images, column)
    missing = [images.key(i) for i in range(len(images)) if i not in found]
    if missing or unknown:
        parts = [f"{len(missing):,} images have no label, for example {missing[0]}"] if missing else []
        parts += [f"{len(unknown):,} rows belong to no image, for example {unknown[0]}"] if unknown else []
        raise UserError(f"{path} is not the table of labels of these images: {' and '.join(parts)}; bring the images "
                        f"back, {_in_full(unknown, images)}or take the rows out")  # fmt: skip
    return _numbered([found[i] for i in range(len(images))])


def named_in_csv(path: Path, images: Images) -> IntArray:
    """Numbers of the images that a table of labels names, in the order of the images: it may label a few of many.

    Rows without a label are counted on standard error. Raises UserError when no image is named.
    """
    found, unknown, blank = _matched(path, images, None)
    if not found:
        if not unknown:
            raise UserError(f"no row of {path} has a label" if blank else f"{path} holds names of columns and no rows")
        first = f", such as {unknown[0]}," if unknown else ""
        raise UserError(
            f"none of the paths in {path}{first} is one of the {len(images):,} images: "
            f"{_in_full(unknown, images)}give the folder that they lie in as images"
        )
    if blank:
        say(f"note: {blank:,} rows of {path} have no label and are left out")
    return np.array(sorted(found), np.int64)


def bad_in_csv(path: Path, images: Images) -> IntArray:
    """Numbers of the images in ``images.bad`` that a table of labels names with a label, in their order."""
    names = [name for name, _ in _given(path, None)[0]]
    place = _Places(images, names)
    numbers = {i for name in names if (i := place.of(name)) is not None}
    return np.array(sorted(i - len(images) for i in numbers if i >= len(images)), np.int64)


def label_column(table: dict[str, list[str]], path: Path) -> tuple[str, str]:
    """(name of the column of paths, name of that of labels): by their usual names, else by what is left.

    Raises UserError where that is not one column.
    """
    names = list(table)
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} column: it should have two, path and label")
    lower = {name.lower(): name for name in reversed(names)}
    paths = path_columns(table)
    key = next((lower[word] for word in PATH_WORDS if word in lower), paths[0] if paths else names[0])
    if word := next((word for word in LABEL_WORDS if word in lower), None):
        return key, lower[word]
    others = [name for name in names if name != key and name.lower() != "split"]
    if len(others) != 1:
        raise UserError(f"{path} has the columns {', '.join(names)}: name the one with the labels 'label'")
    return key, others[0]


def _matched(path: Path, images: Images, column: str | None) -> tuple[dict[int, str], list[str], int]:
    """(what the table says of each image that it names, paths that belong to none, number of rows without label)."""
    given, blank = _given(path, column)
    place = _Places(images, [name for name, _ in given])
    said: dict[int, tuple[str, str]] = {}
    unknown = []
    for name, label in given:
        i = place.of(name)
        if i is None:
            unknown.append(name)
        if i is None or i >= len(images):
            continue
        before, other = said.setdefault(i, (label, name))
        if before != label:
            rows = "" if name == other else f" (in the rows {other} and {name})"
            raise UserError(f"{path} gives {images.key(i)} two labels, {before} and {label}{rows}")
    return {i: label for i, (label, _) in said.items()}, unknown, blank


@final
class _Places:
    """Where the image of a path in a table stands among the usable images, and after them the bad ones. ``names``: all
    paths of the table."""

    def __init__(self, images: Images, names: list[str]) -> None:
        keys = [*map(images.key, range(len(images))), *map(shown, images.bad["path"].to_pylist())]
        parts = {part for key in keys for part in key.split("/")}
        self.normal = len({_composed(part) for part in parts}) == len(parts)
        keys, root = [self.spelt(key) for key in keys], shown(images.root)
        self.whole = {key: i for i, key in enumerate(keys)}
        roots = (root, shown(os.fsencode(Path(root).absolute())))
        self.roots = tuple(f"{self.spelt(name).rstrip('/')}/" for name in roots)
        self.bases = Counter(name.rpartition("/")[2] for name in {self.spelt(name) for name in names})
        self.above = [key.split("/")[-2:-1] for key in keys]  # the folder that the image lies in
        self.folders = {folder[0] for folder in self.above if folder}
        self.ends = _ends(keys, 1)
        bare = not all(map(is_path, names))
        self.stems = _ends([key.rpartition(".")[0] if is_path(key) else key for key in keys], 0) if bare else {}

    def spelt(self, name: str) -> str:
        """As names are compared: é is one letter, also where it is an e and an accent (macOS), unless two names among
        the images differ in that alone."""
        return _composed(name) if self.normal else name

    def of(self, name: str) -> int | None:
        """The number of the image, None where there is none or it is not certain which: of a row that names a folder of
        the source, none in another folder."""
        short = self.spelt(name)
        for root in self.roots:
            short = short.removeprefix(root)  # as seen from the source, where it lies there
        short = short.removeprefix("./")
        i, folder = self._of(short), short.split("/")[-2:-1]
        return i if i is None or not folder or folder[0] not in self.folders or self.above[i] == folder else None

    def _of(self, short: str) -> int | None:
        parts = short.split("/")
        for k in range(len(parts)):  # the table has more folders than the source
            if (i := self.whole.get("/".join(parts[k:]))) is not None:
                return i
        if short in self.ends:
            return self.ends[short]
        if not is_path(short) and short in self.stems:
            return self.stems[short]
        return self.ends.get(parts[-1]) if self.bases[parts[-1]] == 1 else None


def _ends(keys: list[str], first: int) -> dict[str, int | None]:
    """Every end of a key, from the folder ``first`` on; None where several have it."""
    ends: dict[str, int | None] = {}
    for i, key in enumerate(keys):
        parts = key.split("/")
        for k in range(first, len(parts)):
            end = "/".join(parts[k:])
            ends[end] = None if ends.get(end, i) != i else i
    return ends


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _in_full(unknown: list[str], images: Images) -> str:
    """What to do, where a path that belongs to no image has no ending."""
    bare = unknown and not is_path(unknown[0]) and len(images)
    return f"write names in full, such as {images.key(0)}, " if bare else ""


def _given(path: Path, column: str | None) -> tuple[list[tuple[str, str]], int]:
    """((path, what ``column`` says, by itself the label) of every row that has a label, number of the others).

    Raises UserError where what it says is not UTF-8: it is written down later, which a path never is as it stands.
    """
    table = read_table(path, all_columns=True)
    key, value = label_column(table, path)
    labels = [label.strip() for label in table[value]]
    says = labels if column is None else [said.strip().lower() for said in table[column]]
    if not _is_text("".join(says)):
        raise UserError(f"the labels of {path} are not UTF-8: save it as UTF-8")
    rows = zip((_printable(name) for name in table[key]), says, labels, strict=True)
    kept = [
        (name, said) for name, said, label in rows if label or value.lower() == SEVERAL
    ]  # of several none may apply
    return kept, len(labels) - len(kept)


def _printable(name: str) -> str:
    return shown(name.encode("utf-8", "surrogateescape").replace(b"\\", b"/"))


def _is_text(text: str) -> bool:
    """False where the text holds bytes that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numbered(labels: list[str]) -> tuple[IntArray, list[str]]:
    names = sorted(set(labels))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    number = {name: k for k, name in enumerate(names)}
    return np.array([number[label] for label in labels], np.int64), names
