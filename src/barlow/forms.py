"""The two exact forms of the loss and their gradients written by hand, block by block: no autograd inside.

Letters: V views, N images of the whole batch, D features, P = V(V-1)/2 pairs of views. Â_v is view v with every column
standardised over the whole batch, C_ab = Â_aᵀÂ_b / N, c_ab its diagonal, w = 1/sqrt(variance + eps). Since

    Σᵢⱼ (C_ab)ᵢⱼ² = ⟨Â_aÂ_aᵀ, Â_bÂ_bᵀ⟩ / N²,

the loss needs either V Gram matrices Â_vÂ_vᵀ (N×N; "gram") or P cross-correlation matrices (D×D; "correlation").
With s = -2(1 - c_vb) - 2λc_vb the gradient is, in either form and averaged over the P pairs,

    g_v = ∂L/∂Â_v = Σ_{b≠v} [ (2λ/N²) Â_bÂ_bᵀÂ_v + Â_b diag(s_vb)/N ]
    ∂L/∂z_v = w_v ⊙ (g_v - Â_v ⊙ mean(Â_v ⊙ g_v)),

the step through the standardisation; its usual third term, mean(g_v), is zero because the columns of Â_b sum to zero.
For two images that step keeps only eps·w² of g_v, all other digits cancel; there ∂L/∂z_v = eps·w_v³ ⊙ g_v is used.

Across processes each form holds what it can sum: Gram all rows and a share of the columns, so that N×N sums travel;
correlation all columns and the rows of this process, so that D×D sums travel.
The gradients are written over Â: but for them, and the matrices of the form, there is only scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from barlow import ranks
from barlow.standardise import EPS, Scratch, blocks, standardised, standardised_across, take, wide

CALLS = 2**22  # multiplications in the time by which the calls of the Gram form outlast those of ``small``
DEEP = 512  # no block of a gradient is narrower: each costs a look at a whole matrix of the form
PANEL = 64  # no panel of a symmetric product is narrower


class Forward(NamedTuple):
    """What a forward pass leaves for the terms and the gradient; d = D, or in the Gram form this process's share."""

    scale: Tensor  # of every view, (V, d): w
    diagonal: Tensor  # of every pair, (P, d): c
    own: Tensor  # of every view. Gram: κ, (V, 1); correlation: -mean(Â_v ⊙ g_v) in units of 2λ/(N·P), (V, D)
    products: Sequence[Tensor]  # Gram: of every view, Σ_{b≠v} Â_bÂ_bᵀ - κ_v·I; correlation: of every pair, C + diag


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


def gram(z: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Forward, Tensor]:
    """Forward pass over all N rows and the d columns of this process, (N, d) each; V·N²·D/2 multiplications.

    Returns Â of every view, what the gradient needs besides, and N²·Σᵢⱼ Cᵢⱼ² over all pairs, diagonals included.
    """
    hats, scale, diagonal = standardised(z, dtype, list(combinations(range(len(z)), 2)))
    rows, kernels = len(hats[0]), []
    panels = row_panels(rows, hats[0].device)
    for hat in hats:
        kernel = hat.new_empty((rows, rows))
        multiply_symmetric(kernel, hat, panels)
        for panel in panels[1:]:
            kernel[: panel.start, panel] = kernel[panel, : panel.start].T
        kernels.append(ranks.sum_(kernel))
    scratch = Scratch()
    squares = _total(
        torch.mul(a, b, out=scratch.like(a))
        for pair in combinations(kernels, 2)
        for a, b in (take(pair, 0, cut) for cut in blocks(kernels[0], 0))
    )
    others = kernels[::-1]
    if len(z) > 2:
        whole = sum(kernels[1:], kernels[0])
        others = [whole - kernel for kernel in kernels]
    # Σ_b K_b Â_v is mostly a multiple of Â_v (K_b is mostly D·I), which the step through the standardisation projects
    # out. Taking that multiple away beforehand spares the cancellation: sqrt(D/N) in accuracy, free of charge.
    own = []
    for other in others:
        on_diagonal = other.diagonal()
        own.append(on_diagonal.mean(0, keepdim=True))
        on_diagonal.sub_(own[-1])
    return hats, Forward(scale, diagonal, torch.stack(own), others), squares


def gram_gradient(hats: list[Tensor], saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (N, d) each, written over ``hats``; V·N²·D multiplications."""
    rows, pairs = len(hats[0]), len(saved.diagonal)
    alpha, unit = 2 * lambda_ / (rows * rows * pairs), 2 / (rows * pairs)
    cross = (saved.diagonal * (unit * (1 - lambda_))).sub_(unit).unbind()  # s/(N·P)
    lost = saved.scale.square().mul_(EPS)  # the share of the variance that eps took: 1 - mean(Â²)
    weight, kept = saved.scale * gain, saved.own * alpha  # g lacks κÂ, of which that share comes through
    if rows == 2:
        weight, kept = weight * lost, kept.expand_as(lost)
    else:
        kept = lost.mul_(kept)
    factor, left = weight.unbind(), kept.unbind()
    partners, scratch = _partners(len(hats)), [Scratch() for _ in range(len(hats) + 1)]
    for cut in blocks(hats[0], 1, DEEP):
        parts, c_cut, f_cut, left_cut = (take(tensors, -1, cut) for tensors in (hats, cross, factor, left))
        gs = [memory.like(part) for memory, part in zip(scratch, parts, strict=False)]
        for v, (g, hat, lifted) in enumerate(zip(gs, parts, left_cut, strict=True)):
            (b, k), *others = partners[v]
            torch.mul(parts[b], c_cut[k], out=g)
            for b, k in others:
                g.addcmul_(parts[b], c_cut[k])
            multiply(g, saved.products[v], hat, alpha, beta=1.0)
            if rows > 2:
                lifted = lifted - torch.mul(hat, g, out=scratch[-1].like(hat)).mean(0)
            g.addcmul_(hat, lifted)
        for g, hat, w in zip(gs, parts, f_cut, strict=True):
            torch.mul(g, w, out=hat)
    return hats


def correlation(
    z: Sequence[Tensor], total: int, dtype: torch.dtype, lambda_: float
) -> tuple[list[Tensor], Forward, Tensor]:
    """Forward pass over all columns and the n rows of this process, of ``total``; P·N·D² multiplications.

    Returns Â of every view, what the gradient needs besides, and Σᵢⱼ Cᵢⱼ² over all pairs, without the diagonals: a sum
    and not a difference.
    """
    hats, scale = _standardised_rows(z, total, dtype)
    pairs = list(combinations(range(len(z)), 2))
    products = correlations(hats, total, pairs)
    diagonal, squares = [], []
    own = torch.zeros_like(scale)
    for product, (a, b) in zip(products, pairs, strict=True):
        on_diagonal = product.diagonal()
        c = on_diagonal.clone()
        on_diagonal.zero_()
        rows, columns = _sums_of_squares(product)
        # Where c stood comes what makes Â_bCᵀ all of g_a, but for the factor 2λ/(N·P).
        s = (c - 1.0).div_(lambda_ or 1.0)
        if not lambda_:
            product.zero_()
        on_diagonal.copy_(s)
        for v, sums in ((a, rows), (b, columns)):
            own[v].addcmul_(s, c, value=-1.0)
            if lambda_:
                own[v].sub_(sums)
        diagonal.append(c)
        squares.append(rows)
    return hats, Forward(scale, torch.stack(diagonal), own, products), _total(squares)


def again(z: Sequence[Tensor], total: int, form: str, dtype: torch.dtype) -> list[Tensor]:
    """Â of every view, as the forward pass made it. In the correlation form all processes must call."""
    return standardised(z, dtype, ())[0] if form == "gram" else _standardised_rows(z, total, dtype)[0]


def correlations(hats: Sequence[Tensor], total: int, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
    """C_ab of each pair, (D, D), from the rows of this process; on several processes all of them must call."""
    products = []
    for a, b in pairs:
        product = hats[a].new_empty((hats[a].shape[1], hats[b].shape[1]))
        multiply(product, hats[a].T, hats[b], 1.0 / total)
        products.append(ranks.sum_(product))
    return products


def correlation_gradient(hats: list[Tensor], total: int, saved: Forward, lambda_: float, gain: Tensor) -> list[Tensor]:
    """``gain`` · ∂L/∂z, (n, D) each, written over ``hats``; 2·P·N·D² multiplications, nothing travels."""
    alpha = 2 * (lambda_ or 1.0) / (total * len(saved.diagonal))
    weight = saved.scale * gain
    if total == 2:
        weight = weight * saved.scale.square().mul_(EPS)
    factor, own = weight.unbind(), (saved.own * alpha).unbind()
    partners, scratch = _partners(len(hats)), [Scratch() for _ in hats]
    for cut in blocks(hats[0], 0, DEEP):
        parts = take(hats, 0, cut)
        gs = [memory.like(part) for memory, part in zip(scratch, parts, strict=True)]
        for v, g in enumerate(gs):
            for beta, (b, k) in enumerate(partners[v]):
                product = saved.products[k].T if v < b else saved.products[k]
                multiply(g, parts[b], product, alpha, min(beta, 1))
        for g, hat, row, w in zip(gs, parts, own, factor, strict=True):
            if total > 2:
                g.addcmul_(hat, row)
            torch.mul(g, w, out=hat)
    return hats


def multiply(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    """``out = alpha * left @ right + beta * out``: every product of matrices in this room."""
    torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)


def multiply_symmetric(kernel: Tensor, hat: Tensor, panels: Sequence[slice]) -> None:
    """``kernel = hat @ hat.T`` on and below the diagonal, panel by panel."""
    if len(panels) == 1:
        multiply(kernel, hat, hat.T)
        return
    for panel in panels:
        multiply(kernel[panel, : panel.stop], hat[panel], hat[: panel.stop].T)


def row_panels(rows: int, device: torch.device) -> list[slice]:
    """Row panels of a symmetric product: little more than half the work in eight of them.

    One panel, the full product, where there is little to save or where a launch costs more than the work.
    """
    step = rows if device.type != "cpu" else max(PANEL, -(-rows // 8))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _standardised_rows(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    return standardised_across(z, total, dtype) if ranks.world_size() > 1 else standardised(z, dtype, ())[:2]


def _sums_of_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row and of every column."""
    scratch, rows, columns = Scratch(), [], []
    for cut in blocks(matrix, 0):
        (part,) = take([matrix], 0, cut)
        square = torch.mul(part, part, out=scratch.like(part))
        rows.append(square.sum(1))
        columns.append(square.sum(0))
    return (rows[0], columns[0]) if len(rows) == 1 else (torch.cat(rows), torch.stack(columns).sum(0))


def _partners(views: int) -> list[list[tuple[int, int]]]:
    """Of every view: the other views, each with the number of the pair."""
    pairs = list(combinations(range(views), 2))
    return [[(a + b - v, k) for k, (a, b) in enumerate(pairs) if v in (a, b)] for v in range(views)]


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of everything, in float64."""
    first, *rest = (torch.sum(part, dtype=wide(part)) for part in parts)
    return sum(rest, first)
