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

# Quintic iterations X ← aX + b(XXᵀ)X + c(XXᵀ)²X that bring singular values from 0.025 … 1 nearest to one, within 0.06
# (minimax, composed as in Amsel et al. 2025, arXiv:2505.16932). Fewer of a higher degree are hardly faster and
# round three times as much (docs/log.md, "Muon with three steps").
STEPS = (
    (7.5328, -21.4126, 15.6918),
    (3.0542, -2.2885, 0.4875),
    (2.1146, -1.4963, 0.4004),
)
LONG = 1.5  # from this ratio of its sides on a matrix is cheaper by way of its Gram matrix
BETAS, EPS = (0.9, 0.95), 1e-8  # of the plain AdamW step that biases and norms take


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: (m, n) float → (m, n), singular values near 1.

    The largest singular value σ₁ is bounded by (Σσ⁸)^(1/8), at most twice σ₁ for 256 of them: the first iteration has
    it at hand. Directions below a fortieth of that stay smaller. A matrix of zeros stays zero.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp_min(1e-20)  # so that no power of it underflows
    gram = x @ x.T
    squared = gram @ gram
    scale = squared.norm().sqrt().clamp_min(1e-15)  # bound of σ₁²
    x = (_by_gram if x.shape[1] >= LONG * x.shape[0] else _direct)(x / scale.sqrt(), gram / scale, squared / scale**2)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def _direct(x: Tensor, gram: Tensor, squared: Tensor) -> Tensor:
    x = _polynomial(gram, squared, STEPS[0]) @ x
    for step in STEPS[1:]:
        gram = x @ x.T
        x = _polynomial(gram, gram @ gram, step) @ x
    return x


def _by_gram(x: Tensor, gram: Tensor, squared: Tensor) -> Tensor:
    """The same polynomial of XXᵀ, on the small side, and applied once: all its factors are symmetric and commute."""
    factor = polynomial = _polynomial(gram, squared, STEPS[0])
    for step in STEPS[1:]:
        gram = gram @ (polynomial @ polynomial)
        polynomial = _polynomial(gram, gram @ gram, step)
        factor = polynomial @ factor
    return factor @ x


def _polynomial(gram: Tensor, squared: Tensor, step: tuple[float, float, float]) -> Tensor:
    """a + bG + cG², written over G²."""
    a, b, c = step
    made = squared.mul_(c).add_(gram, alpha=b)
    made.diagonal().add_(a)
    return made


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
