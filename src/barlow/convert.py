"""One data set, one kind of array: how many channels, which numbers, and how each image gets there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from barlow.decode import mode_kind
from barlow.guard import BadImage

Array = np.ndarray[Any, np.dtype[Any]]
FULL = {"uint8": 255, "uint16": 65535, "float32": 1}  # the value that stands for 1
WIDTH = ("uint8", "uint16", "float32")
LUMA = np.array([19595, 38470, 7471]) / 65536  # Pillow's weights (ITU-R 601-2)
PERCENTILES = (0.1, 99.9)


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
    """Why an image of this mode cannot have that many channels; "" where it can."""
    own = mode_kind(mode)[0]
    fits = own == channels or {own, channels} == {1, 3}
    return "" if fits else f"has {own} channels where the data set has {channels}"


def convert(array: Array, channels: int, dtype: str, value_range: tuple[float, float] = (0.0, 1.0)) -> Array:
    """(h, w, c) uint8, uint16 or float32 → (h, w, channels) of ``dtype``.

    float32 in is scaled so that ``value_range`` becomes 0–1, and clipped. Between the kinds, 1.0, 65535 and 255 are the
    same white. Grey → three equal channels; colour → luma. Raises BadImage for other numbers of channels.
    """
    own = array.shape[2]
    if own != channels and {own, channels} != {1, 3}:
        raise BadImage(f"has {own} channels where the data set has {channels}")
    if array.dtype.name == "float32":
        low, high = value_range
        if (low, high) != (0.0, 1.0):
            array = (array - np.float32(low)) * np.float32(1 / (high - low))
        array = np.clip(array, 0, 1)
    if array.dtype.name != dtype:
        scaled = array.astype(np.float32) * np.float32(FULL[dtype] / FULL[array.dtype.name])
        array = scaled if dtype == "float32" else np.rint(scaled).astype(dtype)
    if own < channels:
        return np.repeat(array, channels, axis=2)
    return array if own == channels else _luma(array)


def _luma(array: Array) -> Array:
    if array.dtype == np.uint8:
        return np.array(Image.fromarray(array).convert("L"))[:, :, None]
    grey = array.astype(np.float64) @ LUMA
    return (grey if array.dtype == np.float32 else np.rint(grey)).astype(array.dtype)[:, :, None]


def find_range(images: Iterable[Array]) -> tuple[float, float]:
    """The values of float images that become 0 and 1: (0, 1) where all lie between, else the 0.1 and 99.9 percentiles
    (so that one hot pixel does not darken a data set)."""
    looked = [image[:: max(1, image.shape[0] // 256), :: max(1, image.shape[1] // 256)].ravel() for image in images]
    if not looked:
        return 0.0, 1.0
    values = np.concatenate(looked)
    if values.min() >= 0 and values.max() <= 1:
        return 0.0, 1.0
    low, high = (float(np.float32(v)) for v in np.percentile(values, PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)
