"""When a run looks: seldom enough, early enough, and the same again after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from barlow import Config, pretrain
from barlow.config import read_toml
from barlow.errors import Stopped
from barlow.looks import LIDAR, SHARE, cost, looks, warm_up
from barlow.runlog import read_metrics
from barlow.session import Session


def plan(held_out: int = 256, batch_size: int = 256, **more: object) -> Config:
    fields: dict[str, object] = {"held_out": held_out, "batch_size": batch_size, "warmup": 0.05}
    return Config(**(fields | more))  # type: ignore[arg-type]


def all_of(config: Config, steps: int) -> list[int]:
    chosen = looks(config, steps)
    found = [step for step in range(steps + 1) if chosen.due(step)]
    assert len(found) == chosen.count
    return found


def test_the_looks_of_the_demo() -> None:
    """Golden: two minutes of two cores."""
    assert all_of(plan(), 522) == [0, 35, 41, 46, 52, 60, 120, 180, 240, 300, 360, 420, 480, 522]
    assert all_of(plan(), 2500) == sorted({*range(0, 2501, 125), 156, 187, 218})


@pytest.mark.parametrize("batch", [32, 64, 256, 1024])
@pytest.mark.parametrize("held_out", [128, 256, 512])
def test_looks_take_less_than_two_per_cent(held_out: int, batch: int) -> None:
    config = plan(held_out, batch)
    for steps in [*range(100, 3000, 37), 10_000, 65_432, 10**6]:
        chosen = looks(config, steps)
        assert chosen.count <= 3 or cost(config) * (chosen.count + LIDAR) <= SHARE * steps, steps
        affords_five = cost(config) * (5 + LIDAR) <= SHARE * steps
        assert not affords_five or chosen.count >= 4, steps


def test_an_alarm_can_stand_before_a_tenth_of_the_run() -> None:
    for steps in range(400, 5000, 13):
        config = plan()
        before = [step for step in all_of(config, steps) if warm_up(config, steps) <= step <= steps / 10]
        assert len(before) >= 2, steps


def test_long_runs_are_looked_at_every_few_hundred_steps() -> None:
    assert looks(plan(), 200_000).every == 500
    assert looks(plan(), 200_000).early == ()  # every 500 is often enough
    assert looks(plan(512, 16), 20_000).every > 500  # a look at so many would take two per cent at 500


@pytest.mark.parametrize("steps", [1, 2, 8, 20, 21, 30, 99])
def test_the_shortest_runs_are_seen_before_after_and_once_between(steps: int) -> None:
    found = all_of(plan(batch_size=16), steps)
    assert found[0] == 0
    assert found[-1] == steps
    assert len(found) == (3 if steps > 20 else 2)


def test_what_is_given_is_obeyed() -> None:
    assert all_of(plan(health_every=7), 20) == [0, 7, 14, 20]
    assert all_of(plan(health_every=10**6), 1000) == [0, 1000]


def test_three_views_make_a_step_longer_and_a_look_no_longer() -> None:
    assert cost(plan(views=({}, {}, {}))) == pytest.approx(cost(plan()) * 2 / 3)


def test_a_run_that_goes_on_looks_where_it_would_have(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=24)
    assert config.health_every is None

    def seen(run: Path) -> list[int]:
        return sorted({line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "health"})

    whole = pretrain(config.replace(out=str(tmp_path / "whole")), quiet=True)
    assert seen(whole) == [0, 20, 24]
    assert read_toml(whole / "config.toml").health_every is None
    with monkeypatch.context() as patch:
        patch.setattr(Session, "out_of_time", lambda session: session.step == 19)
        with pytest.raises(Stopped):
            pretrain(config, quiet=True)
    assert seen(pretrain(config, quiet=True)) == [0, 20, 24]
