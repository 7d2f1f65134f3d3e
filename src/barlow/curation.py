"""What features say about a pile of images: near-duplicates, outliers, and which to label first.

Plain arrays in and out. Copies are told by whitened features, outliers by these and by what lies before them in the
encoder, clusters by centred features at unit length: measured in docs/log.md, "Curation" and "Outliers at every depth".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from barlow.progress import progress

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

NEIGHBOURS = 20
BLOCK = 1024
CLOSE = 0.35  # share of the usual distance to the 20th neighbour, below which two images are near-duplicates
FAR = 3.0  # deviations further out than is usual, from which on an image is called an outlier
FINE = 15  # directions at least in which copies are told: in one or two of them chance neighbours lie close
ALIKE = 0.01  # of the largest distances to the last neighbour: below that, all neighbours are copies
ROWS = 10  # images for each direction that is whitened: with fewer, every image lies equally far from the mean


@dataclass(frozen=True)
class Curated:
    """One number an image.

    ``group``: number of its group of near-duplicates, from 1 on; 0 for an image that is alone. ``outlier``: how many
    deviations it lies further out than is usual; from ``FAR`` on it is an outlier. ``pick``: 1
    for the first image to label, 2 for the next …; 0 for the others.
    """

    group: Ints
    outlier: Floats
    pick: Ints


def curate_features(
    features: NDArray[np.floating], picks: int, seed: int = 0, before: Sequence[NDArray[np.floating]] = ()
) -> Curated:
    """Judges (n, d) features of n ≥ 2 images; ``picks`` images at most are chosen to be labelled first.

    ``before``: what other places in the encoder say of the same images, (n, d') each, for the outliers.
    """
    white = whitened(features)
    fine = whitened(features, FINE) if len(white) < ROWS * FINE else white
    group = near_duplicates(*nearest(fine, min(NEIGHBOURS, len(fine) - 1)))
    outlier = outliers(white, [whitened(z) for z in before], one_of_each(group))
    return Curated(group, outlier, typical(unit(features), group, outlier, picks, seed))


def whitened(features: NDArray[np.floating], least: int = 1) -> Floats:
    """Centred, along the leading principal directions, each of variance 1: lengths are Mahalanobis distances.

    One direction for every ``ROWS`` images, and at ``least`` so many, where half as many as images are that many.
    """
    z = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    values, directions = np.linalg.eigh(z.T @ z / len(z))
    kept = np.flatnonzero(values > 1e-6 * max(values[-1], 1e-30))[-max(1, len(z) // ROWS, min(least, len(z) // 2)) :]
    return np.asarray(z @ directions[:, kept] / np.sqrt(values[kept]), np.float32)


def unit(features: NDArray[np.floating]) -> Floats:
    """Centred, at unit length; a row of nothing but the mean stays 0."""
    z = features.astype(np.float32) - features.mean(axis=0, dtype=np.float64).astype(np.float32)
    length = np.linalg.norm(z, axis=1, keepdims=True)
    made: Floats = z / np.maximum(length, 1e-12)
    return made


def nearest(z: Floats, k: int) -> tuple[Ints, Floats]:
    """(n, k) numbers of the nearest other rows and their distances, nearest first; block by block, n²d operations."""
    near, distance = np.empty((len(z), k), np.int64), np.empty((len(z), k), np.float32)
    square = np.square(z).sum(axis=1)
    starts = range(0, len(z), BLOCK)
    for at in progress(starts, "comparing features, block by block", len(starts)):
        part = z[at : at + BLOCK]
        far, twice = square[at : at + BLOCK, None] + square, part @ z.T
        twice *= 2
        far -= twice
        del twice
        far[np.arange(len(part)), at + np.arange(len(part))] = np.inf
        # row by row: the numbers of a whole block would take twice its memory
        chosen = np.stack([np.argpartition(row, k - 1)[:k] for row in far])
        exact = np.linalg.norm(z[chosen] - part[:, None], axis=2)  # the squares above cancel between copies
        order = np.lexsort((chosen, exact), axis=1)  # ties by number: the same answer everywhere
        near[at : at + BLOCK] = np.take_along_axis(chosen, order, 1)
        distance[at : at + BLOCK] = np.take_along_axis(exact, order, 1)
    return near, distance


def near_duplicates(near: Ints, distance: Floats) -> Ints:
    """Groups of images joined by pairs closer than ``CLOSE`` times the usual distance to the last of the neighbours.

    As SemDeDup (Abbas et al. 2023, arXiv:2303.09540) by closeness of features, with a threshold that the encoder and
    the pile set themselves. Images with more copies than neighbours are looked at do not move it, however many.
    """
    last = distance[:, -1]
    others = last[last > ALIKE * float(np.quantile(last, 0.99))]
    pair = distance <= max(CLOSE * float(np.median(others if len(others) else last)), 1e-6)
    i, column = np.nonzero(pair)
    n = len(near)
    graph = coo_matrix((np.ones(len(i)), (i, near[i, column])), shape=(n, n))
    _, member = connected_components(graph, directed=False)
    sizes = np.bincount(member)
    named: dict[int, int] = {}
    return np.array([named.setdefault(int(m), len(named) + 1) if sizes[m] > 1 else 0 for m in member], np.int64)


def one_of_each(group: Ints) -> NDArray[np.bool_]:
    """Which images are alone, or the first of their group."""
    numbers, first = np.unique(group, return_index=True)
    chosen = np.asarray(group == 0)
    chosen[first[numbers > 0]] = True
    return chosen


def outliers(white: Floats, before: Sequence[Floats], counted: NDArray[np.bool_]) -> Floats:
    """How far out an image lies, by its Mahalanobis distance to the mean in the features or at all depths together.

    At all depths: each one's distances in robust deviations, added up, and that sum in deviations again (Lee et al.,
    NeurIPS 2018, arXiv:1807.03888, add up the depths too, with weights learned from known outliers). The features
    alone do not tell: an encoder that has learned well finds something that it knows in images of nothing, and its
    first layers do not; odd images of the usual kind stand out in the features. The larger of the two counts
    (docs/log.md, "Outliers at every depth"). ``counted``: the images that say what is usual, one of each group of
    copies.
    """
    features, *others = (deviations(np.linalg.norm(z, axis=1), counted) for z in (white, *before))
    made: Floats = np.maximum(features, deviations(np.sum([features, *others], axis=0), counted))
    return made


def deviations(values: Floats, counted: NDArray[np.bool_]) -> Floats:
    """How far from the median, in units of a robust standard deviation (1.4826 times the median absolute one) of those
    that are ``counted``."""
    some = values[counted]
    usual = np.median(some)
    spread = 1.4826 * np.median(np.abs(some - usual))
    made: Floats = ((values - usual) / max(float(spread), 1e-6)).astype(np.float32)
    return made


def typical(z: Floats, group: Ints, outlier: Floats, picks: int, seed: int) -> Ints:
    """The typical image of each of ``picks`` clusters, that of the largest cluster first: 1, 2, …; 0 for all others.

    TypiClust (Hacohen, Dekel and Weinshall, ICML 2022, arXiv:2202.02794), made for the first labels of all: k-means,
    then in each cluster the image that is closest to its neighbours there. Outliers and all but the first of a group
    of near-duplicates are not asked about.
    """
    from sklearn.cluster import KMeans

    asked = np.flatnonzero(one_of_each(group) & (outlier < FAR))
    pick = np.zeros(len(z), np.int64)
    picks = min(picks, len(np.unique(z[asked], axis=0)))
    if picks == 0:
        return pick
    member = KMeans(picks, random_state=seed, n_init=1).fit_predict(z[asked])
    clusters = sorted((asked[member == c] for c in np.unique(member)), key=lambda rows: (-len(rows), rows[0]))
    for place, rows in enumerate(clusters, 1):
        pick[rows[_densest(z[rows])]] = place
    return pick


def _densest(z: Floats) -> int:
    """The row with the smallest mean distance to its nearest neighbours; the first one of a single row or two."""
    if len(z) < 3:
        return 0
    _, distance = nearest(z, min(NEIGHBOURS, len(z) - 1))
    return int(distance.mean(axis=1).argmin())
