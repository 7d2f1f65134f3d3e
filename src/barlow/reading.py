"""The usable images of a source, read one by one, each converted to the kind of array that the data set has."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import pyarrow as pa

from barlow import draws, sources
from barlow.arrays import Held
from barlow.convert import convert
from barlow.decode import decode
from barlow.draws import IntArray
from barlow.errors import DataError
from barlow.guard import BadImage
from barlow.index import OK, read_row
from barlow.sources import shown

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

TRIES = 100  # replacements tried for one bad image
SCALES = (1, 2, 4, 8)  # at which a JPEG can be decoded, as parts of a side
JPEG_ENDINGS = (b".jpg", b".jpeg", b".jpe")


class Bad(NamedTuple):
    """An image that could not be used: its number, its key, the reason; ``partner``: it is the second of a pair."""

    image: int
    key: str
    reason: str
    partner: bool = False


class BadPartner(BadImage):
    """The second image of a pair cannot be used."""


@final
@dataclass(frozen=True, eq=False)
class RawPixels:
    """A prepared cache: ``file`` holds the pixels of image ``i`` from ``offsets[i]`` on; ``bad``: number → reason."""

    file: bytes
    offsets: IntArray
    bad: dict[int, str]

    def read(self, i: int, size: IntArray, channels: int, dtype: str) -> Array:
        """Image ``i`` as it lies there, a fresh (h, w, c) array; raises BadImage."""
        if i in self.bad:
            raise BadImage(self.bad[i])
        array = np.empty((*size.tolist(), channels), dtype)
        if os.preadv(_handle(self.file), [array.data], int(self.offsets[i])) != array.nbytes:
            raise BadImage("is cut off in the prepared cache")
        return array


@functools.cache
def _handle(file: bytes) -> int:
    """The open file, one a process: reading at a place moves nothing, so that forked workers may share it."""
    return os.open(file, os.O_RDONLY)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """The usable images of a source. Cheap to hand to worker processes: no file is held open, no Python list is long.

    ``channels``: of every array that ``read`` returns. ``dtype``: "uint8" (0–255), "uint16" (0–65535) or "float32"
    (0–1), scaled by the ``value_range`` of the data set and clipped (``barlow.convert``). ``sizes``: int64 (n, 2),
    height and width. ``array``: all images as one (n, h, w, c) array of that dtype where the source is one in memory,
    else None. ``labels``: int64 (n,) where the source carries them. ``rows``, ``bad``: the index of the usable and of
    the other images. ``passed_over``: files of the folder that are no images, by ending. ``beyond``: of ``array``, the
    share of each image that lay beyond the range. ``second``: where the source is a table of pairs, the other image of
    each (as many, with channels of their own).
    """

    kind: str
    root: bytes
    rows: pa.Table
    bad: pa.Table
    sizes: IntArray
    channels: int
    dtype: str
    value_range: tuple[float, float] = (0.0, 1.0)
    labels: IntArray | None = None
    array: Array | None = None
    held: Held | None = None
    raw: RawPixels | None = None
    passed_over: Counter[str] | None = None
    beyond: Array | None = None
    second: Images | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, where these are samples and no images (``barlow.samples.Samples``); else ()."""
        return self.array.shape[1:] if self.kind == "samples" and self.array is not None else ()

    def __repr__(self) -> str:
        return f"Images({self.kind}, {len(self):,} of {self.channels} channels, {self.dtype})"

    def key(self, i: int) -> str:
        """The name of image ``i``: unique, printable; for files the path below the source."""
        return shown(self.rows["path"][int(i)].as_py())

    def read(self, i: int, at_least: tuple[int, int] | None = None) -> Array:
        """Image ``i`` as (h, w, c) of ``dtype``; raises BadImage. ``at_least`` (height, width): a JPEG may come back
        at 1/2, 1/4 or 1/8 of its size, never smaller than this on a side."""
        i = int(i)
        if self.array is not None:
            return np.array(self.array[i])
        if self.raw is not None:
            return self.raw.read(i, self.sizes[i], self.channels, self.dtype)
        return convert(self.decoded(i, at_least), self.channels, self.dtype, self.value_range)

    def decoded(self, i: int, at_least: tuple[int, int] | None = None, fill: bool = True) -> Array:
        """Image ``i`` of a source of files, or of arrays that are ``held``, before it is converted; raises BadImage.
        ``fill`` as in ``decode``."""
        if self.held is not None:
            return self.held.read(i, fill)
        if (status := self.rows["status"][i].as_py()) != OK:
            raise BadImage(status)  # known since it was prepared
        try:
            alpha = self.channels in (2, 4)  # as many as colours and transparency are
            array = decode(read_row(self.rows, self.root, i), at_least, fill, alpha)
        except BadImage:
            sources.gone(self.root)
            raise
        height, width = self.sizes[i].tolist()
        scales = SCALES if at_least is not None else (1,)
        if array.shape[:2] not in [(-(-height // k), -(-width // k)) for k in scales]:
            raise BadImage(f"is {array.shape[0]}×{array.shape[1]} now and was {height}×{width} when it was indexed")
        return array

    def read_or_replace(
        self, i: int, at_least: tuple[int, int] | None = None, among: IntArray | None = None
    ) -> tuple[Array, int, Bad | None]:
        """(array, number of the image that was read, what was wrong with image ``i`` or None).

        Which image stands in for a bad one depends on ``i`` alone, so a run with bad files is the same run each time.
        It is one of ``among`` (sorted numbers), where they are given: held-out images must not stand in.
        """
        return self._or_replace(i, lambda k: self.read(k, at_least), among)

    def read_pair_or_replace(
        self, i: int, at_least: Sequence[tuple[int, int] | None] = (None, None), among: IntArray | None = None
    ) -> tuple[tuple[Array, Array], int, Bad | None]:
        """As ``read_or_replace``, for pairs: (image, its partner); where one of them is bad, both are replaced."""
        assert self.second is not None
        second = self.second

        def read(k: int) -> tuple[Array, Array]:
            first = self.read(k, at_least[0])
            try:
                return first, second.read(k, at_least[1])
            except BadImage as error:
                raise BadPartner(error.reason) from None

        return self._or_replace(i, read, among)

    def reducible(self, i: int) -> bool:
        """Whether image ``i`` may be a JPEG that still has to be decoded, so that reading it smaller saves time."""
        if self.array is not None or self.raw is not None or self.held is not None:
            return False
        ending = os.path.splitext(self.rows["path"][int(i)].as_py())[1].lower()  # noqa: PTH122 - bytes
        return ending in JPEG_ENDINGS or ending not in sources.ENDINGS

    def _or_replace(self, i: int, read: Callable[[int], T], among: IntArray | None) -> tuple[T, int, Bad | None]:
        try:
            return read(int(i)), int(i), None
        except BadImage as error:
            of = self.second if isinstance(error, BadPartner) and self.second else self
            bad = Bad(int(i), of.key(i), error.reason, of is not self)
        tried = set[int]()
        for place in replacements(int(i), len(self) if among is None else len(among)):
            other = place if among is None else int(among[place])
            with contextlib.suppress(BadImage):
                return read(other), other, bad
            tried.add(other)
        count = len(tried - {int(i)})
        raise DataError(f"{bad.key} cannot be read ({bad.reason}), nor can {count} more that were tried in its place")


def replacements(i: int, length: int) -> list[int]:
    """The places, of so many, of the images to try for image ``i``, in this order: a function of these two alone."""
    places = draws.uniforms(0, 0, np.array([i]), draws.VIEWS - 1, TRIES)[0]
    return [int(k) for k in places * length]
