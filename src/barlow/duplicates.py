"""Images that are there twice: thumbnails, and which of them are nearly equal. Plain arrays in and out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

SIDE = 16  # of a thumbnail
ALIKE = 0.995  # correlation: copies saved as JPEG of quality 15, halved or brightened by a fifth lie above it
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2
FLAT = 1.0  # standard deviation (of 255) below which a thumbnail shows nothing that could be compared
BLOCK = 2048


def thumbnail(image: Array) -> Array:
    """(h, w, c) of any kind → (SIDE, SIDE) floats: luma of three channels (which JPEG keeps best), the mean of others,
    averaged over the cells of a grid."""
    grey = image.astype(np.float32) @ LUMA if image.shape[2] == 3 else image.mean(2, dtype=np.float32)
    return _averaged(_averaged(grey).T).T


def _averaged(rows: Array) -> Array:
    """(h, w) → (SIDE, w): the mean of the rows over SIDE equal bands, whose edges may lie inside a row."""
    height = len(rows)
    edges = np.arange(SIDE + 1) * (height / SIDE)
    whole = np.minimum(edges.astype(np.int64), height - 1)
    above = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, 0, dtype=np.float64)])
    area: Array = above[whole] + (edges - whole)[:, None] * rows[whole]
    return np.diff(area, axis=0) / (height / SIDE)


def normalised(thumbnails: Array) -> Floats:
    """(n, SIDE, SIDE) → (n, SIDE²) float32 of mean 0 and length 1, so that a product is a correlation; flat ones 0.

    Brightness and contrast fall away: a copy that was brightened is still a copy.
    """
    rows = thumbnails.reshape(len(thumbnails), SIDE * SIDE).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    flat = length < FLAT * SIDE
    unit: Floats = np.where(flat, 0, rows / np.where(flat, 1, length)).astype(np.float32)
    return unit


def near_pairs(a: Floats, b: Floats | None = None) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of rows of ``a`` and ``b`` that correlate to ALIKE or more; without ``b`` pairs i < j within ``a``.

    Every pair is compared, block by block: 50,000 rows take some seconds and 16 MB.
    """
    other = a if b is None else b
    for i in range(0, len(a), BLOCK):
        for j in range(0 if b is not None else i, len(other), BLOCK):
            rows, columns = np.nonzero(a[i : i + BLOCK] @ other[j : j + BLOCK].T >= ALIKE)
            for row, column in zip((rows + i).tolist(), (columns + j).tolist(), strict=True):
                if b is not None or row < column:
                    yield row, column


def groups(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected groups of the pairs, each sorted, in the order of their first members."""
    leader: dict[int, int] = {}

    def find(i: int) -> int:
        while leader.setdefault(i, i) != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for i, j in pairs:
        first, second = sorted((find(i), find(j)))
        leader[second] = first
    members: dict[int, list[int]] = defaultdict(list)
    for i in sorted(leader):
        members[find(i)].append(i)
    return [members[k] for k in sorted(members)]


def same(hashes: list[bytes]) -> list[list[int]]:
    """Groups of two or more equal hashes; empty hashes are equal to nothing."""
    where: dict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(hashes):
        if digest:
            where[digest].append(i)
    return [found for found in where.values() if len(found) > 1]
