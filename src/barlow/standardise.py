"""Embeddings with every column standardised over the whole batch, and how they are cut into blocks that stay in cache.

    Â = (z - mean) · w,   w = 1/sqrt(variance + eps)      (biased variance: nn.BatchNorm1d without affine)

Every column is counted from its first row before its mean is taken: a constant column then has exactly variance 0, and
features far from zero keep all their digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from barlow import ranks

EPS = 1e-5  # added to the variance, inside the root, as the published code's BatchNorm does
CACHE = 2**18  # numbers in one block of one view: a megabyte of float32; a GPU takes 256 times as much
NARROW = 256  # no block is narrower


def standardised(
    z: Sequence[Tensor], dtype: torch.dtype, pairs: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of (N, d) each, all rows at hand: Â (N, d) and w (V, d) of the views, and mean(Â_a ⊙ Â_b) (P, d) of the pairs."""
    hats = [torch.empty(view.shape, dtype=dtype, device=view.device) for view in z]
    scale, diagonal = (hats[0].new_empty((count, z[0].shape[1])) for count in (len(z), len(pairs)))
    ws, cs = scale.unbind(), diagonal.unbind()
    scratch = Scratch()
    for cut in blocks(hats[0], 1):
        parts = take(hats, 1, cut)
        for part, view, w in zip(parts, take(z, 1, cut), take(ws, 0, cut), strict=True):
            shifted = part if part.is_contiguous() else scratch.like(part)
            mean, variance = moments(view, shifted)
            torch.rsqrt(variance.add_(EPS), out=w)
            torch.addcmul(mean.mul_(w).neg_(), shifted, w, out=part)
        for c, (a, b) in zip(take(cs, 0, cut), pairs, strict=True):
            torch.mean(torch.mul(parts[a], parts[b], out=scratch.like(parts[a])), 0, out=c)
    return hats, scale, diagonal


def standardised_across(z: Sequence[Tensor], total: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Of (n, D) each, the rows of this process out of ``total``: Â (n, D) and w (V, D); all processes must call."""
    hats = [torch.empty(view.shape, dtype=dtype, device=view.device) for view in z]
    means, variances = [], []
    for hat, view in zip(hats, z, strict=True):
        mean, variance = moments(view, hat) if len(hat) else hat.new_zeros((2, hat.shape[1])).unbind()
        means.append(mean.to(wide(hat)))
        variances.append(variance)
    share, local = len(hats[0]) / total, torch.stack(means)
    first = torch.stack([view[:1].sum(0, dtype=local.dtype) for view in z])  # or zero, for a process without rows
    away = first + local - ranks.sum_((first + local) * share)
    scale = ranks.sum_((torch.stack(variances) + away.square()) * share).add_(EPS).rsqrt_().to(dtype)
    for hat, shift, w in zip(hats, (away - local).to(dtype), scale, strict=True):
        hat.add_(shift).mul_(w)
    return hats, scale


def moments(z: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Writes z less its first row; returns the mean and the biased variance of that, (d,) each."""
    torch.sub(z, z[0].to(shifted.dtype), out=shifted)
    if shifted.device.type == "cpu":  # var_mean walks down the columns there, forty times slower
        mean, variance = torch.batch_norm_update_stats(shifted, None, None, 0.0)
        return mean, variance
    variance, mean = torch.var_mean(shifted, 0, correction=0)
    return mean, variance


class Scratch:
    """Memory that is used again and again within one call, so that the system gives it once and not block by block."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, part: Tensor) -> Tensor:
        """Contiguous, of the shape of ``part``; what it held before is lost."""
        if self._memory is None or part.numel() > self._memory.numel():
            self._memory = part.new_empty(part.shape)
        if self._memory.shape == part.shape:
            return self._memory
        return self._memory.view(-1)[: part.numel()].view(part.shape)


def blocks(like: Tensor, axis: int, least: int | None = None) -> list[tuple[int, int] | None]:
    """Start and length of blocks of a matrix along an axis, each small enough for the cache; None: all in one."""
    along, across = like.shape[axis], max(1, like.shape[1 - axis])
    room = CACHE if like.device.type == "cpu" else 256 * CACHE
    if along * across <= room:
        return [None]
    count = -(-along // max(NARROW if least is None else least, room // across))
    width = -(-along // count)
    return [None] if count == 1 else [(start, min(width, along - start)) for start in range(0, along, width)]


def take(tensors: Sequence[Tensor], axis: int, cut: tuple[int, int] | None) -> Sequence[Tensor]:
    """A block of each."""
    return tensors if cut is None else [tensor.narrow(axis, *cut) for tensor in tensors]


def wide(like: Tensor) -> torch.dtype:
    """float64 where the device has it: for sums of everything."""
    return torch.float32 if like.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
