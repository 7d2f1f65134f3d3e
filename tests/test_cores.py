"""The cores: as many as a container gives, as many threads as the run began with, and what it says while it waits."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import barlow.console
import barlow.cores
import barlow.run
import barlow.session
import barlow.train
from barlow import Config, pretrain
from barlow.config import read_toml
from barlow.cores import CoreWait, Wait, cores
from barlow.cores import threads as use
from barlow.environment import environment
from barlow.errors import Stopped, UserError
from barlow.launch import launch, use_threads
from barlow.length import Pace
from barlow.machine import machine
from barlow.resume import on_as_many
from barlow.runlog import read_metrics

Make = Callable[..., Config]


def threads_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With how many threads each step from now on computes."""
    seen: list[int] = []
    step = barlow.train.one_step
    monkeypatch.setattr(barlow.train, "one_step", lambda *what: (seen.append(torch.get_num_threads()), step(*what))[1])
    return seen


def test_the_share_that_a_container_gives_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: the 64 cores of a machine of which the container may use two."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    assert (cores(), machine()[2], environment()["cores"]) == (3, 3, 3)


def test_a_run_keeps_its_threads(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are chosen once, kept by a resume in surroundings that offer others, and given back to the program.
    Kills: a resume that computes with what it finds, which is another run in the last digits."""
    seen = threads_of_steps(monkeypatch)
    with monkeypatch.context() as patch, use(2):
        patch.setattr("barlow.prepare.share", lambda *_: (1, 4, "here"))
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 3)
        with pytest.raises(Stopped):
            pretrain(tiny(), quiet=True)
    assert read_toml(Path(tiny().out or "") / "config.toml").threads == 2
    with use(1):
        run = pretrain(tiny(), quiet=True)
        assert torch.get_num_threads() == 1
    assert seen == [2] * 8
    assert read_toml(run / "config.toml").threads == 2


def test_other_threads_are_another_run(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threads_of_steps(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 3)
        with pytest.raises(Stopped):
            pretrain(tiny(threads=2), quiet=True)
    with pytest.raises(UserError, match=r"threads: 2 → 1.*--allow threads"):
        pretrain(tiny(threads=1), quiet=True)
    pretrain(tiny(threads=1), allow=["threads"], quiet=True)
    assert seen == [2] * 3 + [1] * 5


@pytest.mark.parametrize(
    ("local", "here", "used", "note"),
    [(1, 16, 8, ""), (1, 2, 8, "2 of the cores here: it goes on to the bit, but slowly; --threads 2 --allow threads"),
     (4, 32, 8, ""), (4, 8, 2, "2 of the cores here: it goes on with 2, the same up to rounding; --threads 2")],
)  # fmt: skip
def test_fewer_cores_than_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, local: int, here: int, used: int, note: str
) -> None:
    """One process goes on to the bit; several, which round differently anyway, leave each other room."""
    asked: list[int] = []
    monkeypatch.setattr("barlow.launch.cores", lambda: here)
    monkeypatch.setattr("barlow.launch.torch.set_num_threads", asked.append)
    if local > 1:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        monkeypatch.setenv("WORLD_SIZE", str(local))
    use_threads(Config(threads=8))
    use_threads(Config())
    assert asked == [used]
    said = capsys.readouterr().err
    assert note in said
    assert bool(note) == bool(said)


def test_the_program_around_a_run_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    with ExitStack() as stack:
        launch(Config(devices=1, precision="float32"), stack)
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


# Waiting for a core


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The kernel's account of threads, by number, after so many seconds: (seconds run, seconds waited)."""
    clock = [100.0]
    monkeypatch.setattr(barlow.cores, "TASKS", tmp_path / "task")
    monkeypatch.setattr(barlow.cores.time, "monotonic", lambda: clock[0])

    def after(seconds: float, **waited: float) -> None:
        clock[0] += seconds
        for thread, wait in waited.items():
            (tmp_path / "task" / thread).mkdir(parents=True, exist_ok=True)
            (tmp_path / "task" / thread / "schedstat").write_text(f"{10**12} {round(wait * 1e9)} 12345\n")

    return after


def test_the_wait_is_that_between_two_looks(tasks: Callable[..., None], tmp_path: Path) -> None:
    """A thread that ends and one that begins between them do no harm, nor does one that cannot be read."""
    tasks(0.0, t1=50.0, t2=3.0, t3=7.0)
    waiting = CoreWait()
    (tmp_path / "task" / "t3" / "schedstat").unlink()
    tasks(10.0, t1=54.0, t2=3.5, t4=1.0)
    assert waiting.look() == pytest.approx((10.0, 0.4, 0.55))
    tasks(5.0, t1=54.0)
    assert waiting.look() == pytest.approx((5.0, 0.0, 0.0))


def test_where_the_system_does_not_tell_nothing_is_waited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(barlow.cores, "TASKS", tmp_path / "none")
    assert CoreWait().look()[1:] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("wait", "threads", "way"),
    [(Wait(10, 0.45, 0.5), 2, "45% of the time: end them, or leave them a core: --threads 1, in a new --out"),
     (Wait(10, 0.45, 0.5), 16, "--threads 15"),  # one busy program takes one core
     (Wait(10, 0.5, 1.9), 16, "--threads 12"),
     (Wait(10, 0.5, 1.1), 2, "--threads 1"),
     (Wait(10, 0.45, 0.5), 1, "45% of the time: end them$")],
)  # fmt: skip
def test_the_advice_leaves_others_their_cores(wait: Wait, threads: int, way: str) -> None:
    assert re.search(way, wait.advice(threads))


@pytest.mark.parametrize("wait", [Wait(10, 0.19, 0.3), Wait(4.9, 0.9, 1.8)])
def test_little_that_was_waited_or_seen_is_not_worth_a_word(wait: Wait) -> None:
    assert wait.advice(2) == ""


def test_a_run_tells_of_waiting_once(tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In metrics.jsonl at every look, as a warning at the first, and on the lines from there on."""
    waits = iter([Wait(9, 0.0, 0.0), Wait(9, 0.4, 0.5), Wait(9, 0.3, 0.3), Wait(9, 0.1, 0.1)])
    monkeypatch.setattr(barlow.session.CoreWait, "look", lambda _: next(waits))
    monkeypatch.setattr(barlow.console, "PLAIN_EVERY", 0.0)
    run = pretrain(tiny(threads=2, health_every=2))
    told = [line["core_wait"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "speed"]
    assert told == [0.0, 0.4, 0.3, 0.1]
    said = capsys.readouterr().err
    assert said.count("warning: other programs") == said.count("40% of the time: end them, or leave") == 1
    shown = {
        line.split(" · ")[0]: "waiting for a core" in line for line in said.splitlines() if line.startswith("step ")
    }
    assert [shown[f"step {k} of 8"] for k in (3, 5, 7)] == [False, True, True]
    events = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "event"]
    assert sum("keep this run waiting for a core 40%" in line["message"] for line in events) == 1


@pytest.mark.parametrize("worst", [0.1, 0.6])
def test_minutes_that_were_measured_beside_other_programs(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any, worst: float
) -> None:
    """A fraction of the steps is planned then, which nobody would know."""
    monkeypatch.setattr(barlow.run, "trial", lambda *_: Pace(step=0.1, look=1.0, wait=Wait(6, worst, worst)))
    pretrain(tiny(steps=None, minutes=1, threads=2), dry_run=True)
    assert ("so few are planned: other programs" in capsys.readouterr().err) == (worst > 0.2)


# Devices, which decide the last digits as threads do


def test_a_resume_takes_the_devices_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a run of two processes that a resume by its folder alone continues with one."""
    (tmp_path / "config.toml").write_text("devices = 2\n")
    assert on_as_many(Config(), tmp_path).devices == 2
    assert on_as_many(Config(devices=1), tmp_path).devices == 1
    assert on_as_many(Config(), tmp_path / "new").devices is None
    monkeypatch.setattr("barlow.resume.machine", lambda: ("cuda", 1, 8, True))
    assert on_as_many(Config(), tmp_path).devices == 1


@pytest.mark.parametrize("threads", [1, None])
def test_other_cores_are_worth_a_note_where_they_decide_the_threads(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any, threads: int | None
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 3)
        with pytest.raises(Stopped):
            pretrain(tiny(), quiet=True)
    stored = Path(tiny().out or "") / "config.toml"
    if threads is None:  # as on a GPU
        stored.write_text(re.sub(r"threads = .*\n", "", stored.read_text()))
    monkeypatch.setattr(barlow.run, "environment", lambda devices: environment(devices) | {"cores": 99})
    pretrain(tiny(), allow=["threads"], quiet=True)
    assert ("other versions (cores)" in capsys.readouterr().err) == (threads is None)


def test_the_time_of_a_run_is_that_before_a_resume_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 4)
        with pytest.raises(Stopped):
            pretrain(tiny(health_every=2), quiet=True)
    file = Path(tiny().out or "") / "metrics.jsonl"
    file.write_text(re.sub(r'"seconds": [\d.e-]+', '"seconds": 1000.0', file.read_text()))
    run = pretrain(tiny(health_every=2), quiet=True)
    assert [line["seconds"] > 1000 for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "speed"][-1]
