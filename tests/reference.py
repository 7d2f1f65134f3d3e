"""The loss as the paper writes it, slow and plain: what the package is tested against. Everything in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

EPS = 1e-5


def standardised(z: Tensor) -> Tensor:
    """Column by column over the batch: biased variance, eps inside the root."""
    columns = []
    for j in range(z.shape[1]):
        column = z[:, j]
        mean = sum(column) / len(column)
        variance = sum((x - mean) ** 2 for x in column) / len(column)
        columns.append((column - mean) / torch.sqrt(variance + EPS))
    return torch.stack(columns, dim=1)


def loops(z_a: Tensor, z_b: Tensor, lambda_: float) -> Tensor:
    """Σᵢ (1 - Cᵢᵢ)² + λ Σᵢ Σ_{j≠i} Cᵢⱼ², one entry of C after the other."""
    a, b = standardised(z_a), standardised(z_b)
    n, d = z_a.shape
    loss = z_a.new_zeros(())
    for i in range(d):
        for j in range(d):
            c = (a[:, i] * b[:, j]).sum() / n
            loss = loss + ((1 - c) ** 2 if i == j else lambda_ * c**2)
    return loss


def whole(z_a: Tensor, z_b: Tensor, lambda_: float) -> Tensor:
    """The same at once, for sizes at which the loops take too long; a test holds the two together."""
    a, b = ((z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + EPS) for z in (z_a, z_b))
    c = a.T @ b / len(z_a)
    off_diagonal = ~torch.eye(len(c), dtype=torch.bool)
    return ((1 - c.diagonal()) ** 2).sum() + lambda_ * (c[off_diagonal] ** 2).sum()


def over_pairs(z: Sequence[Tensor], lambda_: float, two: Callable[[Tensor, Tensor, float], Tensor] = whole) -> Tensor:
    """The mean over all pairs of views."""
    pairs = list(combinations(z, 2))
    return sum(two(a, b, lambda_) for a, b in pairs) / len(pairs)


def value_and_gradients(z: Sequence[Tensor], lambda_: float, two=whole) -> tuple[float, list[Tensor]]:
    leaves = [view.detach().double().requires_grad_() for view in z]
    loss = over_pairs(leaves, lambda_, two)
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves]


def correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + EPS) for z in (z_a.double(), z_b.double()))
    return a.T @ b / len(z_a)
