"""Sources that are arrays: in memory, ``.npy`` and ``.npz`` files, lists of arrays of any sizes."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa

from barlow.decode import Header, array_header, tidy
from barlow.errors import UserError
from barlow.guard import BadImage
from barlow.index import OK, WORDS
from barlow.samples import Items

Array = np.ndarray[Any, np.dtype[Any]]
SEEN = 64  # items of a Dataset by which all are known
IN_MEMORY = 2 << 30  # bytes; a larger .npy stays on disk and is read image by image


@final
@dataclass(frozen=True, eq=False)
class Held:
    """Images that lie ready. ``array``: (n, h, w, c), or None with ``parts``, one (h, w, c) each. ``file``: the .npy
    file that ``array`` is mapped from, so that another process maps it again instead of receiving a copy."""

    array: Array | None
    parts: Sequence[Array] = ()
    labels: Array | None = None
    file: str = ""

    @property
    def in_memory(self) -> bool:
        """Whether this is one array in memory."""
        return self.array is not None and not self.file

    def __len__(self) -> int:
        return len(self.parts) if self.array is None else len(self.array)

    def read(self, i: int, fill: bool) -> Array:
        """Image ``i``, (h, w, c); raises BadImage. ``fill`` as in ``decode``."""
        return tidy(np.array(self.parts[i] if self.array is None else self.array[i]), fill)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file:
            return _mapped, (self.file, self.labels)
        return Held, (self.array, self.parts, self.labels)


def _mapped(file: str, labels: Array | None) -> Held:
    return Held(_with_channels(np.load(file, mmap_mode="r", allow_pickle=False), file), (), labels, file)


def from_memory(source: Array | Sequence[Array]) -> Held:
    """An array (n, h, w) or (n, h, w, c), or a sequence of (h, w) or (h, w, c) arrays. Raises UserError."""
    if isinstance(source, np.ndarray):
        return Held(_with_channels(source, "the array"))
    if isinstance(source, Items):
        return Held(None, source)
    for k, part in enumerate(source):
        array = isinstance(part, np.ndarray) and part.dtype.kind in "buif"
        if not array or part.ndim not in (2, 3) or not part.size:
            raise UserError(f"item {k} of the list is no image: give arrays (rows, columns, channels) of numbers")
    return Held(None, tuple(part[:, :, None] if part.ndim == 2 else part for part in source))


def as_images(given: Any, channels: int) -> list[Array]:
    """The images (h, w, c) of a list or of an array (n, h, w, c); of one channel also (h, w) ones, or such a one alone.
    UserError for what is no list of images, and for another number of channels."""
    if isinstance(given, np.ndarray):
        given = [given] if given.ndim == 2 and channels == 1 else given if given.ndim == 4 else ()
    listed = isinstance(given, Sequence | np.ndarray) and all(isinstance(image, np.ndarray) for image in given)
    if not listed or not len(given):
        raise UserError(f"give a list of images (h, w, {channels}), each a NumPy array, and at least one")
    images = [image[:, :, None] if image.ndim == 2 and channels == 1 else image for image in given]
    if odd := [image.shape for image in images if image.ndim != 3 or image.shape[2] != channels or not image.size]:
        raise UserError(f"the encoder takes images (h, w, {channels}), not {odd[0]}")
    return images


def holds_many(path: Path) -> bool:
    """True where a .npy or .npz file is a whole data set, not one image."""
    if path.suffix.lower() == ".npz":
        return True
    try:
        return bool(np.load(path, mmap_mode="r", allow_pickle=False).ndim != 2)
    except (ValueError, OSError, EOFError):
        return True  # from_file says what is wrong


def from_file(path: Path) -> Held:
    """A .npy file of (n, h, w) or (n, h, w, c), or a .npz file with such an array ``images`` and maybe ``labels`` (n,).
    Raises UserError; pickled objects are never loaded."""
    try:
        opened = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(opened, np.ndarray):
            if opened.nbytes <= IN_MEMORY:
                return Held(_with_channels(np.array(opened), str(path)))
            return _mapped(str(path.absolute()), None)
        with opened:
            name = _image_array(opened.files, path)
            images = _with_channels(opened[name], f"{name} in {path}")
            labels = opened["labels"] if "labels" in opened.files else None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error or "it is empty"
        raise UserError(f"{path} cannot be read as an array: {why}") from None
    except UserError:
        raise
    except ValueError as error:
        objects = "allow_pickle" in str(error) or "Python objects" in str(error)
        why = "it holds pickled objects, which are not loaded" if objects else str(error)
        raise UserError(f"{path} cannot be read as an array: {why}; save numbers with numpy.save") from None
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iub"):
        raise UserError(f"labels in {path} have shape {labels.shape} and type {labels.dtype}, not one integer an image")
    return Held(images, (), None if labels is None else labels.astype(np.int64))


def _image_array(names: list[str], path: Path) -> str:
    if "images" in names:
        return "images"
    others = [name for name in names if name not in ("labels", "names")]
    if len(others) != 1:
        raise UserError(f"{path} holds {', '.join(names) or 'nothing'}: name the array of images 'images'")
    return others[0]


def _with_channels(array: Array, name: str) -> Array:
    if array.dtype.kind not in "buif" or array.ndim not in (3, 4):
        raise UserError(f"{name} has shape {array.shape} and type {array.dtype}, not (images, rows, columns, channels)"
                        "; numbers that are no images are given from Python, as Samples(…)")  # fmt: skip
    if not array.size:
        raise UserError(f"{name} has shape {array.shape}: it holds no images")
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.shape[1] > 4:
        n, h, w = array.shape
        raise UserError(f"{name}: shape {array.shape} is one colour image, or {n} gray ones {w} pixels wide: give "
                        f"{(1, n, h, w)}, or {(n, h, w, 1)}")  # fmt: skip
    array = array[..., None] if array.ndim == 3 else array
    _, height, width, channels = array.shape
    if height <= 4 < min(width, channels):
        raise UserError(f"{name} has shape {array.shape}, channels first: transpose it with .transpose(0, 2, 3, 1)")
    return array


def all_at_once(held: Held) -> Array | None:
    """All images as one tidy (n, h, w, c) array where that is one in memory, and all of it finite, else None. Raises
    UserError where nothing is."""
    array = held.array
    if array is None or not held.in_memory:
        return None
    array = tidy(array.reshape(len(array), -1, array.shape[3]), fill=False).reshape(array.shape)
    finite = np.isfinite(array) if array.dtype.kind == "f" else np.ones(1, bool)
    if not finite.any():
        raise UserError("the array holds no finite number")
    return array if finite.all() else None


def _usual_header(items: Items) -> Header:
    """What most of ``SEEN`` items of a Dataset are, and all are taken to be. (One of another size is met when it is
    read: its boxes are drawn anew for its own size.)"""
    seen, first = Counter[Header](), ""
    for i in range(0, len(items), max(1, len(items) // SEEN)):
        try:
            image = items[i]
            seen[array_header(image.shape, image.dtype)] += 1
        except BadImage as bad:
            first = first or f"item {i} {bad.reason}"
    if not seen:
        raise UserError(f"the data set brings no images: {first or 'it is empty'}")
    return seen.most_common(1)[0][0]


def rows_of(held: Held) -> pa.Table:
    """The index rows of arrays: the key of an image is its number."""
    if isinstance(held.parts, Items):
        return numbered(len(held), _usual_header(held.parts))
    if held.array is None:
        return numbered(len(held), *[array_header(part.shape, part.dtype) for part in held.parts])
    return numbered(len(held), array_header(held.array.shape[1:], held.array.dtype))


def numbered(count: int, *heads: Header) -> pa.Table:
    """Index rows of ``count`` images whose keys are their numbers; ``heads``: one each, or one for all."""
    heads = heads * count if len(heads) == 1 else heads
    return pa.table(
        {
            "path": pa.array([str(i).encode() for i in range(count)], pa.large_binary()),
            "bytes": pa.array(np.zeros(count, np.int64)),
            "modified": pa.array(np.zeros(count, np.int64)),
            "width": pa.array([head.width for head in heads], pa.int32()),
            "height": pa.array([head.height for head in heads], pa.int32()),
            "mode": pa.array([head.mode for head in heads], WORDS),
            "status": pa.array([OK] * count, WORDS),
        }
    )
