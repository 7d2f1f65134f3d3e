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
Large embeddings are worked off in blocks that stay in cache: Â is not stored, but made again from z where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from barlow import ranks

EPS = 1e-5  # added to the variance, inside the root: nn.BatchNorm1d(affine=False), which the published code uses
CALLS = 2**22  # multiplications in the time by which the calls of the Gram form outlast those of ``small``
CACHE = 2**18  # numbers in one block of all views: 1 MB of float32; a GPU takes 64 times as much
NARROW = 256  # no block is narrower: products of matrices need some depth
PANEL = 64  # nor is a panel of a symmetric product
Vectors = Sequence[Tensor]


class Forward(NamedTuple):
    """What a forward pass leaves for the terms and the gradient; d = D, or in the Gram form this process's share."""

    mean: Vectors  # of every view, (d,), float64; nothing where Â was kept
    scale: Vectors  # of every view, (d,): w
    diagonal: Vectors  # of every pair, (d,): c
    own: Vectors  # of every view. Gram: κ, scalar; correlation: Σ_b Σ_{j≠i} (C_vb)ᵢⱼ², (D,)
    products: Sequence[Tensor]  # Gram: of every view, Σ_{b≠v} Â_bÂ_bᵀ - κ_v·I; correlation: of every pair, C - diag(c)
    hat: Sequence[Tensor]  # of every view, Â, where it was kept; else nothing


def cheaper(rows: int, dim: int, views: int = 2, world: int = 1, halves: bool = True) -> str:
    """``"gram"`` or ``"correlation"``: by multiplications on one process, by numbers moved per process on several.

    Gram costs 1.5·V·N²·D multiplications where symmetric products take half the work (``halves``) and 2·V·N²·D where
    they do not; correlation 3·P·N·D². So Gram wins for about N < (V-1)·D, or three quarters of it.
    """
    pairs = views * (views - 1) / 2
    if world > 1:  # an all-reduce moves every number twice; columns go out and their gradient comes back
        fewer = 2 * views * (rows * dim / world + rows * rows) < 2 * pairs * dim * dim
        return "gram" if fewer and dim >= world else "correlation"
    cost = (1.5 if halves else 2.0) * views * rows * rows * dim + CALLS
    return "gram" if cost < 3 * pairs * rows * dim * dim else "correlation"


def gram(z: Sequence[Tensor], dtype: torch.dtype) -> tuple[Forward, Tensor]:
    """Forward pass over all N rows and the d columns of this process, (N, d) each; V·N²·D/2 multiplications.

    Returns also Σᵢⱼ Cᵢⱼ² over all pairs, diagonals included.
    """
    views, rows = len(z), len(z[0])
    kernels = [view.new_zeros((rows, rows), dtype=dtype) for view in z]
    cuts, panels = _cuts(z, 1), row_panels(rows, z[0].device)
    vectors: list[list[Tensor]] = []
    for cut in cuts:
        hats, mean, scale = _normalise(_take(z, cut), dtype)
        for kernel, hat in zip(kernels, hats, strict=True):
            add_gram(kernel, hat, panels)
        vectors.append([*mean, *scale, *((a * b).mean(0) for a, b in combinations(hats, 2))])
    for kernel in kernels:
        for panel in panels[1:]:
            kernel[: panel.start, panel] = kernel[panel, : panel.start].T
        ranks.sum_(kernel)
    squares = _total(a * b for a, b in combinations(kernels, 2)) / (rows * rows)
    others = kernels[::-1]
    if views > 2:
        whole = sum(kernels[1:], kernels[0])
        others = [whole - kernel for kernel in kernels]
    # Σ_b K_b Â_v is mostly a multiple of Â_v (K_b is mostly D·I), which the step through the standardisation projects
    # out. Taking that multiple away beforehand spares the cancellation: sqrt(D/N) in accuracy, free of charge.
    own = [other.diagonal().mean() for other in others]
    for other, kappa in zip(others, own, strict=True):
        other.diagonal().sub_(kappa)
    joined = _joined(vectors)
    saved = Forward(joined[:views], joined[views : 2 * views], joined[2 * views :], own, others, hats)
    return saved if len(cuts) == 1 else saved._replace(hat=()), squares


def gram_gradient(z: Sequence[Tensor], saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (N, d) each; V·N²·D multiplications."""
    rows, pairs = len(z[0]), len(saved.diagonal)
    alpha, unit = 2 * lambda_ / (rows * rows * pairs), 2 / (rows * pairs)
    cross = [(c * (unit * (1 - lambda_))).sub_(unit) for c in saved.diagonal]  # s/(N·P)
    factor = [w * gain for w in saved.scale]
    left = [w.square().mul_(kappa * (alpha * EPS)) for w, kappa in zip(saved.scale, saved.own, strict=True)]
    gradients = [torch.empty_like(view, dtype=factor[0].dtype) for view in z]
    partners = _partners(len(z))
    for cut in _cuts(z, 1):
        hats = saved.hat or _standardise(_take(z, cut), _take(saved.mean, cut), _take(saved.scale, cut))
        weights, rest = _take(cross, cut), zip(_take(left, cut), _take(factor, cut), strict=True)
        for v, (g, hat, (lifted, w)) in enumerate(zip(_take(gradients, cut), hats, rest, strict=True)):
            (b, k), *others = partners[v]
            torch.mul(hats[b], weights[k], out=g)
            for b, k in others:
                g.addcmul_(hats[b], weights[k])
            add_product(g, saved.products[v], hat, alpha)
            # g lacks κÂ, of which the projection leaves only what eps took from the variance: ``left``.
            g.addcmul_(hat, lifted - (hat * g).mean(0)).mul_(w)
    return gradients


def correlation(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> tuple[Forward, Tensor]:
    """Forward pass over all columns and the n rows of this process, of ``total``; P·N·D² multiplications.

    Returns also Σᵢⱼ Cᵢⱼ² over all pairs, without the diagonals, so that it is a sum and not a difference.
    """
    mean, scale = moments(z, total, dtype)
    pairs = list(combinations(range(len(z)), 2))
    products = correlations(z, total, mean, scale, pairs)
    diagonal = [product.diagonal().clone() for product in products]
    sums: list[list[Tensor]] = [[] for _ in z]
    for product, (a, b) in zip(products, pairs, strict=True):
        product.diagonal().zero_()
        squared = product.square()
        sums[a].append(squared.sum(1))
        sums[b].append(squared.sum(0))
    own = [sum(rest, first) for first, *rest in sums]
    return Forward(mean, scale, diagonal, own, products, ()), _total(own) / 2


def moments(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> tuple[Vectors, Vectors]:
    """Mean (float64) and w of every column over all processes, (D,) for every view; all processes must call."""
    vectors: list[list[Tensor]] = []
    for cut in _cuts(z, 1):
        _, mean, scale = _normalise(_take(z, cut), dtype)
        vectors.append([*mean, *scale])
    joined = _joined(vectors)
    mean, scale = joined[: len(z)], joined[len(z) :]
    if ranks.world_size() == 1:
        return mean, scale
    share, local, w = len(z[0]) / total, torch.stack(tuple(mean)), torch.stack(tuple(scale))
    whole = ranks.sum_(local * share)
    spread = w.to(whole.dtype).pow_(-2) + (local - whole).square_()  # 1/w² = variance + eps joins as a variance does
    return whole.unbind(), ranks.sum_(spread.mul_(share)).rsqrt_().to(dtype).unbind()


def correlations(
    z: Sequence[Tensor], total: int, mean: Vectors, scale: Vectors, pairs: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """C_ab of each pair, (D, D), from the rows of this process; on several processes all of them must call."""
    dim = z[0].shape[1]
    products = [scale[0].new_zeros((dim, dim)) for _ in pairs]
    for cut in _cuts(z, 0):
        hats = _standardise(_take(z, cut, 0), mean, scale)
        for product, (a, b) in zip(products, pairs, strict=True):
            add_product(product, hats[a].T, hats[b], alpha=1 / total)
    return [ranks.sum_(product) for product in products]


def correlation_gradient(z: Sequence[Tensor], total: int, saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (n, D) each; 2·P·N·D² multiplications, nothing travels."""
    pairs = len(saved.diagonal)
    alpha, unit = 2 * lambda_ / (total * pairs), 2 / (total * pairs)
    cross = [(c * unit).sub_(unit) for c in saved.diagonal]  # s/(N·P), but for the 2λc that C - diag(c) lacks
    factor = [w * gain for w in saved.scale]
    own: list[Tensor] = []
    right: list[list[tuple[int, Tensor]]] = []  # w_v ⊙ g_v = own_v ⊙ Â_v + Σ_b Â_b M_vb
    for v, partners in enumerate(_partners(len(z))):
        own.append(saved.own[v] * -alpha)
        right.append([])
        for b, k in partners:
            own[v].addcmul_(cross[k], saved.diagonal[k], value=-1.0)
            m = (saved.products[k].T if v < b else saved.products[k]) * (factor[v] * alpha)
            torch.mul(cross[k], factor[v], out=m.diagonal())
            right[v].append((b, m))
        own[v].mul_(factor[v])
    gradients = [torch.empty_like(view, dtype=factor[0].dtype) for view in z]
    for cut in _cuts(z, 0):
        hats = _standardise(_take(z, cut, 0), saved.mean, saved.scale)
        for g, hat, row, products in zip(_take(gradients, cut, 0), hats, own, right, strict=True):
            torch.mul(hat, row, out=g)
            for b, m in products:
                add_product(g, hats[b], m)
    return gradients


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """``out += alpha * left @ right``: every product of matrices in this room."""
    out.addmm_(left, right, alpha=alpha)


def add_gram(kernel: Tensor, hat: Tensor, panels: Sequence[slice]) -> None:
    """``kernel += hat @ hat.T`` on and below the diagonal, panel by panel."""
    for panel in panels:
        add_product(kernel[panel, : panel.stop], hat[panel], hat[: panel.stop].T)


def row_panels(rows: int, device: torch.device) -> list[slice]:
    """Row panels of a symmetric product: little more than half the work in eight of them.

    One panel, the full product, where there is little to save or where a launch costs more than the work.
    """
    step = rows if device.type != "cpu" else max(PANEL, -(-rows // 8))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _normalise(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Vectors, Vectors, Vectors]:
    """Â, mean (float64) and w of parts (n, d), over their own rows, by PyTorch's BatchNorm.

    Counted from the first row, so that a constant column has exactly that mean and variance 0, however large it is.
    """
    hats, means, scales = [], [], []
    for part in parts:
        if not len(part):  # a process without rows
            part = part.new_zeros((1, part.shape[1]))
        first = part[0].to(dtype)
        hat, mean, scale = torch.native_batch_norm(part - first, None, None, None, None, True, 0.0, EPS)
        hats.append(hat)
        means.append(mean.to(wide(mean)).add_(first))
        scales.append(scale)
    return hats, means, scales


def _standardise(parts: Sequence[Tensor], mean: Vectors, scale: Vectors) -> list[Tensor]:
    """Â again. Counted from a row here too: a mean rounded to float32 would not centre features far from zero."""
    hats = []
    for part, m, w in zip(parts, mean, scale, strict=True):
        first = part[:1].sum(0, dtype=w.dtype)  # or zero, for a process without rows
        shifted = part - first
        hats.append(torch.addcmul((first - m).to(w.dtype).mul_(w), shifted, w, out=shifted))
    return hats


def _partners(views: int) -> list[list[tuple[int, int]]]:
    """Of every view: the other views, each with the number of the pair."""
    pairs = list(combinations(range(views), 2))
    return [[(a + b - v, k) for k, (a, b) in enumerate(pairs) if v in (a, b)] for v in range(views)]


def _cuts(z: Sequence[Tensor], axis: int) -> Sequence[tuple[int, int] | None]:
    """Start and length of blocks along an axis, those of all views small enough for the cache; None: all in one."""
    along, across = z[0].shape[axis], z[0].shape[1 - axis]
    block, whole = (CACHE, 4 * CACHE) if z[0].device.type == "cpu" else (64 * CACHE, 64 * CACHE)
    if len(z) * along * across <= whole:
        return [None]
    width = -(-along // -(-along // max(NARROW, block // (len(z) * across))))
    return [(start, min(width, along - start)) for start in range(0, along, width)]


def _take(tensors: Sequence[Tensor], cut: tuple[int, int] | None, axis: int = -1) -> Sequence[Tensor]:
    return tensors if cut is None else [tensor.narrow(axis, *cut) for tensor in tensors]


def _joined(vectors: Sequence[Sequence[Tensor]]) -> Vectors:
    """The same vectors of all blocks of columns, end to end."""
    return vectors[0] if len(vectors) == 1 else [torch.cat(parts) for parts in zip(*vectors, strict=True)]


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of everything, in float64."""
    first, *rest = (torch.sum(part, dtype=wide(part)) for part in parts)
    return sum(rest, first)


def wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
