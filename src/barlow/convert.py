"""One data set, one kind of array: how many channels, which numbers, and how each image gets there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from barlow.decode import has_alpha, mode_kind
from barlow.guard import BadImage

Array = np.ndarray[Any, np.dtype[Any]]
FULL = {"uint8": 255, "uint16": 65535, "float32": 1}  # the value that stands for 1
WIDTH = ("uint8", "uint16", "float32")
LUMA = np.array([19595, 38470, 7471]) / 65536  # Pillow's weights (ITU-R 601-2)
PERCENTILES = (0.1, 99.9)
WHOLE = (0.0, 1.0)  # the range of values that leaves images as they are
NO_DATA, ENORMOUS = (-9999.0, -99999.0, -32768.0, -32767.0), 1e15  # what maps hold where nothing was measured
MIDDLE, GAP = (1.0, 99.0), 0.25  # percentiles of what was measured; of these apart lies what stands for "no data"
FAR = 4  # times what is used of 16 bits: how far faults of a detector reach that do not count
NARROW, MARGIN = 0.25, 0.1  # of 16 bits: the part below which it is stretched, and what is added to it at both ends


def choose(modes: dict[str, int]) -> tuple[int, str]:
    """(channels, dtype) of a data set whose files have these modes (``Header.mode`` → how many).

    Channels: 1 where all are grey, 3 where grey and colour meet, else what most images have. Numbers: what most images
    have, the wider where two are equally many.
    """
    channels: Counter[int] = Counter()
    numbers: Counter[str] = Counter()
    for mode, count in modes.items():
        c, name = mode_kind(mode)
        channels[c] += count
        numbers[name] += count
    plain = channels.keys() <= {1, 3}
    most = max(channels, key=lambda c: (channels[c], c))
    return max(channels) if plain else most, max(numbers, key=lambda name: (numbers[name], WIDTH.index(name)))


def misfit(mode: str, channels: int) -> str:
    """Why an image of this mode cannot have that many channels; "" where it can, with its transparency or without."""
    own = mode_kind(mode)[0]
    fits = own == channels or {own, channels} == {1, 3} or (has_alpha(mode) and channels == own + 1)
    return "" if fits else f"has {own} channels where the data set has {channels}"


def convert(array: Array, channels: int, dtype: str, value_range: tuple[float, float] = (0.0, 1.0)) -> Array:
    """(h, w, c) uint8, uint16 or float32 → (h, w, channels) of ``dtype``.

    float32 in is scaled so that ``value_range`` becomes 0–1, and clipped; so is uint16, where that is a part of what 16
    bits can hold (65535 being 1). Between the kinds, 1.0, 65535 and 255 are the same white. Grey → three equal
    channels; colour → luma. Raises BadImage for other numbers of channels.
    """
    own = array.shape[2]
    if own != channels and {own, channels} != {1, 3}:
        raise BadImage(f"has {own} channels where the data set has {channels}")
    low, high = value_range
    stretched = (low, high) != WHOLE
    if array.dtype.name == "uint16" and stretched and 0 <= low < high <= 1:
        array = array.astype(np.float32) * np.float32(1 / FULL["uint16"])
    if array.dtype.name == "float32":
        if stretched:
            array = (array - np.float32(low)) * np.float32(1 / (high - low))
        array = np.clip(array, 0, 1)
    if array.dtype.name != dtype:
        scaled = array.astype(np.float32) * np.float32(FULL[dtype] / FULL[array.dtype.name])
        array = scaled if dtype == "float32" else np.rint(scaled).astype(dtype)
    if own < channels:
        return np.repeat(array, channels, axis=2)
    return array if own == channels else _luma(array)


def beyond(array: Array, value_range: tuple[float, float]) -> float:
    """The share of the numbers of an image, as it was decoded, that lie beyond the range and become an end of it."""
    if array.dtype.name not in ("uint16", "float32") or (array.dtype.name == "uint16" and value_range == WHOLE):
        return 0.0
    low, high = (value * FULL[array.dtype.name] for value in value_range)
    return float(((array < low) | (array > high)).mean())


def _luma(array: Array) -> Array:
    if array.dtype == np.uint8:
        return np.array(Image.fromarray(array).convert("L"))[:, :, None]
    grey = array.astype(np.float64) @ LUMA
    return (grey if array.dtype == np.float32 else np.rint(grey)).astype(array.dtype)[:, :, None]


def find_range(images: Iterable[Array]) -> tuple[float, float]:
    """The values that become 0 and 1, from some images of a data set: of float32 where there are some, else of uint16,
    as shares of what 16 bits can hold. (0, 1) leaves the images as they are.

    float32: (0, 1) where all lie between, else the 0.1 and 99.9 percentiles of what was measured: numbers for "no data"
    are not. uint16: (0, 1) where more than a quarter of the full range is used, else all that is used, with a margin:
    of cameras with 12 bits, or of detectors with an offset, where brightness and contrast drawn for the full range
    would drown what the images show (docs/log.md, "16 bits of which few are used"). Single hot or dead pixels, and a
    border of 0 or 65535, are not what is used, where they lie far from the rest (docs/log.md, "Hot pixels").
    """
    looked = list(images)
    floats = [image for image in looked if image.dtype == np.float32]
    deep = [image for image in looked if image.dtype == np.uint16]
    return _float_range(_some_values(floats)) if floats else _band(deep) if deep else WHOLE


def _float_range(values: Array) -> tuple[float, float]:
    values = _measured(values, NO_DATA, GAP, MIDDLE)
    if values.min() >= 0 and values.max() <= 1:
        return WHOLE
    low, high = (float(np.float32(v)) for v in np.percentile(values, PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)


def _band(images: Sequence[Array]) -> tuple[float, float]:
    full = FULL["uint16"]
    values, clean = _some_values(images), _measured(_some_values(images, specks=False), (0, full))
    if int(np.ptp(values)) > FAR * int(np.ptp(clean)) > 0:
        values = clean
    low, high = int(values.min()) / full, int(values.max()) / full
    margin = MARGIN * (high - low)
    return (max(0.0, low - margin), min(1.0, high + margin)) if 0 < high - low < NARROW else WHOLE


def _measured(
    values: Array, no_data: Sequence[float], far: float = 1.0, middle: tuple[float, float] = (0.0, 100.0)
) -> Array:
    """Without a number that stands for "no data": the least or the greatest, when it is one of those that are used for
    that and lies ``far`` times as far from the others as these, between the percentiles ``middle``, from each other."""
    for end, sign in ((np.min, 1.0), (np.max, -1.0)):
        last = float(end(values))
        if last not in no_data and abs(last) < ENORMOUS:
            continue
        rest = values[values != last].astype(np.float64)
        if len(rest) and sign * (float(end(rest)) - last) > far * float(np.ptp(np.percentile(rest, middle))):
            values = rest
    return values


def _some_values(images: Sequence[Array], specks: bool = True) -> Array:
    """Numbers of images spread evenly over each: up to about 512 × 512 of one."""
    looked = []
    for image in images:
        rows, columns = np.ix_(*(np.arange(0, n, max(1, n // 256)) for n in image.shape[:2]))
        looked.append((image[rows, columns] if specks else _without_specks(image, rows, columns)).ravel())
    return np.concatenate(looked)


def _without_specks(image: Array, rows: Array, columns: Array) -> Array:
    """The pixels at these rows and columns, none outside what two of its eight neighbours reach: what optics drew is
    never one pixel wide and high, what a fault of the detector drew mostly is."""
    (h, w), steps = image.shape[:2], [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    around = np.sort([image[_mirrored(rows + y, h), _mirrored(columns + x, w)] for y, x in steps], axis=0)
    return np.clip(image[rows, columns], around[1], around[-2])


def _mirrored(at: Array, length: int) -> Array:
    """Places one outside a side, as the place one inside of it."""
    return (length - 1 - abs(length - 1 - abs(at))).clip(0)


def range_in_words(dtype: str, value_range: Sequence[float]) -> str:
    """Which values of the files become 0 and 1, where they are others than those of the kind of numbers; else ""."""
    low, high = (value * (FULL[dtype] if dtype == "uint16" else 1) for value in value_range)
    return "" if tuple(value_range) == WHOLE else f"values from {low:,.6g} to {high:,.6g} become the full range"
