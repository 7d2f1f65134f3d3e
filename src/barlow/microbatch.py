"""The exact gradient of a whole batch with the memory of a micro-batch.

The loss is no sum over images, so ordinary gradient accumulation optimises something else: the loss of small batches.
Here all micro-batches go through the network twice. First without a graph: the embeddings, their loss, and its gradient
∂L/∂z, all of the whole batch. Then with a graph, one micro-batch at a time, each fed its rows of ∂L/∂z.
(Gao et al. 2021, arXiv:2101.06983, do this for contrastive losses.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from barlow.errors import UserError
from barlow.objective import BarlowTwinsLoss, Terms

State = tuple[Tensor, Tensor | None]


def backward(
    network: nn.Module | Sequence[nn.Module],
    views: Sequence[Tensor],
    loss: BarlowTwinsLoss,
    micro_batch: int,
    *,
    rows: int | None = None,
    run: Callable[[Tensor, Tensor], object] = Tensor.backward,
    hold: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
) -> Terms:
    """Adds to every parameter's ``.grad`` what ``loss(*(network(view) for view in views)).backward()`` would add.

    ``network``: maps (m, …) to embeddings (m, D); one for all views, or one for each. ``views``: (n, …) each.
    ``micro_batch``: the most images of one view in the network at once; micro-batches are as equal as can be.
    ``rows``: of the largest share of a batch that a process has, n unless given: all make as many micro-batches as it
    needs, for normalisation that is synchronised waits for each of them.
    ``run(z, gradient)`` runs one backward pass (``fabric.backward``, say). ``hold(network)`` is the context in which
    backward passes do not synchronise gradients between processes, ``network.no_sync()`` unless given; the last pass of
    every network runs outside it. Returns the terms of the whole batch.

    Exact for networks whose rows do not see each other. Dropout and drop path draw the same in both passes. The one
    difference: batch normalisation takes the statistics of each micro-batch instead of the whole batch of a view. Its
    running statistics, and all other buffers, change once, in the second pass.

    Raises UserError for a ``micro_batch`` below 1 or a wrong number of networks, and what the loss raises.
    """
    if micro_batch < 1:
        raise UserError(f"micro_batch must be at least 1, given {micro_batch}")
    networks = [network] * len(views) if isinstance(network, nn.Module) else list(network)
    if len(networks) != len(views):
        raise UserError(f"there must be one network, or one for each of the {len(views)} views; given {len(networks)}")
    count = max(1, -(-(rows or len(views[0])) // micro_batch))
    pieces = [(v, part) for v, view in enumerate(views) for part in torch.tensor_split(view, count)]

    buffers = {buffer: buffer.clone() for each in networks for buffer in each.buffers()}
    states: list[State] = []
    embeddings: list[list[Tensor]] = [[] for _ in views]
    with torch.no_grad():
        for v, part in pieces:
            states.append(_random_state(part.device))
            embeddings[v].append(networks[v](part))
        for buffer, before in buffers.items():
            buffer.copy_(before)
    torch.clear_autocast_cache()  # it may hold casts of the weights that were made without a graph

    z = [torch.cat(parts).requires_grad_() for parts in embeddings]
    loss(*z).backward()
    cotangents = [part for each in z for part in torch.tensor_split(_gradient(each), count)]

    last = {id(networks[v]): number for number, (v, _) in enumerate(pieces)}
    for number, ((v, part), state, cotangent) in enumerate(zip(pieces, states, cotangents, strict=True)):
        _set_random_state(part.device, state)
        with nullcontext() if number == last[id(networks[v])] else (hold or _no_sync)(networks[v]):
            run(networks[v](part), cotangent)
    assert loss.terms is not None
    return loss.terms


def _gradient(z: Tensor) -> Tensor:
    assert z.grad is not None
    return z.grad


def _no_sync(network: nn.Module) -> AbstractContextManager[object]:
    """DistributedDataParallel's own context; other modules synchronise nothing."""
    no_sync: Callable[[], AbstractContextManager[object]] = getattr(network, "no_sync", nullcontext)
    return no_sync()


def _random_state(device: torch.device) -> State:
    other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), other


def _set_random_state(device: torch.device, state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
