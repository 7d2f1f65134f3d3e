"""Images that are there twice: thumbnails, and which of them are nearly equal. Plain arrays in and out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from barlow.progress import progress

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

SIDE = 16  # of a thumbnail
ALIKE = 0.995  # correlation: copies saved as JPEG of quality 15, halved or brightened by a fifth lie above it
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2
FLAT = 1.0  # standard deviation (of 255) below which a thumbnail shows nothing that could be compared
BLOCK = 1024  # rows that are compared at a time
SOME = 1 << 18  # numbers of an image that are computed with at a time: in cache, and no copy of a large image


def thumbnail(image: Array) -> Array:
    """(h, w, c) of any kind → (SIDE, SIDE) floats: luma of three channels (which JPEG keeps best), the mean of others,
    averaged over the cells of a grid."""
    step = max(1, SOME // (image.shape[1] * image.shape[2]))
    narrow = [_averaged(_grey(image[at : at + step]).T) for at in range(0, len(image), step)]  # (SIDE, step) each
    return _averaged(np.concatenate(narrow, axis=1).T)


def _grey(image: Array) -> Floats:
    grey: Floats = image.astype(np.float32) @ LUMA if image.shape[2] == 3 else image.mean(2, dtype=np.float32)
    return grey


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


def _blocks(a: Floats, b: Floats | None = None) -> Iterator[tuple[int, int, Array]]:
    """(i, j, bool array), block by block, with progress: which rows of ``a`` from i on correlate to ALIKE or more with
    which of ``b`` from j on; without ``b`` of ``a`` itself, the blocks with j >= i."""
    other = a if b is None else b
    starts = [(i, j) for i in range(0, len(a), BLOCK) for j in range(i if b is None else 0, len(other), BLOCK)]
    for i, j in progress(starts, "comparing images, block by block", len(starts)):
        yield i, j, a[i : i + BLOCK] @ other[j : j + BLOCK].T >= ALIKE


def near_groups(a: Floats) -> list[list[int]]:
    """The groups of rows that are joined by pairs that correlate to ALIKE or more, each sorted, in the order of their
    first members.

    Every pair is compared: 50,000 rows take about half a minute. The memory is that of a block, 60 MB where all of its
    rows are alike.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(a)
    label = np.arange(n)  # rows that are known to be joined have the same
    for i, j, alike in _blocks(a):
        row, column = np.nonzero(alike)
        row, column = label[i + row], label[j + column]
        new = row != column
        if new.any():
            graph = coo_matrix((np.ones(int(new.sum()), bool), (row[new], column[new])), shape=(n, n))
            label = connected_components(graph, directed=False)[1][label]
    order = np.argsort(label, kind="stable")
    found = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    return sorted(group.tolist() for group in found if len(group) > 1)


def near_partners(a: Floats, b: Floats) -> dict[int, int]:
    """For the rows of ``b`` that correlate to ALIKE or more with rows of ``a``: the last one of these."""
    partner = np.full(len(b), -1)
    for i, j, alike in _blocks(a, b):
        last = i + len(alike) - 1 - np.argmax(alike[::-1], axis=0)
        part = partner[j : j + BLOCK]
        np.copyto(part, last, where=alike.any(0))
    return {int(j): int(partner[j]) for j in np.flatnonzero(partner >= 0)}


def same(hashes: list[bytes]) -> list[list[int]]:
    """Groups of two or more equal hashes; empty hashes are equal to nothing."""
    where: dict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(hashes):
        if digest:
            where[digest].append(i)
    return [found for found in where.values() if len(found) > 1]
