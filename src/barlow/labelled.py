"""Labelled images for evaluation: where the labels come from, of which kind they are, which images are tested on."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from barlow.errors import UserError
from barlow.images import SAMPLE, Images, open_images
from barlow.labels import (
    SEVERAL,
    VALUE_WORDS,
    bad_in_csv,
    label_column,
    labels_from_csv,
    labels_from_folders,
    named_in_csv,
)
from barlow.pairs import ENDINGS_OF_TABLES, read_table
from barlow.protocols import stratified

TEST_WORDS = ("test", "val", "valid", "validation")
SHARE = 0.8  # of the images are for training where the source does not say


class Targets(NamedTuple):
    """``kind`` "classes": int64 (n,), numbers of ``names``. "labels": bool (n, c), which of ``names`` apply.
    "values": float64 (n, t)."""

    kind: str
    values: NDArray[Any]
    names: list[str]


@final
@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and their targets, one after the other through all ``images``; ``test``: bool (n,), which ones are tested
    on, None until ``divided``. ``split`` says in words who decided that."""

    images: tuple[Images, ...]
    targets: Targets
    test: NDArray[np.bool_] | None
    split: str

    def key(self, i: int) -> str:
        """The name of image ``i`` of all."""
        images, place = self._source(i)
        return images.key(place)

    def read(self, i: int) -> NDArray[Any]:
        """Image ``i`` of all, (h, w, c); raises BadImage."""
        images, place = self._source(i)
        return images.read(place)

    def _source(self, i: int) -> tuple[Images, int]:
        for images in self.images:
            if i < len(images):
                return images, i
            i -= len(images)
        raise IndexError(i)


def open_labelled(
    labels: str | Path, *, images: str | None = None, test: str | Path | None = None, channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> Labelled:  # fmt: skip
    """Opens labelled images; ``test`` is a second source of the same forms, for testing only.

    ``labels``: ``sample``; a folder of class folders; a folder that holds two of these (train/ and test/ or val/) or
    train.npz and test.npz; an ``.npz`` with ``images`` and ``labels`` (integers (n,): classes, 0 and 1 (n, c): labels
    that do not exclude each other, real numbers: values) and maybe ``names`` (texts (K,), that of class k in place k);
    a data set file that carries labels; a CSV with a column ``path`` and one of ``label``, ``labels`` (several,
    separated by ;) or ``value``, and maybe ``split`` (train, test).
    ``images``: where the images of a CSV are, which may then label a few of many; default: the files that it names, as
    seen from where it lies. Raises UserError.
    """
    first, second = (labels, test) if test is not None else _parts(labels)
    found, targets, given = _open(first, images, channels, value_range)
    if second is None:
        return Labelled((found,), targets, given, "the column split" if given is not None else "")
    if given is not None:
        raise UserError(f"{first} has a column split: give it alone, or without that column and with a test set")
    same_scale = found.value_range if found.dtype != "uint8" else value_range
    other, other_targets, given = _open(second, images, channels, same_scale)
    if given is not None:
        raise UserError(f"{second} has a column split and is given as the test set as well: leave one of the two out")
    values = np.concatenate([targets.values, _aligned(targets, other_targets, second)])
    part = np.repeat([False, True], [len(found), len(other)])
    return Labelled((found, other), targets._replace(values=values), part, f"{Path(second).name} is the test set")


def _parts(source: str | Path) -> tuple[str | Path, str | Path | None]:
    """(training source, test source or None) of one that may hold both."""
    folder = SAMPLE.parent if source == "sample" else Path(source)
    if os.access(folder, os.X_OK) and folder.is_dir():
        for ending in (".npz", ""):
            for word in TEST_WORDS:
                train, test = folder / f"train{ending}", folder / f"{word}{ending}"
                if train.exists() and test.exists() and train.is_dir() == test.is_dir() == (not ending):
                    return train, test
    return source, None


def _open(
    source: str | Path, images: str | None, channels: int | None, value_range: tuple[float, float] | None
) -> tuple[Images, Targets, NDArray[np.bool_] | None]:
    """(images, targets, which ones are tested on where the source says so)."""
    path = SAMPLE if source == "sample" else Path(source)
    if path.suffix.lower() in ENDINGS_OF_TABLES:
        found = open_images(images or path, channels=channels, value_range=value_range)
        found = _only(found, named_in_csv(path, found), bad_in_csv(path, found))
        targets, part = _from_csv(path, found)
        return found, targets, part
    if images is not None:
        raise UserError(f"{source} brings its own images: give images only with a CSV of labels")
    numbers = _numbers(path)
    if numbers is not None:
        with np.load(path, allow_pickle=False) as file:
            found = open_images(file["images"], channels=channels, value_range=value_range)
        if len(found) != len(numbers.values):
            raise UserError(f"{path} holds {len(found):,} images and labels for {len(numbers.values):,}")
        return found, numbers, None
    found = open_images(path, channels=channels, value_range=value_range)
    if found.labels is not None:
        classes, values = np.unique(found.labels, return_inverse=True)
        return found, Targets("classes", values.astype(np.int64), _names(path, classes)), None
    if found.kind != "folder":
        raise UserError(f"{source} carries no labels: give class folders, an .npz with labels, or a CSV of path,label")
    values, names = labels_from_folders(found)
    return found, Targets("classes", values, names), None


def _only(images: Images, chosen: NDArray[np.int64], bad: NDArray[np.int64]) -> Images:
    """These images of a source of files, and these of its bad ones."""
    return replace(images, rows=images.rows.take(chosen), sizes=images.sizes[chosen], bad=images.bad.take(bad))


def _numbers(path: Path) -> Targets | None:
    """The labels of an .npz file where they are something else than one integer an image."""
    if path.suffix.lower() != ".npz":
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            values: NDArray[Any] = file["labels"] if "images" in file.files else np.zeros(1, int)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # open_images says what is wrong
    if values.dtype.kind in "iub" and values.ndim == 1:
        return None
    if values.dtype.kind == "f" and values.ndim in (1, 2) and np.isfinite(values).all():
        return Targets("values", values.reshape(len(values), -1).astype(np.float64), [])
    if values.dtype.kind in "iub" and values.ndim == 2 and np.isin(values, (0, 1)).all():
        return Targets("labels", values.astype(bool), _names(path, np.arange(len(values.T))))
    raise UserError(
        f"labels in {path} have shape {values.shape} and type {values.dtype}: give integers (n,), with an array "
        "'names' where they have some, or 0 and 1 (n, c), or real numbers"
    )


def _names(path: Path, classes: NDArray[Any]) -> list[str]:
    """What these classes are called: by an .npz file's array ``names``, which has that of class k in place k, else by
    their numbers."""
    if path.suffix.lower() != ".npz":
        return [str(number) for number in classes]
    with np.load(path, allow_pickle=False) as file:
        if "names" not in file.files:
            return [str(number) for number in classes]
        try:
            names = file["names"]
        except ValueError:  # Python objects
            names = np.zeros(0)
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) < len(names):
        raise UserError(f"names in {path} should be texts (K,), each another one: the name of class k in place k")
    if classes.min() < 0 or classes.max() >= len(names):
        raise UserError(f"{path} has {len(names)} names, but labels from {classes.min()} to {classes.max()}")
    return [str(names[number]) for number in classes]


def _from_csv(path: Path, images: Images) -> tuple[Targets, NDArray[np.bool_] | None]:
    table = read_table(path, all_columns=True)
    columns = {name.lower(): name for name in table}
    column = label_column(table, path)[1]
    word = column.lower()
    numbers, names = labels_from_csv(path, images)
    targets = Targets("classes", numbers, names)
    if word == SEVERAL:
        targets = _several(numbers, names)
    elif word in VALUE_WORDS:
        targets = _values(path, numbers, names)
    else:
        _refuse_values(path, column, names, len(images))
    if "split" not in columns:
        return targets, None
    numbers, names = labels_from_csv(path, images, columns["split"])
    if "train" not in names or len(names) != 2 or not set(names) <= {"train", *TEST_WORDS}:
        raise UserError(f"the column split of {path} says {', '.join(names)}: it should say train and test")
    return targets, numbers != names.index("train")


def _values(path: Path, numbers: NDArray[np.int64], names: Sequence[str]) -> Targets:
    values = np.array([_number(name) for name in names])
    if not np.isfinite(values).all():
        first = names[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise UserError(f"the column of values in {path} holds {first!r}, which is not a number (such as 1.5)")
    return Targets("values", values[numbers, None], [])


def _refuse_values(path: Path, column: str, names: Sequence[str], count: int) -> None:
    """UserError where the names of the classes of ``count`` images are measurements, most of one image alone."""
    values = [_number(name.replace(",", ".")) for name in names]
    numbers = [value for value in values if math.isfinite(value)]
    if 2 * len(numbers) > count and not all(map(float.is_integer, numbers)):
        raise UserError(f"the column {column} of {path} holds numbers, most of them of one image alone: name it "
                        "'value' to predict them, or write classes as words")  # fmt: skip


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _several(numbers: NDArray[np.int64], names: Sequence[str]) -> Targets:
    sets = [{part.strip() for part in re.split(r"[;|]", name)} - {""} for name in names]
    labels = sorted({part for some in sets for part in some})
    return Targets("labels", np.array([[label in some for label in labels] for some in sets])[numbers], labels)


def _aligned(train: Targets, test: Targets, source: str | Path) -> NDArray[Any]:
    """The values of ``test``, numbered as those of ``train``."""
    if train.kind != test.kind or (train.kind == "values" and train.values.shape[1:] != test.values.shape[1:]):
        raise UserError(f"{source} has labels of another kind than the training part: {test.kind}, not {train.kind}")
    if unknown := sorted(set(test.names) - set(train.names)):
        raise UserError(f"{source} has {unknown[0]!r}, which no training image is labelled with")
    if train.kind == "classes":
        numbers = np.array([train.names.index(name) for name in test.names], np.int64)
        return np.take(numbers, test.values)
    if train.kind == "values":
        return test.values
    values: NDArray[Any] = np.zeros((len(test.values), len(train.names)), bool)
    values[:, [train.names.index(name) for name in test.names]] = test.values
    return values


def divided(labelled: Labelled, digests: Sequence[bytes | None], seed: int) -> Labelled:
    """The same with a test part, of the images that could be read (those with a digest of their content).

    A given part is refused (UserError) when it holds an image that the training part holds too. Without one, a fifth
    of the images becomes the test part, class by class, drawn by ``seed``; copies of one image stay on one side.
    """
    first: dict[bytes, int] = {}
    source = np.array([-1 if d is None else first.setdefault(d, i) for i, d in enumerate(digests)])
    if labelled.test is not None:
        _refuse_leaks(labelled, labelled.test, source)
        return labelled
    targets = labelled.targets
    originals = np.flatnonzero(source == np.arange(len(source)))
    strata = targets.values[originals] if targets.kind == "classes" else np.zeros(len(originals), np.int64)
    train = np.zeros(len(source), bool)
    train[originals[stratified(strata, SHARE, np.random.default_rng(seed))]] = True
    test = ~train[source]
    how = "class by class, " if targets.kind == "classes" else ""
    return replace(labelled, test=test, split=f"a fifth held back, {how}drawn by seed {seed}")


def _refuse_leaks(labelled: Labelled, test: NDArray[np.bool_], source: NDArray[np.int64]) -> None:
    read = source >= 0
    both = np.intersect1d(source[~test & read], source[test & read])
    if len(both):
        copies = np.flatnonzero(source == both[0])
        one, other = (labelled.key(int(copies[test[copies] == side][0])) for side in (False, True))
        raise UserError(
            f"{len(both):,} images are in the training part and in the test part, for example {one} and {other}: "
            "remove them from one of the two"
        )
