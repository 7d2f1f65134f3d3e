"""One run folder, one writer: a lock file that names its holder and that no crash can leave standing.

The kernel's lock (flock) is the truth: it ends with the process, whatever ended it. The text in the file names the
holder for the message, and decides alone where the file system has no such lock or another machine may hold one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any, final

from barlow.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems without flock answer
_held: set[int] = set()


def _let_go() -> None:
    """A forked worker shares the lock and would hold it on when we are killed: it closes its end."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@final
class Lock:
    """The lock file ``path``, held by this process from the making of the object until ``release``.

    Raises UserError naming host and pid when another live process holds it. A lock whose holder is gone (killed,
    machine rebooted, pid in use by another program, its SLURM job started anew) is taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        self._handle: int | None = None
        while self._handle is None:
            self._handle = self._open()
        _held.add(self._handle)

    def _open(self) -> int | None:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            ours = kernel_lock(handle)
            if not self._still_there(handle):  # its holder removed it between our open and our lock: try again
                os.close(handle)
                return None
            holder = read_holder(handle)
            if ours is False or not gone(holder, sure=ours is True):
                raise UserError(refusal(self.path, holder))
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(myself()) + "\n").encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _still_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file and lets go. Does nothing a second time, nor in a forked child."""
        if self._pid != os.getpid() or self._handle is None:
            return
        if self._still_there(self._handle):
            self.path.unlink()
        _held.discard(self._handle)
        os.close(self._handle)
        self._handle = None


def kernel_lock(handle: int) -> bool | None:
    """True: the kernel's lock is ours now; False: another process holds it; None: this file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def read_holder(handle: int) -> dict[str, Any]:
    """Who wrote the lock file; empty when it is new, or not readable as such (a live holder's always is)."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}


def myself() -> dict[str, Any]:
    """This process, so that no other in the world is taken for it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "boot": boot(),
        "pids": pid_space(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def gone(holder: dict[str, Any], *, sure: bool) -> bool:
    """True when the process in the lock file no longer runs. ``sure``: the kernel has just given us its lock."""
    if not holder:
        return True
    me = myself()
    if holder.get("boot") == me["boot"] and (me["boot"] or holder.get("host") == me["host"]):  # the same machine
        return sure or (holder.get("pids") == me["pids"] and not runs(holder["pid"], holder.get("started")))
    if holder.get("host") == me["host"]:
        return True  # this machine has been started anew since
    return me["job"] is not None and holder.get("job") == me["job"] and holder.get("restart") != me["restart"]


def refusal(path: Path, holder: dict[str, Any]) -> str:
    """The sentence for the second comer."""
    who = f"pid {holder['pid']} on {holder.get('host')}" if holder else "a process that has just started"
    return f"{path.parent} is in use by {who}: wait for it, choose another --out, or, if it is dead, delete {path}"


def runs(pid: int, since: int | None) -> bool:
    """True when process ``pid`` is alive and is the one that started at ``since`` (not a later one of that number)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # alive, of another user
    now = started(pid)
    return now is None or since is None or now == since


def started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where /proc does not say it. A zombie has no start."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def boot() -> str | None:
    """The identity of this start of this machine; None where the kernel has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def pid_space() -> str | None:
    """The name space in which our pids count: two containers may both have a process 7."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None
