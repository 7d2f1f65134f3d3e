"""The verdict: every fault at every dose, injected and found; and what the words come with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from barlow.health import diagnose, measure
from barlow.verdict import CAUSES, REMEDIES, WORDS, Diagnosis, judge


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "verdicts.py"
    spec = importlib.util.spec_from_file_location("verdicts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verdicts"] = module
    spec.loader.exec_module(module)
    module.SIZES, module.ODD_SIZES = ((128, 64), (256, 512)), ((256, 16),)  # the benchmark itself takes larger ones
    return module


@pytest.mark.parametrize("number", range(8))
def test_every_injected_fault_is_named(bench: ModuleType, number: int) -> None:
    fault = bench.FAULTS[number]
    cases = list(fault(np.random.default_rng((77, number))))
    assert len(cases) >= 7
    for case in cases:
        found = diagnose(case.z, case.z_b, warm_up=case.warm_up)
        assert found.verdict == case.injected, f"{case.injected}, {case.dose}, {case.z.shape}: {found.sentence}"


def test_noise_around_a_constant_has_full_rank_and_is_collapsed() -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal(64) + 1e-4 * draw.standard_normal((256, 64))
    assert measure(z)["effective_rank"] > 55  # a centred rank is blind to it
    assert diagnose(z).verdict == "complete collapse"


def test_a_constant_part_is_no_collapse_where_the_twins_are_found() -> None:
    draw = np.random.default_rng(0)
    z = 10 * draw.standard_normal(64) + draw.standard_normal((256, 64))
    other = z + 0.3 * draw.standard_normal((256, 64))
    assert measure(z)["relative_spread"] < 0.02
    assert diagnose(z).verdict == "complete collapse"  # alone it cannot be told from noise
    assert diagnose(z, other).verdict == "healthy"


def test_features_after_a_relu_are_no_collapse() -> None:
    z = np.maximum(np.random.default_rng(0).standard_normal((256, 512)) + 3, 0)
    assert measure(z)["mean_cosine"] > 0.85
    assert diagnose(z).verdict == "healthy"


def test_warm_up_silences_a_low_rank_but_not_a_constant() -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal((256, 3)) @ draw.standard_normal((3, 64))
    assert diagnose(z).verdict == "dimensional collapse"
    assert diagnose(z, warm_up=True).verdict == "not learning yet"
    assert diagnose(np.ones((256, 64)), warm_up=True).verdict == "complete collapse"
    assert diagnose(z, z, warm_up=True).verdict == "identical views"


def test_two_views_turn_a_low_rank_into_a_shortcut() -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal((256, 3)) @ draw.standard_normal((3, 64))
    other = z + 0.2 * draw.standard_normal((256, 3)) @ draw.standard_normal((3, 64))
    assert diagnose(z).verdict == "dimensional collapse"
    assert diagnose(z, other).verdict == "shortcut"


def test_an_embedding_below_the_eps_is_gone_though_its_shape_is_fine() -> None:
    draw = np.random.default_rng(0)
    a, b = (1e-4 * draw.standard_normal((256, 64)) for _ in "ab")
    assert diagnose(a, b).verdict == "complete collapse"
    assert diagnose(1e4 * a, 1e4 * b).verdict == "not learning yet"
    assert diagnose(a).verdict == "healthy"  # one array alone has no scale


def test_tiny_samples_are_not_called_collapsed() -> None:
    for n, d in ((2, 1), (2, 5), (3, 2), (4, 100), (5, 1), (100, 1)):
        assert diagnose(np.random.default_rng(n).standard_normal((n, d))).verdict == "healthy", (n, d)


FINE = {
    "n": 512.0, "d": 512.0, "deviation": 1.0, "relative_spread": 0.5, "effective_rank": 60.0, "participation": 12.0,
    "rank_cliff": 0.0, "dead_dimensions": 0.0, "duplicate_dimensions": 0.1, "duplicate_neighbour_rate": 0.0,
    "modes": 1.0, "modes_within": 1.0, "mean_diagonal": 0.7, "twins_found": 0.2, "view_gap": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "word"), [
    ({}, "healthy"),
    ({"relative_spread": 0.0011}, "healthy"), ({"relative_spread": 0.0009}, "complete collapse"),
    ({"view_gap": 0.0011}, "healthy"), ({"view_gap": 0.0009}, "identical views"),
    ({"view_gap": 1e-4, "effective_rank": 3.0, "mean_diagonal": 0.99}, "shortcut"),
    ({"view_gap": 1e-7, "effective_rank": 3.0, "mean_diagonal": 1.0}, "identical views"),
    ({"modes": 9.0, "modes_within": 0.06}, "healthy"), ({"modes": 9.0, "modes_within": 0.04}, "cluster collapse"),
    ({"duplicate_neighbour_rate": 0.29}, "healthy"), ({"duplicate_neighbour_rate": 0.31}, "cluster collapse"),
    ({"duplicate_neighbour_rate": 0.31, "participation": 2.4}, "healthy"),  # on a line neighbours are close
    ({"duplicate_dimensions": 0.6, "forced_duplicates": 0.14}, "redundant features"),
    ({"duplicate_dimensions": 0.6, "forced_duplicates": 0.16}, "healthy"),
    ({"duplicate_dimensions": 0.6, "forced_duplicates": 0.19, "participation": 3.9}, "redundant features"),
    ({"duplicate_dimensions": 0.6, "forced_duplicates": 0.21, "participation": 3.9}, "healthy"),
    ({"duplicate_dimensions": 0.6, "participation": 1.2}, "dimensional collapse"),
    ({"rank_cliff": 40.0}, "dimensional collapse"), ({"rank_cliff": 40.0, "mean_diagonal": 0.81}, "shortcut"),
    ({"participation": 1.31}, "healthy"), ({"participation": 1.29}, "dimensional collapse"),
    ({"d": 2.0, "participation": 1.06, "effective_rank": 1.3}, "healthy"),
    ({"d": 2.0, "participation": 1.04, "effective_rank": 1.3}, "dimensional collapse"),
    ({"effective_rank": 9.1}, "healthy"), ({"effective_rank": 8.9}, "dimensional collapse"),
    ({"effective_rank": 11.9, "mean_diagonal": 0.81}, "shortcut"),
    ({"effective_rank": 12.1, "mean_diagonal": 0.81}, "healthy"),
    ({"d": 16.0, "effective_rank": 4.1}, "healthy"), ({"d": 16.0, "effective_rank": 3.9}, "dimensional collapse"),
    ({"dead_dimensions": 0.49}, "healthy"), ({"dead_dimensions": 0.51}, "dimensional collapse"),
    ({"mean_diagonal": 0.34, "twins_found": 0.029}, "not learning yet"),
    ({"mean_diagonal": 0.36, "twins_found": 0.029}, "healthy"),
    ({"mean_diagonal": 0.34, "twins_found": 0.031}, "healthy"),
    ({"mean_diagonal": 0.19, "twins_found": 0.099}, "not learning yet"),
    ({"mean_diagonal": 0.21, "twins_found": 0.099}, "healthy"),
    ({"mean_diagonal": 0.19, "twins_found": 0.11}, "healthy"),
    ({"n": 32.0, "mean_diagonal": 0.34, "twins_found": 0.15}, "not learning yet"),  # chance is 0.03
])  # fmt: skip
def test_every_threshold_where_it_is_written(changes: dict[str, float], word: str) -> None:
    assert judge(FINE | changes).verdict == word


@pytest.mark.parametrize(("changes", "word"), [
    ({}, "healthy"), ({"duplicate_dimensions": 0.74, "participation": 2.0}, "healthy"),
    ({"duplicate_dimensions": 0.76, "participation": 2.0}, "dimensional collapse"),
    ({"duplicate_dimensions": 0.76, "participation": 2.0, "mean_diagonal": 0.81}, "shortcut"),
    ({"duplicate_dimensions": 0.76, "participation": 4.1, "forced_duplicates": 0.9}, "redundant features"),
])  # fmt: skip
def test_copies_in_an_embedding_in_training_are_never_forced(changes: dict[str, float], word: str) -> None:
    assert judge(FINE | changes, embedding=True).verdict == word
    assert changes.get("participation", 4.1) > 4 or judge(FINE | changes).verdict == "redundant features"


@pytest.mark.parametrize(("n", "d"), [(256, 128), (500, 512), (1000, 2048)])
@pytest.mark.parametrize("share", [0.55, 0.85])
def test_copies_of_one_dimension_are_seen(n: int, d: int, share: float) -> None:
    """They make one direction strong, so the participation is small while the rank is not low. Kills: "healthy"."""
    z = np.random.default_rng(0).standard_normal((n, d))
    z[:, : int(share * d)] = z[:, [0]]
    assert diagnose(z).verdict in ("redundant features", "dimensional collapse")
    few = np.random.default_rng(1).standard_normal((n, d))
    few[:, : d // 4] = few[:, [0]]
    assert "copies." in diagnose(few).sentence


@pytest.mark.parametrize(("near", "first", "word"), [
    (0.33, 0.22, "not learning yet"), (0.34, 0.22, "healthy"), (0.10, 0.22, "not learning yet"),
    (0.12, -0.02, "not learning yet"), (0.14, -0.02, "healthy"),
    (0.22, 0.22, "not learning yet"),  # before the first step
    (0.89, 0.89, "not learning yet"), (0.5, 0.91, "healthy"),  # no way left to measure
])  # fmt: skip
def test_learned_is_what_brings_the_twins_nearer_than_they_were(near: float, first: float, word: str) -> None:
    """Batches of four, huge λ, a shared frame: nothing has collapsed, and nothing is learned."""
    found = judge(FINE | {"twins_near": near, "twins_near_first": first}, embedding=True)
    assert found.verdict == word
    assert word == "healthy" or f"{near:.2f}, then {first:.2f}" in found.sentence
    assert judge(FINE | {"twins_near": near}, embedding=True).verdict == "healthy"  # nobody knows how it began
    low = judge(FINE | {"twins_near": near, "twins_near_first": first, "effective_rank": 3.0}, embedding=True)
    assert low.verdict == "dimensional collapse"  # an alarm comes first


def test_every_word_has_causes_and_a_remedy() -> None:
    assert set(CAUSES) == set(REMEDIES) == set(WORDS)
    assert all(CAUSES[word] for word in WORDS if word != "healthy")


def test_a_diagnosis_carries_all_it_says(bench: ModuleType) -> None:
    z = np.random.default_rng(0).standard_normal((100, 20))
    found = diagnose(z, z)
    assert found == Diagnosis("identical views", found.sentence, CAUSES["identical views"],
                              REMEDIES["identical views"], measure(z, z))  # fmt: skip
    assert found.alarm
    assert not diagnose(z).alarm
    assert not judge(measure(z), warm_up=True).alarm
    assert "rank" not in found.sentence.lower()


def test_the_table_is_printed(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["verdicts.py", "--seeds", "1"])
    monkeypatch.setattr(bench, "FAULTS", (bench.complete,))
    bench.main()
    shown = capsys.readouterr().out
    assert "| complete collapse | · |" in shown
    assert "0 wrong verdicts, 1 seeds" in shown


def test_views_that_agree_only_where_nothing_is_trained_are_not_learned_from() -> None:
    """A mix-up of pairs in training: what is only decorrelated keeps finding held-out twins for hundreds of steps."""
    draw = np.random.default_rng(0)
    z = draw.standard_normal((256, 64))
    m = measure(z, z + 0.5 * draw.standard_normal(z.shape))
    assert judge(m, embedding=True).verdict == "healthy"
    assert judge(m | {"train_diagonal": 0.4}, embedding=True).verdict == "healthy"
    mixed = judge(m | {"train_diagonal": -0.02}, embedding=True)
    assert mixed.verdict == "not learning yet"
    assert "agree by -0.02" in mixed.sentence
    assert "does not belong together" in mixed.causes[-1]


def test_the_readme_shows_the_whole_table() -> None:
    """As the benchmark prints it: every fault, everything it was called, and as many cases as the text says."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head == ["injected \\ diagnosed", *WORDS]
    assert [row[0] for row in rows] == list(WORDS)
    called = np.array([[0 if cell == "·" else int(cell) for cell in row[1:]] for row in rows])
    sound = int(called[0, 0])
    faulty = f"Of {called.sum() - sound:,} embeddings with a known fault"
    assert f"{faulty} and {sound:,} sound ones all were named rightly" in text
    assert (called == np.diag(np.diag(called))).all()


def test_few_images_are_not_praised_for_what_they_cannot_show() -> None:
    """Kills: 15 images on three points "without clusters or a cliff", a rule that does not speak of so few."""
    z = np.repeat(np.random.default_rng(0).standard_normal((3, 40)), 5, axis=0)
    said = diagnose(z)
    assert said.verdict == "healthy"
    assert "15 images are too few to tell copies, clusters or a cliff" in said.sentence
    assert "without" not in said.sentence
    for n, told in ((127, True), (128, False)):
        said = diagnose(np.random.default_rng(0).standard_normal((n, 64)))
        assert said.verdict == "healthy"
        assert (f"which of only {n} images says little" in said.sentence) is told
