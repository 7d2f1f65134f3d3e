"""The correlation form of two small views on one process: the formulas of ``forms`` in a straight line.

For embeddings this small the time goes into the calls, not into the arithmetic; so here are no loops over views, blocks
or processes, and the gradient is made along with the loss, but for its last factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from barlow.forms import Forward
from barlow.standardise import EPS, wide

SMALL = 2**16  # numbers in one view: beyond, passes over memory cost more than calls


def fits(z: Sequence[Tensor], world: int, lambda_: float) -> bool:
    """Whether this room is meant for these views. (For two images ∂L/∂z has a formula of its own.)"""
    return len(z) == 2 and world == 1 and z[0].numel() <= SMALL and len(z[0]) > 2 and lambda_ > 0.0


def correlation(z: Sequence[Tensor], dtype: torch.dtype, lambda_: float) -> tuple[list[Tensor], Forward, Tensor]:
    """As ``forms.correlation`` on one process; but what comes first lacks only a factor to be the gradients."""
    z_a, z_b = z
    a, _, w_a = torch.native_batch_norm(z_a - z_a[0].to(dtype), None, None, None, None, True, 0.0, EPS)
    b, _, w_b = torch.native_batch_norm(z_b - z_b[0].to(dtype), None, None, None, None, True, 0.0, EPS)
    c = torch.mm(a.T, b).div_(len(a))
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


def gradient(g: Sequence[Tensor], scale: Tensor, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z of both views."""
    factor = scale * (gain * (2.0 * lambda_ / len(g[0])))
    return [part * w for part, w in zip(g, factor.unbind(), strict=True)]
