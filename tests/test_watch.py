"""Alarms from look to look, and runs that stop on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from barlow import Config, pretrain
from barlow.checkpoint import latest
from barlow.errors import NumbersError, Stopped
from barlow.runlog import read_metrics
from barlow.session import Session
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


def test_the_second_encoder_of_two_is_watched() -> None:
    """Kills: a run of unshared twins that ends in a KeyError at its second alarm, and at each resume."""
    line = {"of": "features_b", "verdict": "cluster collapse", "sentence": "Why."}
    watch = Watch()
    watch.see([line])
    assert watch.see([line])[0].startswith("cluster collapse of the second encoder's output. Why.")


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


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_interrupted_run_tells_and_stops_at_the_same_look(
    tiny: Callable[..., Config], tmp_path: Path, at: int
) -> None:
    """Kills: what the looks before have told is forgotten, or told again, over a resume."""

    def stops(out: str, stop_on_collapse: bool) -> tuple[Path, str]:
        config = tiny(views=({}, {}), health_every=2, out=str(tmp_path / out), stop_on_collapse=stop_on_collapse)
        try:
            return pretrain(config, quiet=True), ""
        except NumbersError as error:
            return tmp_path / out, str(error).partition(" The evidence")[0]

    def told(run: Path) -> list[dict[str, Any]]:
        return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "event" and line["step"] > 0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "out_of_time", lambda session: session.step == at)
        for name in ("told", *(("stopped",) if at < 2 else ())):
            with pytest.raises(Stopped):
                stops(name, name == "stopped")
    assert told(stops("told", False)[0]) == told(stops("told whole", False)[0]) != []
    if at < 2:
        assert stops("stopped", True)[1] == stops("stopped whole", True)[1] != ""


def test_the_report_of_a_stopped_run_is_there(tiny: Callable[..., Config]) -> None:
    config = tiny(views=({}, {}), health_every=2, stop_on_collapse=True)
    with pytest.raises(NumbersError):
        pretrain(config, quiet=True)
    page = (Path(config.out or "") / "report.html").read_text(encoding="utf-8")
    assert "identical views" in page


def test_without_being_told_to_nothing_stops(tiny: Callable[..., Config]) -> None:
    run = pretrain(tiny(views=({}, {}), health_every=2), quiet=True)
    assert (run / "encoder").is_dir()
