"""The only room that knows there are other processes. Without a process group every function is the trivial one.

Nothing here is pickled: tensors travel as numbers, small Python values as JSON.
All functions but ``rank`` and ``world_size`` are collective: every process must call them, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from barlow.errors import UserError

Json = TypeVar("Json")


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _in_group() else 0


def sum_(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes in place, outside autograd, and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def integers(values: Sequence[int]) -> list[list[int]]:
    """Every process's integers (the same count on each), in the order of the ranks."""
    if world_size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.int64, device=_wire())
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


def barrier() -> None:
    """Returns when every process has come here."""
    integers([0])


def broadcast(value: Json) -> Json:
    """Rank 0's value on every process: anything JSON can hold (tuples come back as lists, keys as text)."""
    if world_size() == 1:
        return value
    payload = json.dumps(value).encode() if rank() == 0 else b""
    size = integers([len(payload)])[0][0]
    letters = torch.frombuffer(bytearray(payload or bytes(size)), dtype=torch.uint8).to(_wire())
    dist.broadcast(letters, src=0)
    received: Json = json.loads(bytes(letters.tolist()))
    return received


def gather(value: Json) -> list[Json]:
    """Every process's value, in the order of the ranks: anything JSON can hold (tuples come back as lists)."""
    if world_size() == 1:
        return [value]
    letters = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_wire())
    counts = [row[0] for row in integers([len(letters)])]
    everyone = gather_rows(letters).tolist()
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [json.loads(bytes(everyone[end - count : end])) for end, count in zip(ends, counts, strict=True)]


def gather_rows(tensor: Tensor) -> Tensor:
    """All rows of all processes, (Σn, …), in the order of the ranks; n may differ, all else must agree. No gradient."""
    if world_size() == 1:
        return tensor
    counts = [row[0] for row in integers([len(tensor)])]
    wide = tensor.detach().reshape(len(tensor), -1).contiguous()
    padded = wide.new_zeros((max(counts), wide.shape[1]))
    padded[: len(wide)] = wide
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather([_bytes(each) for each in everyone], _bytes(padded))
    rows = torch.cat([each[:count] for each, count in zip(everyone, counts, strict=True)])
    return rows.view(-1, *tensor.shape[1:])


def rows_to_columns(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """From (n, D), this process's rows of a batch, to (N, D/W): all N rows of its share of the columns.

    ``counts``: rows held by each process. Every number moves at most once. No gradient.
    """
    shares = rows.detach().tensor_split(world_size(), dim=1)
    mine = shares[rank()].shape[1]
    send = torch.cat([share.reshape(-1) for share in shares])
    received = send.new_empty(sum(counts) * mine)
    _exchange(received, send, [count * mine for count in counts], [share.numel() for share in shares])
    return received.view(sum(counts), mine)


def columns_to_rows(columns: Tensor, counts: Sequence[int], dim: int) -> Tensor:
    """The way back: from (N, D/W) to (n, D = ``dim``)."""
    widths = [share.numel() for share in torch.arange(dim).tensor_split(world_size())]
    mine = counts[rank()]
    received = columns.new_empty(mine * dim)
    sent = [count * columns.shape[1] for count in counts]
    _exchange(received, columns.contiguous().view(-1), [mine * width for width in widths], sent)
    chunks = torch.split(received, [mine * width for width in widths])
    return torch.cat([chunk.view(mine, width) for chunk, width in zip(chunks, widths, strict=True)], dim=1)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """``module`` with every batch normalisation using the statistics of the whole batch; parameter names stay.

    With NCCL these are PyTorch's own SyncBatchNorm (timm's variant where an activation is built in), else
    ``BatchNorm`` below. Without other processes ``module`` comes back as it is.

    Raises UserError for a batch normalisation with a forward pass of its own that this function does not know.
    """
    if world_size() == 1:
        return module
    if _on_cuda():
        from timm.layers import convert_sync_batchnorm  # slow to import, and needed here only

        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for name, child in module.named_children():
        setattr(module, name, synchronise_batch_norm(child))
    if not isinstance(module, _BatchNorm) or isinstance(module, BatchNorm):
        return module
    plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not plain and not (hasattr(module, "drop") and hasattr(module, "act")):
        raise UserError(f"{type(module).__name__} cannot be synchronised across processes; use nn.BatchNorm2d instead")
    return BatchNorm(module)


class BatchNorm(_BatchNorm):
    """Batch normalisation over the rows of all processes: exact for unequal batches.

    Takes over the parameters and buffers of ``norm``, and the dropout and activation that timm builds into its
    BatchNormAct2d. Evaluation, and life outside a process group, are those of nn.BatchNorm2d.
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
        if self.training and world_size() > 1:
            self._check_input_dim(input)
            normed = self._normalise(input)
        else:
            normed = super().forward(input)
        return self.act(self.drop(normed))  # type: ignore[no-any-return]

    def _normalise(self, input: Tensor) -> Tensor:
        x = input if input.dtype == torch.float64 else input.float()
        weight, bias = (self.weight, self.bias) if self.affine else (x.new_ones(x.shape[1]), x.new_zeros(x.shape[1]))
        normed, mean, variance, count = _Normalise.apply(x, weight, bias, self.eps)
        self._keep(mean, variance * count / (count - 1))
        return normed.to(input.dtype)  # type: ignore[no-any-return]

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Normalise(torch.autograd.Function):
    """(n, c, …), weight (c,), bias (c,) → normalised, and mean, variance and count over all processes in float64.

    Gradients written by hand: a third of the time of automatic ones. Buffers are used twice, for memory that is new is
    slower than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = [1, -1] + [1] * (x.ndim - 2)
        sums = sum_(torch.cat([_sum_channels(x), x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float64)]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = x - mean.to(x.dtype).view(shape)
        buffer = centred.square()
        variance = sum_(_sum_channels(buffer)) / count
        inverse = torch.rsqrt(variance + eps)
        factor = (weight * inverse).to(x.dtype).view(shape)
        normed = torch.addcmul(bias.view(shape), centred, factor, out=buffer)
        ctx.save_for_backward(centred, weight, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normed, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        centred, weight, inverse, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (centred.ndim - 2)
        buffer = gradient * centred
        along, level = _sum_channels(buffer), _sum_channels(gradient)
        to_weight, to_bias = (along * inverse).to(weight.dtype), level.to(weight.dtype)  # of this process's rows
        along, level = sum_(torch.stack([along, level])) / count
        factor = weight * inverse
        a, b, c = ((f.to(centred.dtype).view(shape)) for f in (factor, -factor * inverse**2 * along, -factor * level))
        to_x = torch.addcmul(c, centred, b, out=buffer).addcmul_(gradient, a)
        return to_x, to_weight, to_bias, None


def _sum_channels(x: Tensor) -> Tensor:
    """(n, c, …) → (c,) in float64: each image in the dtype of ``x``, then over the images, as exact as all in float64
    at a twentieth of its cost."""
    images = x.sum(list(range(2, x.ndim))) if x.ndim > 2 else x
    return images.sum(0, dtype=torch.float64)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _on_cuda() -> bool:
    return dist.get_backend() != "gloo" and torch.cuda.is_available()


def _wire() -> torch.device:
    """Where small messages are put: NCCL carries nothing but CUDA tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if _on_cuda() else torch.device("cpu")


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: backends differ in which dtypes they carry (bfloat16, bool), not in bytes."""
    return tensor.view(-1).view(torch.uint8)


def _exchange(received: Tensor, send: Tensor, counts_in: list[int], counts_out: list[int]) -> None:
    size = send.element_size()
    into, out = [c * size for c in counts_in], [c * size for c in counts_out]
    dist.all_to_all_single(_bytes(received), _bytes(send), into, out)
