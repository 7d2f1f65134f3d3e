"""Batch normalisation over the rows of all processes, with statistics that are as good as in float64.

PyTorch's own on a processor adds up all rows of a channel in float32, one after the other: variances are off by 1e-5
to 1e-4, which is a thousand times the rounding of everything else, and what makes one process part from several
(docs/log.md, "Batch normalisation that rounds less").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from barlow import ranks
from barlow.errors import UserError

ROWS = 256  # of one channel that are added up in float32; such sums are added up in float64


def exact_batch_norm(module: nn.Module) -> nn.Module:
    """``module`` with every batch normalisation using the statistics of the whole batch; parameter names stay.

    On a processor, and across processes with gloo, these are ``BatchNorm`` below; with NCCL PyTorch's own SyncBatchNorm
    (timm's variant where an activation is built in). One process with a GPU keeps what it has, and one without
    others keeps a batch normalisation with a forward pass of its own that this function does not know.

    Raises UserError for such a one across processes.
    """
    if any(p.is_cuda for p in module.parameters()) and (ranks.world_size() == 1 or ranks.on_cuda()):
        if ranks.world_size() == 1:
            return module
        from timm.layers import convert_sync_batchnorm  # slow to import, and needed here only

        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for name, child in module.named_children():
        setattr(module, name, exact_batch_norm(child))
    if not isinstance(module, _BatchNorm) or isinstance(module, BatchNorm):
        return module
    plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if plain or (hasattr(module, "drop") and hasattr(module, "act")):
        return BatchNorm(module)
    if ranks.world_size() == 1:
        return module
    raise UserError(f"{type(module).__name__} cannot be synchronised across processes; use nn.BatchNorm2d instead")


class BatchNorm(_BatchNorm):
    """Batch normalisation over the rows of all processes: exact for unequal batches.

    Takes over the parameters and buffers of ``norm``, and the dropout and activation that timm builds into its
    BatchNormAct2d. Evaluation is that of nn.BatchNorm2d, and so is training on a GPU without other processes.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.weight, self.bias, self.training = norm.weight, norm.bias, norm.training
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise UserError(f"batch normalisation needs (n, channels, …), given {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, …) → the same shape and dtype, computed in float32 (float64 for float64) with sums in float64."""
        self._check_input_dim(input)
        alone = ranks.world_size() == 1
        if not self.training or (alone and (input.is_cuda or input.numel() == input.shape[1])):
            normed = super().forward(input)
        else:
            normed, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
            self._keep(mean, variance * count / (count - 1))
        return self.act(self.drop(normed))  # type: ignore[no-any-return]

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Normalise(torch.autograd.Function):
    """(n, c, …), weight (c,), bias (c,), or None for both → normalised, and mean, variance and count over all processes
    in float64."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance = moments(x)
        count = mean.new_full((), x.numel() / x.shape[1])
        if ranks.world_size() > 1:
            sums = ranks.sum_(torch.stack([mean.new_ones(mean.shape), mean, variance + mean.square()]) * count)
            count, mean = sums[0, 0], sums[1] / sums[0]
            variance = sums[2] / count - mean.square()
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        level, inverse = mean.to(kind), torch.rsqrt(variance + eps).to(kind)
        normed = torch.batch_norm(x, weight, bias, level, variance.to(kind), False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, level, inverse, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return normed, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        if ranks.world_size() == 1:  # its sums round as PyTorch's do, and that does no harm
            wanted = [ctx.needs_input_grad[0], weight is not None, weight is not None]
            made = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, mean, inverse, True, ctx.eps, wanted
            )
            return *made, None
        return *_across(x, weight, mean, inverse, count, gradient), None


def _across(
    x: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, count: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those of the parameters for the rows of this process."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred, gradient = x - mean.view(shape), gradient.to(mean.dtype)
    buffer = gradient * centred
    along, level = _sum_channels(buffer), _sum_channels(gradient)
    to_weight, to_bias = (
        (None, None) if weight is None else ((along * inverse).to(weight.dtype), level.to(weight.dtype))
    )
    along, level = ranks.sum_(torch.stack([along, level])) / count
    factor = inverse.double() if weight is None else weight * inverse.double()
    a, b, c = (f.to(mean.dtype).view(shape) for f in (factor, -factor * inverse**2 * along, -factor * level))
    to_x = torch.addcmul(c, centred, b, out=buffer).addcmul_(gradient, a)
    return to_x.to(x.dtype), to_weight, to_bias


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of (n, c, …), float64 (c,) each, of the rows of this process.

    Where the channels lie innermost in memory, ``ROWS`` rows side by side pass for so many more channels: one pass.
    """
    innermost = x.ndim == 2 or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    if x.is_cuda or not innermost:
        over = [axis for axis in range(x.ndim) if axis > 1 or (axis == 0 and x.is_cuda)]
        variances, means = torch.var_mean(x if x.dtype == torch.float64 else x.float(), over, correction=0)
        return _joined(means.view(-1, x.shape[1]), variances.view(-1, x.shape[1]))
    rows = x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    groups = max(1, len(rows) // ROWS)
    rest = len(rows) % groups
    mean, variance = _joined(*_of_groups(rows[: len(rows) - rest], groups))
    if rest:
        last, spread = _joined(*_of_groups(rows[-rest:], 1))
        share, away = rest / len(rows), last - mean
        mean, variance = mean + share * away, torch.lerp(variance, spread, share) + share * (1 - share) * away.square()
    return mean, variance


def _of_groups(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Means and variances (groups, c) of equal groups of rows (n, c), which lie interleaved."""
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    wide = rows.reshape(-1, groups * rows.shape[1])
    unused = rows.new_zeros(wide.shape[1], dtype=kind)  # they say in which dtype to answer
    mean, variance = torch.batch_norm_update_stats(wide, unused, unused, 0.0)
    return mean.view(groups, -1), variance.view(groups, -1)


def _joined(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all, in float64, from those of equal groups (groups, c)."""
    between, mean = torch.var_mean(means.double(), 0, correction=0)
    return mean, variances.mean(0, dtype=torch.float64) + between


def _sum_channels(x: Tensor) -> Tensor:
    """(n, c, …) → (c,) in float64: each image in the dtype of ``x``, then over the images, as exact as all in float64
    at a twentieth of its cost."""
    images = x.sum(list(range(2, x.ndim))) if x.ndim > 2 else x
    return images.sum(0, dtype=torch.float64)
