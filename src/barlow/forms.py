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

from collections.abc import Sequence
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
    kernels = z[0].new_zeros((views, rows, rows), dtype=dtype)
    panels = _panels(kernels)
    mean, scale = z[0].new_empty((views, dim), dtype=dtype), z[0].new_empty((views, dim), dtype=dtype)
    diagonal = z[0].new_empty((views * (views - 1) // 2, dim), dtype=dtype)
    blocks = _Blocks(z, rows, dim, dtype)
    for block in blocks.along:
        hat, spare, _ = blocks.columns(block)
        hats = _normalise([view[:, block] for view in z], hat, spare, mean[:, block], scale[:, block])
        for k, (a, b) in enumerate(combinations(hats, 2)):
            torch.mean(torch.mul(a, b, out=spare[0]), 0, out=diagonal[k, block])
        add_gram(kernels, hat, panels)
    _mirror(kernels, panels)
    ranks.sum_(kernels)
    others = kernels.flip(0) if views == 2 else kernels.sum(0) - kernels
    squares = torch.sum(kernels.mul_(others), dtype=_wide(kernels)).div_(2 * rows * rows)
    # Σ_b K_b Â_v is mostly a multiple of Â_v (K_b is mostly D·I), which the step through the standardisation projects
    # out. Taking that multiple away beforehand spares the cancellation: sqrt(D/N) in accuracy, free of charge.
    on_diagonal = others.diagonal(dim1=1, dim2=2)
    kappa = on_diagonal.mean(1, keepdim=True)
    on_diagonal.sub_(kappa)
    return Forward(mean, scale, diagonal, squares, others, kappa)


def gram_gradient(z: Sequence[Tensor], saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (N, d) in the dtype of each z; V·N²·D multiplications."""
    rows, dim = z[0].shape
    alpha = 2 * lambda_ / (rows * rows * len(saved.diagonal))
    cross = _cross(saved.diagonal, rows, 1 - lambda_)
    factor = saved.scale * gain
    left = saved.scale.square().mul_(saved.kappa * (alpha * EPS))  # what the projection leaves of κÂ, thanks to eps
    gradients = [torch.empty_like(view) for view in z]
    blocks = _Blocks(z, rows, dim, saved.mean.dtype)
    for block in blocks.along:
        hat, g, spare = blocks.columns(block)
        _standardise([view[:, block] for view in z], saved.mean[:, block], saved.scale[:, block], hat)
        _combine(hat, cross[:, block], g)
        add_product(g, saved.products, hat, alpha)
        own = left[:, block] - torch.mul(hat, g, out=spare).mean(1)
        _finish(g, hat, own, factor[:, block], [gradient[:, block] for gradient in gradients])
    return gradients


def correlation(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> Forward:
    """Forward pass over all columns and the n rows of this process, of ``total``; P·N·D² multiplications."""
    views, (rows, dim) = len(z), z[0].shape
    mean, scale = z[0].new_ones((2, views, dim), dtype=dtype)
    blocks = _Blocks(z, rows, dim, dtype)
    for block in blocks.along if rows else ():
        hat, spare, _ = blocks.columns(block)
        _normalise([view[:, block] for view in z], hat, spare, mean[:, block], scale[:, block])
    if ranks.world_size() > 1:
        mean, scale = _join(mean, scale, rows, total)
    products = correlations(z, total, mean, scale, list(combinations(range(views), 2)))
    on_diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal = on_diagonal.clone()
    on_diagonal.zero_()  # so that the redundancy is a sum and not a difference
    squares = torch.sum(products.square(), dtype=_wide(products))
    return Forward(mean, scale, diagonal, squares, products, kappa=mean.new_zeros((views, 1)))


def correlations(
    z: Sequence[Tensor], total: int, mean: Tensor, scale: Tensor, pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """C_ab of each pair, (P, D, D), from the rows of this process; on several processes all of them must call."""
    rows, dim = z[0].shape
    products = mean.new_zeros((len(pairs), dim, dim))
    blocks = _Blocks(z, dim, rows, mean.dtype)
    for block in blocks.along:
        hat, _, _ = blocks.rows(block)
        _standardise([view[block] for view in z], mean, scale, hat)
        for product, (a, b) in zip(products, pairs, strict=True):
            add_product(product, hat[a].T, hat[b], alpha=1 / total)
    return ranks.sum_(products)


def correlation_gradient(z: Sequence[Tensor], total: int, saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (n, D) in the dtype of each z; 2·P·N·D² multiplications, nothing travels."""
    rows, dim = z[0].shape
    alpha = 2 * lambda_ / (total * len(saved.diagonal))
    cross = _cross(saved.diagonal, total, 1.0)
    factor = saved.scale * gain
    own = torch.zeros_like(factor)  # -mean(Â ⊙ g), which C holds already
    right: list[list[tuple[int, Tensor]]] = [[] for _ in z]  # for every view v its b and C_vbᵀ
    for k, (a, b) in enumerate(combinations(range(len(z)), 2)):
        c, squared, on_diagonal = saved.products[k], saved.products[k].square(), cross[k] * saved.diagonal[k]
        for v, other, matrix, sums in ((a, b, c.T, squared.sum(1)), (b, a, c, squared.sum(0))):
            own[v].sub_(on_diagonal).sub_(sums, alpha=alpha)
            right[v].append((other, matrix))
    gradients = [torch.empty_like(view) for view in z]
    blocks = _Blocks(z, dim, rows, saved.mean.dtype)
    for block in blocks.along:
        hat, g, _ = blocks.rows(block)
        _standardise([view[block] for view in z], saved.mean, saved.scale, hat)
        _combine(hat, cross, g)
        for v, terms in enumerate(right):
            for b, matrix in terms:
                add_product(g[v], hat[b], matrix, alpha)
        _finish(g, hat, own, factor, [gradient[block] for gradient in gradients])
    return gradients


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """``out += alpha * left @ right``: every product of matrices in this room."""
    (out.addmm_ if out.ndim == 2 else out.baddbmm_)(left, right, alpha=alpha)


def add_gram(kernels: Tensor, hat: Tensor, panels: Sequence[slice]) -> None:
    """``kernels += hat @ hat.mT`` on and below the diagonal, panel by panel."""
    if len(panels) == 1:
        add_product(kernels, hat, hat.mT)
        return
    for kernel, view in zip(kernels.unbind(), hat.unbind(), strict=True):
        for panel in panels:
            add_product(kernel[panel, : panel.stop], view[panel], view[: panel.stop].T)


def _panels(kernels: Tensor) -> list[slice]:
    """Row panels of a symmetric product: little more than half the work in eight of them.

    One panel, the full product, where there is little to save or where a launch costs more than the work.
    """
    rows = kernels.shape[1]
    step = rows if kernels.device.type != "cpu" else max(64, -(-rows // 8))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _mirror(kernels: Tensor, panels: Sequence[slice]) -> None:
    for panel in panels[1:]:
        kernels[:, : panel.start, panel] = kernels[:, panel, : panel.start].mT


def _normalise(
    parts: Sequence[Tensor], hat: Tensor, spare: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Â of parts (n, d) that hold all rows, into ``hat``, with mean and w of every column, by PyTorch's BatchNorm.

    Counted from the first row, so that a constant column has exactly that mean and variance 0, however large it is.
    """
    hats = hat.unbind()
    for part, shifted, *out in zip(parts, spare.unbind(), hats, mean.unbind(), scale.unbind(), strict=True):
        torch.sub(part, part[:1], out=shifted)
        torch.native_batch_norm(shifted, None, None, None, None, True, 0.0, EPS, out=out)
        out[1].add_(part[0])
    return hats


def _join(mean: Tensor, scale: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Mean and w over ``total`` rows from those of each process; 1/w² = variance + eps joins as a variance does."""
    share = rows / total
    whole = ranks.sum_(mean.to(_wide(mean)) * share).to(mean.dtype)
    return whole, ranks.sum_((scale.pow(-2) + (mean - whole).square_()).mul_(share)).rsqrt_()


def _standardise(parts: Sequence[Tensor], mean: Tensor, scale: Tensor, hat: Tensor) -> None:
    for part, centred, m in zip(parts, hat.unbind(), mean.unbind(), strict=True):
        torch.sub(part, m, out=centred)
    hat.mul_(scale.unsqueeze(1))


def _cross(diagonal: Tensor, rows: int, share: float) -> Tensor:
    """Weight of Â_b in g_a and of Â_a in g_b, (P, d). ``share``: 1-λ if the products hold the diagonal of C, else 1."""
    unit = 2.0 / (rows * len(diagonal))
    return (diagonal * (share * unit)).sub_(unit)


def _combine(hat: Tensor, cross: Tensor, out: Tensor) -> None:
    """``out[v] = Σ_{b≠v} cross_vb ⊙ Â_b``."""
    hats, sums, fresh = hat.unbind(), out.unbind(), set(range(len(hat)))
    for weight, (a, b) in zip(cross.unbind(), combinations(range(len(hats)), 2), strict=True):
        for v, other in ((a, b), (b, a)):
            if v in fresh:
                torch.mul(hats[other], weight, out=sums[v])
                fresh.discard(v)
            else:
                sums[v].addcmul_(hats[other], weight)


def _finish(g: Tensor, hat: Tensor, own: Tensor, factor: Tensor, gradients: Sequence[Tensor]) -> None:
    """``factor ⊙ (g + own ⊙ Â)``, rounded to the dtypes of the gradients."""
    g.addcmul_(hat, own.unsqueeze(1))
    for gradient, whole, scale in zip(gradients, g.unbind(), factor.unbind(), strict=True):
        torch.mul(whole, scale, out=gradient)


class _Blocks:
    """How the way ``along`` is cut into blocks that stay in cache, and room for one block of all views, thrice."""

    def __init__(self, z: Sequence[Tensor], across: int, along: int, dtype: torch.dtype) -> None:
        budget = 2**18 if z[0].device.type == "cpu" else 2**24
        width = max(256, budget // max(1, len(z) * across))
        width = max(1, -(-along // max(1, -(-along // width))))
        self.along = [slice(start, min(start + width, along)) for start in range(0, along, width)]
        self._across, self._like = across, z[0].new_empty((3, len(z), 0, 0), dtype=dtype)
        self._rooms = self._like.unbind()

    def columns(self, block: slice) -> tuple[Tensor, ...]:
        """Three tensors (V, across, width of the block)."""
        return self._cut(self._across, block.stop - block.start)

    def rows(self, block: slice) -> tuple[Tensor, ...]:
        """Three tensors (V, width of the block, across)."""
        return self._cut(block.stop - block.start, self._across)

    def _cut(self, n: int, d: int) -> tuple[Tensor, ...]:
        if self._rooms[0].shape[1:] != (n, d):
            self._rooms = self._like.new_empty((3, self._like.shape[1], n, d)).unbind()
        return self._rooms


def _wide(like: Tensor) -> torch.dtype:
    """float64 for sums of many squares, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
