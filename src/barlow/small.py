"""The correlation form of two views that fit in one block: the formulas of ``forms`` in a straight line.

For embeddings this small the time goes into the calls, not into the arithmetic; so here are no loops over views, blocks
or processes, and Â is kept from the forward pass for the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from barlow.forms import EPS, Forward, wide


def fits(z: Sequence[Tensor], world: int) -> bool:
    """Whether this room is meant for these views on so many processes."""
    return len(z) == 2 and world == 1 and z[0].numel() <= 2**19


def correlation(z: Sequence[Tensor], dtype: torch.dtype) -> tuple[Forward, Tensor]:
    """As ``forms.correlation`` on one process."""
    z_a, z_b = z
    row_a, row_b = z_a[0].to(dtype), z_b[0].to(dtype)
    a, _, w_a = torch.native_batch_norm(z_a - row_a, None, None, None, None, True, 0.0, EPS)
    b, _, w_b = torch.native_batch_norm(z_b - row_b, None, None, None, None, True, 0.0, EPS)
    c = torch.mm(a.T, b).div_(len(a))
    on_diagonal = c.diagonal()
    diagonal = on_diagonal.clone()
    on_diagonal.zero_()
    squared = c.square()
    rows = squared.sum(1)
    return Forward((), (w_a, w_b), (diagonal,), (rows, squared.sum(0)), (c,), (a, b)), rows.sum(dtype=wide(c))


def gradient(saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """As ``forms.correlation_gradient``."""
    (a, b), (w_a, w_b), (diagonal,), (c,) = saved.hat, saved.scale, saved.diagonal, saved.products
    unit = 2 / len(a)
    s = (diagonal * unit).sub_(unit)
    on_diagonal = s * diagonal
    out = []
    for hat, other, w, own, matrix in ((a, b, w_a * gain, saved.own[0], c.T), (b, a, w_b * gain, saved.own[1], c)):
        m = matrix * (w * (lambda_ * unit))
        torch.mul(s, w, out=m.diagonal())
        g = torch.mm(other, m)
        out.append(g.addcmul_(hat, torch.add(on_diagonal, own, alpha=lambda_ * unit).mul_(w), value=-1.0))
    return out
