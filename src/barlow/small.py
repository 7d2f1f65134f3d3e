"""Both forms of two small views on one process: the formulas of ``forms`` in a straight line.

For embeddings this small the time goes into the calls, not into the arithmetic; so here are no loops over views, blocks
or processes, and the gradient is made along with the loss, but for its last factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from barlow.forms import PANEL, Forward
from barlow.standardise import CACHE, EPS, moments, wide

SMALL = CACHE  # numbers in one view: beyond, passes over memory cost more than calls
LEAST = 1e-6  # λ: the gradients are made in units of it, which for a smaller one, or large embeddings, underflow
FEW = 2 * PANEL  # rows in the Gram form: beyond, the half of a symmetric product that ``forms`` leaves out costs more


def fits(z: Sequence[Tensor], form: str, world: int, lambda_: float) -> bool:
    """Whether this room is meant for these views. (For two images ∂L/∂z has a formula of its own.)"""
    rows, numbers = len(z[0]), z[0].numel()
    small = numbers <= SMALL and rows > 2 and (form == "correlation" or rows <= FEW)
    return small and len(z) == 2 and world == 1 and lambda_ >= LEAST


def way(form: str) -> Callable[[Sequence[Tensor], torch.dtype, float], tuple[list[Tensor], Forward, Tensor]]:
    """The forward pass of a form. As in ``forms`` on one process, but what it returns first lacks only a factor to be
    the gradients."""
    return _gram if form == "gram" else _correlation


def _gram(z: Sequence[Tensor], dtype: torch.dtype, lambda_: float) -> tuple[list[Tensor], Forward, Tensor]:
    (a, w_a), (b, w_b) = _standardised(z[0], dtype), _standardised(z[1], dtype)
    n, k_a, k_b = len(a), torch.mm(a, a.T), torch.mm(b, b.T)
    squares = torch.mul(k_a, k_b).sum(dtype=wide(a))
    g_b = torch.empty_like(b)  # scratch, until its turn comes
    c = torch.mul(a, b, out=g_b).mean(0)
    s = c.mul(1.0 - lambda_).sub_(1.0).mul_(n / lambda_)
    lost_a, lost_b = _lessened(k_b, w_a), _lessened(k_a, w_b)
    g_a = torch.mul(b, s).addmm_(k_b, a)
    g_a.addcmul_(a, torch.mul(a, g_a, out=g_b).mean(0).sub_(lost_a), value=-1.0)
    torch.mul(a, s, out=g_b).addmm_(k_a, b)
    g_b.addcmul_(b, torch.mul(b, g_b, out=a).mean(0).sub_(lost_b), value=-1.0)
    scale = torch.stack((w_a, w_b))
    return [g_a, g_b], Forward(scale, c[None], scale, ()), squares


def _lessened(kernel: Tensor, w: Tensor) -> Tensor:
    """Takes κ from the diagonal of the other view's kernel; returns what of κÂ comes through the standardisation."""
    on_diagonal = kernel.diagonal()
    kappa = on_diagonal.mean()
    on_diagonal.sub_(kappa)
    return w.square().mul_(kappa * EPS)


def _correlation(z: Sequence[Tensor], dtype: torch.dtype, lambda_: float) -> tuple[list[Tensor], Forward, Tensor]:
    (a, w_a), (b, w_b) = _standardised(z[0], dtype), _standardised(z[1], dtype)
    n = len(a)
    c = torch.mm(a.T, b).div_(n)
    on_diagonal = c.diagonal()
    diagonal = on_diagonal.clone()
    on_diagonal.zero_()
    squared = c.square()
    rows, columns = squared.sum(1), squared.sum(0)
    s = torch.sub(diagonal, 1.0).div_(lambda_)
    on_diagonal.copy_(s)
    s.mul_(diagonal)
    g_a = torch.mm(b, c.T).addcmul_(a, rows + s, value=-1.0)
    g_b = torch.mm(a, c).addcmul_(b, columns + s, value=-1.0)
    scale = torch.stack((w_a, w_b))
    return [g_a, g_b], Forward(scale, diagonal[None], scale, (c,)), rows.sum(dtype=wide(c))


def _standardised(view: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shifted = torch.empty(view.shape, dtype=dtype, device=view.device)
    mean, variance = moments(view, shifted)
    w = variance.add_(EPS).rsqrt_()
    return torch.addcmul(mean.mul_(w).neg_(), shifted, w, out=shifted), w


def gradient(g: list[Tensor], scale: Tensor, form: str, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z of both views, written over ``g``."""
    n = len(g[0])
    factor = scale * (gain * (2.0 * lambda_ / (n * n if form == "gram" else n)))
    for part, w in zip(g, factor.unbind(), strict=True):
        part.mul_(w)
    return g
