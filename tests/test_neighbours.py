"""Who lies beside whom: clusters, duplicates and the two views, on arrays small enough to work out by hand."""

from __future__ import annotations

import numpy as np
from test_health import CROSS, orthogonal, smooth

from barlow import health


def test_self_cluster_end_points() -> None:
    assert np.isclose(health.self_cluster(np.full((20, 5), 2.0)), 1)
    z = np.random.default_rng(0).standard_normal((400, 30))
    assert abs(health.self_cluster(z)) < 0.01
    assert np.isclose(health.self_cluster(CROSS), -1 / 3)  # ‖Z̃Z̃ᵀ‖² = 8: (2·8 − 4·5) / (1·3·4)
    assert health.self_cluster(np.ones((3, 1))) == 1


def test_duplicate_neighbours_by_hand() -> None:
    z = np.random.default_rng(0).standard_normal((40, 20))
    assert health.duplicate_neighbour_rate(z) == 0
    z[:10] = z[10:20]
    assert np.isclose(health.duplicate_neighbour_rate(z), 0.5)
    assert health.duplicate_neighbour_rate(np.full((9, 3), 0.1)) == 1


def test_occupancy_by_hand() -> None:
    points = np.repeat(np.arange(5.0), 5)[:, None]  # 25 images, 5 clusters of 5 points on a line
    assert np.isclose(health.occupancy(points), 1)
    heap = np.zeros((25, 1))
    heap[:4, 0] = [1, 2, 3, 4]
    p = np.array([21, 1, 1, 1, 1]) / 25
    assert np.isclose(health.occupancy(heap), np.exp(-(p * np.log(p)).sum()) / 5)
    assert np.isclose(health.occupancy(np.ones((25, 2))), 1 / 5)


def test_modes_by_hand() -> None:
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((4, 30))
    z = np.repeat(centres, 20, axis=0)
    assert health.modes(z).groups == 4
    assert health.modes(z).within < 1e-9
    found = health.modes(z + 0.1 * draw.standard_normal(z.shape))
    assert found.groups == 4
    assert 0.005 < found.within < 0.03
    for shapeless in (
        draw.standard_normal((200, 1)),
        draw.standard_normal((200, 2)),
        smooth(),
        np.ones((50, 2)),
        z[:5],
    ):
        assert health.modes(shapeless).groups == 1 or health.modes(shapeless).within > 0.05


def test_a_few_strays_are_no_modes() -> None:
    draw = np.random.default_rng(0)
    strays = np.concatenate([np.repeat(draw.standard_normal((2, 30)), 40, axis=0), draw.standard_normal((20, 30))])
    assert health.modes(strays) == (1, 1.0)
    assert health.modes(np.concatenate([np.zeros((99, 3)), np.ones((1, 3))])) == (1, 1.0)


def test_mean_diagonal_by_hand() -> None:
    a = orthogonal(50, 3)
    assert np.isclose(health.mean_diagonal(a, a), 1)
    assert np.isclose(health.mean_diagonal(a, 5 * a + 2), 1)
    assert np.isclose(health.mean_diagonal(a, a * [1, -1, 1]), 1 / 3)
    assert np.isclose(health.mean_diagonal(a, a[:, [1, 2, 0]]), 0)
    assert np.isclose(health.mean_diagonal(a * [1, 1, 0], a), 2 / 3)  # a dead dimension counts as 0


def test_view_gap_by_hand() -> None:
    a = orthogonal(50, 4)
    assert health.view_gap(a, a) == 0
    assert np.isclose(health.view_gap(a, -a), 2)
    assert np.isclose(health.view_gap(a + 1, a), 0.5)  # 4 · 1² over 4 + 4
    assert np.isclose(health.view_gap(a, 1000 * a), 999**2 / (1 + 1000**2))
    assert health.view_gap(np.ones((3, 2)), np.ones((3, 2))) == 0


def test_twins_found_by_hand() -> None:
    a = np.eye(4) + 0.1
    assert health.twins_found(a, a) == 1
    assert health.twins_found(a, 7 * a) == 1
    assert health.twins_found(a, a[[1, 0, 2, 3]]) == 0.5
    assert health.twins_found(np.ones((5, 3)), np.ones((5, 3))) == 0  # a tie is no find
    draw = np.random.default_rng(0)
    assert health.twins_found(draw.standard_normal((400, 20)), draw.standard_normal((400, 20))) < 0.02


def test_twins_near_by_hand() -> None:
    a = np.eye(4) + 0.1
    assert health.twins_near(a, 7 * a) == 1
    assert health.twins_near(np.ones((5, 3)), np.ones((5, 3))) == 1 - np.log(5) / np.log(120) * 5  # all last
    turned = np.stack([[np.cos(t), np.sin(t)] for t in (0.0, 0.2, 0.5)])
    # the first view is paired with the last: both are the farthest of all from their own, the middle one the nearest
    places = [3, 1, 3, 3, 1, 3]
    assert np.isclose(health.twins_near(turned, turned[::-1]), 1 - np.log(places).mean() / np.log([1, 2, 3]).mean())
    draw = np.random.default_rng(0)
    z, w = draw.standard_normal((2, 400, 20))
    assert abs(health.twins_near(z, w)) < 0.03  # chance
    assert np.isclose(health.twins_near(z, w), health.twins_near(w, z))
    doses = [health.twins_near(z, z + share * w) for share in (0.5, 1.0, 2.0, 4.0)]
    assert doses == sorted(doses, reverse=True)
    assert doses[-1] > 0.1 > health.twins_found(z, z + 4.0 * w)  # it still tells where few are found


def test_lidar_counts_what_separates_images() -> None:
    draw = np.random.default_rng(0)
    centres = np.zeros((200, 1, 10))
    centres[:, 0, :3] = orthogonal(200, 3)
    shake = np.zeros((200, 20, 10))
    shake[:, :, 3:] = draw.standard_normal((200, 20, 7))  # directions that only the augmentation moves
    assert abs(health.lidar(centres + shake * 0.5) - 3) < 0.1
    assert health.effective_rank((centres + shake)[:, 0]) > 7
    wide = np.concatenate([centres + shake, np.zeros((200, 20, 5000 - 10))], axis=2)
    assert np.isclose(health.lidar(wide[:30, :4]), health.lidar((centres + shake)[:30, :4]), rtol=1e-6)


def test_lidar_matches_the_definition() -> None:
    z = np.random.default_rng(2).standard_normal((12, 5, 4)) + np.random.default_rng(3).standard_normal((12, 1, 4))
    means = z.mean(axis=1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(rows.T, bias=True) for rows in z], axis=0) + 1e-4 * np.eye(4)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(root @ between @ root)
    p /= p.sum()
    assert np.isclose(health.lidar(z), np.exp(-(p * np.log(p)).sum()))
