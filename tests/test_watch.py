"""Alarms from look to look, and runs that stop on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from barlow import Config, pretrain
from barlow.checkpoint import latest
from barlow.errors import NumbersError
from barlow.runlog import read_metrics
from barlow.watch import Watch


def look(features: str, embedding: str) -> list[dict[str, Any]]:
    spaces = (("features", features), ("embedding", embedding))
    return [{"of": of, "verdict": word, "sentence": "Why."} for of, word in spaces]


def test_one_look_is_no_alarm_two_in_a_row_are_and_are_told_once() -> None:
    watch = Watch()
    assert watch.see(look("healthy", "shortcut")) == []
    assert watch.see(look("healthy", "healthy")) == []
    assert watch.see(look("healthy", "shortcut")) == []
    assert watch.collapsed == ""
    (told,) = watch.see(look("healthy", "dimensional collapse"))
    assert told.startswith("dimensional collapse of the embedding. Why. Likely: the learning rate is too high; or ")
    assert told.endswith("if it stays, narrow the projector.")
    assert watch.collapsed == told
    assert watch.see(look("healthy", "dimensional collapse")) == []
    assert watch.collapsed == told
    watch.see(look("healthy", "not learning yet"))
    assert watch.collapsed == ""


def test_an_alarm_that_moves_from_space_to_space_does_not_stand() -> None:
    watch = Watch()
    watch.see(look("shortcut", "healthy"))
    assert watch.see(look("healthy", "shortcut")) == []
    assert watch.collapsed == ""


def test_a_collapsed_run_stops_says_why_and_goes_on_when_told_to(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(views=({}, {}), health_every=2, stop_on_collapse=True)
    with pytest.raises(NumbersError, match="Stopped after step 2 of 8, saved: identical views of") as stopped:
        pretrain(config, quiet=True)
    assert stopped.value.exit_code == 4
    assert "--no-stop-on-collapse" in str(stopped.value)
    assert config.out
    run = pretrain(config.replace(stop_on_collapse=False), quiet=True)
    assert "warning: step 2: identical views of the embedding" in capsys.readouterr().err
    events = [line["message"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "event"]
    assert any("make the augmentations stronger" in message for message in events)
    newest = latest(run / "checkpoints")
    assert newest
    assert newest.name.endswith("8")


def test_the_report_of_a_stopped_run_is_there(tiny: Callable[..., Config]) -> None:
    config = tiny(views=({}, {}), health_every=2, stop_on_collapse=True)
    with pytest.raises(NumbersError):
        pretrain(config, quiet=True)
    page = (Path(config.out or "") / "report.html").read_text(encoding="utf-8")
    assert "identical views" in page


def test_without_being_told_to_nothing_stops(tiny: Callable[..., Config]) -> None:
    run = pretrain(tiny(views=({}, {}), health_every=2), quiet=True)
    assert (run / "encoder").is_dir()
