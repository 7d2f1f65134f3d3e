"""The Barlow Twins loss (Zbontar et al., ICML 2021, arXiv:2103.03230), exact, the same on one process and on many.

    L = Σᵢ (1 - Cᵢᵢ)² + λ Σᵢ Σ_{j≠i} Cᵢⱼ²,   C = ÂᵀB̂/N     (eq. 1 and 2)

Â, B̂ are the embeddings (N×D), every column standardised over the whole batch, that of all processes: biased variance,
eps 1e-5 inside the root. With more than two views L is the mean over all pairs, so scale and floor stay those of two.
The arithmetic is float32, autocast or not (float64 if an embedding is float64).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from barlow import forms, ranks, small
from barlow.errors import NumbersError, UserError
from barlow.standardise import EPS

MISSING: Any = object()  # a view that was not given: too few of them is the sentence of barlow_twins_loss
NOTHING, MOST = 1e-30, 1e30  # a smaller λ adds what float32 does not hold; beyond either end its products overflow
DEAD = (2 * EPS) ** -0.5  # 1/sqrt(variance + eps) above this: a variance below eps


@dataclass(frozen=True, eq=False)
class Terms:
    """One evaluation of the loss: loss = invariance + λ · redundancy. The same on every process."""

    loss: Tensor  # scalar, float32 or float64: the one to differentiate
    invariance: float  # Σᵢ (1 - Cᵢᵢ)², mean over the pairs of views
    redundancy: float  # Σᵢ Σ_{j≠i} Cᵢⱼ², likewise; not yet multiplied by λ
    floor: float  # no embeddings of this many images and features can have a smaller loss
    diagonal: Tensor  # (D,) Cᵢᵢ, mean over the pairs: how well each feature survives the distortions, in [-1, 1]
    dead: int  # features whose variance in some view is below eps = 1e-5 (a constant one has 0)
    form: str  # "gram" or "correlation": which exact form was the cheaper
    _matrix: Callable[[int, int], Tensor] = field(repr=False)

    @property
    def mean_diagonal(self) -> float:
        """Mean Cᵢᵢ: 1 when the views agree in every feature, about 0 for unrelated views."""
        return float(self.diagonal.mean())

    def cross_correlation(self, a: int = 0, b: int = 1) -> Tensor:
        """C between views a and b, (D, D), detached.

        The correlation form has it at hand. In the Gram form no D×D matrix exists: it is computed when asked for, from
        the embeddings (to which these terms hold a reference, not a copy); on several processes all of them must ask.
        """
        return self._matrix(a, b)


class BarlowTwinsLoss(nn.Module):
    """The loss as a module: ``BarlowTwinsLoss()(z_a, z_b)`` is the scalar to differentiate.

    ``lambda_``: the weight of the redundancy, at least 0; None stands for ``default_lambda(D)``.
    ``terms``: the ``Terms`` of the last call, None before the first; its loss is detached, to keep no graph alive.
    """

    def __init__(self, lambda_: float | None = None) -> None:
        super().__init__()
        _check_lambda(lambda_)
        self.lambda_ = lambda_
        self.terms: Terms | None = None

    def forward(self, z_a: Tensor = MISSING, z_b: Tensor = MISSING, *more: Tensor) -> Tensor:
        """Two or more embeddings (n, D) of the same images → scalar. Raises what ``barlow_twins_loss`` raises."""
        z = [view for view in (z_a, z_b, *more) if view is not MISSING]
        terms = barlow_twins_loss(*z, lambda_=self.lambda_)
        self.terms = replace(terms, loss=terms.loss.detach())
        return terms.loss

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


def barlow_twins_loss(*z: Tensor, lambda_: float | None = None) -> Terms:
    """The loss of two or more embeddings of the same images, with its terms.

    ``z``: (n, D) each, floating point, row i of all of them from image i. ``lambda_``: None stands for
    ``default_lambda(D)``; below 1e-30 it counts as 0.

    In a process group the batch is the joined batch of all processes (n may differ, all must call), and the gradient is
    multiplied by the number of processes: the mean over processes which DistributedDataParallel takes then is exactly
    the gradient of one process with the joined batch. A call costs a GPU one read-back.

    Raises UserError (a ValueError) for bad shapes, dtypes or λ, and NumbersError naming the view that is not finite.
    """
    counts = _agreed_counts(z, lambda_)
    weight = default_lambda(z[0].shape[1]) if lambda_ is None else float(lambda_)
    weight = weight if weight >= NOTHING else 0.0
    loss, others = _Loss.apply(weight, counts, *z)
    return Terms(loss, *others)


def floor(n: int, dim: int, lambda_: float) -> float:
    """The smallest loss that any embeddings of ``n`` images in ``dim`` features can have.

    C has rank n-1 at most. When dim > n-1 it cannot be the identity, and since trace(C)² ≤ rank(C)·ΣCᵢⱼ²

        L ≥ D·κ/(1+κ),   κ = λ(D/(N-1) - 1),

    reached with all Cᵢᵢ = 1/(1+κ). For λ > 1 giving features up is cheaper, and the bound is that of λ = 1, D-N+1.
    Zero when dim ≤ n-1. Raises UserError for n < 2, dim < 1 or a λ that is not a number ≥ 0.
    """
    if n < 2 or dim < 1:
        raise UserError(f"the floor needs at least 2 images and 1 feature, given n={n}, dim={dim}")
    _check_lambda(lambda_)
    kappa = min(lambda_, 1.0) * max(0.0, dim / (n - 1) - 1.0)
    return dim * kappa / (1.0 + kappa)


def default_lambda(dim: int) -> float:
    """λ for D features: 0.0051, but 1/D for fewer than 196 of them.

    0.0051 is the published code's at D = 8192 (the paper's ablation finds little sensitivity around it) and common
    down to D = 2048; 1/D is Tsai et al. 2021 (arXiv:2104.13712), who use 1/128 at D = 128.
    """
    return max(0.0051, 1.0 / dim)


class _Loss(torch.autograd.Function):
    """z → (loss, the other fields of ``Terms``); the forms do the arithmetic."""

    @staticmethod
    def forward(ctx: Any, lambda_: float, counts: list[int], *z: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        total, world, dim = sum(counts), len(counts), z[0].shape[1]
        dtype = torch.float64 if any(view.dtype == torch.float64 for view in z) else torch.float32
        form = forms.cheaper(total, dim, len(z), world, halves=z[0].device.type == "cpu")
        across = form == "gram" and world > 1  # this process holds a share of the columns
        straight = small.fits(z, form, world, lambda_)
        with _no_autocast(z[0]):
            held = tuple(ranks.rows_to_columns(view, counts) for view in z) if across else z
            if straight:
                kept, saved, squares = small.way(form)(held, dtype, lambda_)
            elif form == "gram":
                kept, saved, squares = forms.gram(held, dtype)
            else:
                kept, saved, squares = forms.correlation(held, total, dtype, lambda_)
            diagonal = saved.diagonal
            if across:
                diagonal = torch.stack([ranks.gather_rows(c) for c in diagonal])
            norms = (torch.linalg.vector_norm(c, dtype=squares.dtype) for c in (diagonal, 1.0 - diagonal))
            off, on, distance, low, high = _read(squares, *norms, *saved.scale.aminmax())
        if form == "gram":
            off = off / total**2 - on**2
        dead = 0
        if across or not (low > 0.0 and high <= DEAD):  # NaN fails too
            dead, *bad = (ranks.sum_(_flags(saved.scale)) if across else _flags(saved.scale)).tolist()
            _refuse_bad(bad)
        invariance = distance**2 / len(diagonal)
        redundancy = max(0.0, off) / len(diagonal)
        loss = saved.scale.new_full((), invariance + lambda_ * redundancy)
        ctx.lambda_, ctx.counts, ctx.form, ctx.dim, ctx.across = lambda_, counts, form, dim, across
        ctx.straight, ctx.kept = straight, {"kept": kept}
        ctx.save_for_backward(*held, *saved[:3], *saved.products)
        at_hand = (saved.products, saved.diagonal) if form == "correlation" and lambda_ else None
        matrix = partial(_cross_correlation, [view.detach() for view in z], total, dtype, at_hand)
        mean = diagonal[0] if len(z) == 2 else diagonal.mean(0)
        return loss, (invariance, redundancy, floor(total, dim, lambda_), mean, dead, form, matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: better no second derivative than one that lacks this part
            raise RuntimeError("the Barlow Twins loss has first derivatives only; call backward without create_graph")
        views, total, gain = len(ctx.needs_input_grad) - 2, sum(ctx.counts), gradient
        if len(ctx.counts) > 1:
            gain = gradient * len(ctx.counts)
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint gives them a single time
        held, (scale, c, own, *products) = tensors[:views], tensors[views:]
        saved = forms.Forward(scale, c, own, products)
        with _no_autocast(gain):
            kept = ctx.kept.pop("kept", None)  # the gradients are written over it, and a second pass must make it again
            if ctx.straight:
                kept = kept or small.way(ctx.form)(held, gain.dtype, ctx.lambda_)[0]
                g = small.gradient(kept, saved.scale, ctx.form, ctx.lambda_, gain)
            else:
                hats = kept or forms.again(held, total, ctx.form, gain.dtype)
                if ctx.form == "gram":
                    g = forms.gram_gradient(hats, saved, ctx.lambda_, gain)
                else:
                    g = forms.correlation_gradient(hats, total, saved, ctx.lambda_, gain)
            if ctx.across:
                g = [ranks.columns_to_rows(part, ctx.counts, ctx.dim) for part in g]
        return None, None, *(part.to(view.dtype) for part, view in zip(g, held, strict=True))


def _cross_correlation(
    z: Sequence[Tensor],
    total: int,
    dtype: torch.dtype,
    at_hand: tuple[Sequence[Tensor], Tensor] | None,
    a: int,
    b: int,
) -> Tensor:
    if not (0 <= a < len(z) and 0 <= b < len(z)):
        raise UserError(f"there are {len(z)} views, numbered from 0; given {a} and {b}")
    if at_hand and a != b:
        k = list(combinations(range(len(z)), 2)).index((min(a, b), max(a, b)))
        products, diagonals = at_hand
        matrix = products[k].clone()
        matrix.diagonal().copy_(diagonals[k])
        return matrix if a < b else matrix.T
    with torch.no_grad(), _no_autocast(z[0]):
        return forms.correlations(forms.again(z, total, "correlation", dtype), total, [(a, b)])[0]


def _agreed_counts(z: Sequence[Tensor], lambda_: float | None) -> list[int]:
    """Rows held by each process. A mistake on one process raises on all of them, so that none is left waiting."""
    complaint = _wrong_lambda(lambda_) or _complaint(z)
    rows = 0 if complaint else len(z[0])
    table = [[complaint is None, rows, 0]]
    if ranks.world_size() > 1:
        same = "" if complaint else f"{len(z)} {z[0].shape[1]} {[view.dtype for view in z]} {lambda_}"
        table = ranks.integers([complaint is None, rows, zlib.crc32(same.encode())])
    if complaint:
        raise UserError(complaint)
    if not all(fine for fine, _, _ in table):
        raise UserError("another process gave the loss what it cannot use; its own message says why")
    if len({signature for _, _, signature in table}) > 1:
        raise UserError("the processes gave the loss different λ, numbers of views, widths or dtypes; they must agree")
    counts = [n for _, n, _ in table]
    if sum(counts) < 2:
        raise UserError(f"the loss needs at least 2 images to correlate features, given {sum(counts)}")
    return counts


def _complaint(z: Sequence[Any]) -> str | None:
    if len(z) < 2:
        return f"the loss needs embeddings of at least two views, given {len(z)}"
    for v, view in enumerate(z):
        name = _name(v, len(z))
        if not isinstance(view, Tensor):
            return f"{name} must be a tensor of shape (batch, dim), given {type(view).__name__}"
        if view.ndim != 2 or view.shape[1] == 0:
            return f"{name} must have the shape (batch, dim), given {tuple(view.shape)}"
        if not view.is_floating_point():
            return f"{name} must be floating point, given {view.dtype}; use .float()"
        if view.shape != z[0].shape or view.device != z[0].device:
            return (
                f"{name} must match {_name(0, len(z))}: "
                f"given {tuple(view.shape)} on {view.device} and {tuple(z[0].shape)} on {z[0].device}"
            )
    return None


def _check_lambda(lambda_: float | None) -> None:
    if complaint := _wrong_lambda(lambda_):
        raise UserError(complaint)


def _wrong_lambda(lambda_: Any) -> str | None:
    try:
        fine = lambda_ is None or 0.0 <= float(lambda_) <= MOST
    except (TypeError, ValueError, OverflowError, RuntimeError):  # no number, or several
        fine = False
    return None if fine else f"lambda must be a number from 0 to {MOST:g}, given {lambda_}"


def _name(v: int, views: int) -> str:
    return ("z_a", "z_b")[v] if views == 2 else f"view {v + 1} of {views}"


def _read(*scalars: Tensor) -> list[float]:
    """Scalars as numbers: one wait for a GPU, one copy each from the CPU's own memory."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    return torch.stack(scalars).tolist()


def _flags(w: Tensor) -> Tensor:
    """[dead features, view 1 not finite, view 2 not finite, …]; a variance that is NaN or infinite has no w > 0."""
    return torch.cat(((w > DEAD).any(0).sum().view(1), ~(w > 0.0).all(1)))


def _refuse_bad(bad: Sequence[int]) -> None:
    names = [_name(v, len(bad)) for v, flag in enumerate(bad) if flag]
    if names:
        what = "holds" if len(names) == 1 else "hold"
        raise NumbersError(f"{' and '.join(names)} {what} NaN, infinity or numbers whose square overflows")


def _no_autocast(like: Tensor) -> AbstractContextManager[object]:
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
