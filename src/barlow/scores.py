"""Figures that compare predictions with labels: accuracies and their intervals, per class, for values, for many labels.

Plain arrays: ``labels`` and ``answers`` int64 (n,), classes 0 … K-1; every figure is a share, 0..1, higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Ints = NDArray[np.int64]
CONFUSION_CLASSES = 100  # with more the confusion matrix is left out
Z = 1.959963984540054  # 97.5 % point of the normal distribution


class ClassRow(NamedTuple):
    """One class: number of test images, recall (its own accuracy) with a 95 % interval, precision (nan: never said)."""

    images: int
    recall: float
    low: float
    high: float
    precision: float


def accuracy(labels: Ints, answers: Ints) -> float:
    """Share of answers that are right."""
    return float(np.mean(np.asarray(labels) == np.asarray(answers)))


def confusion(labels: Ints, answers: Ints, classes: int) -> Ints:
    """(K, K) counts: row = the label, column = the answer."""
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(answers, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def balanced_accuracy(labels: Ints, answers: Ints, classes: int) -> float:
    """Mean of the recalls of the classes that occur among the labels."""
    images, _, right = _counts(labels, answers, classes)
    return float(np.mean(right[images > 0] / images[images > 0]))


def per_class(labels: Ints, answers: Ints, classes: int) -> list[ClassRow]:
    """One row a class; K numbers, never K x K, so that thousands of classes are no burden."""
    rows = []
    for images, said, right in zip(*(c.tolist() for c in _counts(labels, answers, classes)), strict=True):
        recall, precision = (right / total if total else math.nan for total in (images, said))
        rows.append(ClassRow(images, recall, *wilson(right, images), precision))
    return rows


def detail(labels: Ints, answers: Ints, names: Sequence[str]) -> dict[str, Any]:
    """What stands behind an accuracy, as plain values ready for JSON (None for nan): class by class, and who is taken
    for whom where there are few."""
    rows = [row._asdict() for row in per_class(labels, answers, len(names))]
    few = len(names) <= CONFUSION_CLASSES
    return {
        "balanced_accuracy": balanced_accuracy(labels, answers, len(names)),
        "per_class": [
            {"class": name} | {key: None if math.isnan(value) else value for key, value in row.items()}
            for name, row in zip(names, rows, strict=True)
        ],
        "confusion": confusion(labels, answers, len(names)).tolist() if few else None,
    }


def _counts(labels: Ints, answers: Ints, classes: int) -> tuple[Ints, Ints, Ints]:
    """Of each class (K,): how often it is the label, the answer, and both."""
    labels, answers = np.asarray(labels, np.int64), np.asarray(answers, np.int64)
    images, said, right = (np.bincount(x, minlength=classes) for x in (labels, answers, labels[labels == answers]))
    return images, said, right


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): holds for few images and near 0 and 1, never leaves 0..1."""
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, Z * Z / total
    centre = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval (Student's t) of the mean of shares, cut to 0..1; (0, 1) for a single value."""
    n = len(values)
    if n < 2:
        return 0.0, 1.0
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return max(0.0, mean - half), min(1.0, mean + half)


def r2(targets: NDArray[Any], answers: NDArray[Any]) -> float:
    """Coefficient of determination, mean over the columns of (n, t): 1 perfect, 0 no better than the mean, may be < 0.

    A column whose targets are all equal is left out; nan when there is no other.
    """
    targets, answers = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (targets, answers))
    total = ((targets - targets.mean(0)) ** 2).sum(0)
    rest = ((targets - answers) ** 2).sum(0)
    varies = total > 0
    return float(np.mean(1 - rest[varies] / total[varies])) if varies.any() else math.nan


def mean_average_precision(targets: NDArray[Any], scores: NDArray[Any]) -> float:
    """Mean over the labels (columns) of the average precision, Σ (Rₖ - Rₖ₋₁) Pₖ over the distinct scores, as in
    scikit-learn; a label that no row carries is left out, nan when there is no other."""
    columns = zip(np.asarray(targets).T, np.asarray(scores).T, strict=True)
    values = [_average_precision(target, score) for target, score in columns if target.any()]
    return float(np.mean(values)) if values else math.nan


def _average_precision(target: NDArray[Any], score: NDArray[Any]) -> float:
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(target[order] > 0)
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # rows of equal score count together
    recall = np.concatenate([[0.0], hits[last] / hits[-1]])
    return float(np.sum(np.diff(recall) * hits[last] / (last + 1)))
