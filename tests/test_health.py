"""The measures: golden values on arrays small enough to work out by hand, invariances, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barlow import health
from barlow.errors import UserError
from barlow.health import diagnose, measure
from barlow.measures import LARGE, Sample, forced_duplicates

CROSS = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # mean 0, covariance I/2
SINGLE = [
    health.relative_spread, health.mean_cosine, health.effective_rank, health.participation, health.rank_me,
    health.off_diagonal_excess, health.dead_dimensions, health.duplicate_dimensions, health.self_cluster,
    health.duplicate_neighbour_rate, health.occupancy,
]  # fmt: skip


def orthogonal(n: int, d: int) -> np.ndarray:
    """n rows with mean zero and exactly the identity as covariance."""
    rows = np.random.default_rng(0).standard_normal((n, d + 1))
    rows[:, 0] = 1.0
    return np.linalg.qr(rows)[0][:, 1:] * np.sqrt(n)


def smooth(n: int = 200, d: int = 40, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)) @ np.linalg.qr(draw.standard_normal((d, d)))[0] / np.arange(1, d + 1) ** 0.5


@pytest.mark.parametrize("d", [1, 2, 7, 30])
def test_identity_covariance_has_full_rank(d: int) -> None:
    z = orthogonal(64, d)
    assert np.isclose(health.effective_rank(z), d)
    assert np.isclose(health.participation(z), d)
    assert np.allclose(health.spectrum(z), np.ones(d))
    assert np.isclose(health.relative_spread(z), 1)


def test_effective_rank_by_hand() -> None:
    z = orthogonal(32, 3) * [2.0, 1.0, 1.0]  # σ in the ratio 2 : 1 : 1, so p = ½, ¼, ¼
    assert np.isclose(health.effective_rank(z), np.exp(0.5 * np.log(2) + 0.5 * np.log(4)))
    assert np.isclose(health.participation(z), 36 / 18)  # λ = 4, 1, 1
    assert np.isclose(health.rank_me(z), health.effective_rank(z), rtol=1e-5)  # mean zero: both see the same σ


def test_rank_me_sees_the_mean_and_effective_rank_does_not() -> None:
    z = orthogonal(32, 4)
    assert np.isclose(health.effective_rank(z + 1000), 4)
    assert health.rank_me(z + 1000) < 1.1
    exact = np.linalg.svd(z + 3, compute_uv=False)
    p = exact / exact.sum() + 1e-7
    assert np.isclose(health.rank_me(z + 3), np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_wide_and_tall_arrays_agree_with_the_singular_values(shape: tuple[int, int]) -> None:
    z = np.random.default_rng(1).standard_normal(shape) + 2
    sigma = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)[: min(shape[0] - 1, shape[1])]
    assert np.allclose(health.spectrum(z), sigma**2 / shape[0])
    p = sigma / sigma.sum()
    assert np.isclose(health.effective_rank(z), np.exp(-(p * np.log(p)).sum()))


def test_relative_spread_by_hand() -> None:
    assert np.isclose(health.relative_spread(CROSS), 1)
    assert np.isclose(health.relative_spread(CROSS + np.array([3.0, 4.0])), 1 / 26)  # tr Cov = 1, ‖μ‖² = 25
    assert health.relative_spread(np.full((5, 3), 7.0)) == 0
    assert health.relative_spread(np.zeros((5, 3))) == 0


def test_mean_cosine_by_hand() -> None:
    assert np.isclose(health.mean_cosine(CROSS), -1 / 3)  # per row: -1, 0, 0
    assert np.isclose(health.mean_cosine(np.full((6, 2), -2.0)), 1)
    assert np.isclose(health.mean_cosine(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])), np.sqrt(0.5) / 3)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, 2.0])
def test_alpha_of_an_exact_power_law(alpha: float) -> None:
    z = orthogonal(256, 100) * np.arange(1, 101) ** (-alpha / 2)
    assert np.isclose(health.spectrum_alpha(z), alpha, atol=1e-9)


def test_cliff_is_found_where_it_is() -> None:
    z = orthogonal(256, 100)
    steep = np.where(np.arange(100) < 5, 1.0, 1e-3)
    assert health.rank_cliff(z * steep) == 5
    assert health.rank_cliff(z) == 0
    assert health.rank_cliff(z * np.where(np.arange(100) < 50, 1.0, 1e-3)) == 0  # half of the room: a narrow layer
    assert health.rank_cliff(z * np.where(np.arange(100) < 5, 1.0, 0.25)) == 0  # λ falls by 16 only
    assert health.rank_cliff(z * np.exp(-np.arange(100) / 2)) == 0  # steep, but no cliff
    below = np.where(np.arange(100) < 5, 1.0, np.maximum(0.25 * 0.7 ** (np.arange(100) - 5.0), 0.01))
    assert health.rank_cliff(z * below) == 0  # λ falls by 16 only, to little
    assert health.rank_cliff(z * np.where(np.arange(100) < 5, 1.0, 0.55 * below)) == 0  # by 53
    assert health.rank_cliff(z * np.where(np.arange(100) < 5, 1.0, 0.5 * below)) == 5  # by 64


def test_one_odd_image_is_not_taken_for_a_direction() -> None:
    z = smooth()
    assert Sample(z).tempered.n == 200
    assert np.isclose(measure(z)["participation"], health.participation(z))
    z[17] *= 200
    assert health.participation(z) < 1.1
    assert measure(z)["participation"] > 5
    assert diagnose(z).verdict == "healthy"


def test_off_diagonal_excess_has_its_floor_at_one() -> None:
    draw = np.random.default_rng(0)
    found = [health.off_diagonal_excess(draw.standard_normal((64, 40))) for _ in range(20)]
    assert abs(np.mean(found) - 1) < 0.03
    z = draw.standard_normal((50, 1))
    assert np.isclose(health.off_diagonal_excess(np.hstack([z, -2 * z, 5 * z])), 49)
    assert np.isclose(health.off_diagonal_excess(orthogonal(40, 6)), 0, atol=1e-9)
    assert np.isnan(health.off_diagonal_excess(z))


def test_dead_dimensions_are_those_that_never_change() -> None:
    z = np.random.default_rng(0).standard_normal((30, 10)) * 1e-6
    assert health.dead_dimensions(z) == 0  # small everywhere is not dead
    z[:, :4] = 3.0
    assert np.isclose(health.dead_dimensions(z), 0.4)
    assert health.dead_dimensions(np.zeros((4, 3))) == 1


def test_duplicate_dimensions_by_hand() -> None:
    z = np.random.default_rng(0).standard_normal((100, 10))
    assert health.duplicate_dimensions(z) == 0
    z[:, 1], z[:, 2] = -3 * z[:, 0] + 1, z[:, 0]
    assert np.isclose(health.duplicate_dimensions(z), 0.3)
    assert health.duplicate_dimensions(np.random.default_rng(0).standard_normal((6, 400))) == 0  # chance is allowed for
    wide = np.random.default_rng(0).standard_normal((100, 600))
    wide[:, :300] = wide[:, 300:]
    assert health.duplicate_dimensions(wide) == 1


def test_forced_duplicates_tell_low_rank_from_copies() -> None:
    draw = np.random.default_rng(0)
    assert forced_duplicates(draw.standard_normal((200, 2)) @ draw.standard_normal((2, 300))) > 0.9
    assert forced_duplicates(np.tile(draw.standard_normal((200, 30)), 4)) == 0
    assert forced_duplicates(np.ones((4, 3))) == 0


@pytest.mark.parametrize("function", SINGLE)
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 7.0, 1e25])
def test_the_scale_does_not_matter(function: object, factor: float) -> None:
    z = np.maximum(smooth() + 0.3, 0)
    assert np.isclose(function(z * factor), function(z), rtol=1e-9)  # type: ignore[operator]


@pytest.mark.parametrize("function", [f for f in SINGLE if f is not health.occupancy])
def test_the_order_of_images_and_numbers_does_not_matter(function: object) -> None:
    z, draw = smooth(), np.random.default_rng(5)
    mixed = z[draw.permutation(len(z))][:, draw.permutation(z.shape[1])]
    assert np.isclose(function(mixed), function(z), rtol=1e-9)  # type: ignore[operator]


def test_a_rotation_changes_no_spectrum() -> None:
    z = smooth()
    turned = z @ np.linalg.qr(np.random.default_rng(9).standard_normal((40, 40)))[0]
    for function in (health.effective_rank, health.rank_me, health.spectrum_alpha, health.self_cluster):
        assert np.isclose(function(turned), function(z), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8])
def test_any_number_type(dtype: type) -> None:
    z = (np.abs(smooth()) * 60).astype(dtype)
    assert np.isclose(health.effective_rank(z), health.effective_rank(z.astype(np.float64)), rtol=1e-4)


def test_single_precision_for_large_arrays_is_close() -> None:
    z = smooth(300, 40) @ np.random.default_rng(0).standard_normal((40, 4000)) + 5
    exact, fast = measure(z[:, :1500]), measure(z[:, :1500].astype(np.float32).repeat(2, axis=1)[:, ::2])
    for name in ("relative_spread", "mean_cosine", "effective_rank", "participation", "self_cluster"):
        assert np.isclose(exact[name], fast[name], rtol=1e-3), name
    assert np.isclose(health.relative_spread(z), health.relative_spread(Sample(z)))


@pytest.mark.parametrize("z", [
    np.zeros(3), np.zeros((1, 3)), np.zeros((3, 0)), np.zeros((2, 2, 2)), [["a", "b"], ["c", "d"]],
    [[1.0, np.nan], [0.0, 1.0]], [[1.0, np.inf], [0.0, 1.0]], np.full((2, 2), 1 + 1j),
])  # fmt: skip
def test_what_is_not_an_array_of_embeddings_is_refused(z: object) -> None:
    with pytest.raises(UserError, match="embeddings"):
        measure(z)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_taken_with_their_graph_and_in_any_type(kind: torch.dtype) -> None:
    """Kills: torch's own errors for features as a training loop has them."""
    z = torch.from_numpy(smooth()).to(kind).requires_grad_()
    expected = health.effective_rank(z.detach().double().numpy())
    assert np.isclose(health.effective_rank(z), expected, rtol=1e-4)
    assert np.isclose(Sample(z).n, 200)
    found = measure(z, z + 0)
    assert np.isclose(found["effective_rank"], expected, rtol=1e-4)
    assert found["twins_found"] == 1
    assert diagnose(z).verdict == "healthy"
    assert health.measure_pair(z, z + 0)["twins_found"] == 1


@pytest.mark.parametrize("z", [[[1.0, 2.0], [3.0]], torch.eye(4).to_sparse(), [torch.ones(2, requires_grad=True)] * 3])
def test_what_numpy_makes_no_array_of_is_refused_in_a_sentence(z: object) -> None:
    """Kills: NumPy's and torch's own errors, of either view."""
    for ask in (Sample, measure, diagnose, health.effective_rank, lambda bad: measure(np.eye(4), bad)):
        with pytest.raises(UserError, match=r"^embeddings must be an array \(images, numbers\)$"):
            ask(z)  # type: ignore[operator]


def test_views_of_other_images_are_refused() -> None:
    with pytest.raises(UserError, match="one shape"):
        diagnose(np.eye(4), np.eye(5))
    many = np.random.default_rng(0).standard_normal((3000, 4))  # of so many a part is looked at, of both the same
    for measured in (diagnose, health.measure_pair):
        with pytest.raises(UserError, match="one shape"):
            measured(many, many[:-1])  # type: ignore[operator]
    for bad in (np.zeros((3, 2)), np.zeros((3, 1, 2)), np.full((3, 3, 2), np.nan)):
        with pytest.raises(UserError, match="lidar"):
            health.lidar(bad)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_measure_is_finite_and_in_range(n: int, d: int, seed: int, coarse: bool) -> None:
    z = np.random.default_rng(seed).standard_normal((n, d))
    z = np.round(z) if coarse else z
    m = diagnose(z, np.roll(z, 1, axis=0)).measures
    assert all(np.isfinite(value) for value in m.values())
    assert 0 <= m["effective_rank"] <= min(n - 1, d) + 1e-9
    assert 0 <= m["participation"] <= min(n - 1, d) + 1e-9
    assert 1 - 1e-6 <= m["rank_me"] <= min(n, d) + 1e-3 or not z.any()
    shares = ("relative_spread", "dead_dimensions", "duplicate_dimensions", "duplicate_neighbour_rate", "occupancy")
    for name in (*shares, "modes_within", "twins_found"):
        assert -1e-9 <= m[name] <= 1 + 1e-9, name
    assert -1 - 1e-9 <= m["mean_diagonal"] <= 1 + 1e-9


def test_many_rows_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ROWS", 100)
    z = smooth(250, 8)
    assert measure(z)["n"] == 100
    assert measure(z, z)["twins_found"] == 1
    assert measure(z[:99])["n"] == 99


def test_public_names_are_sorted_and_there() -> None:
    assert health.__all__ == sorted(health.__all__, key=str.lower) or sorted(health.__all__) == health.__all__
    assert all(hasattr(health, name) for name in health.__all__)


def test_large_arrays_are_as_exact_as_small_ones() -> None:
    """Kills: square roots of eigenvalues of a product in single precision, which for a low rank are mostly noise."""
    rng = np.random.default_rng(0)
    for n, d in ((1100, 500), (500, 1100)):
        z = rng.standard_normal((n, 3)) @ rng.standard_normal((3, d)) + 5
        sigma = np.linalg.svd(z - z.mean(0), compute_uv=False)
        p = sigma[sigma > 1e-9 * sigma[0]] / sigma.sum()
        assert n * d > LARGE
        assert health.effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
        whole = np.linalg.svd(z, compute_uv=False)
        p = whole / whole.sum() + 1e-7
        assert health.rank_me(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
