"""Linear models with an L2 penalty on fixed features, by L-BFGS on all rows: classes, several labels, real values.

The strength of the penalty is chosen on rows that are held back. Loss: mean over the rows + strength/2 ‖w‖², so the
strength is 1/(n C) in the terms of scikit-learn. Features come as (n, d) float32 tensors, targets as (n, K), classes
as (n,). Scores are held for a block of rows at a time, so that many classes of many rows fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.cores import threads
from barlow.progress import Tell, headed, silent

STRENGTHS = tuple(10.0**-e for e in (-2, -1.5, -1, -0.5, 0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6))  # strong to weak
LONE = 10.0**-1.5  # where each class has but one label and nothing can be held back
PATIENCE = 2  # strengths in a row without gain that end the search
USUAL = 1.0  # and above, where many classes learn nothing yet: no gain there ends nothing
SMALL = 1 << 19  # numbers; to fit fewer than that, a second thread costs more than it brings
BLOCK = 1 << 22  # scores held at a time: 16 MB
SEARCH, FINAL = (60, 1e-3), (100, 1e-5)  # L-BFGS: iterations, largest entry of the gradient


class Problem(NamedTuple):
    """What a probe minimises; of scores (F, K, n), which it may overwrite, and targets (K, n), or (n,) for classes."""

    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # each row's loss (F, n), its gradient by the scores
    curvature: float  # bound on the second derivative by the scores


def probe(
    candidates: Sequence[tuple[Tensor, Tensor]], targets: Tensor, fold: Tensor, problem: Problem, tell: Tell = silent
) -> Iterator[Tensor]:
    """Scores (b, K) of test rows by the model fitted to all training rows, block after block of them.

    ``candidates``: the same rows for training and for testing, prepared in different ways. ``targets``: float32 (n, K),
    for ``SOFTMAX`` int64 (n,), the classes. ``fold`` int64 (n,): the training rows with the same number are held back
    together, those with -1 never; the way and the strength are those with the lowest loss on held-back rows.
    """
    y, found = (targets.T.contiguous() if targets.dim() > 1 else targets), []
    with threads(1 if candidates[0][0].numel() < SMALL else torch.get_num_threads()):
        for number, (train, _) in enumerate(candidates):
            tell_way = headed(tell, f"preparation {number + 1} of {len(candidates)}") if len(candidates) > 1 else tell
            tell_way("principal axes")
            x, axes, spread = principal(train)
            found.append((*search(x, y, fold, spread, problem, tell_way), number, (x, axes, spread)))
        _, strength, start, number, (x, axes, spread) = min(found, key=lambda f: (f[0], f[3]))
        weights = torch.full((1, x.shape[1]), 1 / x.shape[1])
        last = headed(tell, "all rows")
        w = fit(x, y, weights, strength, spread, start.mean(0, keepdim=True), problem, FINAL, last)[0]
    test, turned = candidates[number][1], axes @ w[:, :-1].T
    for rows in _blocks(len(test), len(w)):
        yield test[rows] @ turned + w[:, -1]


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


def search(
    x: Tensor, y: Tensor, fold: Tensor, spread: Tensor, problem: Problem, tell: Tell = silent
) -> tuple[float, float, Tensor]:
    """(held-back loss, strength, weights (F, K, r+1)) of the best strength; all F folds are fitted at once, from strong
    to weak."""
    w = x.new_zeros(1, len(y) if y.dim() > 1 else int(y.max()) + 1, len(x))
    if fold.max() < 0:
        return 0.0, LONE, w
    held = torch.stack([fold == f for f in range(int(fold.max()) + 1)]).float()
    kept = (1 - held) / (1 - held).sum(1, keepdim=True)
    best, waited = (float("inf"), STRENGTHS[0], w), 0
    w = w.expand(len(held), -1, -1)
    for number, strength in enumerate(STRENGTHS, 1):
        tell_strength = headed(tell, f"strength {number} of {len(STRENGTHS)}")
        w = fit(x, y, kept, strength, spread, w, problem, SEARCH, tell_strength)
        parts = [
            (problem.loss(_scores(w, x[:, rows]), y[..., rows])[0] * held[:, rows]).sum()
            for rows in _blocks(len(fold), len(held) * w.shape[1])
        ]
        loss = float(sum(parts) / held.sum())
        if loss < best[0]:
            best, waited = (loss, strength, w), 0
        elif strength <= USUAL and (waited := waited + 1) == PATIENCE:
            break
    return best


def fit(
    x: Tensor, y: Tensor, weights: Tensor, strength: float, spread: Tensor, start: Tensor,
    problem: Problem, effort: tuple[int, float], tell: Tell = silent,
) -> Tensor:  # fmt: skip
    """Weights (F, K, r+1) that minimise Σᵢ weightsᵢ lossᵢ + strength/2 ‖w‖² (not the intercept) in each of F problems.

    x (r+1, n), y (K, n) or (n,), weights (F, n). L-BFGS in units in which the bound on the curvature (Böhning
    1992) is 1.
    """
    unit = torch.cat([problem.curvature * spread + strength, spread.new_tensor([problem.curvature])]).rsqrt()
    v = (start / unit).requires_grad_()
    iterations, tolerance = effort
    solver = torch.optim.LBFGS(
        [v], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=tolerance, tolerance_change=0,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    blocks, passes = _blocks(x.shape[1], v.shape[0] * v.shape[1]), count(1)

    def objective() -> Tensor:
        w, number = v.detach() * unit, next(passes)
        total, gradient = strength / 2 * w[..., :-1].square().sum(), strength * w
        gradient[..., -1] = 0
        for rows in blocks:
            tell(f"pass {number}")
            losses, residual = problem.loss(_scores(w, x[:, rows]), y[..., rows])
            residual *= weights[:, None, rows]
            gradient += (residual.flatten(0, 1) @ x[:, rows].T).view_as(w)
            total += (losses * weights[:, rows]).sum()
        v.grad = gradient * unit
        return total

    solver.step(objective)  # type: ignore[no-untyped-call]
    return v.detach() * unit


def _blocks(n: int, columns: int) -> list[slice]:
    """n rows cut so that ``columns`` numbers a row make no more than ``BLOCK``; 64 at least, or the products crawl."""
    step = max(64, BLOCK // columns)
    return [slice(start, start + step) for start in range(0, n, step)]


def _scores(w: Tensor, x: Tensor) -> Tensor:
    """(F, K, n)."""
    return (w.flatten(0, 1) @ x).view(*w.shape[:2], -1)


def _softmax(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row (F, n) and its gradient by the scores (F, K, n): one class of K, y its number (n,)."""
    log_z, own = scores.logsumexp(1, keepdim=True), y.expand(len(scores), 1, -1)
    losses = (log_z - scores.gather(1, own))[:, 0]
    residual = scores.sub_(log_z).exp_()
    return losses, residual.scatter_add_(1, own, residual.new_full((1, 1, 1), -1.0).expand(own.shape))


def _sigmoid(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same for K labels, each there or not."""
    return (torch.nn.functional.softplus(scores) - scores * y).sum(1), scores.sigmoid() - y


def _squares(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same for K real values."""
    residual = scores - y
    return residual.square().sum(1) / 2, residual


SOFTMAX, SIGMOID, SQUARES = Problem(_softmax, 0.5), Problem(_sigmoid, 0.25), Problem(_squares, 1.0)
