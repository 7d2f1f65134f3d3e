"""Label-free measures of who lies beside whom: clusters among the images, and the two views of each image.

Plain numpy, on (n, d) arrays or Samples, like ``barlow.measures``; pairwise, so memory and time grow with n².
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from barlow.errors import UserError
from barlow.measures import Floats, Sample, entropy_rank


def self_cluster(z: ArrayLike | Sample) -> float:
    """(d ‖Z̃Z̃ᵀ‖² − n(d + n − 1)) / ((d − 1)(n − 1) n), Z̃ the rows at unit length: 0 for rows spread evenly over the
    sphere, 1 when all lie on one line; slightly below 0 for orthogonal rows (Tsitsulin et al. 2023). 1 when d = 1."""
    s = Sample.of(z)
    if s.d == 1:
        return 1.0
    square = float(np.square(s.cosines).sum(dtype=np.float64))
    return float((s.d * square - s.n * (s.d + s.n - 1)) / ((s.d - 1) * (s.n - 1) * s.n))


def duplicate_neighbour_rate(z: ArrayLike | Sample) -> float:
    """Share of images whose nearest other image is closer than 1 % of the median distance of two images: 0 … 1. Above
    0 either the images hold duplicates or the encoder maps different images to one point."""
    s = Sample.of(z)
    typical = float(np.median(s.distances[np.triu_indices(s.n, 1)]))
    # rows equal up to rounding count as one point, also where everything is one point
    rounding = 1e-6 * float(s.lengths.max())
    return float((s.distances.min(axis=1) <= max(0.01 * typical, rounding)).mean())


def occupancy(z: ArrayLike | Sample, seed: int = 0) -> float:
    """Perplexity of the sizes of √n k-means clusters, divided by their number: 1 (equal sizes) down to 1/√n (all images
    in one heap). The k-means runs on the Gram matrix, 10 rounds from k-means++ starts drawn with ``seed``."""
    s = Sample.of(z)
    k = max(int(np.sqrt(s.n)), 1)
    sizes = np.bincount(_k_means(s.gram.astype(np.float64), k, seed), minlength=k)
    return entropy_rank(sizes.astype(np.float64)) / k


def _k_means(gram: Floats, k: int, seed: int) -> NDArray[np.intp]:
    square, draw = np.diag(gram), np.random.default_rng(seed)
    centre = int(draw.integers(len(gram)))
    nearest = square + square[centre] - 2 * gram[centre]
    starts = [centre]
    while len(starts) < k:
        weight = np.cumsum(np.maximum(nearest, 0.0))
        centre = min(int(np.searchsorted(weight, draw.random() * weight[-1], side="right")), len(gram) - 1)
        starts.append(centre)
        nearest = np.minimum(nearest, square + square[centre] - 2 * gram[centre])
    group = np.argmin(square[starts][None, :] - 2 * gram[:, starts], axis=1)
    for _ in range(10):
        member = (group[:, None] == np.arange(k)).astype(np.float64)
        size = member.sum(axis=0)
        member = member[:, size > 0] / size[size > 0]
        product = gram @ member
        moved = np.argmin(np.einsum("nk,nk->k", member, product)[None, :] - 2 * product, axis=1)
        if np.array_equal(moved, group):
            break
        group = moved
    return np.asarray(group, dtype=np.intp)


class Modes(NamedTuple):
    """``groups`` of images with empty space between; ``within`` is the share of the variance inside them (0 … 1). One
    group holds everything where no such cut exists: groups 1, within 1."""

    groups: int
    within: float


def modes(z: ArrayLike | Sample) -> Modes:
    """Cuts the single-linkage tree of the images at its widest gaps (2 … n/4 groups), and keeps the cut with the least
    variance inside the groups for which: the gap is at least 1.5, nine images in ten have company of at least two, and
    the groups are not one heap and a few strays. Continuous data, of whatever rank, has no such cut."""
    s = Sample.of(z)
    most = s.n // 4
    if most < 2 or not np.trace(s.gram) > 0:
        return Modes(1, 1.0)
    lengths, ends = _spanning_tree(s.distances)
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order][: most + 1].astype(np.float64)
    gaps = longest[:most] / np.maximum(longest[1 : most + 1], max(1e-9 * longest[0], 1e-300))
    best = Modes(1, 1.0)
    for cuts in np.argsort(-gaps)[:5] + 1:
        if gaps[cuts - 1] < 1.5 or cuts + 1 > most:
            continue
        group = _groups(s.n, np.delete(ends, order[:cuts], axis=0))
        size = np.bincount(group)
        if size[size >= 3].sum() < 0.9 * s.n or entropy_rank(size.astype(np.float64)) < 1.3:
            continue
        member = (group[:, None] == np.arange(len(size))) / np.sqrt(size)
        between = float(np.einsum("nk,nk->", member, s.gram.astype(np.float64) @ member))
        within = max(1 - between / float(np.trace(s.gram, dtype=np.float64)), 0.0)
        best = min(best, Modes(len(size), within), key=lambda m: m.within)
    return best


def _spanning_tree(distances: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Prim's minimum spanning tree of a full distance matrix: lengths (n − 1,), ends (n − 1, 2)."""
    n = len(distances)
    near, via = distances[0].copy(), np.zeros(n, dtype=np.intp)
    inside = np.zeros(n, dtype=bool)
    inside[0] = True
    near[0] = np.inf
    lengths, ends = np.empty(n - 1), np.empty((n - 1, 2), dtype=np.intp)
    for edge in range(n - 1):
        joined = int(near.argmin())
        lengths[edge], ends[edge] = near[joined], (via[joined], joined)
        inside[joined] = True
        closer = (distances[joined] < near) & ~inside
        near[closer], via[closer] = distances[joined][closer], joined
        near[joined] = np.inf
    return lengths, ends


def _groups(n: int, edges: NDArray[np.intp]) -> NDArray[np.intp]:
    """Number of the connected part each of n nodes belongs to; ``edges`` in the order Prim found them."""
    parent = np.arange(n)
    for child_of, child in edges:  # Prim adds `child` last, so `child_of` carries its final label already
        parent[child] = parent[child_of]
    return np.unique(parent, return_inverse=True)[1].astype(np.intp)


def paired(z_a: ArrayLike | Sample, z_b: ArrayLike | Sample) -> tuple[Sample, Sample]:
    """Both views as Samples. Raises UserError unless row i of both can be the same image in the same dimensions."""
    a, b = Sample.of(z_a), Sample.of(z_b)
    if (a.n, a.d) != (b.n, b.d):
        raise UserError(f"the two views must have one shape; got {(a.n, a.d)} and {(b.n, b.d)}")
    return a, b


def mean_diagonal(z_a: ArrayLike | Sample, z_b: ArrayLike | Sample) -> float:
    """Mean Cᵢᵢ, the correlation of each dimension with itself across the two views: −1 … 1, and 1 is perfect
    invariance; dead dimensions count as 0 (Zbontar et al. 2021, eq. 2, without the eps)."""
    a, b = paired(z_a, z_b)
    both = a.alive & b.alive
    product = np.einsum("nd,nd->d", a.centred, b.centred) / a.n
    scale = np.where(both, a.deviations * b.deviations, 1.0)
    return float(np.where(both, product / scale, 0.0).mean(dtype=np.float64))


def view_gap(z_a: ArrayLike | Sample, z_b: ArrayLike | Sample) -> float:
    """Σ‖a − b‖² over the sum of both views' squared deviations: 0 (the views are the same) … 1 (unrelated) and above.
    0 for two constant arrays that agree."""
    a, b = paired(z_a, z_b)
    ratio = b.scale / a.scale
    shift = a.mean - ratio * b.mean
    apart = float(np.square(a.centred - ratio * b.centred).sum(dtype=np.float64)) + a.n * float(shift @ shift)
    total = a.n * (a.variance + ratio**2 * b.variance)
    return apart / total if total > 0 else (float("inf") if apart > 0 else 0.0)


class Twins(NamedTuple):
    """``found``: share of images whose own view B is, of all views B, the nearest to their view A by cosine: 0 … 1,
    chance 1/n. ``near``: how high the own view stands among all, by the logarithm of its place: 0 by chance, 1 where
    it is always first."""

    found: float
    near: float


def twins(z_a: ArrayLike | Sample, z_b: ArrayLike | Sample) -> Twins:
    """Asks every view for its twin among all views of the other side, by cosine. A tie counts against the twin, so
    vectors that are all the same find nothing.

    ``near`` is 1 − (mean log r) / (mean log k over k = 1 … n), r the place of the own view from nearest (1) to farthest
    (n), asked from A and from B: how much one view tells of which image it is, as a share of all there is to tell.
    Where few twins are found it is far less noisy than their share.
    """
    a, b = paired(z_a, z_b)
    mean_a, mean_b = a.mean.astype(a.centred.dtype), b.mean.astype(b.centred.dtype)
    product = a.centred @ b.centred.T + float(a.mean @ b.mean)
    product += (a.centred @ mean_b)[:, None] + (b.centred @ mean_a)[None, :]
    cosines = product / a.lengths[:, None] / b.lengths[None, :]
    own = np.diag(cosines).copy()
    places = np.concatenate([(cosines >= own[:, None]).sum(axis=1), (cosines >= own[None, :]).sum(axis=0)])
    every = np.log(np.arange(1, a.n + 1))
    return Twins(float((places[: a.n] == 1).mean()), float(1 - np.log(places).mean() / every.mean()))


def twins_found(z_a: ArrayLike | Sample, z_b: ArrayLike | Sample) -> float:
    """Share of images whose own view B is the nearest to their view A: 0 … 1, chance 1/n (``twins``)."""
    return twins(z_a, z_b).found


def twins_near(z_a: ArrayLike | Sample, z_b: ArrayLike | Sample) -> float:
    """How high the own view stands among all views of the other side: 0 by chance, 1 always first (``twins``)."""
    return twins(z_a, z_b).near


def lidar(z: ArrayLike, delta: float = 1e-4) -> float:
    """LiDAR of (n images, q views, d): the effective rank of Σ = W^−½ B W^−½, B the covariance of the n image means, W
    the mean covariance of an image's views + δI: 1 … min(n − 1, d). Directions that only the augmentation moves do not
    count. n ≥ 2, q ≥ 2; the paper uses n = 1000, q = 50 and δ = 1e-4 (Thilak et al. 2023, eq. 1–4). Depends on the
    scale of z through δ."""
    return entropy_rank(between_over_within(z, delta))


def between_over_within(z: ArrayLike, delta: float = 1e-4) -> Floats:
    """The eigenvalues of LiDAR's Σ, largest first."""
    z = np.asarray(z, dtype=np.float64)
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2 or not np.isfinite(z).all():
        raise UserError(f"lidar needs finite numbers of the shape (images ≥ 2, views ≥ 2, numbers); got {z.shape}")
    n, q, d = z.shape
    means = z.mean(axis=1)
    between, within = (means - means.mean(axis=0)) / np.sqrt(n), (z - means[:, None]).reshape(n * q, d) / np.sqrt(n * q)
    if d > n * (q + 1):  # everything happens in the span of the rows: exact, and far smaller
        basis = np.linalg.qr(np.concatenate([between, within]).T)[0]
        between, within = between @ basis, within @ basis
    values, vectors = np.linalg.eigh(within.T @ within)
    whitened = (between @ vectors) / np.sqrt(np.maximum(values, 0.0) + delta)
    return np.asarray(np.square(np.linalg.svd(whitened, compute_uv=False)))
