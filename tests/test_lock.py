from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from barlow import lock
from barlow.errors import UserError
from barlow.lock import Lock

# Holds the lock, says so, forks a child that lives on, and waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from barlow.lock import Lock
Lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    sys.stdin.read()  # until the test closes its end
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    first = hold(path)
    assert first.stdout is not None
    child = int(first.stdout.readline())
    with pytest.raises(UserError, match=f"in use by pid {first.pid} on {socket.gethostname()}: wait for it"):
        Lock(path)
    assert json.loads(path.read_text())["pid"] == first.pid
    first.kill()
    first.wait()
    os.kill(child, 0)  # a forked worker that outlives it does not hold the lock
    taken = Lock(path)  # no hand work
    assert json.loads(path.read_text())["pid"] == os.getpid()
    taken.release()
    assert list(tmp_path.iterdir()) == []
    first.communicate()


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    one, other = Lock(tmp_path / "a.lock"), Lock(tmp_path / "b.lock")
    with pytest.raises(UserError, match=f"in use by pid {os.getpid()} on"):
        Lock(tmp_path / "a.lock")
    one.release()
    again = Lock(tmp_path / "a.lock")
    one.release()  # a second time: nothing, least of all with the new one
    with pytest.raises(UserError):
        Lock(tmp_path / "a.lock")
    again.release()
    other.release()


def test_a_lock_that_its_holder_removes_under_our_hands_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.lock"
    real, calls = lock.kernel_lock, 0

    def slow(handle: int) -> bool | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()  # the holder lets go between our open and our lock
        return real(handle)

    monkeypatch.setattr(lock, "kernel_lock", slow)
    held = Lock(path)
    assert calls == 2
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()


def holder(**changes: Any) -> str:
    return json.dumps(lock.myself() | changes)


DEAD = 2**22 + 1  # above the largest pid Linux gives


@pytest.fixture
def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_kernel_locks")
@pytest.mark.parametrize(("text", "free"), [
    (holder(), False),
    (holder(pid=os.getppid(), started=lock.started(os.getppid())), False),
    (holder(pid=1, started=lock.started(1)), False),
    (holder(pid=DEAD), True),
    (holder(pid=10**30), True),
    (holder(pid=os.getppid(), started=-7), True),  # that pid is another program by now
    (holder(pids="pid:[1]", pid=DEAD), False),  # in another container on this machine: not to be seen from here
    (holder(boot="before", pid=os.getppid()), True),  # this machine has been started anew
    (holder(boot="other", host="other"), False),
    ("", True), ("{", True), ("[]", True), ('{"pid": "x"}', True),
])  # fmt: skip
def test_without_kernel_locks_the_text_decides(tmp_path: Path, text: str, free: bool) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)
    if free:
        Lock(path).release()
        assert not path.exists()
        return
    with pytest.raises(UserError, match="is in use by pid"):
        Lock(path)
    assert path.read_text() == text


def test_with_the_kernels_lock_only_other_machines_are_doubted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    for text in (holder(), holder(pids="pid:[1]", host="container")):
        path.write_text(text)
        Lock(path).release()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, restart, free in (("77", None, True), ("77", "1", False), ("78", None, False), (None, None, False)):
        path.write_text(holder(boot="other", host="node7", pid=5, job=job, restart=restart))
        if free:  # the same job, requeued on another node
            Lock(path).release()
        else:
            with pytest.raises(UserError, match=r"pid 5 on node7: .* if it is dead, delete .*run\.lock"):
                Lock(path)


def test_one_that_has_locked_but_not_yet_written_holds_it(tmp_path: Path) -> None:
    with (tmp_path / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by a process that has just started"):
            Lock(tmp_path / "run.lock")


def test_a_dead_process_that_nobody_waited_for_is_gone() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended and is a zombie now
    since = int(Path(f"/proc/{child}/stat").read_text().split()[21])
    assert not lock.runs(child, since)
    os.waitpid(child, 0)
