"""The protocols on plain arrays, against hand-made cases, slow references and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, r2_score

from barlow import probe, protocols, scores


def clouds(n: int, d: int, classes: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with columns of very different scale and offset; the last column is constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(0, 1.2, (classes, d))
    x = (centres[labels] + spread * rng.normal(size=(n, d))) * np.geomspace(0.01, 50, d) + np.linspace(-20, 20, d)
    x[:, -1] = 7
    return x.astype(np.float32), labels


# ---- k-NN


def test_whitened_features_are_heard_alike_whatever_their_scale() -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal((400, 6)).astype(np.float32)
    labels = (z[:, 0] > 0).astype(np.int64)
    z[:, 1:4] *= 50  # loud, and about nothing
    right = [float((protocols.knn(a, labels[:300], b) == labels[300:]).mean())
             for a, b in ((z[:300], z[300:]), protocols.whitened(z[:300], z[300:]))]  # fmt: skip
    assert right[0] < 0.75 < 0.85 < right[1]
    bank, queries = protocols.whitened(z[:300], z[300:])
    assert np.allclose(np.cov(bank.T, bias=True), np.eye(6), atol=0.01)
    assert np.allclose(bank.mean(0), 0, atol=1e-4)
    again = protocols.whitened(z[:300] * np.float32(7) + 3, z[300:] * np.float32(7) + 3)
    assert np.allclose(np.abs(again[1]), np.abs(queries), atol=1e-2)  # an axis has no sign
    alone = protocols.whitened(z[:300], z[300:301])[1]
    assert np.allclose(alone, queries[:1], atol=1e-5)  # moments of the bank, never of what is asked
    few, _ = protocols.whitened(z[:3], z[300:])  # fewer images than numbers
    assert np.isfinite(few).all()


@pytest.mark.parametrize("n", [60, 100, 150, 234, 300])
def test_few_rows_of_many_features_are_whitened_along_the_leading_axes_only(n: int) -> None:
    """Kills: classes that lie apart lost among axes that hold nothing but the noise of so few rows."""
    centres = np.random.default_rng(99).normal(0, 0.5, (3, 256))
    labels, draw = np.arange(n + 300) % 3, np.random.default_rng(n)
    z = (centres[labels] + draw.normal(size=(len(labels), 256))).astype(np.float32)
    bank, queries = protocols.whitened(z[:n], z[n:])
    assert bank.shape == (n, n // 10)
    assert np.cov(bank.T, bias=True).diagonal() == pytest.approx(np.ones(n // 10), abs=0.01)
    assert (protocols.knn(bank, labels[:n], queries) == labels[n:]).mean() >= 0.9


def test_with_ten_rows_a_feature_whitening_is_as_it_was_to_the_bit() -> None:
    z = np.random.default_rng(5).standard_normal((121, 12)).astype(np.float32) * np.geomspace(0.1, 9, 12, dtype="f4")
    whole = protocols._basis(z[:120], 1.0)
    bank, queries = protocols.whitened(z[:120], z[120:])
    assert (bank == whole(z[:120]).numpy()).all()
    assert (queries == whole(z[120:]).numpy()).all()
    assert protocols.whitened(z[:119], z[120:])[0].shape == (119, 11)


def test_knn_on_four_points_of_the_circle() -> None:
    degrees = np.deg2rad([0, 30, 90, 180])
    # the lengths must not matter, only the angles do
    bank = np.stack([np.cos(degrees), np.sin(degrees)], 1).astype(np.float32) * np.array([[1], [100], [0.01], [5]])
    labels = np.array([0, 1, 1, 2])
    queries = np.deg2rad([10, 20, 61, 140, 200])
    queries = np.stack([np.cos(queries), np.sin(queries)], 1).astype(np.float32)
    # nearest: 10° → 0° (0); 20° → 30° (1); 61° → 90° (1); 140° → 180° (2); 200° → 180° (2)
    assert protocols.knn(bank, labels, queries, k=1).tolist() == [0, 1, 1, 2, 2]
    # the three nearest of 10° are 0° (class 0), 30° and 90° (class 1). Cold: cos 10° = .985 outvotes .940 and .174;
    # hot: all weigh the same and two beat one.
    assert protocols.knn(bank, labels, queries[:1], k=3, temperature=0.01).tolist() == [0]
    assert protocols.knn(bank, labels, queries[:1], k=3, temperature=100).tolist() == [1]


def test_knn_votes_as_a_loop_over_the_definition() -> None:
    bank, labels = clouds(300, 6, 5, seed=1, spread=3)
    queries, _ = clouds(80, 6, 5, seed=2, spread=3)
    bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    for k, temperature in ((20, 0.07), (7, 1.0)):
        expected = []
        for q in queries.astype(np.float64):
            sims = [float(q @ b) / float(np.linalg.norm(q) * np.linalg.norm(b)) for b in bank.astype(np.float64)]
            votes = [0.0] * 5
            for j in sorted(range(len(sims)), key=lambda j: -sims[j])[:k]:
                votes[labels[j]] += np.exp(sims[j] / temperature)
            expected.append(int(np.argmax(votes)))
        assert protocols.knn(bank, labels, queries, k=k, temperature=temperature).tolist() == expected
    plain = [np.bincount(labels[np.argsort(-sims)[:20]]).argmax() for sims in _cosines(queries, bank)]
    assert plain != protocols.knn(bank, labels, queries, temperature=0.02).tolist()  # the weights do matter here


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    return unit[0] @ unit[1].T


def test_of_equally_near_rows_the_first_count() -> None:
    bank = np.tile(np.array([[1.0, 0.0]], np.float32), (1000, 1))
    labels = np.r_[np.full(3, 2), np.full(2, 1), np.full(995, 0)]
    assert protocols.knn(bank, labels, bank[:2], k=5).tolist() == [2, 2]
    assert protocols.knn(bank, labels, bank[:2], k=4).tolist() == [2, 2]
    bank[500] = [1.0, 0.1]  # one nearer than all, of class 0, then the first four
    assert protocols.knn(bank, labels, bank[500:501], k=5).tolist() == [2]
    assert protocols.knn(bank, np.r_[1, labels[1:]], bank[:1], k=2).tolist() == [1]  # one vote each: the lower class
    assert protocols.knn(bank * 0, labels, bank[:1], k=1).tolist() == [2]  # dead features: similarity 0 to all


def test_knn_does_not_depend_on_the_size_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = clouds(500, 8, 4, seed=3, spread=3)
    queries, _ = clouds(150, 8, 4, seed=4, spread=3)
    whole = protocols.knn(bank, labels, queries)
    monkeypatch.setattr(protocols, "BLOCK", 500 * 7)
    assert (protocols.knn(bank, labels, queries) == whole).all()


def test_knn_refuses_a_k_beyond_its_bank() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        protocols.knn(np.eye(5, dtype=np.float32), np.arange(5), np.eye(5, dtype=np.float32), k=6)


# ---- linear probe


def fitted(x: np.ndarray, y: np.ndarray, strength: float, problem: probe.Problem = probe.SOFTMAX) -> np.ndarray:
    columns = np.concatenate([x.T, np.ones((1, len(x)), np.float32)])
    spread, targets = torch.from_numpy((x**2).mean(0)), torch.from_numpy(y.T).contiguous()
    outputs = y.shape[1] if y.ndim > 1 else int(y.max()) + 1
    return probe.fit(
        torch.from_numpy(columns), targets.float() if y.ndim > 1 else targets,
        torch.full((1, len(x)), 1 / len(x)), strength, spread, torch.zeros(1, outputs, len(columns)),
        problem, (500, 1e-7),
    )[0].numpy()  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_the_fit_is_scikit_learns(strength: float) -> None:
    x, labels = clouds(400, 7, 3, seed=5, spread=2)
    x = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-3)).astype(np.float32)
    theirs = LogisticRegression(C=1 / (len(x) * strength), tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), labels)
    ours = fitted(x, labels, strength)
    assert ours[:, :-1] == pytest.approx(theirs.coef_, abs=2e-3 * np.abs(theirs.coef_).max())
    assert ours[:, -1] - ours[:, -1].mean() == pytest.approx(theirs.intercept_ - theirs.intercept_.mean(), abs=5e-3)


def test_two_labels_fit_as_two_logistic_regressions() -> None:
    x, labels = clouds(400, 6, 4, seed=6, spread=2)
    x = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-3)).astype(np.float32)
    y = np.stack([labels % 2, labels // 2], 1)
    ours = fitted(x, y, 1e-2, probe.SIGMOID)
    for column, row in zip(y.T, ours, strict=True):
        theirs = LogisticRegression(C=1 / (len(x) * 1e-2), tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), column)
        assert row == pytest.approx(np.r_[theirs.coef_[0], theirs.intercept_], abs=2e-3)


def test_values_fit_as_ridge() -> None:
    x, labels = clouds(300, 6, 4, seed=7)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-3)
    y = np.stack([labels + x[:, 0], x[:, 1] - 3 * x[:, 2]], 1).astype(np.float32)
    theirs = Ridge(alpha=300 * 1e-2).fit(x.astype(np.float64), y)
    ours = fitted(x.astype(np.float32), y, 1e-2, probe.SQUARES)
    assert ours == pytest.approx(np.c_[theirs.coef_, theirs.intercept_], abs=1e-3)


@pytest.mark.parametrize(("n", "d"), [(600, 20), (60, 200)])
def test_the_probe_is_scikit_learns_with_the_same_penalty(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standardising, turning, intercept and all; also where the fit runs on as few axes as there are images."""
    monkeypatch.setattr(probe, "STRENGTHS", (0.03,))
    train, labels = clouds(n, d, 4, seed=8, spread=4)
    test, truth = clouds(2000, d, 4, seed=9, spread=4)
    answers = protocols.linear_probe(train, labels, test)
    deviation = np.where(train.std(0) > 1e-4, train.std(0), 1)
    scaled = [(x - train.mean(0)) / deviation for x in (train, test)]
    theirs = LogisticRegression(C=1 / (n * 0.03), tol=1e-8, max_iter=5000).fit(scaled[0], labels).predict(scaled[1])
    assert (theirs == answers).mean() > 0.995
    assert scores.accuracy(truth, answers) > 0.5


def test_the_probe_does_not_see_scale_or_offset() -> None:
    train, labels = clouds(300, 10, 3, seed=10, spread=3)
    test, _ = clouds(500, 10, 3, seed=11, spread=3)
    plain = protocols.linear_probe(train, labels, test)
    assert (protocols.linear_probe(train * 8 + 16, labels, test * 8 + 16) == plain).mean() > 0.995


def test_weak_features_get_a_penalty_that_is_strong_enough() -> None:
    """Kills: a choice that ends at a strength of 1, where wide and weak features are still fitted to noise."""
    draw = np.random.default_rng(3)
    x = draw.standard_normal((625, 400)).astype(np.float32)
    y = (x @ draw.standard_normal((400, 1)) / 20 + 2 * draw.standard_normal((625, 1))).astype(np.float32)
    train, test = slice(225), slice(225, None)
    mean, deviation = x[train].mean(0), x[train].std(0)
    scaled, level = (x - mean) / deviation, y[train].mean()
    ridges = {s: Ridge(alpha=225 * s).fit(scaled[train], y[train] - level) for s in (1.0, 3.0, 10.0)}
    theirs = {s: scores.r2(y[test], ridge.predict(scaled[test]) + level) for s, ridge in ridges.items()}
    ours = scores.r2(y[test], protocols.ridge(x[train], y[train], x[test], seed=0))
    assert theirs[10.0] > theirs[1.0] + 0.03
    assert ours > theirs[1.0] + 0.03


def test_with_many_classes_the_search_goes_on_where_nothing_is_learned_yet() -> None:
    """Kills: two strengths at the strong end, at which the weights do not move, taken for the end of all gain."""
    draw = np.random.default_rng(0)
    centres, y = draw.normal(size=(600, 8)), np.repeat(np.arange(600), 3)
    x, test = ((centres[y] + draw.normal(size=(1800, 8))).astype(np.float32) for _ in range(2))
    assert scores.accuracy(y, protocols.linear_probe(x, y, test)) > 0.09  # .072 at a strength of 100


def test_scores_are_held_block_by_block_and_the_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: scores of all rows and classes at once, and a 1 for each class that a row is of beside a 0 for all others:
    gigabytes where the classes are a thousand."""
    x, labels = clouds(300, 7, 5, seed=28, spread=2)
    x = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-3)).astype(np.float32)
    several = np.stack([labels % 2, labels > 2], 1)
    cases = [(labels, probe.SOFTMAX), (several, probe.SIGMOID), (several, probe.SQUARES)]
    whole = [fitted(x, y, 1e-2, problem) for y, problem in cases]
    answers, widest, loss = protocols.linear_probe(x, labels, x), 0, probe.SOFTMAX.loss

    def spy(scores: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal widest
        widest = max(widest, scores.shape[2])
        assert y.shape == scores.shape[2:]
        return loss(scores, y)

    monkeypatch.setattr(probe, "BLOCK", 1)
    for (y, problem), expected in zip(cases, whole, strict=True):
        assert fitted(x, y, 1e-2, problem) == pytest.approx(expected, abs=2e-3)
    monkeypatch.setattr(protocols, "SOFTMAX", probe.SOFTMAX._replace(loss=spy))
    assert (protocols.linear_probe(x, labels, x) == answers).all()
    assert widest == 64
    parts = [
        *probe.probe([(torch.from_numpy(x),) * 2], torch.from_numpy(labels), torch.full((300,), -1), probe.SOFTMAX)
    ]
    assert [part.shape for part in parts] == [(64, 5)] * 4 + [(44, 5)]


def test_all_who_work_for_long_tell_what_they_are_at() -> None:
    """Kills: a probe of many classes that is silent for minutes."""
    x, labels = clouds(100, 6, 3, seed=29)
    heard: list[str] = []
    protocols.linear_probe(x, labels, x, tell=heard.append)
    number = len(probe.STRENGTHS)
    assert heard[:2] == ["principal axes", f"strength 1 of {number}, pass 1"]
    assert any(text.startswith(f"strength 4 of {number}, pass 2") for text in heard)
    assert heard[-1].startswith("all rows, pass ")
    heard.clear()
    protocols.few_labels(x, labels, x, labels, share=0.3, draws=2, tell=heard.append)
    assert f"draw 2 of 2, preparation 2 of 2, strength 3 of {number}, pass 1" in heard
    for said in (protocols.multi_label_probe, protocols.ridge):
        heard.clear()
        said(x, np.stack([labels % 2, labels > 1], 1), x, tell=heard.append)
        assert f"strength 2 of {number}, pass 1" in heard
    heard.clear()
    protocols.neighbour_votes(x, labels, x, k=3, temperature=0.1, tell=heard.append)
    assert heard == ["0 of 100 images"]


def test_noise_calls_for_a_strong_penalty_and_clean_classes_for_a_weak_one() -> None:
    chosen = []
    for spread in (30.0, 0.3):
        x, labels = clouds(400, 50, 4, seed=12, spread=spread)
        deviation = np.where(x.std(0) > 1e-4, x.std(0), 1)
        columns, _, mean_square = probe.principal(torch.from_numpy((x - x.mean(0)) / deviation))
        y = torch.from_numpy(labels)
        fold = protocols._folds(labels, 0)
        chosen.append(probe.search(columns, y, fold, mean_square, probe.SOFTMAX)[1])
    assert chosen[0] >= 0.1
    assert chosen[1] <= 1e-2


def test_the_answers_never_depend_on_the_other_test_rows() -> None:
    train, labels = clouds(200, 12, 3, seed=13, spread=3)
    test, _ = clouds(100, 12, 3, seed=14, spread=3)
    whole = protocols.linear_probe(train, labels, test)
    odd = test.copy()
    odd[50:] = 1e3  # were test statistics used anywhere, this would move the first half
    assert (protocols.linear_probe(train, labels, odd)[:50] == whole[:50]).all()


def test_the_held_back_part_is_judged_and_never_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fold's weights are zero on the rows it is judged by, and the folds cover every row once."""
    seen: list[torch.Tensor] = []
    fit = probe.fit

    def spy(x, y, weights, *rest):  # type: ignore[no-untyped-def]
        seen.append(weights)
        return fit(x, y, weights, *rest)

    monkeypatch.setattr(probe, "fit", spy)
    train, labels = clouds(203, 6, 3, seed=15)
    protocols.linear_probe(train, labels, train[:1])
    assert all((w > 0).sum(0).eq(4).all() and w.shape[0] == 5 for w in seen[:-1])
    assert seen[-1].shape[0] == 1
    assert seen[-1].gt(0).all()


def test_the_folds_are_stratified_and_a_lone_label_stays_in_training() -> None:
    labels = np.r_[np.zeros(50), np.ones(11), np.full(2, 2), [3]].astype(np.int64)
    fold = protocols._folds(labels, seed=0).numpy()
    counts = [np.bincount(fold[labels == c], minlength=5) for c in range(3)]
    assert counts[0].tolist() == [10] * 5
    assert sorted(counts[1].tolist()) == [2, 2, 2, 2, 3]
    assert sorted(counts[2].tolist()) == [0, 0, 0, 1, 1]
    assert fold[-1] == -1
    assert (protocols._folds(labels, seed=1).numpy() != fold).any()
    many = np.arange(protocols.MANY + 5) % 5
    assert sorted(np.unique(protocols._folds(many, 0), return_counts=True)[1].tolist()) == [1001, 4004]


def test_one_label_a_class_is_enough() -> None:
    train, labels = clouds(400, 10, 4, seed=16, spread=0.2)
    rows = np.array([np.flatnonzero(labels == c)[0] for c in range(4)])
    answers = protocols.linear_probe(train[rows], labels[rows], train)
    assert scores.accuracy(labels, answers) > 0.95


def test_the_same_seed_gives_the_same_answers() -> None:
    train, labels = clouds(120, 30, 4, seed=17, spread=6)
    test, truth = clouds(300, 30, 4, seed=18, spread=6)
    first, second = (protocols.few_labels(train, labels, test, truth, share=0.3, seed=3) for _ in range(2))
    assert first == second
    assert protocols.few_labels(train, labels, test, truth, share=0.3, seed=4).draws != first.draws


def test_every_draw_of_every_seed_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clouds(60, 4, 3, seed=27)
    drawn, stratified = [], protocols.stratified
    monkeypatch.setattr(protocols, "stratified", lambda *args: drawn.append(stratified(*args)) or drawn[-1])
    for seed in (0, 1):
        protocols.few_labels(x, labels, x[:1], labels[:1], share=0.2, draws=3, seed=seed)
    assert len({tuple(rows) for rows in drawn}) == 6


def test_many_labels_and_values() -> None:
    train, labels = clouds(500, 8, 4, seed=19, spread=1)
    test, truth = clouds(400, 8, 4, seed=20, spread=1)
    found = protocols.multi_label_probe(train, np.stack([labels % 2, labels > 1], 1), test)
    assert scores.mean_average_precision(np.stack([truth % 2, truth > 1], 1), found) > 0.85
    line = np.c_[train[:, 1] * 3 + 1e4, train[:, 0]]
    answers = protocols.ridge(train, line, test)
    assert scores.r2(np.c_[test[:, 1] * 3 + 1e4, test[:, 0]], answers) > 0.999


def test_values_keep_their_digits_wherever_zero_lies_and_whatever_the_unit() -> None:
    """Kills: seconds since 1970 rounded to minutes, values near the largest float32 turned to inf."""
    x = np.random.default_rng(31).normal(size=(400, 5)).astype(np.float32)
    line = (x[:, 0] + 0.3 * x[:, 1] + 0.3 * np.random.default_rng(32).normal(size=400))[:, None].astype(np.float64)

    def r2(targets: np.ndarray) -> float:
        answers = protocols.ridge(x[:300], targets[:300], x[300:])
        assert answers.dtype == np.float64
        return scores.r2(targets[300:], answers)

    plain = r2(line)
    assert plain > 0.9
    for other in (line + 1.7e9, line * 60 - 1e6, line * 1e38, line * 1e39, line * 1e-39):
        assert r2(other) == pytest.approx(plain, abs=1e-4)
    constant = protocols.ridge(x[:300], np.full((300, 1), 0.5), x[300:])
    assert constant == pytest.approx(np.full((100, 1), 0.5))


# ---- few labels


def test_draws_are_stratified_and_differ() -> None:
    labels = np.r_[np.zeros(700), np.ones(290), np.full(10, 2)].astype(np.int64)
    drawn = [protocols.stratified(labels, 0.02, np.random.default_rng(s)) for s in range(3)]
    for rows in drawn:
        assert np.bincount(labels[rows]).tolist() == [14, 5, 1]  # 2 % are 14, 5.8 and 0.2, together 20
        assert (np.diff(rows) > 0).all()
    assert len({tuple(rows) for rows in drawn}) == 3
    assert len(protocols.stratified(np.arange(10) % 3, 1.0, np.random.default_rng(0))) == 10


def test_only_the_drawn_labels_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that were not drawn may say anything; the drawn rows come from the labels, so those stay."""
    train, labels = clouds(300, 10, 3, seed=21, spread=2)
    test, truth = clouds(200, 10, 3, seed=22, spread=2)
    rows = protocols.stratified(labels, 0.1, np.random.default_rng([0, 0]))
    monkeypatch.setattr(protocols, "stratified", lambda *_: rows)
    before = protocols.few_labels(train, labels, test, truth, share=0.1, draws=2)
    wrong = (labels + 1) % 3
    wrong[rows] = labels[rows]
    assert protocols.few_labels(train, wrong, test, truth, share=0.1, draws=2) == before
    assert before.labels == len(rows)


def test_the_moments_come_from_all_images_and_whitening_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = clouds(300, 10, 3, seed=25, spread=2)
    seen = []
    basis = protocols._basis
    monkeypatch.setattr(protocols, "_basis", lambda pool, power: seen.append((len(pool), power)) or basis(pool, power))
    protocols.few_labels(train, labels, train, labels, share=0.1, draws=1)
    assert seen == [(300, 0.0), (300, 0.5)]
    variances = []
    for power in (0.0, 0.5, 1.0):
        turned = basis(train[:, :-1], power)(train[:, :-1]).numpy()
        variances.append(np.linalg.eigvalsh(turned.T @ turned / 300))
    assert variances[2] == pytest.approx(np.ones(9), abs=0.05)
    assert variances[1] / variances[1].mean() == pytest.approx(
        np.sqrt(variances[0]) / np.sqrt(variances[0]).mean(), rel=0.02
    )


def test_of_two_preparations_the_one_that_held_back_labels_prefer() -> None:
    x, labels = clouds(200, 8, 3, seed=26, spread=1)
    good = (torch.from_numpy((x[:100, :-1] - x[:, :-1].mean(0)) / x[:, :-1].std(0)), torch.from_numpy(x[100:, :-1]))
    noise = tuple(torch.from_numpy(np.random.default_rng(k).normal(size=(100, 7)).astype(np.float32)) for k in (0, 1))
    targets = torch.from_numpy(labels[:100])
    fold = protocols._folds(labels[:100], 0)
    alone = torch.cat([*probe.probe([good], targets, fold, probe.SOFTMAX)])
    for both in ([good, noise], [noise, good]):
        assert torch.equal(torch.cat([*probe.probe(both, targets, fold, probe.SOFTMAX)]), alone)


def test_the_mean_of_the_draws_and_its_interval() -> None:
    train, labels = clouds(1000, 10, 3, seed=23, spread=3)
    test, truth = clouds(500, 10, 3, seed=24, spread=3)
    got = protocols.few_labels(train, labels, test, truth, share=0.02, draws=4)
    assert len(got.draws) == 4
    assert got.mean == pytest.approx(np.mean(got.draws))
    # Student's t with 3 degrees of freedom: 3.182 standard errors
    assert got.high - got.mean == pytest.approx(3.1824 * np.std(got.draws, ddof=1) / 2, rel=1e-3)
    full = scores.accuracy(truth, protocols.linear_probe(train, labels, test))
    assert 0.4 < got.mean < full


# ---- figures


def test_accuracies_confusion_and_classes_by_hand() -> None:
    labels, answers = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    counts = scores.confusion(labels, answers, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert scores.accuracy(labels, answers) == 0.5
    assert scores.balanced_accuracy(labels, answers, 4) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores.balanced_accuracy(labels, answers, 4) == pytest.approx(balanced_accuracy_score(labels, answers))
    rows = scores.per_class(labels, answers, 4)
    assert rows[1][:2] == (2, 0.5)
    assert rows[1].precision == pytest.approx(1 / 3)
    assert rows[3].images == 0
    assert np.isnan(rows[3].recall)
    assert np.isnan(rows[2].precision)


def test_a_confusion_matrix_is_made_once_and_only_where_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: K x K numbers, twice, for figures that need 3 K."""
    made, confusion = [], scores.confusion
    monkeypatch.setattr(scores, "confusion", lambda *args: made.append(args[2]) or confusion(*args))
    draw = np.random.default_rng(0)
    for classes in (100, 101):
        labels, answers = draw.integers(0, classes, (2, 500))
        names = [f"class {k}" for k in range(classes)]
        detail, counts = scores.detail(labels, answers, names), confusion(labels, answers, classes)
        assert detail["confusion"] == (counts.tolist() if classes == 100 else None)
        assert [row["class"] for row in detail["per_class"]] == names
        assert [row["images"] for row in detail["per_class"]] == counts.sum(1).tolist()
        for key, totals in (("recall", counts.sum(1)), ("precision", counts.sum(0))):
            shares = [right / total if total else None for right, total in zip(counts.diagonal(), totals, strict=True)]
            assert [row[key] for row in detail["per_class"]] == shares
    assert made == [100]


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263: .2553–.3662; 15 of 148: .0624–.1605; 0 of 20: 0–.1611; 29 of 29: .8834–1
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert scores.wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert scores.wilson(29, 29) == pytest.approx((0.8830, 1), abs=5e-4)
    assert scores.wilson(0, 0) == (0, 1)


def test_t_interval() -> None:
    assert scores.t_interval([0.5, 0.7]) == (0, 1)  # t with one degree of freedom is 12.7
    low, high = scores.t_interval([0.80, 0.82, 0.84, 0.82, 0.82])
    half = 2.7764 * 0.0141421 / 5**0.5
    assert (low, high) == pytest.approx((0.82 - half, 0.82 + half), abs=1e-5)
    assert scores.t_interval([0.5]) == (0, 1)


def test_r2_and_mean_average_precision_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(50, 3))
    answers = targets + rng.normal(size=(50, 3))
    theirs = pytest.approx(r2_score(targets, answers))
    assert scores.r2(targets, answers) == theirs
    assert scores.r2(np.c_[targets, np.ones(50)], np.c_[answers, np.zeros(50)]) == theirs  # nothing to explain in it
    present = rng.random((60, 4)) < 0.3
    guesses = np.round(present + rng.normal(size=(60, 4)), 1)  # rounded: many equal scores
    expected = np.mean([average_precision_score(t, s) for t, s in zip(present.T, guesses.T, strict=True)])
    assert scores.mean_average_precision(present, guesses) == pytest.approx(expected)
    assert np.isnan(scores.mean_average_precision(np.zeros((3, 2)), np.zeros((3, 2))))
