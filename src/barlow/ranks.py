"""What the processes of a run tell each other. Without a process group every function is the trivial one.

Nothing here is pickled: tensors travel as numbers, small Python values as JSON.
All functions but ``rank`` and ``world_size`` are collective: every process must call them, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def on_cuda() -> bool:
    return dist.get_backend() != "gloo" and torch.cuda.is_available()


def _wire() -> torch.device:
    """Where small messages are put: NCCL carries nothing but CUDA tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: backends differ in which dtypes they carry (bfloat16, bool), not in bytes."""
    return tensor.view(-1).view(torch.uint8)


def _exchange(received: Tensor, send: Tensor, counts_in: list[int], counts_out: list[int]) -> None:
    size = send.element_size()
    into, out = [c * size for c in counts_in], [c * size for c in counts_out]
    dist.all_to_all_single(_bytes(received), _bytes(send), into, out)
