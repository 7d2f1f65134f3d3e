from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest

from barlow.errors import UserError
from barlow.kinds import parse_duration
from barlow.signals import EXIT_CODES, Deadline, StopRequest, ignore_stop_signals, kill_workers

LOOP = """
import os, signal, sys
from barlow.signals import EXIT_CODES, StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.signal:
        signal.pause()
    print("saving", flush=True)
    for sent in range(2):  # signals that come during the save
        sys.stdin.readline()
    print("saved", flush=True)
sys.exit(EXIT_CODES[stop.signal])
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_real_process_saves_and_leaves_with_its_code(name: str, code: int) -> None:
    command = [sys.executable, "-c", LOOP]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.Signals[name])
        assert child.stdout.readline() == "saving\n"
        for later in (signal.SIGINT, signal.SIGTERM):
            child.send_signal(later)
            child.stdin.write("\n")
            child.stdin.flush()
        assert child.stdout.readline() == "saved\n"
        assert child.stderr.read() == f"\nbarlow: {name}: finishing this step, saving, then stopping\n"
    assert child.returncode == code


def test_the_first_counts_and_the_handlers_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGUSR1
    assert {each: signal.getsignal(each) for each in EXIT_CODES} == before
    assert capfd.readouterr().err.count("SIGUSR1") == 1
    assert EXIT_CODES[stop.signal] == 75


def test_the_handlers_come_back_after_an_error_too() -> None:
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert {each: signal.getsignal(each) for each in EXIT_CODES} == before


def test_in_another_thread_nothing_is_installed() -> None:
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    seen: list[object] = []

    def inside() -> None:
        with StopRequest() as stop:
            seen.append((stop.signal, {each: signal.getsignal(each) for each in EXIT_CODES}))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def worker(ready: multiprocessing.synchronize.Event) -> None:  # type: ignore[name-defined]
    ignore_stop_signals()
    ready.set()
    threading.Event().wait(60)


def test_workers_ignore_the_signals_and_can_be_ended() -> None:
    spawn = multiprocessing.get_context("forkserver")
    ready = spawn.Event()
    child = spawn.Process(target=worker, args=(ready,), daemon=True)
    child.start()
    assert ready.wait(30)
    for each in EXIT_CODES:
        os.kill(child.pid or 0, each)
    child.join(0.2)
    assert child.is_alive()
    kill_workers(spared=[child])
    assert child.is_alive()
    kill_workers()
    assert child.exitcode == -signal.SIGKILL
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_worker_leaves_no_note_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if stop.signal is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "SIGTERM" not in capfd.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [
    ("2h", 7200), ("90m", 5400), ("45s", 45), ("1h30m", 5400), ("1h 30m 10s", 5410), ("1.5 hours", 5400), ("1d", 86400),
    ("1:30:00", 5400), ("0:00:01", 1), ("100:00:00", 360000), ("1-00:00:01", 86401), ("5400", 5400), (" 2H ", 7200),
    ("0.5", 0.5), ("3 min", 180), ("1 hour 1 minute 1 second", 3661),
])  # fmt: skip
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1:30", "2x", "-5", "0", "0s", "0:00:00", "1:60:00", "2h banana", "30m 2h",
                                  "two hours", "1h1h", "nan", "inf", "1e5", "9" * 400, "1..5h", "2hm"])  # fmt: skip
def test_what_is_no_length_of_time_is_said(text: str) -> None:
    with pytest.raises(UserError, match="write 2h, 90m, 45s, 1h30m, 1:30:00 or seconds"):
        parse_duration(text)


def test_the_deadline_leaves_time_for_a_step_and_a_save() -> None:
    now = 100.0
    limit = Deadline(3600, clock=lambda: now)
    assert not limit.near(step=1, save=2)
    now = 100 + 3600 - 10 - 2 - 6
    assert not limit.near(step=1, save=2)
    now += 0.1
    assert limit.near(step=1, save=2)
    assert not limit.near(step=0.5, save=2)
    now = 7.0
    short = Deadline(20, begun=0.0, clock=lambda: now)  # a short limit is not all margin
    assert not short.near(step=1, save=1)
    now = 13.1
    assert short.near(step=1, save=1)
    assert not Deadline(None).near(step=1e9, save=1e9)
