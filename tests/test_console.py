"""What people see while a run goes on: the figures that were promised, in lines that fit, said once."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
from rich.console import Console

import barlow.console
import barlow.progress
from barlow.console import Display, lines, spelled
from barlow.index import in_threads

STATE = {
    "step": 19_346, "steps": 103_375, "epoch": 182.04, "loss": 1149.321, "floor": 1122.1, "invariance": 16.062,
    "redundancy": 213_326.6, "lambda": 0.0051, "twins_found": 0.27, "verdict": "dimensional collapse",
    "images_per_s": 12_085.2, "data_wait": 0.0451, "seconds_left": 73_516.0,
}  # fmt: skip


def test_everything_promised_is_there() -> None:
    text = "\n".join(lines(STATE))
    for part in ("step 19,346 of 103,375", "epoch 182.0", "20 h 25 min left", "loss 1149.3 (floor 1122.1)",
                 "invariance 16.06", "redundancy 1088.0 (λ × 213,327)", "twins found 27%", "dimensional collapse",
                 "12,085 images/s", "waiting for data 4.5%"):  # fmt: skip
        assert part in text


def test_lines_fit_a_terminal() -> None:
    crowded = lines(STATE | {"core_wait": 0.41})
    assert crowded[0].endswith("left · waiting for a core 41%")
    assert len(crowded) == 3
    assert max(map(len, crowded)) <= 80


def test_what_is_not_known_yet_is_left_out() -> None:
    early = {key: value for key, value in STATE.items() if key not in ("twins_found", "verdict", "images_per_s")}
    assert lines(early)[2] == ""
    assert "left" not in lines(early)[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (0.002121320343559643, "0.002121"), ((512, 512, 256), "512-512-256"), ((0.28, 0.3), "0.28 0.3"),
     ({"layers": [1, 1]}, '{"layers": [1, 1]}'), (20_000, "20000"), ("adamw", "adamw"), ((0.28,), "0.28")],
)  # fmt: skip
def test_settings_are_spelled_as_they_are_typed(value: object, text: str) -> None:
    assert spelled(value) == text


def test_a_pipe_gets_a_line_now_and_then_and_the_last_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(barlow.console.time, "monotonic", lambda: clock[0])
    with Display() as display:
        for step in range(1, 26):
            clock[0] += 1.0
            display.update(**STATE | {"step": step})
    assert [line.split(" of ")[0] for line in out.getvalue().splitlines()] == ["step 10", "step 20", "step 25"]
    out.truncate(0)
    with Display() as display:
        clock[0] += 100.0
        display.update(**STATE)
    assert out.getvalue().count("step 19,346") == 1


def test_a_terminal_gets_four_lines_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(barlow.console, "on_terminal", lambda: True)
    plain = Console(file=out, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(barlow.console, "Console", lambda stderr: plain)
    with Display() as display:
        display.update(**STATE)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue()).splitlines()
    assert [line.rstrip() for line in shown[-4:]] == ["━" * 60, *lines(STATE)]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=True) as display:
        display.update(**STATE)
    assert capsys.readouterr().err == ""


def test_progress_never_breaks_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a narrow terminal filled with the remains of a line that was drawn again and again."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(barlow.progress, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    clock = iter(range(100))
    monkeypatch.setattr(barlow.progress.time, "monotonic", lambda: float(next(clock)))
    assert list(barlow.progress.progress(range(5), "preparing images for 224-pixel crops", 5)) == list(range(5))
    drawn = [line for line in out.getvalue().split("\r\033[K") if line]
    assert len(drawn) == 5
    assert max(map(len, drawn)) < 40


@pytest.mark.parametrize(
    ("seconds", "speed"), [(0.25, "4/s"), (1.0, "1/s"), (4.3, "4.3 s each"), (90.0, "90.0 s each")]
)
def test_the_speed_of_slow_items_is_said(
    seconds: float, speed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: "0/s" for images that take seconds each."""
    monkeypatch.setattr(barlow.progress, "PLAIN_EVERY", 0.0)
    now = [0.0]
    monkeypatch.setattr(barlow.progress.time, "monotonic", lambda: now[0])
    for _ in barlow.progress.progress(range(4), "looking", 4):
        now[0] += seconds
    assert capsys.readouterr().err.splitlines()[0].startswith(f"looking: 1 of 4 · {speed} · ")


def test_slow_items_come_one_by_one_and_quick_ones_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: no sign of life before eight images of 20 seconds are done, in each thread."""
    monkeypatch.setattr("barlow.index.SHORT", 0.02)
    lock, begun = threading.Lock(), list[int]()

    def slow(k: int) -> int:
        with lock:
            begun.append(k)
        time.sleep(0.03)
        return k

    made, ahead = [], []
    for item in in_threads(slow, 12, "waiting", 2, chunk=8):
        made.append(item)
        ahead.append(len(begun) - len(made))
    assert made == list(range(12))
    assert max(ahead) <= 5  # what two threads are at, and what they were given
    assert list(in_threads(lambda k: k, 1001, "counting", 3, chunk=64)) == list(range(1001))
