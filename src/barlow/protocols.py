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

from barlow.scores import accuracy, t_interval

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

BLOCK = 1 << 24  # similarities held at a time: 64 MB
STRENGTHS = tuple(10.0**-e for e in (0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6))  # of the penalty, strong to weak
PATIENCE = 2  # strengths in a row without gain that end the search
WHITENING = (0.0, 0.5)  # offered to few labels: how far the features' variances are evened out
FOLDS, MANY = 5, 5_000  # cross-validation in five folds up to so many labels, then one validation part of a fifth
SEARCH, FINAL = (60, 1e-3), (100, 1e-5)  # L-BFGS: iterations, largest entry of the gradient


class Problem(NamedTuple):
    """What a probe minimises; of scores (F, K, n) and targets (K, n)."""

    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # each row's loss (F, n), its gradient by the scores
    curvature: float  # bound on the second derivative by the scores


def knn(
    bank: Floats, bank_labels: Ints, queries: Floats, *, k: int = 20, temperature: float = 0.07,
    classes: int | None = None,
) -> Ints:  # fmt: skip
    """Class of each query (n,) by the votes of its k nearest rows of the bank (m, d), cosine similarity s.

    A neighbour votes with weight exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4). Of equally
    near rows the earlier counts, of classes with equal votes the lower. A row of zeros has similarity 0 to all.
    ``classes``: K, where the bank does not hold the highest class. Needs m·d + BLOCK numbers of memory.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie between 1 and the {len(bank)} rows of the bank, not {k}")
    columns = torch.nn.functional.normalize(_tensor(bank), dim=1).T
    labels = torch.from_numpy(np.asarray(bank_labels, np.int64))
    count = classes or int(labels.max()) + 1
    unit, step, answers = torch.nn.functional.normalize(_tensor(queries), dim=1), max(1, BLOCK // len(bank)), []
    for start in range(0, len(unit), step):
        rows = unit[start : start + step]
        near, which = _nearest(rows @ columns, k)
        weights = ((near - near.amax(1, keepdim=True)).double() / temperature).exp()
        votes = torch.zeros(len(rows), count, dtype=torch.float64).scatter_add_(1, labels[which], weights)
        answers.append(votes.argmax(1))
    return torch.cat(answers).numpy()


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


def linear_probe(train: Floats, train_labels: Ints, test: Floats, *, seed: int = 0) -> Ints:
    """Class of each row of ``test`` by multinomial logistic regression on ``train``, the encoder frozen.

    Features are standardised with mean and deviation of ``train``. The strength of the L2 penalty is the one of
    ``STRENGTHS`` with the lowest log-loss on labels held back from ``train`` (stratified: five folds up to ``MANY``
    labels, else a fifth, drawn by ``seed``); then all of ``train`` is fitted with it.
    The optimum is unique, so only that split depends on the seed.
    """
    basis = _basis(train, 0.0)
    labels = np.asarray(train_labels, np.int64)
    return _classify([(basis(train), basis(test))], labels, seed)


def multi_label_probe(train: Floats, targets: NDArray[Any], test: Floats, *, seed: int = 0) -> Floats:
    """Scores (n, c), higher is likelier, of c labels that do not exclude each other; ``targets`` (m, c) of 0 and 1.

    One logistic regression a label, one strength of the penalty for all, chosen as in ``linear_probe``.
    """
    basis, fold = _basis(train, 0.0), _folds(np.zeros(len(train), np.int64), seed)
    return _probe([(basis(train), basis(test))], _tensor(targets), fold, SIGMOID).numpy()


def ridge(train: Floats, targets: Floats, test: Floats, *, seed: int = 0) -> Floats:
    """Predictions (n, t) of t real values, ``targets`` (m, t), by ridge regression; the penalty chosen by
    squared error on held-back rows."""
    basis, fold = _basis(train, 0.0), _folds(np.zeros(len(train), np.int64), seed)
    values = _tensor(targets)
    mean, deviation = _moments(values)
    answers = _probe([(basis(train), basis(test))], (values - mean) / deviation, fold, SQUARES)
    return (answers * deviation + mean).numpy()


class FewLabels(NamedTuple):
    """Accuracy with few labels: mean of the draws, its 95 % interval (Student's t over the draws), each draw."""

    mean: float
    low: float
    high: float
    draws: list[float]
    labels: int  # in each draw


def few_labels(
    train: Floats, labels: Ints, test: Floats, test_labels: Ints, *, share: float = 0.01, draws: int = 5, seed: int = 0
) -> FewLabels:
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
        answers = _classify([(x[rows], x_test) for x, x_test in turned], labels[rows], seed)
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


def _folds(labels: Ints, seed: int) -> Ints:
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
    return fold


def _basis(pool: Floats, power: float) -> Callable[[Floats], Tensor]:
    """Standardises features with the moments of ``pool``, turns them to its principal axes and divides each by
    variance**(power/2): 0 leaves the geometry, 1 whitens."""
    mean, deviation = _moments(_tensor(pool))
    if not power:
        return lambda x: (_tensor(x) - mean) / deviation
    unit = (_tensor(pool) - mean) / deviation
    variance, axes = torch.linalg.eigh((unit.T @ unit / len(unit)).double())
    variance = variance.clamp_min(0) + 1e-3 * variance.mean()  # rounding and dead axes must not be blown up
    scale = variance.pow(-power / 2)
    turn = (axes * (scale / (scale.square() * variance).mean().sqrt())).float()
    return lambda x: (_tensor(x) - mean) / deviation @ turn


def _classify(candidates: list[tuple[Tensor, Tensor]], labels: Ints, seed: int) -> Ints:
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    return _probe(candidates, targets, _folds(labels, seed), SOFTMAX).argmax(1).numpy()


def _probe(candidates: list[tuple[Tensor, Tensor]], targets: Tensor, fold: Ints, problem: Problem) -> Tensor:
    """Scores (n, K) of test rows; of ``candidates`` (training rows, test rows) and strengths the best on ``fold``."""
    y, found = targets.T.contiguous(), []
    for number, (train, _) in enumerate(candidates):
        x, axes, spread = _principal(train)
        found.append((*_search(x, y, torch.from_numpy(fold), spread, problem), number, (x, axes, spread)))
    _, strength, start, number, (x, axes, spread) = min(found, key=lambda f: (f[0], f[3]))
    weights = torch.full((1, x.shape[1]), 1 / x.shape[1])
    w = _fit(x, y, weights, strength, spread, start.mean(0, keepdim=True), problem, FINAL)[0]
    return candidates[number][1] @ (axes @ w[:, :-1].T) + w[:, -1]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column; where a column is constant but for rounding the deviation is set to 1."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    return mean, torch.where(deviation > 1e-6 * mean.abs().clamp_min(1e-30), deviation, 1.0)


def _principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of x on their principal axes as columns, a last row of ones for the intercept (r+1, n); axes (d, r);
    mean square along each (r,)).

    The L2 penalty does not see the turn; along these axes the curvature of the loss is nearly diagonal, which is what
    makes L-BFGS quick. The solution lies in the span of the n rows, so no more than n axes are needed.
    """
    n, d = x.shape
    base = torch.linalg.qr(x.T)[0] if n < d else torch.eye(d)
    turned = x @ base if n < d else x
    spread, axes = torch.linalg.eigh((turned.T @ turned / n).double())
    axes = base @ axes.float()
    out = x.new_ones(axes.shape[1] + 1, n)
    torch.matmul(axes.T, x.T, out=out[:-1])
    return out, axes, spread.clamp_min(0).float()


def _search(x: Tensor, y: Tensor, fold: Tensor, spread: Tensor, problem: Problem) -> tuple[float, float, Tensor]:
    """(held-back loss, strength, weights (F, K, r+1)) of the best strength; all F folds are fitted at once, from strong
    to weak."""
    w = x.new_zeros(1, len(y), len(x))
    if fold.max() < 0:
        return 0.0, STRENGTHS[2], w  # one label a class: nothing to choose by
    held = torch.stack([fold == f for f in range(int(fold.max()) + 1)]).float()
    kept = (1 - held) / (1 - held).sum(1, keepdim=True)
    best, waited = (float("inf"), STRENGTHS[0], w), 0
    w = w.expand(len(held), -1, -1)
    for strength in STRENGTHS:
        w = _fit(x, y, kept, strength, spread, w, problem, SEARCH)
        loss = float((problem.loss(_scores(w, x), y)[0] * held).sum() / held.sum())
        if loss < best[0]:
            best, waited = (loss, strength, w), 0
        elif (waited := waited + 1) == PATIENCE:
            break
    return best


def _fit(
    x: Tensor, y: Tensor, weights: Tensor, strength: float, spread: Tensor, start: Tensor,
    problem: Problem, effort: tuple[int, float],
) -> Tensor:  # fmt: skip
    """Weights (F, K, r+1) that minimise Σᵢ weightsᵢ lossᵢ + strength/2 ‖w‖² (not the intercept) in each of F problems.

    x (r+1, n), y (K, n), weights (F, n). L-BFGS in units in which the bound on the curvature (Böhning 1992) is 1.
    """
    unit = torch.cat([problem.curvature * spread + strength, spread.new_tensor([problem.curvature])]).rsqrt()
    v = (start / unit).requires_grad_()
    iterations, tolerance = effort
    solver = torch.optim.LBFGS(
        [v], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=tolerance, tolerance_change=0,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        w = v.detach() * unit
        losses, residual = problem.loss(_scores(w, x), y)
        gradient = ((residual * weights[:, None]).flatten(0, 1) @ x.T).view_as(w)
        gradient[..., :-1] += strength * w[..., :-1]
        v.grad = gradient * unit
        return (losses * weights).sum() + strength / 2 * w[..., :-1].square().sum()

    solver.step(objective)  # type: ignore[no-untyped-call]
    return v.detach() * unit


def _scores(w: Tensor, x: Tensor) -> Tensor:
    """(F, K, n)."""
    return (w.flatten(0, 1) @ x).view(*w.shape[:2], -1)


def _softmax(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row (F, n) and its gradient by the scores (F, K, n): one class of K."""
    log_z = scores.logsumexp(1, keepdim=True)
    return log_z[:, 0] - (scores * y).sum(1), (scores - log_z).exp_() - y


def _sigmoid(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same for K labels, each there or not."""
    return (torch.nn.functional.softplus(scores) - scores * y).sum(1), scores.sigmoid() - y


def _squares(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same for K real values."""
    residual = scores - y
    return residual.square().sum(1) / 2, residual


SOFTMAX, SIGMOID, SQUARES = Problem(_softmax, 0.5), Problem(_sigmoid, 0.25), Problem(_squares, 1.0)


def _tensor(x: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
