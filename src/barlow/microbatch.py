"""Exact large batches in little memory: two passes over micro-batches, embeddings first, then gradients.

The loss is no sum over images, so adding up the gradients of small batches optimises something else. Exact is: embed
all micro-batches without a graph, take the loss and ∂L/∂z once on the whole batch, embed again with a graph and feed
each micro-batch its rows of ∂L/∂z (Gao et al. 2021, arXiv:2101.06983, do so for contrastive losses). It costs one more
forward pass and holds the activations of one micro-batch.

The gradient is that of the whole batch for networks without batch statistics. BatchNorm sees one micro-batch at a time,
in both passes the same one: then it is the exact gradient of that network, whose statistics are those of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from barlow.objective import Terms, barlow_twins_loss


def backward(
    network: nn.Module,
    views: Sequence[Tensor],
    *,
    lambda_: float | None,
    micro_batch: int,
    unsynchronised: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Terms:
    """Adds the gradients of the whole batch to the parameters of ``network`` and returns the terms of its loss.

    ``network``: V views (n, …) → V embeddings (n, D). ``micro_batch``: images a pass, at least 1; the last pass may hold
    fewer. Random numbers (dropout, drop path) are the same in both passes, running statistics are updated once.
    ``unsynchronised``: a context in which a DistributedDataParallel ``network`` keeps its gradients to itself; all
    passes but the last run in it.
    """
    parts = list(zip(*(view.split(micro_batch) for view in views), strict=True))
    states, rows = [], []
    with torch.no_grad(), kept_statistics(network):
        for part in parts:
            states.append(random_state(views[0]))
            rows.append(network(*part))
    z = [torch.cat(chunks).requires_grad_() for chunks in zip(*rows, strict=True)]
    terms = barlow_twins_loss(*z, lambda_=lambda_)
    gradients = torch.autograd.grad(terms.loss, z)
    cotangents = zip(*(gradient.split(micro_batch) for gradient in gradients), strict=True)
    for i, (part, cotangent) in enumerate(zip(parts, cotangents, strict=True)):
        with unsynchronised() if i < len(parts) - 1 else nullcontext():
            set_random_state(views[0], states[i])
            torch.autograd.backward(list(network(*part)), list(cotangent))
    return terms


@contextmanager
def kept_statistics(network: nn.Module) -> Iterator[None]:
    """BatchNorm uses the statistics of its batch as in training, and its running ones come out as they went in."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])


def random_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    """State of torch's generators that a network on the device of ``like`` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if like.is_cuda else None


def set_random_state(like: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
    """Puts the generators back into a state of ``random_state``."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], like.device)
