"""The objective against the slow reference, by hand, and under bad input. Mutations named here were tried and die."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from barlow import forms, small, standardise
from barlow.errors import NumbersError
from barlow.objective import BarlowTwinsLoss, barlow_twins_loss, default_lambda, floor

spec = spec_from_file_location("benchmark", Path(__file__).parent.parent / "benchmarks" / "objective.py")
benchmark = module_from_spec(spec)
spec.loader.exec_module(benchmark)
LAMBDA = 0.0051
WAYS = ["gram", "correlation", "small gram", "small correlation", "gram in blocks", "correlation in blocks"]
SIZES = [(2, 3), (2, 9), (5, 9), (9, 9), (17, 9), (31, 8), (8, 31)]  # N below, at and above D


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch):
    """Makes one way to the loss the chosen one, at any size; in blocks (and panels) of four rows or columns."""

    def choose(name: str) -> str:
        form = "gram" if "gram" in name else "correlation"
        monkeypatch.setattr(forms, "cheaper", lambda *_, **__: form)
        for limit in ("SMALL", "FEW"):
            monkeypatch.setattr(small, limit, 2**30 if name.startswith("small") else 0)
        if name.endswith("in blocks"):
            for room, constant, value in ((standardise, "CACHE", 0), (standardise, "NARROW", 4), (forms, "PANEL", 4)):
                monkeypatch.setattr(room, constant, value)
            monkeypatch.setattr(forms, "DEEP", 4)
        return form

    return choose


def some_views(n: int, d: int, views: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Views that share a part, as embeddings of the same images do, with columns of different mean and scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    common, mean, scale = normal(n, d), normal(d), normal(d).exp()
    return [((common + 0.7 * normal(n, d)) * scale + mean).to(dtype) for _ in range(views)]


def ours(z: list[Tensor], lambda_: float = LAMBDA) -> tuple[float, list[Tensor]]:
    leaves = [view.detach().clone().requires_grad_() for view in z]
    loss = barlow_twins_loss(*leaves, lambda_=lambda_).loss
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of a view's gradient, in norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((f.double() - e).norm() / e.norm()) for f, e in pairs)


def hadamard(n: int = 8) -> Tensor:
    """n-1 columns of ±1, orthogonal to each other and to the constant."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h[:, 1:]


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_float64_equals_the_loops(way, name: str, n: int, d: int) -> None:
    """Kills: a sign, a factor 2 or N, standardisation not differentiated through (``own`` left out), unbiased variance,
    eps outside the root, κ not put back, the mirrored triangle left out, a block lost or counted twice."""
    way(name)
    z = some_views(n, d)
    z[1][:, 0] *= 1e-3  # here eps matters
    value, gradients = reference.value_and_gradients(z, LAMBDA, reference.loops)
    found, found_gradients = ours(z)
    assert found == pytest.approx(value, rel=1e-10)
    assert difference(found_gradients, gradients) < 1e-10


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("n", "d"), [*SIZES, (130, 200), (200, 130)])
def test_float32_equals_float64(way, name: str, n: int, d: int) -> None:
    way(name)
    z = some_views(n, d, dtype=torch.float32)
    value, gradients = reference.value_and_gradients(z, LAMBDA)
    found, found_gradients = ours(z)
    assert found == pytest.approx(value, rel=1e-5)
    assert difference(found_gradients, gradients) < 1e-5


@pytest.mark.parametrize("name", [way for way in WAYS if not way.startswith("small")])
@pytest.mark.parametrize("views", [3, 4])
def test_more_views_are_the_mean_over_pairs(way, name: str, views: int) -> None:
    """Kills: pairs forgotten or counted twice, partner indices mixed up (C_ab taken for C_ba)."""
    way(name)
    for n, d in ((6, 11), (19, 7)):
        z = some_views(n, d, views)
        value, gradients = reference.value_and_gradients(z, LAMBDA)
        found, found_gradients = ours(z)
        assert found == pytest.approx(value, rel=1e-10)
        assert difference(found_gradients, gradients) < 1e-10


def test_the_two_references_agree() -> None:
    z = some_views(7, 9)
    assert reference.whole(*z, 0.3).item() == pytest.approx(reference.loops(*z, 0.3).item(), rel=1e-12)


@pytest.mark.parametrize("name", WAYS)
def test_gradcheck(way, name: str) -> None:
    way(name)
    z = [view.requires_grad_() for view in some_views(5, 6, 2 if name.startswith("small") else 3)]
    assert torch.autograd.gradcheck(lambda *views: barlow_twins_loss(*views, lambda_=0.2).loss, z)


@pytest.mark.parametrize("name", WAYS)
def test_a_lambda_next_to_nothing_is_none(way, name: str) -> None:
    """Kills: a gradient divided by λ and multiplied by it again, which is NaN where 1/λ overflows."""
    way(name)
    for n, d in ((2, 5), (12, 40), (40, 12)):
        z = some_views(n, d, dtype=torch.float32)
        value, gradients = ours(z, 0.0)
        for lambda_ in (1e-45, 1e-39, 1e-31, 1e-29):
            found, found_gradients = ours(z, lambda_)
            assert found == pytest.approx(value, rel=1e-6)
            assert difference(found_gradients, [g.double() for g in gradients]) < 1e-5
        far = [view * 1e15 for view in z]
        expected = [g.double() / 1e15 for g in ours([view.double() for view in z], 0.0)[1]]
        for lambda_ in (1e-25, 1e-30):
            assert n == 2 or difference(ours(far, lambda_)[1], expected) < 1e-2


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("scale", "mean"), [(1e4, 0.0), (1e-4, 0.0), (1.0, 5e3)])
def test_large_and_small_inputs_and_such_far_from_zero(way, name: str, scale: float, mean: float) -> None:
    """float32. At 1e-4 eps is a thousand times the variance; or means are a thousand times the spread. Kills: κ taken
    away and only its main part put back; Â made again with the mean rounded to float32."""
    way(name)
    for n, d in ((12, 40), (40, 12)):
        z = [(view * scale + mean).float() for view in some_views(n, d)]
        value, gradients = reference.value_and_gradients(z, LAMBDA)
        found, found_gradients = ours(z)
        assert found == pytest.approx(value, rel=1e-5)
        assert difference(found_gradients, gradients) < 1e-5


@pytest.mark.parametrize("name", WAYS)
def test_uninitialised_memory_is_never_read(way, name: str) -> None:
    """All new memory is filled with NaN first."""
    way(name)
    z = some_views(10, 13)
    before = ours(z)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        after = ours(z)
    finally:
        torch.use_deterministic_algorithms(False)
    assert after[0] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))


# ---------------------------------------------------------------- symmetries


@pytest.mark.parametrize("name", WAYS)
def test_symmetries(way, name: str) -> None:
    """Order of images, of features, of views; scale and shift of every feature: loss the same, gradient follows."""
    way(name)
    for n, d in ((6, 11), (15, 8)):
        z = [1e3 * view for view in some_views(n, d)]  # eps is nothing beside these variances
        loss, gradients = ours(z)
        rows, columns = torch.randperm(n), torch.randperm(d)
        scale, shift = torch.rand(d, dtype=torch.float64) + 0.5, 1e3 * torch.randn(d, dtype=torch.float64)
        for moved, expected in (
            ([view[rows] for view in z], [g[rows] for g in gradients]),
            ([view[:, columns] for view in z], [g[:, columns] for g in gradients]),
            ([view * scale + shift for view in z], [g / scale for g in gradients]),
        ):
            found, found_gradients = ours(moved)
            assert found == pytest.approx(loss, rel=1e-9)
            assert difference(found_gradients, expected) < 1e-9
        found, found_gradients = ours(z[::-1])
        assert found == pytest.approx(loss, rel=1e-12)
        assert difference(found_gradients[::-1], gradients) < 1e-10


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("name", WAYS)
def test_cases_computed_by_hand(way, name: str) -> None:
    way(name)
    h = hadamard()
    c = 1 / (1 + standardise.EPS)  # a column of ±1 with itself
    healthy = barlow_twins_loss(h, h, lambda_=LAMBDA)
    assert healthy.loss.item() == pytest.approx(7 * (1 - c) ** 2, abs=1e-9)
    opposite = barlow_twins_loss(h, -h, lambda_=LAMBDA)
    assert opposite.loss.item() == pytest.approx(7 * (1 + c) ** 2, rel=1e-9)
    twice = barlow_twins_loss(h[:, [0, 0, 0]], h[:, [0, 0, 0]], lambda_=LAMBDA)  # redundancy: 6 off-diagonal entries c
    assert twice.loss.item() == pytest.approx(3 * (1 - c) ** 2 + LAMBDA * 6 * c**2, rel=1e-9)
    assert twice.redundancy == pytest.approx(6 * c**2, rel=1e-9)
    constant = torch.full((8, 7), 3.7, dtype=torch.float64)  # complete collapse
    collapsed = barlow_twins_loss(constant, constant, lambda_=LAMBDA)
    assert collapsed.loss.item() == pytest.approx(7, rel=1e-12)
    assert (collapsed.redundancy, collapsed.dead) == (0.0, 7)
    assert healthy.loss < twice.loss < collapsed.loss < opposite.loss


@pytest.mark.parametrize("name", WAYS)
def test_gradient_leads_away_from_collapse(way, name: str) -> None:
    """Near complete collapse and near redundancy a small step down the gradient lowers the loss, as it predicts."""
    way(name)
    h = hadamard()
    near_constant = [3.7 + 1e-5 * view for view in some_views(8, 7)]
    near_copies = [h[:, [0] * 7] + 0.05 * view for view in some_views(8, 7)]
    for z in (near_constant, near_copies):
        loss, gradients = ours(z)
        slope = sum(float(g.square().sum()) for g in gradients)
        assert 0 < slope < float("inf")
        step = 1e-6 * loss / slope
        after, _ = ours([view - step * g for view, g in zip(z, gradients, strict=True)])
        assert loss - after == pytest.approx(1e-6 * loss, rel=1e-2)
    lively = [view - view.mean(0) for view in near_constant]
    assert sum(float((g * v).sum()) for g, v in zip(ours(near_constant)[1], lively, strict=True)) < 0  # it spreads


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("value", [0.0, 31415.9, 7.7e8])
def test_constant_column_is_dead(way, name: str, value: float) -> None:
    """Kills: the first row not taken away before the mean. Rounding then turns the constant 31415.9 into ±1 after
    standardisation, a feature that agrees perfectly in both views."""
    way(name)
    z = some_views(100, 6, dtype=torch.float32)
    for view in z:
        view[:, 2] = value
    leaves = [view.requires_grad_() for view in z]
    terms = barlow_twins_loss(*leaves)
    terms.loss.backward()
    assert terms.dead == 1
    assert terms.diagonal[2] == 0.0
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)
    others = barlow_twins_loss(*(view.detach()[:, [0, 1, 3, 4, 5]] for view in z), lambda_=default_lambda(6))
    assert terms.loss.item() == pytest.approx(1 + others.loss.item(), rel=1e-6)


# ---------------------------------------------------------------- floor and λ


def test_floor_known_values() -> None:
    assert floor(256, 8192, 0.0051) == pytest.approx(1122, abs=0.5)
    assert floor(1024, 8192, 0.0051) == pytest.approx(283, abs=0.5)
    assert floor(129, 128, 0.0051) == 0.0
    assert floor(128, 128, 0.0051) > 0.0


@pytest.mark.parametrize("lambda_", [0.0, 0.0051, 0.5, 1.0, 30.0])
def test_floor_is_reached_and_never_passed(lambda_: float) -> None:
    """Reached: every direction used twice, and one view so small that eps turns C into 1/(1+κ) of the projection; with
    λ > 1, half of the features given up. Kills: N for N-1, λ not capped."""
    h = hadamard().repeat(1, 2)
    least = floor(8, 14, lambda_)
    if lambda_ <= 1:
        c = 1 / (1 + lambda_)  # κ = λ(14/7 - 1)
        shrunk = (standardise.EPS * c**2 / (1 - c**2)) ** 0.5 if c < 1 else 1.0
        z = (1e4 * h, shrunk * h if c < 1 else 1e4 * h)
    else:
        z = (1e4 * torch.cat((h[:, :7], 0 * h[:, :7]), 1),) * 2
    assert barlow_twins_loss(*z, lambda_=lambda_).loss.item() == pytest.approx(least, rel=1e-6, abs=1e-9)
    for seed in range(20):
        a, b = some_views(8, 14, seed=seed)
        assert barlow_twins_loss(a, b, lambda_=lambda_).loss.item() >= least
        assert barlow_twins_loss(a, a, lambda_=lambda_).loss.item() >= least


def test_default_lambda() -> None:
    assert default_lambda(8192) == default_lambda(2048) == 0.0051
    assert default_lambda(128) == 1 / 128
    z = some_views(6, 16)
    assert torch.equal(barlow_twins_loss(*z).loss, barlow_twins_loss(*z, lambda_=1 / 16).loss)
    assert torch.equal(BarlowTwinsLoss()(*z), BarlowTwinsLoss(1 / 16)(*z))


# ---------------------------------------------------------------- terms, module, dtypes


@pytest.mark.parametrize("name", WAYS)
def test_terms_and_matrix(way, name: str) -> None:
    """Kills: C transposed, its zeroed diagonal not put back, a diagonal of one pair taken for the mean."""
    form = way(name)
    z = some_views(9, 7, 2 if name.startswith("small") else 3)
    criterion = BarlowTwinsLoss(0.3)
    assert criterion.terms is None
    loss = criterion(*[view.requires_grad_() for view in z])
    terms = criterion.terms
    assert terms is not None
    assert loss.shape == ()
    assert loss.requires_grad
    assert not terms.loss.requires_grad
    assert terms.form == form
    assert loss.item() == terms.loss.item() == pytest.approx(terms.invariance + 0.3 * terms.redundancy, rel=1e-12)
    assert terms.floor == floor(9, 7, 0.3)
    pairs = [(a, b) for a in range(len(z)) for b in range(a + 1, len(z))]
    matrices = [reference.correlation(z[a].detach(), z[b].detach()) for a, b in pairs]
    diagonal = sum(c.diagonal() for c in matrices) / len(pairs)
    torch.testing.assert_close(terms.diagonal, diagonal, rtol=0, atol=1e-12)
    assert terms.mean_diagonal == pytest.approx(float(diagonal.mean()))
    for (a, b), c in zip(pairs, matrices, strict=True):
        torch.testing.assert_close(terms.cross_correlation(a, b), c, rtol=0, atol=1e-12)
        torch.testing.assert_close(terms.cross_correlation(b, a), c.T, rtol=0, atol=1e-12)
    own = reference.correlation(z[1].detach(), z[1].detach())
    torch.testing.assert_close(terms.cross_correlation(1, 1), own, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="numbered from 0"):
        terms.cross_correlation(0, 5)
    with pytest.raises(FrozenInstanceError):
        terms.dead = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(way, name: str, dtype: torch.dtype) -> None:
    """Under autocast too, whose bfloat16 products would be wrong in the third digit. Kills: autocast left on."""
    way(name)
    z = some_views(20, 24, dtype=dtype)
    loss, gradients = ours([view.float() for view in z])
    leaves = [view.requires_grad_() for view in z]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = barlow_twins_loss(*leaves, lambda_=LAMBDA)
        terms.loss.backward()
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad, gradient.to(dtype), rtol=1e-2, atol=1e-7)


def test_mixed_dtypes_and_layouts() -> None:
    a, b = some_views(8, 12)
    expected, gradients = ours([a.float().double(), b])
    found, found_gradients = ours([a.float(), b])
    assert found == expected
    assert [g.dtype for g in found_gradients] == [torch.float32, torch.float64]
    joined = torch.cat((a.float().double(), b)).requires_grad_()  # what a shared network gives: one tensor, chunked
    barlow_twins_loss(*joined.chunk(2), lambda_=LAMBDA).loss.backward()
    torch.testing.assert_close(joined.grad, torch.cat(gradients))
    strided = a.float().double().T.contiguous().T
    assert ours([strided, b])[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", WAYS)
def test_autograd_manners(way, name: str) -> None:
    """Scaled losses, two backward passes, one view without gradient, a view changed in between, second derivatives."""
    way(name)
    z = some_views(6, 9)
    _, gradients = ours(z)
    leaves = [view.clone().requires_grad_() for view in z]
    loss = barlow_twins_loss(*leaves, lambda_=LAMBDA).loss
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    assert difference([leaf.grad / 4 for leaf in leaves], gradients) < 1e-12
    alone = z[1].clone().requires_grad_()
    barlow_twins_loss(z[0], alone, lambda_=LAMBDA).loss.backward()
    assert difference([alone.grad], gradients[1:]) < 1e-12
    loss = barlow_twins_loss(*leaves, lambda_=LAMBDA).loss
    with torch.no_grad():
        leaves[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(barlow_twins_loss(z[0], alone).loss, alone, create_graph=True)


@pytest.mark.parametrize("name", WAYS)
def test_checkpointed_by_torch(way, name: str) -> None:
    """Kills: tensors that are taken from the graph twice, which torch.utils.checkpoint refuses."""
    way(name)
    for n, d in ((12, 40), (40, 12)):
        z = some_views(n, d)
        leaves = [view.clone().requires_grad_() for view in z]
        loss = BarlowTwinsLoss(LAMBDA)
        checkpoint(loss, *leaves, use_reentrant=False).backward()
        assert difference([leaf.grad for leaf in leaves], ours(z)[1]) == 0


@pytest.mark.parametrize("name", WAYS)
def test_gradients_are_nobody_elses_memory(way, name: str) -> None:
    """They are written over what the forward pass kept. Kills: that kept for a second pass too, or shared by calls."""
    way(name)
    z = some_views(6, 9)
    leaves = [view.clone().requires_grad_() for view in z]
    first, other = (barlow_twins_loss(*leaves, lambda_=LAMBDA).loss for _ in range(2))
    passes = [torch.autograd.grad(first, leaves, retain_graph=True) for _ in range(2)]
    passes.append(torch.autograd.grad(other, leaves))
    assert len({g.untyped_storage().data_ptr() for gradients in passes for g in gradients}) == 6
    for gradients in passes:
        assert difference(list(gradients), ours(z)[1]) < 1e-12
    assert all(torch.equal(leaf, view) for leaf, view in zip(leaves, z, strict=True))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-2, 1e-4])
def test_two_images_keep_their_digits(way, name: str, scale: float) -> None:
    """Two rows standardise to ±1 wherever they lie; the gradient is what eps leaves, at 1e4 a part in 10¹³. Kills: the
    general formula, a difference of which float32 keeps three digits at scale 1 and none at 1e4."""
    way(name)
    z = [view * scale for view in some_views(2, 9, dtype=torch.float32)]
    _, gradients = reference.value_and_gradients(z, LAMBDA, two_images)
    assert difference(ours(z)[1], gradients) < 1e-5


def two_images(z_a: Tensor, z_b: Tensor, lambda_: float) -> Tensor:
    """The loss of two rows with no digit cancelled: Â = ±1/sqrt(1 + eps/d²), d half of their distance."""
    a, b = (torch.sign(d) * (1 + standardise.EPS / d.square()).rsqrt() for d in ((z[0] - z[1]) / 2 for z in (z_a, z_b)))
    c = a[:, None] * b[None]
    off = ~torch.eye(len(c), dtype=torch.bool)
    return ((1 - c.diagonal()) ** 2).sum() + lambda_ * (c[off] ** 2).sum()


def test_the_benchmark_says_what_was_missed() -> None:
    rows = [
        benchmark.Row(64, 2048, "gram", 2.0, 80.0, 1.0, 40.0, 2.0, 46.0),
        benchmark.Row(256, 8192, "gram", 60.0, 3600.0, 40.0, 60.0, 1.5, None),
        benchmark.Row(32, 128, "correlation", 1.0, 0.9, 0.1, 0.9, 10.0, 1.0),
    ]
    text = "\n".join(benchmark.summary(rows))
    assert "smallest reference/ours: 0.90 at N=32, D=128" in text
    assert "sizes above 50 ms beyond 1.3: N=256, D=8192: 1.50" in text
    assert "N=64, D=2048: 40.0 times faster (aim: 45), missed; 46.0 warm" in text
    assert text.endswith("N=256, D=8192: 60.0 times faster (aim: 50), met")


# ---------------------------------------------------------------- choice and memory


def test_the_cheaper_form_is_chosen() -> None:
    assert barlow_twins_loss(*some_views(40, 400)).form == "gram"
    assert barlow_twins_loss(*some_views(400, 40)).form == "correlation"
    assert [forms.cheaper(n, 8192) for n in (32, 4096, 8000, 9000)] == ["gram"] * 3 + ["correlation"]
    assert forms.cheaper(9000, 8192, views=4) == "gram"  # four Gram matrices instead of six correlation matrices
    assert forms.cheaper(7000, 8192, halves=False) == "correlation"
    assert forms.cheaper(1024, 8192, world=8) == "gram"
    assert forms.cheaper(8000, 8192, world=8) == "correlation"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_small() -> None:
    """Forward and backward at N=256, D=16384: 34 MB are the gradients themselves. Kills: a D×D matrix (1 GB)."""
    code = benchmark.MEMORY.replace("{n}", "256").replace("{d}", "16384")
    megabytes = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 30 < megabytes < 160


def test_the_benchmark_times_the_same_loss() -> None:
    """Its reference, the published formulation, gives our value and gradients."""
    z = some_views(12, 30)
    leaves = [view.clone().requires_grad_() for view in z]
    loss = benchmark.Published(30).double()(*leaves)
    loss.backward()
    found, gradients = ours(z, benchmark.LAMBDA)
    assert found == pytest.approx(loss.item(), rel=1e-10)
    assert difference(gradients, [leaf.grad for leaf in leaves]) < 1e-10


# ---------------------------------------------------------------- bad input

good = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("z", "words"),
    [
        ((), "at least two views, given 0"),
        ((good,), "at least two views, given 1"),
        ((good, torch.randn(4, 5)), r"z_b must match z_a: given \(4, 5\)"),
        ((good, torch.randn(5, 3)), r"z_b must match z_a: given \(5, 3\)"),
        ((good, good, torch.randn(5, 3)), "view 3 of 3 must match view 1 of 3"),
        ((good[:1], good[:1]), "at least 2 images to correlate features, given 1"),
        ((good[:0], good[:0]), "given 0"),
        ((good[:, :0], good[:, :0]), r"shape \(batch, dim\), given \(4, 0\)"),
        ((good[None], good[None]), r"shape \(batch, dim\), given \(1, 4, 3\)"),
        ((good, good.int()), "z_b must be floating point, given torch.int32"),
        ((good.to(torch.complex64), good), "z_a must be floating point, given torch.complex64"),
        ((good.numpy(), good), "z_a must be a tensor"),
        ((good, good.to("meta")), "on meta"),
    ],
)
def test_bad_input(z: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        barlow_twins_loss(*z)


def test_the_module_takes_its_views_by_name() -> None:
    """Kills: a TypeError for the names that the contract gives; other sentences of the module for too few views."""
    a, b, c = some_views(6, 5, views=3)
    loss = BarlowTwinsLoss()
    assert loss(z_a=a, z_b=b) == loss(a, z_b=b) == loss(a, b) != loss(a, b, c)
    for given, named, words in (((), {}, "given 0"), ((a,), {}, "given 1"), ((), {"z_a": a}, "given 1"),
                                ((a, None), {}, "z_b must be a tensor")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            loss(*given, **named)


@pytest.mark.parametrize("lambda_", [-0.1, float("nan"), float("inf"), 1e31, 10**400, torch.ones(2)])
def test_bad_lambda(lambda_: float) -> None:
    for call in (
        lambda: barlow_twins_loss(good, good, lambda_=lambda_),
        lambda: BarlowTwinsLoss(lambda_),
        lambda: floor(4, 3, lambda_),
    ):
        with pytest.raises(ValueError, match=r"lambda must be a number from 0 to 1e\+30, given"):
            call()
    for n, d in ((1, 3), (4, 0)):
        with pytest.raises(ValueError, match="at least 2 images and 1 feature"):
            floor(n, d, 0.1)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_not_finite_names_the_view(way, name: str, poison: float) -> None:
    """1e30 is finite, but its variance is not: without the check w = 0, and the feature is silently gone."""
    way(name)
    for bad, words in (([1], "z_b holds"), ([0], "z_a holds"), ([0, 1], "z_a and z_b hold")):
        z = some_views(9, 6, dtype=torch.float32)
        for v in bad:
            z[v][3, 2] = poison
        with pytest.raises(NumbersError, match=words):
            barlow_twins_loss(*z)
    z = some_views(9, 6, dtype=torch.float32)
    z[0][0, 0] = poison  # the first row is taken away from all others
    with pytest.raises(NumbersError, match="z_a holds"):
        BarlowTwinsLoss()(*z)
