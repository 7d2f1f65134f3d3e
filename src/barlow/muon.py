"""Muon: momentum, made orthogonal. It moves all directions of a weight matrix at once.

The embedding's directions are learned one after the other, each at the speed of its own singular value (Simon et al.,
ICML 2023, arXiv:2303.15438). An update whose singular values are all one lets the small ones keep up, which is what a
short run lacks (docs/log.md, "Muon"). Method: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); scale of the
update: Liu et al. 2025 (arXiv:2502.16982, section 2.2), with which the rates of AdamW hold. Why not timm's: it
multiplies in bfloat16, which many processors do slowly, and does not use that the polynomial is one of the small Gram
matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

# Quintic iterations X ← aX + b(XXᵀ)X + c(XXᵀ)²X that take singular values from 0.001 … 1 to about 1.
STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
LONG = 1.5  # from this ratio of its sides on a matrix is cheaper by way of its Gram matrix
BETAS, EPS = (0.9, 0.95), 1e-8  # of the plain AdamW step that biases and norms take


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: (m, n) float → (m, n), singular values near 1.

    Directions with a singular value below about a thousandth of the norm stay smaller. A matrix of zeros stays zero.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp_min(1e-20)
    x = _by_gram(x) if x.shape[1] >= LONG * x.shape[0] else _direct(x)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def _direct(x: Tensor) -> Tensor:
    for a, b, c in STEPS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same polynomial of XXᵀ, on the small side, and applied once: all its factors are symmetric and commute."""
    gram = x @ x.T
    factor = None
    for k, (a, b, c) in enumerate(STEPS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if k + 1 < len(STEPS):
            gram = gram @ (polynomial @ polynomial)
    assert factor is not None
    return factor @ x


@final
class Muon(Optimizer):
    """Orthogonal momentum for parameters of two and more dimensions, AdamW for the others (biases and norms).

    A convolution's kernel is the matrix (out, in · height · width). ``momentum`` in [0, 1); weight decay is decoupled.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]] | Iterable[Tensor], lr: float, weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.ndim > 1:
                    self._orthogonal_step(p, group["lr"], group["momentum"])
                else:
                    self._adam_step(p, group["lr"])
        return loss

    def _orthogonal_step(self, p: Tensor, lr: float, momentum: float) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        matrix = state["momentum"].flatten(1)
        update = orthogonal(matrix.float()).view_as(p)
        p.add_(update, alpha=-0.2 * lr * max(matrix.shape) ** 0.5)

    def _adam_step(self, p: Tensor, lr: float) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - BETAS[0])
        state["square"].lerp_(p.grad.square(), 1 - BETAS[1])
        first, second = (1 - beta ** state["step"] for beta in BETAS)
        p.addcdiv_(state["mean"], (state["square"] / second).sqrt().add_(EPS), value=-lr / first)
