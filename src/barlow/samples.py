"""Data from Python: pairs, samples that are no images, and the items of a torch Dataset, as arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from PIL.Image import Image

from barlow.errors import Stopped, UserError
from barlow.guard import BadImage

Array = np.ndarray[Any, np.dtype[Any]]


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """Given pairs: image i of ``images`` belongs to image i of ``images_b``. Each is anything that ``pretrain`` takes
    in memory (an array, a sequence of arrays, a torch Dataset) or a list of paths."""

    images: Any
    images_b: Any


@final
@dataclass(frozen=True, eq=False)
class Samples:
    """Numbers that are no images: signals, spectra, rows of a table. They reach views and network as they are, float32,
    neither cropped nor scaled, so both are then of your own.

    ``data``: (n, …) array or tensor, or a sequence or Dataset of arrays of one shape. ``data_b``: the other of each
    pair, which may have another shape.
    """

    data: Any
    data_b: Any = None


@final
class Items(Sequence[Array]):
    """The images of a torch Dataset, or of any object with a length whose items are images: read when they are needed.

    An item is an array or tensor, a Pillow image, or a tuple that begins with one. Tensors have their channels first,
    as is usual in torch, arrays last. The same number must bring the same image each time: chance belongs in the views.
    """

    def __init__(self, data: Any) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise UserError(f"a {type(data).__name__} has no length or no items: give a Dataset that has both")
        if isinstance(data, Mapping):  # such as all parts of a Hugging Face data set
            names = ", ".join(map(str, list(data)[:3]))
            raise UserError(f"a {type(data).__name__} holds images by name ({names}), not by number: give one of them")
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: Any) -> Any:
        """Image ``i`` as (h, w) or (h, w, c). Raises BadImage where the item is none, or cannot be read."""
        try:
            return as_image(self.data[i])
        except (BadImage, MemoryError, Stopped):
            raise
        except Exception as error:  # of code that is not ours: torchvision raises RuntimeError for a broken JPEG
            text = re.sub(r"<[^>]*>", "…", " ".join(str(error).split()))[:200]  # no addresses: the same each time
            raise BadImage(f"cannot be read: {type(error).__name__}{text and ': '}{text}") from error


def as_image(item: Any) -> Array:
    """One item of a data set as an array (h, w) or (h, w, c). Raises BadImage."""
    if isinstance(item, Mapping):  # as of Hugging Face data sets
        image = next((name for name in item if _is_image(item[name])), next(iter(item), None))
        raise BadImage(f"is a dict with the keys {', '.join(map(str, item))}: give a data set that returns the image, "
                       f"such as ds[{image!r}]")  # fmt: skip
    array = _array(item)
    if _is_tensor(_first(item)) and array.ndim == 3:
        if array.shape[2] <= 4 < min(array.shape[:2]):
            raise BadImage(f"is a tensor of shape {array.shape}, channels last: give it with .permute(2, 0, 1), or as "
                           "a NumPy array")  # fmt: skip
        array = np.ascontiguousarray(array.transpose(1, 2, 0))
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or not array.size:
        raise BadImage(f"is no image: shape {array.shape}, type {array.dtype}")
    return array


def many_images(source: Any) -> Array | Sequence[Array] | None:
    """Images in memory or behind a Dataset, as ``arrays.from_memory`` takes them; None where ``source`` names files."""
    if isinstance(source, np.ndarray):
        return source
    if _is_tensor(source):
        array = _array(source)
        if array.ndim == 4 and array.shape[3] <= 4 < min(array.shape[1:3]):
            raise UserError(f"the tensor has shape {array.shape}, channels last: give it with .permute(0, 3, 1, 2), or "
                            "as a NumPy array")  # fmt: skip
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array
    if isinstance(source, list | tuple):
        first = source[0] if len(source) else None
        if not (isinstance(first, np.ndarray) or _is_tensor(first)):  # pictures, (image, label), or paths
            return Items(source) if _is_image(_first(first)) or isinstance(first, Mapping) else None
        try:
            return [as_image(item) if _is_tensor(item) else item for item in source]
        except BadImage as bad:
            raise UserError(f"the list holds something that {bad.reason}") from None
    return Items(source)


def as_samples(data: Any) -> Array:
    """(n, …) float32, all finite. Raises UserError naming the first sample that does not fit."""
    if isinstance(data, np.ndarray) or _is_tensor(data):
        stacked = _array(data)
    else:
        Items(data)  # refuses what has no length
        rows = [_array(data[i]) for i in range(len(data))]
        odd = next((i for i, row in enumerate(rows) if row.shape != rows[0].shape), None)
        if odd is not None:
            raise UserError(f"sample {odd} has the shape {rows[odd].shape}, the first {rows[0].shape}; cut them to one")
        stacked = np.stack(rows) if rows else np.empty((0,))
    if stacked.dtype.kind not in "buif" or stacked.ndim < 2 or not stacked.size:
        raise UserError(f"samples have shape {stacked.shape} and type {stacked.dtype}, not (samples, …) of numbers")
    made = np.ascontiguousarray(stacked, dtype=np.float32)
    if not np.isfinite(made).all():
        bad = int(np.flatnonzero(~np.isfinite(made.reshape(len(made), -1)).all(1))[0])
        raise UserError(f"sample {bad} holds NaN or infinity: fill or drop such samples first")
    return made


def _array(item: Any) -> Array:
    """The numbers of an item: of a tuple, its first; a tensor without its graph; a picture as its pixels."""
    item = _first(item)
    if _is_tensor(item):
        item = item.detach().cpu()
        return np.asarray(item.float() if str(item.dtype) == "torch.bfloat16" else item)  # NumPy does not have it
    if getattr(item, "mode", None) in ("1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"):  # Pillow's, not yet grey or RGB
        item = item.convert("RGB")
    return np.asarray(item)


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, list | tuple) and len(item) else item


def _is_image(item: Any) -> bool:
    return isinstance(item, np.ndarray | Image) or _is_tensor(item)


def _is_tensor(item: Any) -> bool:
    return hasattr(item, "detach") and hasattr(item, "cpu")  # so that looking at files needs no torch
