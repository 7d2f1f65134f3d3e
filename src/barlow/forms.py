"""The two exact forms of the loss and their gradients written by hand, block by block: no autograd inside.

Letters: V views, N images of the whole batch, D features, P = V(V-1)/2 pairs of views. Â_v is view v with every column
standardised over the whole batch, C_ab = Â_aᵀÂ_b / N, c_ab its diagonal, w = 1/sqrt(variance + eps). Since

    Σᵢⱼ (C_ab)ᵢⱼ² = ⟨Â_aÂ_aᵀ, Â_bÂ_bᵀ⟩ / N²,

the loss needs either V Gram matrices Â_vÂ_vᵀ (N×N; "gram") or P cross-correlation matrices (D×D; "correlation").
With s = -2(1 - c_vb) - 2λc_vb the gradient is, in either form and averaged over the P pairs,

    g_v = ∂L/∂Â_v = Σ_{b≠v} [ (2λ/N²) Â_bÂ_bᵀÂ_v + Â_b diag(s_vb)/N ]
    ∂L/∂z_v = w_v ⊙ (g_v - Â_v ⊙ mean(Â_v ⊙ g_v)),

the step through the standardisation; its usual third term, mean(g_v), is zero because the columns of Â_b sum to zero.

Across processes each form holds what it can sum: Gram all rows and a share of the columns, so that N×N sums travel;
correlation all columns and the rows of this process, so that D×D sums travel.
Blocks are sized to stay in cache: Â is never stored, it is made again from z where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from barlow import ranks

EPS = 1e-5  # added to the variance, inside the root: nn.BatchNorm1d(affine=False), which the published code uses


class Forward(NamedTuple):
    """What a forward pass leaves for the terms and the gradient; d = D, or in the Gram form this process's share."""

    mean: Tensor  # (V, d)
    scale: Tensor  # (V, d), w
    diagonal: Tensor  # (P, d), c
    squares: Tensor  # scalar, Σ Cᵢⱼ² over all pairs; correlation: without the diagonal
    products: Tensor  # Gram: (V, N, N), Σ_{b≠v} Â_bÂ_bᵀ - κ_v·I; correlation: (P, D, D), C with 0 on its diagonal
    kappa: Tensor  # (V, 1), 0 in the correlation form


def cheaper(rows: int, dim: int, views: int = 2, world: int = 1, halves: bool = True) -> str:
    """``"gram"`` or ``"correlation"``: by multiplications on one process, by numbers moved per process on several.

    Gram costs 1.5·V·N²·D multiplications where symmetric products take half the work (``halves``) and 2·V·N²·D where
    they do not; correlation 3·P·N·D². So Gram wins for N < (V-1)·D, or three quarters of it.
    """
    pairs = views * (views - 1) / 2
    if world > 1:  # an all-reduce moves every number twice; columns go out and their gradient comes back
        return "gram" if 2 * views * (rows * dim / world + rows * rows) < 2 * pairs * dim * dim else "correlation"
    return "gram" if (1.5 if halves else 2.0) * views * rows < 3 * pairs * dim else "correlation"


def gram(z: Sequence[Tensor], dtype: torch.dtype) -> Forward:
    """Forward pass over all N rows and the d columns of this process, (N, d) each; V·N²·D/2 multiplications."""
    views, (rows, dim) = len(z), z[0].shape
    pairs = list(combinations(range(views), 2))
    kernels = z[0].new_zeros((views, rows, rows), dtype=dtype)
    mean, scale = z[0].new_empty((2, views, dim), dtype=dtype)
    diagonal = z[0].new_empty((len(pairs), dim), dtype=dtype)
    blocks = _Blocks(z, rows, dim, dtype)
    for block in blocks.along:
        parts = [view[:, block] for view in z]
        hat, spare = blocks.columns(block, 0), blocks.columns(block, 1)
        mean[:, block], scale[:, block] = _moments(parts, rows, hat, spare, lambda sums: sums)
        hat.mul_(scale[:, None, block])
        for k, (a, b) in enumerate(pairs):
            diagonal[k, block] = torch.mul(hat[a], hat[b], out=spare[0]).sum(0)
        add_gram(kernels, hat)
    ranks.sum_(_mirror(kernels))
    others = kernels.flip(0) if views == 2 else kernels.sum(0) - kernels
    squares = torch.sum(kernels.mul_(others), dtype=_wide(kernels)) / (2 * rows * rows)
    # Σ_b K_b Â_v is mostly a multiple of Â_v (K_b is mostly D·I), which the step through the standardisation projects
    # out. Taking that multiple away beforehand spares the cancellation: sqrt(D/N) in accuracy, free of charge.
    on_diagonal = others.diagonal(dim1=1, dim2=2)
    kappa = on_diagonal.mean(1, keepdim=True)
    on_diagonal.sub_(kappa)
    return Forward(mean, scale, diagonal.div_(rows), squares, others, kappa)


def gram_gradient(z: Sequence[Tensor], saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (N, d) in the dtype of each z; V·N²·D multiplications."""
    views, (rows, dim) = len(z), z[0].shape
    alpha = gain * (2 * lambda_ / (rows * rows * len(saved.diagonal)))
    products = saved.products * alpha
    square = saved.scale.square()  # Ŷ = w ⊙ Â is used for Â, so that the product comes out multiplied by w
    cross = _cross(saved.diagonal, saved.scale, gain, rows, 1 - lambda_)
    cross /= saved.scale
    lift = EPS * alpha * saved.kappa * square  # κÂ is projected out but for what eps took from Â
    shrink = -1.0 / (rows * square)
    gradients = [torch.empty_like(view) for view in z]
    blocks = _Blocks(z, rows, dim, saved.mean.dtype)
    for block in blocks.along:
        hat, product, spare = (blocks.columns(block, room) for room in range(3))
        _centre([view[:, block] for view in z], saved.mean[:, block], hat)
        hat.mul_(square[:, None, block])
        _combine(hat, cross[..., block], product)
        add_product(product, products, hat)
        own = torch.mul(hat, product, out=spare).sum(1).mul_(shrink[:, block]).add_(lift[:, block])
        for gradient, *factors in zip(gradients, product, hat, own, strict=True):
            torch.addcmul(*factors, out=gradient[:, block])
    return gradients


def correlation(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> Forward:
    """Forward pass over all columns and the n rows of this process, of ``total``; P·N·D² multiplications."""
    views, (rows, dim) = len(z), z[0].shape
    mean, scale = z[0].new_empty((2, views, dim), dtype=dtype)
    blocks = _Blocks(z, rows, dim, dtype)
    for block in blocks.along:
        hat, spare = blocks.columns(block, 0), blocks.columns(block, 1)
        parts = [view[:, block] for view in z]
        mean[:, block], scale[:, block] = _moments(parts, total, hat, spare, ranks.sum_)
    products = correlations(z, total, mean, scale, list(combinations(range(views), 2)))
    on_diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal = on_diagonal.clone()
    on_diagonal.zero_()  # so that the redundancy is a sum and not a difference
    squares = torch.stack([torch.sum(c.square(), dtype=_wide(c)) for c in products]).sum()
    return Forward(mean, scale, diagonal, squares, products, kappa=mean.new_zeros((views, 1)))


def correlations(
    z: Sequence[Tensor], total: int, mean: Tensor, scale: Tensor, pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """C_ab of each pair, (P, D, D), from the rows of this process; on several processes all of them must call."""
    rows, dim = z[0].shape
    products = mean.new_zeros((len(pairs), dim, dim))
    blocks = _Blocks(z, dim, rows, mean.dtype)
    for block in blocks.along:
        hat = blocks.rows(block, 0)
        _centre([view[block] for view in z], mean, hat)
        hat.mul_(scale.unsqueeze(1))
        for product, (a, b) in zip(products, pairs, strict=True):
            add_product(product, hat[a].T, hat[b], alpha=1 / total)
    return ranks.sum_(products)


def correlation_gradient(z: Sequence[Tensor], total: int, saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (n, D) in the dtype of each z; 2·P·N·D² multiplications, nothing travels."""
    views, (rows, dim) = len(z), z[0].shape
    factor = saved.scale * gain
    weight = 2 * lambda_ / (total * len(saved.diagonal))
    cross = _cross(saved.diagonal, saved.scale, gain, total, 1.0)
    own = torch.zeros_like(factor)  # -w ⊙ mean(Â ⊙ g), which C holds already
    right: list[list[tuple[int, Tensor]]] = [[] for _ in z]  # for every view v its b and C_vbᵀ, multiplied by w_v
    pairs = combinations(range(views), 2)
    for (a, b), c, on_diagonal in zip(pairs, saved.products, saved.diagonal, strict=True):
        squared = c.square()
        for v, other, matrix, sums in ((a, b, c.T, squared.sum(1)), (b, a, c, squared.sum(0))):
            own[v].addcmul_(cross[v, other], on_diagonal, value=-1.0).addcmul_(factor[v], sums, value=-weight)
            right[v].append((other, matrix * (factor[v] * weight)))
    gradients = [torch.empty_like(view) for view in z]
    blocks = _Blocks(z, dim, rows, saved.mean.dtype)
    for block in blocks.along:
        hat, product = blocks.rows(block, 0), blocks.rows(block, 1)
        _centre([view[block] for view in z], saved.mean, hat)
        hat.mul_(saved.scale.unsqueeze(1))
        _combine(hat, cross, product)
        for v, gradient in enumerate(gradients):
            for b, matrix in right[v]:
                add_product(product[v], hat[b], matrix)
            torch.addcmul(product[v], hat[v], own[v], out=gradient[block])
    return gradients


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """``out += alpha * left @ right``: every product of matrices in this room."""
    (out.addmm_ if out.ndim == 2 else out.baddbmm_)(left, right, alpha=alpha)


def add_gram(kernels: Tensor, hat: Tensor) -> None:
    """``kernel += hat @ hat.T``, on the CPU in panels on and below the diagonal: little more than half the work."""
    panels = _panels(kernels)
    if len(panels) == 1:
        add_product(kernels, hat, hat.mT)
        return
    for kernel, view in zip(kernels, hat, strict=True):
        for panel in panels:
            add_product(kernel[panel, : panel.stop], view[panel], view[: panel.stop].T)


def _panels(kernels: Tensor) -> list[slice]:
    """Row panels of the lower triangle; one panel (the full product) where there is little to save or launches cost."""
    rows = kernels.shape[1]
    step = rows if kernels.device.type != "cpu" else max(64, -(-rows // 8))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _mirror(kernels: Tensor) -> Tensor:
    """Copies the panels below the diagonal to the other side."""
    for panel in _panels(kernels)[1:]:
        kernels[:, : panel.start, panel] = kernels[:, panel, : panel.start].mT
    return kernels


def _moments(
    parts: Sequence[Tensor], total: int, hat: Tensor, spare: Tensor, add: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and w of every column, (V, d) each; leaves the centred parts in ``hat``. ``add`` sums over processes.

    Sums are taken of differences from the first row, and put together in float64: the mean of a constant column is that
    constant, to the bit, however large, and its variance zero.
    """
    first = torch.stack([part[:1].sum(0, dtype=_wide(hat)) for part in parts])
    for part, difference in zip(parts, hat, strict=True):
        torch.sub(part, part[:1], out=difference)
    mean = add(first.mul_(hat.shape[1]).add_(hat.sum(1))).div_(total).to(hat.dtype)
    _centre(parts, mean, hat)
    variance = add(torch.mul(hat, hat, out=spare).sum(1)).div_(total)
    return mean, variance.add_(EPS).rsqrt_()


def _centre(parts: Sequence[Tensor], mean: Tensor, hat: Tensor) -> None:
    for part, centred, m in zip(parts, hat, mean, strict=True):
        torch.sub(part, m, out=centred)


def _cross(diagonal: Tensor, scale: Tensor, gain: Tensor, rows: int, share: float) -> Tensor:
    """The weight of Â_b in ∂L/∂z_v, (V, V, d). ``share``: 1-λ where the products hold the diagonal of C, else 1."""
    views, dim = scale.shape
    cross = scale.new_zeros((views, views, dim))
    weights = (diagonal * (2 * share)).sub_(2.0).mul_(gain / (rows * len(diagonal)))
    for (a, b), weight in zip(combinations(range(views), 2), weights, strict=True):
        torch.mul(weight, scale[a], out=cross[a, b])
        torch.mul(weight, scale[b], out=cross[b, a])
    return cross


def _combine(hat: Tensor, cross: Tensor, out: Tensor) -> None:
    """``out[v] = Σ_{b≠v} cross[v, b] ⊙ hat[b]``."""
    for v, mixed in enumerate(out):
        first, *rest = (b for b in range(len(hat)) if b != v)
        torch.mul(hat[first], cross[v, first], out=mixed)
        for b in rest:
            mixed.addcmul_(hat[b], cross[v, b])


class _Blocks:
    """How the way ``along`` is cut into blocks that stay in cache, and room for one block of all views, thrice."""

    def __init__(self, z: Sequence[Tensor], across: int, along: int, dtype: torch.dtype) -> None:
        budget = 2**18 if z[0].device.type == "cpu" else 2**24
        width = max(256, budget // max(1, len(z) * across))
        width = max(1, -(-along // max(1, -(-along // width))))
        self.along = [slice(start, min(start + width, along)) for start in range(0, along, width)]
        self._across, self._room = across, z[0].new_empty((3, len(z), across * width), dtype=dtype)

    def columns(self, block: slice, room: int) -> Tensor:
        """(V, across, width of the block)."""
        width = block.stop - block.start
        return self._room[room, :, : self._across * width].view(-1, self._across, width)

    def rows(self, block: slice, room: int) -> Tensor:
        """(V, width of the block, across)."""
        width = block.stop - block.start
        return self._room[room, :, : self._across * width].view(-1, width, self._across)


def _wide(like: Tensor) -> torch.dtype:
    """float64 for sums of many squares, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
