"""Protocols that judge features by labels, on plain arrays: weighted k-NN, linear probes, few labels.

Features are (n, d) arrays of finite float32, one row an image; classes are int64, 0 … K-1. No protocol ever sees
the labels it is judged by: ``knn`` and the probes return predictions, the figures are made in ``barlow.scores``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow.probe import SIGMOID, SOFTMAX, SQUARES, probe
from barlow.progress import Tell, headed, silent
from barlow.scores import accuracy, t_interval

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

BLOCK = 1 << 24  # similarities held at a time: 64 MB
WHITENING = (0.0, 0.5)  # offered to few labels: how far the features' variances are evened out
ROWS = 10  # of the bank for each axis that is whitened: with fewer, every row lies equally far from all others
FOLDS, MANY = 5, 5_000  # cross-validation in five folds up to so many labels, then one validation part of a fifth


class Votes(NamedTuple):
    """What weighted k-NN says of n queries, and by whom."""

    answers: Ints  # (n,) classes
    certainty: Floats  # (n,) float64, the share of the votes that the answer has, 0..1
    rows: Ints  # (n, k) of the bank, nearest first
    cosines: Floats  # (n, k) float32, beside them


def knn(
    bank: Floats, bank_labels: Ints, queries: Floats, *, k: int = 20, temperature: float = 0.07,
    classes: int | None = None,
) -> Ints:  # fmt: skip
    """Class of each query (n,) by the votes of its k nearest rows of the bank (m, d), cosine similarity s.

    A neighbour votes with weight exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4). Of equally
    near rows the earlier counts, of classes with equal votes the lower. A row of zeros has similarity 0 to all.
    ``classes``: K, where the bank does not hold the highest class. Needs m·d + BLOCK numbers of memory.
    """
    return neighbour_votes(bank, bank_labels, queries, k=k, temperature=temperature, classes=classes).answers


def neighbour_votes(
    bank: Floats, bank_labels: Ints, queries: Floats, *, k: int, temperature: float, classes: int | None = None,
    tell: Tell = silent,
) -> Votes:  # fmt: skip
    """What ``knn`` decides by; arguments as there. ``tell`` is told how many of the queries have been answered."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie between 1 and the {len(bank)} rows of the bank, not {k}")
    columns = torch.nn.functional.normalize(_tensor(bank), dim=1).T
    labels = torch.from_numpy(np.asarray(bank_labels, np.int64))
    count = classes or int(labels.max()) + 1
    unit, step = torch.nn.functional.normalize(_tensor(queries), dim=1), max(1, BLOCK // len(bank))
    blocks: list[tuple[Tensor, ...]] = []
    for start in range(0, len(unit), step):
        tell(f"{start:,} of {len(unit):,} images")
        rows = unit[start : start + step]
        near, which = _nearest(rows @ columns, k)
        weights = ((near - near.amax(1, keepdim=True)).double() / temperature).exp()
        votes = torch.zeros(len(rows), count, dtype=torch.float64).scatter_add_(1, labels[which], weights)
        blocks.append((votes.argmax(1), votes.amax(1) / votes.sum(1), which, near))
    return Votes(*(torch.cat(parts).numpy() for parts in zip(*blocks, strict=True)))


def whitened(bank: Floats, queries: Floats) -> tuple[Floats, Floats]:
    """Bank (m, r) and queries (n, r) on the r leading principal axes of the bank (m, d), each scaled to one; no labels
    are used.

    k-NN by cosine hears a few loud axes above all others, however little they say. This asks what features hold rather
    than how loudly. Axes of next to no variance are held down: below a thousandth of the mean it is noise. There is
    one axis for every ``ROWS`` rows of the bank, at least one, at most d; the others are dropped, because the noise
    that so few rows leave in them would be made as loud as what the leading ones say.
    """
    basis = _basis(bank, 1.0, max(1, len(bank) // ROWS))
    return basis(bank).numpy(), basis(queries).numpy()


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they stand; where ``topk`` leaves open which of equal ones, the first."""
    values, which = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    values, beyond, which = values[:, :k], values[:, k:], which[:, :k].clone()
    for row in (values[:, -1:] == beyond).any(1).nonzero()[:, 0].tolist():
        last = values[row, -1]
        above = (similarity[row] > last).nonzero()[:, 0]
        equal = (similarity[row] == last).nonzero()[:, 0]
        which[row] = torch.cat([above, equal[: k - len(above)]])
    return similarity.gather(1, which), which


def linear_probe(train: Floats, train_labels: Ints, test: Floats, *, seed: int = 0, tell: Tell = silent) -> Ints:
    """Class of each row of ``test`` by multinomial logistic regression on ``train``, the encoder frozen.

    Features are standardised with mean and deviation of ``train``. The strength of the L2 penalty is the one of
    ``probe.STRENGTHS`` with the lowest log-loss on labels held back from ``train`` (stratified: five folds up to
    ``MANY`` labels, else a fifth, drawn by ``seed``); then all of ``train`` is fitted with it. The optimum is unique,
    so only that split depends on the seed. ``tell`` is told which strength is being fitted.
    """
    basis = _basis(train, 0.0)
    labels = np.asarray(train_labels, np.int64)
    return _classify([(basis(train), basis(test))], labels, seed, tell)


def multi_label_probe(
    train: Floats, targets: NDArray[Any], test: Floats, *, seed: int = 0, tell: Tell = silent
) -> Floats:
    """Scores (n, c), higher is likelier, of c labels that do not exclude each other; ``targets`` (m, c) of 0 and 1.

    One logistic regression a label, one strength of the penalty for all, chosen as in ``linear_probe``.
    """
    basis, fold = _basis(train, 0.0), _folds(np.zeros(len(train), np.int64), seed)
    return torch.cat([*probe([(basis(train), basis(test))], _tensor(targets), fold, SIGMOID, tell)]).numpy()


def ridge(train: Floats, targets: Floats, test: Floats, *, seed: int = 0, tell: Tell = silent) -> Floats:
    """Predictions (n, t), float64, of t real values, ``targets`` (m, t), by ridge regression; the penalty chosen by
    squared error on held-back rows. The targets are standardised in float64, so that no digits of them are lost."""
    basis, fold = _basis(train, 0.0), _folds(np.zeros(len(train), np.int64), seed)
    values = np.asarray(targets, np.float64)
    mean, deviation = values.mean(0), values.std(0)
    deviation[deviation == 0] = 1
    scaled = _tensor((values - mean) / deviation)
    answers = torch.cat([*probe([(basis(train), basis(test))], scaled, fold, SQUARES, tell)])
    return np.asarray(answers.double().numpy() * deviation + mean)


class FewLabels(NamedTuple):
    """Accuracy with few labels: mean of the draws, its 95 % interval (Student's t over the draws), each draw."""

    mean: float
    low: float
    high: float
    draws: list[float]
    labels: int  # in each draw


def few_labels(
    train: Floats, labels: Ints, test: Floats, test_labels: Ints, *, share: float = 0.01, draws: int = 5, seed: int = 0,
    tell: Tell = silent,
) -> FewLabels:  # fmt: skip
    """Linear probes on ``draws`` stratified samples of a share of the labels; each class keeps at least one.

    Mean, deviation and principal axes of the features come from all of ``train``: the images are there, only their
    labels are missing. Everything else is chosen within the drawn labels: the strength of the penalty, and whether
    the features are whitened half way (``WHITENING``).
    """
    bases = [_basis(train, power) for power in WHITENING]
    turned = [(basis(train), basis(test)) for basis in bases]
    values, count = [], 0
    for draw in range(draws):
        rows = stratified(labels, share, np.random.default_rng([seed, draw]))
        tell_draw = headed(tell, f"draw {draw + 1} of {draws}")
        answers = _classify([(x[rows], x_test) for x, x_test in turned], labels[rows], seed, tell_draw)
        values.append(accuracy(test_labels, answers))
        count = len(rows)
    return FewLabels(float(np.mean(values)), *t_interval(values), values, count)


def stratified(labels: Ints, share: float, rng: np.random.Generator) -> Ints:
    """Sorted rows of a sample with the classes in their proportions (largest remainders), at least one of each."""
    names, counts = np.unique(labels, return_counts=True)
    exact = counts * share
    wanted = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = max(0, round(float(exact.sum())) - int(wanted.sum()))
    wanted[np.argsort(-(exact - wanted), kind="stable")[:missing]] += 1
    parts = [
        rng.permutation(np.flatnonzero(labels == name))[:w]
        for name, w in zip(names, np.minimum(wanted, counts), strict=True)
    ]
    return np.sort(np.concatenate(parts))


def _folds(labels: Ints, seed: int) -> Tensor:
    """The fold (n,) in which each label is held back, -1 for those never held back: the only one of their class."""
    rng = np.random.default_rng(seed)
    fold = np.full(len(labels), -1, np.int64)
    offset = 0
    for name in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == name))
        if len(members) > 1:
            fold[members] = (np.arange(len(members)) + offset) % FOLDS
            offset += len(members)  # goes on where the last class ended, so that the folds are equally long
    if len(labels) > MANY:
        fold[fold > 0] = -1
    return torch.from_numpy(fold)


def _basis(pool: Floats, power: float, most: int | None = None) -> Callable[[Floats], Tensor]:
    """Standardises features with the moments of ``pool``, turns them to its principal axes and divides each by
    variance**(power/2): 0 leaves the geometry, 1 whitens. Of the turned axes the ``most`` leading ones are kept."""
    mean, deviation = _moments(_tensor(pool))
    if not power:
        return lambda x: (_tensor(x) - mean) / deviation
    unit = (_tensor(pool) - mean) / deviation
    variance, axes = torch.linalg.eigh((unit.T @ unit / len(unit)).double())
    variance = variance.clamp_min(0) + 1e-3 * variance.mean()  # rounding and dead axes must not be blown up
    if most is not None:
        variance, axes = variance[-most:], axes[:, -most:]  # in ascending order
    scale = variance.pow(-power / 2)
    turn = (axes * (scale / (scale.square() * variance).mean().sqrt())).float()
    return lambda x: (_tensor(x) - mean) / deviation @ turn


def _classify(candidates: list[tuple[Tensor, Tensor]], labels: Ints, seed: int, tell: Tell) -> Ints:
    blocks = probe(candidates, torch.from_numpy(labels), _folds(labels, seed), SOFTMAX, tell)
    return torch.cat([scores.argmax(1) for scores in blocks]).numpy()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column; where a column is constant but for rounding the deviation is set to 1."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    return mean, torch.where(deviation > 1e-6 * mean.abs().clamp_min(1e-30), deviation, 1.0)


def _tensor(x: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
