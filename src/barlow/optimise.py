"""Parameter groups, the optimiser, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.optim import Lars
from torch import nn
from torch.optim import AdamW, Optimizer

from barlow.muon import Muon

FLOOR = 1e-3  # the cosine ends at a thousandth of its start (paper, section 2.2)


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor in (0, 1] of the highest learning rate at ``step`` (0 is the first) of ``steps``.

    Linear over the first ``warmup`` share of the steps, reaching 1 at the last of them; then a cosine that reaches
    a thousandth at the last step (paper, section 2.2: "linear warm-up", "cosine decay … by a factor of 1000").
    """
    warm = min(round(warmup * steps), steps - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(steps - 1 - warm, 1)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights, biases and norms): every trainable parameter exactly once; one-dimensional ones have no decay.

    The paper's two groups ("biases and batch normalization parameters" are those of one dimension or none).
    """
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    weights = [p for p in named.values() if p.ndim > 1]
    small = [p for p in named.values() if p.ndim <= 1]
    if sum(p.numel() for p in weights + small) != sum(p.numel() for p in network.parameters() if p.requires_grad):
        raise AssertionError("a parameter is missing from the optimiser's groups, or in two of them")
    return weights, small


def build_optimizer(network: nn.Module, name: str, *, lr: float, lr_bias: float, weight_decay: float) -> Optimizer:
    """The optimiser with its two groups; each keeps its own highest rate as ``peak``.

    ``lars``: momentum 0.9, trust coefficient 0.001; biases and norms take a plain momentum step at ``lr_bias``, without
    adaptation and decay (paper, section 2.2). Published code uses 0.0048 for them at base batch 256, tuned with
    gradients that were divided by the number of GPUs (16 or 32); here gradients are the true ones.
    ``muon``: orthogonal momentum for weights, AdamW for biases and norms; both groups at ``lr``, decay on weights only.
    ``adamw``: betas (0.9, 0.999), both groups at ``lr``, decay on weights only.
    """
    weights, small = parameter_groups(network)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "peak": lr},
        {"params": small, "weight_decay": 0.0, "peak": lr_bias if name == "lars" else lr},
    ]
    for group in groups:
        group["lr"] = group["peak"]
    if name == "lars":
        groups[0]["always_adapt"] = True  # whatever the weight decay; timm leaves out groups without decay
        filled = [group for group in groups if group["params"]]
        return cast(Optimizer, Lars(filled, lr=lr, momentum=0.9, trust_coeff=0.001))
    groups = [group for group in groups if group["params"]]
    if name == "muon":
        return Muon(groups, lr=lr)
    return AdamW(groups, lr=lr, fused=_can_fuse(weights + small))


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets every group's rate to ``factor`` times its own highest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _can_fuse(parameters: Iterable[torch.Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
