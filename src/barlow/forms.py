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
    kernels, scratch = z[0].new_zeros((views, rows, rows), dtype=dtype), _Scratch(z, rows, dim, dtype)
    mean, scale = z[0].new_empty((2, views, dim), dtype=dtype)
    pairs = list(combinations(range(views), 2))
    diagonal = z[0].new_empty((len(pairs), dim), dtype=dtype)
    for block in scratch.blocks:
        parts = [view[:, block] for view in z]
        hat, spare = scratch.columns(block), scratch.columns(block, 1)
        mean[:, block], scale[:, block] = _moments(parts, rows, hat, spare, lambda sums: sums)
        _standardise(parts, mean[:, block], scale[:, block], hat)
        for k, (a, b) in enumerate(pairs):
            diagonal[k, block] = torch.mul(hat[a], hat[b], out=spare[0]).sum(0)
        for kernel, view in zip(kernels, hat, strict=True):
            add_gram(kernel, view)
    ranks.sum_(_mirror(kernels))
    others = kernels.flip(0) if views == 2 else kernels.sum(0) - kernels
    squares = (kernels * others).sum(dtype=_wide(z[0])) / (2 * rows * rows)
    # K_b Â_v is mostly a multiple of Â_v (K_b is mostly D·I), which the step through the standardisation projects out.
    # Taking that multiple away beforehand spares the cancellation: sqrt(D/N) in accuracy, free of charge.
    on_diagonal = others.diagonal(dim1=1, dim2=2)
    kappa = on_diagonal.mean(1, keepdim=True)
    on_diagonal.sub_(kappa)
    return Forward(mean, scale, diagonal.div_(rows), squares, others, kappa)


def gram_gradient(
    z: Sequence[Tensor], saved: Forward, lambda_: float, gain: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """``gain`` · ∂L/∂z of the wanted views, (N, d) in the dtype of each; cost V·N²·D."""
    views, (rows, dim) = len(z), z[0].shape
    scratch = _Scratch(z, rows, dim, saved.mean.dtype)
    alpha = 2 * lambda_ / (rows * rows * len(saved.diagonal))
    factor = saved.scale * gain
    cross, own = _weights(saved.diagonal, views, rows, 1 - lambda_)
    own.add_(alpha * EPS * saved.kappa * saved.scale.square())  # κÂ is projected out but for what eps took from Â
    gradients = [torch.empty_like(view) if want else None for view, want in zip(z, wanted, strict=True)]
    for block in scratch.blocks:
        hat, spare = scratch.columns(block), scratch.columns(block, 1)
        _standardise([view[:, block] for view in z], saved.mean[:, block], saved.scale[:, block], hat)
        for v, gradient in enumerate(gradients):
            if gradient is None:
                continue
            product = add_product(spare[0], saved.products[v], hat[v], alpha, beta=0.0)
            on_own = own[v, block] - torch.mul(product, hat[v], out=spare[1]).sum(0).div_(rows)
            _finish(product, hat, v, factor[v, block], on_own, cross[v, :, block], out=gradient[:, block])
    return gradients


def correlation(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> Forward:
    """Forward pass over all columns and the n rows of this process, of ``total`` rows; cost P·N·D² and D×D sums."""
    views, (rows, dim) = len(z), z[0].shape
    mean, scale = z[0].new_empty((2, views, dim), dtype=dtype)
    scratch = _Scratch(z, rows, dim, dtype)
    for block in scratch.blocks:
        parts = [view[:, block] for view in z]
        hat, spare = scratch.columns(block), scratch.columns(block, 1)
        mean[:, block], scale[:, block] = _moments(parts, total, hat, spare, ranks.sum_)
    pairs = list(combinations(range(views), 2))
    products = correlations(z, total, mean, scale, pairs)
    on_diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal = on_diagonal.clone()
    on_diagonal.zero_()  # so that the redundancy is a sum and not a difference
    squares = torch.stack([c.square().sum(dtype=_wide(c)) for c in products]).sum()
    return Forward(mean, scale, diagonal, squares, products, kappa=mean.new_zeros((views, 1)))


def correlations(
    z: Sequence[Tensor], total: int, mean: Tensor, scale: Tensor, pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """C_ab of each pair, (P, D, D), from the rows of this process; on several processes all of them must call."""
    rows, dim = z[0].shape
    scratch = _Scratch(z, dim, rows, mean.dtype)
    products = mean.new_zeros((len(pairs), dim, dim))
    for block in scratch.blocks:
        hat = scratch.rows(block)
        _standardise([view[block] for view in z], mean, scale, hat)
        for product, (a, b) in zip(products, pairs, strict=True):
            add_product(product, hat[a].T, hat[b], 1 / total)
    return ranks.sum_(products)


def correlation_gradient(
    z: Sequence[Tensor], total: int, saved: Forward, lambda_: float, gain: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """``gain`` · ∂L/∂z of the wanted views, (n, D) in the dtype of each; cost 2·P·N·D², nothing moves."""
    views, (rows, dim) = len(z), z[0].shape
    scratch = _Scratch(z, dim, rows, saved.mean.dtype)
    alpha = 2 * lambda_ / (total * len(saved.diagonal))
    factor = saved.scale * gain
    cross, own = _weights(saved.diagonal, views, total, 1.0)
    right: list[list[tuple[int, Tensor]]] = [[] for _ in z]  # Σ_b Â_b C_abᵀ: for every view its b and C_abᵀ
    for product, (a, b) in zip(saved.products, combinations(range(views), 2), strict=True):
        squared = product.square()
        own[a].sub_(squared.sum(1), alpha=alpha)
        own[b].sub_(squared.sum(0), alpha=alpha)
        right[a].append((b, product.T))
        right[b].append((a, product))
    gradients = [torch.empty_like(view) if want else None for view, want in zip(z, wanted, strict=True)]
    for block in scratch.blocks:
        hat, spare = scratch.rows(block), scratch.rows(block, 1)[0]
        _standardise([view[block] for view in z], saved.mean, saved.scale, hat)
        for v, gradient in enumerate(gradients):
            if gradient is None:
                continue
            for k, (b, matrix) in enumerate(right[v]):
                add_product(spare, hat[b], matrix, alpha, beta=float(k > 0))
            _finish(spare, hat, v, factor[v], own[v], cross[v], out=gradient[block])
    return gradients


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """``out = beta * out + alpha * left @ right``: every product of matrices in this room. beta = 0 ignores ``out``."""
    return torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)


def add_gram(kernel: Tensor, hat: Tensor) -> None:
    """``kernel += hat @ hat.T``, on the CPU in panels on and below the diagonal: little more than half the work."""
    for panel in _panels(len(hat), kernel.device):
        add_product(kernel[panel, : panel.stop], hat[panel], hat[: panel.stop].T)


def _panels(rows: int, device: torch.device) -> list[slice]:
    """Row panels of the lower triangle; one panel (the full product) where there is little to save or launches cost."""
    step = rows if device.type != "cpu" else max(64, -(-rows // 8))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _mirror(kernels: Tensor) -> Tensor:
    """Copies the panels below the diagonal to the other side."""
    for panel in _panels(kernels.shape[1], kernels.device)[1:]:
        kernels[:, : panel.start, panel] = kernels[:, panel, : panel.start].mT
    return kernels


def _moments(
    parts: Sequence[Tensor], total: int, hat: Tensor, spare: Tensor, add: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and w of every column, (V, d) each: the corrected two-pass algorithm (Chan, Golub & LeVeque 1983, eq. 1.7).

    The correction makes the variance of a constant column zero however large the constant.
    ``add`` sums over processes.
    """
    mean = add(torch.stack([part.sum(0, dtype=hat.dtype) for part in parts])).div_(total)
    for part, centred, m in zip(parts, hat, mean, strict=True):
        torch.sub(part, m, out=centred)
    torch.mul(hat, hat, out=spare)
    first, second = add(torch.stack((hat.sum(1), spare.sum(1)))).div_(total)
    variance = second.addcmul_(first, first, value=-1.0).clamp_min_(0.0)
    return mean.add_(first), variance.add_(EPS).rsqrt_()


def _standardise(parts: Sequence[Tensor], mean: Tensor, scale: Tensor, hat: Tensor) -> None:
    for part, centred, m in zip(parts, hat, mean, strict=True):
        torch.sub(part, m, out=centred)
    hat.mul_(scale.unsqueeze(1))


def _weights(diagonal: Tensor, views: int, rows: int, share: float) -> tuple[Tensor, Tensor]:
    """Weights of Â_b (V, V, d) and Â_v (V, d) in ∂L/∂z_v; ``share``: 1-λ if the products hold the diagonal, else 1."""
    cross = diagonal.new_zeros((views, views, diagonal.shape[1]))
    own = diagonal.new_zeros((views, diagonal.shape[1]))
    weights = (diagonal * (2 * share)).sub_(2.0).div_(rows * len(diagonal))
    for (a, b), s, sc in zip(combinations(range(views), 2), weights, weights * diagonal, strict=True):
        cross[a, b] = cross[b, a] = s
        own[a].sub_(sc)
        own[b].sub_(sc)
    return cross, own


def _finish(product: Tensor, hat: Tensor, v: int, factor: Tensor, own: Tensor, cross: Tensor, out: Tensor) -> None:
    """``out = factor ⊙ (product + own ⊙ Â_v + Σ_b cross_b ⊙ Â_b)``; the last sum writes (and rounds) into ``out``."""
    product.mul_(factor).addcmul_(hat[v], own * factor)
    *rest, last = (b for b in range(len(hat)) if b != v)
    for b in rest:
        product.addcmul_(hat[b], cross[b] * factor)
    torch.addcmul(product, hat[last], cross[last] * factor, out=out)


class _Scratch:
    """Room for one block of all views, twice, and how the longer way is cut into blocks that stay in cache."""

    def __init__(self, z: Sequence[Tensor], across: int, along: int, dtype: torch.dtype) -> None:
        budget = 2**18 if z[0].device.type == "cpu" else 2**24
        width = max(256, budget // max(1, len(z) * across))
        count = max(1, -(-along // width))
        width = -(-along // count)
        self.blocks = [slice(start, min(start + width, along)) for start in range(0, along, max(1, width))]
        self._room = z[0].new_empty((2, len(z), across * width), dtype=dtype)
        self._across = across

    def columns(self, block: slice, which: int = 0) -> Tensor:
        """(V, across, width of the block)."""
        return self._cut(block, which).view(self._room.shape[1], self._across, block.stop - block.start)

    def rows(self, block: slice, which: int = 0) -> Tensor:
        """(V, width of the block, across)."""
        return self._cut(block, which).view(self._room.shape[1], block.stop - block.start, self._across)

    def _cut(self, block: slice, which: int) -> Tensor:
        return self._room[which, :, : self._across * (block.stop - block.start)]


def _wide(like: Tensor) -> torch.dtype:
    """float64 for the sums of many squares, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
