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

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from barlow import ranks

EPS = 1e-5  # added to the variance, inside the root: nn.BatchNorm1d(affine=False), which the published code uses
ALL = slice(None)


class Forward(NamedTuple):
    """What a forward pass leaves for the terms and the gradient; d = D, or in the Gram form this process's share."""

    mean: Tensor  # (V, d)
    scale: Tensor  # (V, d), w
    diagonal: Tensor  # (P, d), c
    squares: Tensor  # scalar, Σ Cᵢⱼ² over all pairs; correlation: without the diagonal
    products: Tensor  # Gram: (V, N, N), Σ_{b≠v} Â_bÂ_bᵀ - κ_v·I; correlation: (P, D, D), C with 0 on its diagonal
    own: Tensor  # Gram: (V, 1), κ; correlation: (V, D), Σ_b Σ_{j≠i} (C_vb)ᵢⱼ²
    hat: Tensor  # (V, N, d), Â where all of it is one block, else empty


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
    panels = row_panels(kernels)
    mean, scale = z[0].new_empty((views, dim), dtype=dtype), z[0].new_empty((views, dim), dtype=dtype)
    diagonal = z[0].new_empty((views * (views - 1) // 2, dim), dtype=dtype)
    hat = kernels
    for (_, columns), (hat, spare) in _blocks(z, 1, dtype):
        hats, (room, *_) = hat.unbind(), spare.unbind()
        _normalise([view[:, columns] for view in z], hats, room, mean[:, columns], scale[:, columns])
        for k, (a, b) in enumerate(combinations(hats, 2)):
            torch.mean(torch.mul(a, b, out=room), 0, out=diagonal[k, columns])
        add_gram(kernels, hat, panels)
    for panel in panels[1:]:
        kernels[:, : panel.start, panel] = kernels[:, panel, : panel.start].mT
    ranks.sum_(kernels)
    others = kernels.flip(0) if views == 2 else kernels.sum(0) - kernels
    squares = torch.sum(kernels.mul_(others), dtype=_wide(kernels)).div_(2 * rows * rows)
    # Σ_b K_b Â_v is mostly a multiple of Â_v (K_b is mostly D·I), which the step through the standardisation projects
    # out. Taking that multiple away beforehand spares the cancellation: sqrt(D/N) in accuracy, free of charge.
    on_diagonal = others.diagonal(dim1=1, dim2=2)
    kappa = on_diagonal.mean(1, keepdim=True)
    on_diagonal.sub_(kappa)
    return Forward(mean, scale, diagonal, squares, others, kappa, _if_whole(hat, rows, dim))


def gram_gradient(z: Sequence[Tensor], saved: Forward, lambda_: float, gain: Tensor) -> Tensor:
    """``gain`` · ∂L/∂z, (V, N, d); V·N²·D multiplications."""
    rows = len(z[0])
    alpha = 2 * lambda_ / (rows * rows * len(saved.diagonal))
    cross = _cross(saved.diagonal, rows, 1 - lambda_)
    factor = saved.scale * gain
    left = saved.scale.square().mul_(saved.own * (alpha * EPS))  # what the projection leaves of κÂ, thanks to eps
    gradient = saved.mean.new_empty((len(z), *z[0].shape))
    for (_, columns), (hat, spare) in _standardised(z, saved, 1):
        g = gradient[:, :, columns]
        _combine(hat, cross[:, columns], g)
        add_product(g, saved.products, hat, alpha)
        own = left[:, columns] - torch.mul(hat, g, out=spare).mean(1)
        g.addcmul_(hat, own.unsqueeze(1)).mul_(factor[:, None, columns])
    return gradient


def correlation(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> Forward:
    """Forward pass over all columns and the n rows of this process, of ``total``; P·N·D² multiplications."""
    views, (rows, dim) = len(z), z[0].shape
    mean, scale = z[0].new_ones((views, dim), dtype=dtype), z[0].new_ones((views, dim), dtype=dtype)
    hat = z[0].new_empty(0, dtype=dtype)
    for (_, columns), (hat, spare) in _blocks(z, 1, dtype) if rows else ():
        _normalise([view[:, columns] for view in z], hat.unbind(), spare[0], mean[:, columns], scale[:, columns])
    hat = _if_whole(hat, rows, dim)
    if ranks.world_size() > 1:
        (mean, scale), hat = _join(mean, scale, rows, total), hat.new_empty(0)
    saved = Forward(mean, scale, mean, mean, mean, torch.zeros_like(mean), hat)
    products = correlations(z, total, saved, list(combinations(range(views), 2)))
    on_diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal = on_diagonal.clone()
    on_diagonal.zero_()  # so that the redundancy is a sum and not a difference
    for (a, b), product in zip(combinations(saved.own.unbind(), 2), products.unbind(), strict=True):
        squared = product.square()
        a.add_(squared.sum(1))
        b.add_(squared.sum(0))
    squares = torch.sum(saved.own, dtype=_wide(mean)) / 2
    return saved._replace(diagonal=diagonal, squares=squares, products=products)


def correlations(z: Sequence[Tensor], total: int, saved: Forward, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """C_ab of each pair, (P, D, D), from the rows of this process; on several processes all of them must call."""
    products = saved.mean.new_zeros((len(pairs), z[0].shape[1], z[0].shape[1]))
    for _, (hat,) in _standardised(z, saved, 0, rooms=1):
        for product, (a, b) in zip(products.unbind(), pairs, strict=True):
            add_product(product, hat[a].T, hat[b], alpha=1 / total)
    return ranks.sum_(products)


def correlation_gradient(z: Sequence[Tensor], total: int, saved: Forward, lambda_: float, gain: Tensor) -> Tensor:
    """``gain`` · ∂L/∂z, (V, n, D); 2·P·N·D² multiplications, nothing travels."""
    alpha = 2 * lambda_ / (total * len(saved.diagonal))
    cross = _cross(saved.diagonal, total, 1.0)
    factor = saved.scale * gain
    own = saved.own * -alpha  # -mean(Â ⊙ g), which C holds already
    right: list[list[tuple[int, Tensor]]] = [[] for _ in z]  # g_v = Σ_b Â_b M_vb + own_v ⊙ Â_v, multiplied by w_v
    pairs = zip(combinations(range(len(z)), 2), saved.products.unbind(), cross, cross * saved.diagonal, strict=True)
    for (a, b), product, weight, minus in pairs:
        for v, other, matrix in ((a, b, product.T), (b, a, product)):
            own[v].sub_(minus)
            m = matrix * (factor[v] * alpha)
            torch.mul(weight, factor[v], out=m.diagonal())
            right[v].append((other, m))
    own.mul_(factor)
    gradient = saved.mean.new_empty((len(z), *z[0].shape))
    for (rows, _), (hat,) in _standardised(z, saved, 0, rooms=1):
        hats = hat.unbind()
        for view, g, row, products in zip(hats, gradient[:, rows].unbind(), own.unbind(), right, strict=True):
            torch.mul(view, row, out=g)
            for b, m in products:
                add_product(g, hats[b], m)
    return gradient


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


def row_panels(kernels: Tensor) -> list[slice]:
    """Row panels of a symmetric product: little more than half the work in eight of them.

    One panel, the full product, where there is little to save or where a launch costs more than the work.
    """
    rows = kernels.shape[1]
    step = rows if kernels.device.type != "cpu" else max(64, -(-rows // 8))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _normalise(parts: Sequence[Tensor], hats: Sequence[Tensor], room: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Â of parts (n, d) that hold all rows, into ``hats``, with mean and w of every column, by PyTorch's BatchNorm.

    Counted from the first row, so that a constant column has exactly that mean and variance 0, however large it is.
    """
    for part, *out in zip(parts, hats, mean.unbind(), scale.unbind(), strict=True):
        first = part[0]
        torch.sub(part, first, out=room)
        torch.native_batch_norm(room, None, None, None, None, True, 0.0, EPS, out=out)
        out[1].add_(first)


def _join(mean: Tensor, scale: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Mean and w over ``total`` rows from those of each process; 1/w² = variance + eps joins as a variance does."""
    share = rows / total
    whole = ranks.sum_(mean.to(_wide(mean)) * share).to(mean.dtype)
    return whole, ranks.sum_((scale.pow(-2) + (mean - whole).square_()).mul_(share)).rsqrt_()


def _cross(diagonal: Tensor, rows: int, share: float) -> Tensor:
    """Weight of Â_b in g_a and of Â_a in g_b, (P, d). ``share``: 1-λ if the products hold the diagonal of C, else 1."""
    unit = 2.0 / (rows * len(diagonal))
    return (diagonal * (share * unit)).sub_(unit)


Block = tuple[tuple[slice, slice], tuple[Tensor, ...]]  # its rows and columns; rooms (V, rows, columns), Â the first


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


def _blocks(z: Sequence[Tensor], axis: int, dtype: torch.dtype, rooms: int = 2) -> Iterator[Block]:
    """Cuts along an axis into blocks that stay in cache; what little there is stays one block."""
    along, across = z[0].shape[axis], z[0].shape[1 - axis]
    whole, budget = (2**20, 2**18) if z[0].device.type == "cpu" else (2**24, 2**24)
    width = along
    if len(z) * along * across > whole:
        width = max(256, budget // (len(z) * across))
        width = -(-along // -(-along // width))
    room: tuple[Tensor, ...] = ()
    for start in range(0, along, max(1, width)):
        size = min(width, along - start)
        shape = (size, across) if axis == 0 else (across, size)
        if not room or room[0].shape[1:] != shape:
            room = z[0].new_empty((rooms, len(z), *shape), dtype=dtype).unbind()
        block = slice(start, start + size)
        yield (block, ALL) if axis == 0 else (ALL, block), room


def _standardised(z: Sequence[Tensor], saved: Forward, axis: int, rooms: int = 2) -> Iterator[Block]:
    """Blocks with Â in the first room: made again from z, or the one that was kept."""
    if saved.hat.numel():
        yield (ALL, ALL), (saved.hat, *(torch.empty_like(saved.hat) for _ in range(1, rooms)))
        return
    for (rows, columns), room in _blocks(z, axis, saved.mean.dtype, rooms):
        for view, hat, mean in zip(z, room[0].unbind(), saved.mean.unbind(), strict=True):
            torch.sub(view[rows, columns], mean[columns], out=hat)
        room[0].mul_(saved.scale[:, None, columns])
        yield (rows, columns), room


def _if_whole(hat: Tensor, rows: int, dim: int) -> Tensor:
    return hat if hat.shape[1:] == (rows, dim) else hat.new_empty(0)


def _wide(like: Tensor) -> torch.dtype:
    """float64 for sums of many squares, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
