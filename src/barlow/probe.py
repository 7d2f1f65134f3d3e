"""Linear models with an L2 penalty on fixed features, by L-BFGS on all rows: classes, several labels, real values.

The strength of the penalty is chosen on rows that are held back. Loss: mean over the rows + strength/2 ‖w‖², so the
strength is 1/(n C) in the terms of scikit-learn. Features come as (n, d) float32 tensors, targets as (n, K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.cores import threads

STRENGTHS = tuple(10.0**-e for e in (-2, -1.5, -1, -0.5, 0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6))  # strong to weak
LONE = 10.0**-1.5  # where each class has but one label and nothing can be held back
PATIENCE = 2  # strengths in a row without gain that end the search
USUAL = 1.0  # and above, where many classes learn nothing yet: no gain there ends nothing
SMALL = 1 << 19  # numbers; to fit fewer than that, a second thread costs more than it brings
SEARCH, FINAL = (60, 1e-3), (100, 1e-5)  # L-BFGS: iterations, largest entry of the gradient


class Problem(NamedTuple):
    """What a probe minimises; of scores (F, K, n) and targets (K, n)."""

    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # each row's loss (F, n), its gradient by the scores
    curvature: float  # bound on the second derivative by the scores


def probe(candidates: Sequence[tuple[Tensor, Tensor]], targets: Tensor, fold: Tensor, problem: Problem) -> Tensor:
    """Scores (n, K) of test rows by the model fitted to all training rows.

    ``candidates``: the same rows for training and for testing, prepared in different ways. ``fold`` int64 (n,): the
    training rows with the same number are held back together, those with -1 never; the way and the strength are those
    with the lowest loss on held-back rows.
    """
    y, found = targets.T.contiguous(), []
    with threads(1 if candidates[0][0].numel() < SMALL else torch.get_num_threads()):
        for number, (train, _) in enumerate(candidates):
            x, axes, spread = principal(train)
            found.append((*search(x, y, fold, spread, problem), number, (x, axes, spread)))
        _, strength, start, number, (x, axes, spread) = min(found, key=lambda f: (f[0], f[3]))
        weights = torch.full((1, x.shape[1]), 1 / x.shape[1])
        w = fit(x, y, weights, strength, spread, start.mean(0, keepdim=True), problem, FINAL)[0]
    return candidates[number][1] @ (axes @ w[:, :-1].T) + w[:, -1]


def principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of x on their principal axes as columns, a last row of ones for the intercept (r+1, n); axes (d, r);
    mean square along each (r,)).

    The L2 penalty does not see the turn; along these axes the curvature of the loss is nearly diagonal, which is what
    makes L-BFGS quick. The solution lies in the span of the n rows, so no more than n axes are needed.
    """
    n, d = x.shape
    base = torch.linalg.qr(x.T)[0] if n < d else None
    turned = x if base is None else x @ base
    spread, axes = torch.linalg.eigh((turned.T @ turned / n).double())
    axes = axes.float() if base is None else base @ axes.float()
    out = x.new_ones(axes.shape[1] + 1, n)
    torch.matmul(axes.T, x.T, out=out[:-1])
    return out, axes, spread.clamp_min(0).float()


def search(x: Tensor, y: Tensor, fold: Tensor, spread: Tensor, problem: Problem) -> tuple[float, float, Tensor]:
    """(held-back loss, strength, weights (F, K, r+1)) of the best strength; all F folds are fitted at once, from strong
    to weak."""
    w = x.new_zeros(1, len(y), len(x))
    if fold.max() < 0:
        return 0.0, LONE, w
    held = torch.stack([fold == f for f in range(int(fold.max()) + 1)]).float()
    kept = (1 - held) / (1 - held).sum(1, keepdim=True)
    best, waited = (float("inf"), STRENGTHS[0], w), 0
    w = w.expand(len(held), -1, -1)
    for strength in STRENGTHS:
        w = fit(x, y, kept, strength, spread, w, problem, SEARCH)
        loss = float((problem.loss(_scores(w, x), y)[0] * held).sum() / held.sum())
        if loss < best[0]:
            best, waited = (loss, strength, w), 0
        elif strength <= USUAL and (waited := waited + 1) == PATIENCE:
            break
    return best


def fit(
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
