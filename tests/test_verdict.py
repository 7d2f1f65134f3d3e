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
