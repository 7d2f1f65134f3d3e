"""Label-free measures of a set of embeddings: plain numpy, on any (n, d) array of n images and d numbers.

Every measure is a function of an array, or of a ``Sample`` when several are wanted of the same array (a Sample centres,
multiplies and decomposes once). None but ``spectrum`` depends on the scale of the array.
Notation: Z (n × d), μ its mean row, λ₁ ≥ λ₂ ≥ … the eigenvalues of Cov Z, σ the singular values, ρ correlations.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from barlow.errors import UserError

Floats: TypeAlias = NDArray[np.floating[Any]]

DEAD = 1e-4  # a dimension whose deviation is below this share of the root mean square of all is constant
COPY = 0.95  # |ρ| of two dimensions that say the same thing
LONG = 5.0  # median lengths; in one dimension, where lengths differ most, one Gaussian row in 1,300 is longer
QUERIES = 256  # dimensions compared with all others; a share over 256 of them has a standard error of at most 0.03
LARGE = 1 << 19  # numbers above which single precision is used: twice as fast, and exact enough for every measure


def as_array(z: Any) -> NDArray[Any]:
    """``z`` as an array: any that NumPy can make one of, and a tensor of torch on any device, with or without a graph.
    UserError for the rest."""
    try:
        if hasattr(z, "detach"):  # a tensor: told so, this works where there is no torch
            z = z.detach().cpu()
            z = z.float() if str(z.dtype) == "torch.bfloat16" else z  # NumPy does not have it
        return np.asarray(z)
    except (TypeError, ValueError, RuntimeError):
        raise UserError("embeddings must be an array (images, numbers)") from None


@final
class Sample:
    """One (n, d) array, checked, centred, and decomposed at most once. n ≥ 2, d ≥ 1, all numbers finite.

    Raises UserError for another shape, for text, and for numbers that are not finite.
    """

    def __init__(self, z: ArrayLike) -> None:
        raw = as_array(z)
        if raw.ndim != 2 or raw.shape[0] < 2 or raw.shape[1] < 1:
            raise UserError(f"embeddings must have the shape (images ≥ 2, numbers ≥ 1); got {raw.shape}")
        if raw.dtype.kind not in "fiub":
            raise UserError(f"embeddings must be real numbers; got {raw.dtype}")
        self.n, self.d = int(raw.shape[0]), int(raw.shape[1])
        largest = float(np.max(np.abs(raw.astype(np.float64) if raw.dtype.itemsize < 4 else raw)))
        if not np.isfinite(largest):
            raise UserError("embeddings hold numbers that are not finite: look for the first step with a NaN loss")
        self.scale = 1.0 if 1e-4 < largest < 1e4 or largest == 0 else 2.0 ** np.floor(np.log2(largest))
        work = np.float32 if raw.size > LARGE else np.float64
        values = raw.astype(work, copy=False) if self.scale == 1.0 else (raw / self.scale).astype(work)
        self.mean: Floats = values.mean(axis=0, dtype=np.float64)
        self.centred: Floats = values - self.mean.astype(work)

    @classmethod
    def of(cls, z: ArrayLike | Sample) -> Sample:
        """``z`` itself when it is a Sample already."""
        return z if isinstance(z, Sample) else cls(z)

    @cached_property
    def tempered(self) -> Sample:
        """This sample with rows that lie more than ``LONG`` median lengths from the mean drawn in to that; itself when
        none does. One odd image must not pass for the only direction there is."""
        lengths = np.sqrt(np.einsum("nd,nd->n", self.centred, self.centred))
        bound = LONG * float(np.median(lengths))
        if not 0 < bound < lengths.max():
            return self
        nearer = self.centred * np.minimum(1.0, bound / np.maximum(lengths, bound))[:, None]
        return Sample((nearer + self.mean) * self.scale)

    @property
    def room(self) -> int:
        """The largest rank a centred sample can have, min(n − 1, d)."""
        return min(self.n - 1, self.d)

    @cached_property
    def gram(self) -> Floats:
        """Inner products of the centred rows, (n, n)."""
        return self.centred @ self.centred.T

    @cached_property
    def along(self) -> Floats:
        """Inner product of every centred row with the mean row, (n,)."""
        return np.asarray(self.centred @ self.mean.astype(self.centred.dtype), dtype=np.float64)

    @cached_property
    def raw_gram(self) -> Floats:
        """Inner products of the rows as they came, (n, n), in units of ``scale``²."""
        product: Floats = self.gram + self.along[:, None] + self.along[None, :] + float(self.mean @ self.mean)
        return product

    @cached_property
    def lengths(self) -> Floats:
        """Length of every row as it came, (n,) float64, in units of ``scale``; 1 in place of 0."""
        square = np.einsum("nd,nd->n", self.centred, self.centred) + 2 * self.along + float(self.mean @ self.mean)
        return np.sqrt(np.where(square > 0, square, 1.0))

    @cached_property
    def cosines(self) -> Floats:
        """Cosines of all pairs of rows, (n, n); a row of zeros has cosine 0 with every row."""
        product: Floats = self.raw_gram / self.lengths[:, None] / self.lengths[None, :]
        return product

    @cached_property
    def distances(self) -> Floats:
        """Euclidean distances of all pairs of rows, (n, n), in units of ``scale``; the diagonal is infinite."""
        square = np.diag(self.gram)
        apart = np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * self.gram, 0.0))
        np.fill_diagonal(apart, np.inf)
        return apart

    @cached_property
    def eigenvalues(self) -> Floats:
        """Eigenvalues of Cov Z, largest first, (room,), ≥ 0, in units of ``scale``²."""
        exact = self.centred.astype(np.float64)  # of float32 products the square roots of small ones would be noise
        matrix = exact @ exact.T if self.d >= self.n else exact.T @ exact
        values = np.linalg.eigvalsh(matrix)[::-1][: self.room]
        return np.asarray(np.maximum(values, 0.0) / self.n)

    @cached_property
    def deviations(self) -> Floats:
        """Standard deviation of every dimension, (d,), in units of ``scale``."""
        return np.asarray(np.sqrt(np.einsum("nd,nd->d", self.centred, self.centred) / self.n))

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """Dimensions that are not constant, (d,)."""
        return np.asarray(self.deviations > max(DEAD * np.sqrt(self.variance / self.d), 1e-12))

    @property
    def variance(self) -> float:
        """tr Cov Z, in units of ``scale``²."""
        return float(np.square(self.deviations, dtype=np.float64).sum())

    @cached_property
    def correlations(self) -> Floats:
        """Correlations ρ of up to ``QUERIES`` evenly spaced living dimensions with all living ones, (queries, living),
        with 0 in place of a dimension's correlation with itself."""
        living = np.flatnonzero(self.alive)
        asked = np.unique(np.linspace(0, len(living) - 1, min(len(living), QUERIES)).astype(np.intp))
        chosen = living[asked]
        table = (self.centred[:, chosen].T @ self.centred)[:, living]
        table /= self.n * self.deviations[chosen][:, None] * self.deviations[living][None, :]
        table[np.arange(len(asked)), asked] = 0.0
        return table


def spectrum(z: ArrayLike | Sample) -> Floats:
    """Eigenvalues λ of the covariance matrix, largest first: (min(n − 1, d),) float64, ≥ 0, in squared units of z."""
    s = Sample.of(z)
    return np.asarray(s.eigenvalues * s.scale**2)


def relative_spread(z: ArrayLike | Sample) -> float:
    """tr Cov / (tr Cov + ‖μ‖²): the share of the squared length that differs between images. 0 (the same vector for
    every image) … 1 (no common part). A rank is blind to a constant plus noise; this is not (after Chen & He, SimSiam,
    2021, whose measure is the deviation of the normalised rows)."""
    s = Sample.of(z)
    total = s.variance + float(s.mean @ s.mean)
    return s.variance / total if total > 0 else 0.0


def mean_cosine(z: ArrayLike | Sample) -> float:
    """Mean cosine of two different images' vectors: −1/(n−1) … 1 (all point the same way). Features after a ReLU are
    non-negative, so 0.4 to 0.98 is ordinary for an encoder's output; near 0 for a centred embedding."""
    s = Sample.of(z)
    return float(s.cosines.sum(dtype=np.float64) - np.trace(s.cosines)) / (s.n * (s.n - 1))


def entropy_rank(p: Floats) -> float:
    """exp of the entropy of the shares ``p`` (any positive scale): how many of them there are in effect; 0 for none."""
    p = p[p > 0]
    p = p / p.sum() if p.size else p
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def effective_rank(z: ArrayLike | Sample) -> float:
    """exp(−Σ p log p) with p = σ/Σσ, σ the singular values of the centred Z: how many directions the images spread
    over. 1 … min(n − 1, d); 0 for identical rows (Roy & Vetterli 2007)."""
    return entropy_rank(np.sqrt(Sample.of(z).eigenvalues))


def participation(z: ArrayLike | Sample) -> float:
    """(Σλ)² / Σλ²: the number of directions that carry the variance; unlike the effective rank it hardly sees a long
    weak tail. 1 … min(n − 1, d); 0 for identical rows (participation ratio, a relative of He & Ozay's NESum 2022)."""
    values = Sample.of(z).eigenvalues
    return float(values.sum() ** 2 / np.square(values).sum()) if values.any() else 0.0


def rank_me(z: ArrayLike | Sample) -> float:
    """exp(−Σ p log p) with p = σ/Σσ + 1e-7, σ the singular values of Z as it is, not centred: 1 … min(n, d). Compares
    runs of one method on the same number of images only (RankMe, Garrido et al. 2023, eq. 1; the paper uses 25,600)."""
    s = Sample.of(z)
    exact = s.centred.astype(np.float64) + s.mean
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(exact @ exact.T if s.d >= s.n else exact.T @ exact), 0.0))
    total = sigma.sum()
    p = sigma / (total if total > 0 else 1.0) + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def spectrum_alpha(z: ArrayLike | Sample) -> float:
    """α of λ_k ∝ k^−α, by least squares on the logarithms for k from min(10, r/8) to r/2, r = min(n − 1, d): about 1
    for good encoders, well above 2 steep (few directions), near 0 white. The head is left out because a few strong
    directions are no tail, the end because the sample bends it. nan where fewer than four λ are left (α-ReQ, Agrawal
    et al. 2022)."""
    s = Sample.of(z)
    last = max(s.room // 2, min(s.room, 6))
    first = min(10, s.room // 8)
    values = s.eigenvalues[first:last]
    positive = values > 1e-12 * s.eigenvalues[0]
    if positive.sum() < 4:
        return float("nan")
    k = np.log(np.arange(first + 1, last + 1)[positive])
    return -float(np.polyfit(k, np.log(values[positive]), 1)[0])


def rank_cliff(z: ArrayLike | Sample) -> int:
    """The rank r at which the spectrum falls off a cliff: λ_r ≥ 60 λ_{r+1} with at most 5 % of the variance beyond, and
    r at most an eighth of the room min(n − 1, living d); 0 where there is no cliff. The spectra of working encoders
    fall smoothly (λ_r/λ_{r+1} below 3); an embedding has a step of up to 25 behind the directions it has learned.
    Higher cliffs are no fault: the last layer of MobileNet widens a narrow one, a fifth of the room, by design."""
    s = Sample.of(z)
    room = min(s.n - 1, int(s.alive.sum()))
    reach = room // 8
    values = s.eigenvalues[: reach + 1]
    if reach < 1 or not values[0] > 0:
        return 0
    beyond = 1 - np.cumsum(values[:-1]) / s.eigenvalues.sum()
    gap = values[:-1] / np.maximum(values[1:], 1e-30)
    cliffs = np.flatnonzero((gap >= 60) & (beyond <= 0.05) & (values[:-1] > 1e-10 * values[0]))
    return int(cliffs[0]) + 1 if cliffs.size else 0


def off_diagonal_excess(z: ArrayLike | Sample) -> float:
    """Mean ρ²ᵢⱼ over pairs of different dimensions times n − 1: 1 for independent dimensions (the sampling floor: a
    chance ρ² has mean 1/(n − 1)), up to n − 1 when all are copies; below 1 for an embedding decorrelated on this very
    sample. Over at most 256 × d pairs; nan where fewer than two dimensions live."""
    s = Sample.of(z)
    if s.alive.sum() < 2:
        return float("nan")
    table = s.correlations
    return float(np.square(table).sum(dtype=np.float64) / (len(table) * (table.shape[1] - 1)) * (s.n - 1))


def dead_dimensions(z: ArrayLike | Sample) -> float:
    """Share of dimensions that are the same number for every image (deviation below 1e-4 of the root mean square
    deviation): 0 … 1."""
    return 1.0 - float(Sample.of(z).alive.mean())


def duplicate_dimensions(z: ArrayLike | Sample) -> float:
    """Share of living dimensions with a copy, |ρᵢⱼ| > 0.95 for some j ≠ i: 0 … 1. With few images the bar is raised
    to where chance alone would reach it once in a hundred arrays. Asked of at most 256 dimensions, each against all."""
    s = Sample.of(z)
    if s.alive.sum() < 2 or s.n < 4:
        return 0.0
    table = s.correlations
    chance = np.sqrt(1 - (0.01 / table.shape[1] ** 2) ** (2 / (s.n - 2)))
    return float((np.abs(table).max(axis=1) > max(COPY, chance)).mean())


def forced_duplicates(z: ArrayLike | Sample) -> float:
    """The share of copies that this spectrum forces on d dimensions that point in random directions: 0 … 1. In two or
    three directions hundreds of dimensions cannot avoid being copies; that is a low rank, not redundancy. The first 64
    directions are drawn (seed 0), the variance beyond them counts as unshared."""
    s = Sample.of(z)
    values = s.eigenvalues
    if not values.any():
        return 0.0
    ways = np.random.default_rng(0).standard_normal((min(64, s.room), s.d)) * np.sqrt(values[:64])[:, None]
    ways /= np.sqrt(np.square(ways).sum(axis=0) + values[64:].sum())
    near = np.abs(ways[:, :QUERIES].T @ ways)
    np.fill_diagonal(near, 0.0)
    return float((near.max(axis=1) > COPY).mean())
