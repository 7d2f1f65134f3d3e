"""Checkpoints when the disk fills, when the machine dies at any moment, and when old ones are deleted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from barlow import files
from barlow.checkpoint import SaveFailed, keep, latest, load, save


def write(folder: Path, step: int) -> Path:
    return save(folder, step, {"model/x": torch.full((300,), float(step)), "optimizer/m/x": torch.ones(5)}, {"n": step})


def there(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in folder.iterdir() if path.name != "latest")


# A child process each dies: at its k-th call to the file system for every k (not even ``finally`` runs), by SIGKILL at
# some moment of an endless loop of saves, and meets a limit on the size of files. One program, as torch loads slowly.
PROGRAM = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from barlow.checkpoint import SaveFailed, keep, latest, load, save

def write(folder, step):
    tensors = {"model/x": torch.full((300,), float(step)), "optimizer/m/x": torch.ones(5)}
    return save(folder, step, tensors, {"n": step})

def dying(folder, k):
    count = 0
    def die(*_):
        nonlocal count
        count += 1
        if count == k:
            os._exit(9)
    real = os.fsync
    os.fsync = lambda handle: (die(), real(handle))[1]
    events = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
    sys.addaudithook(lambda event, _: die() if event in events else None)
    write(folder, 2)
    write(folder, 2)
    keep(folder, last=1)

def saving(folder, tell):
    step = 0
    while True:
        step += 1
        write(folder, step)
        os.write(tell, step.to_bytes(4, "big"))
        keep(folder, last=2)

def limited(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save(folder, 2, {"model/x": torch.zeros(100_000)}, {})
    except SaveFailed as error:
        print("limit", error, flush=True)

def forked(function, *arguments):
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        function(*arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(1)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

root, k, code = Path(sys.argv[1]), 0, 9
while code == 9:
    k += 1
    folder = root / f"call-{k}"
    write(folder, 1)
    code = ended(forked(dying, folder, k))
    newest = load(latest(folder))
    assert newest.tensors["model/x"][7] == newest.state["n"] == newest.step, k
    print("call", k, newest.step)
    write(folder, 3)
    keep(folder, last=1)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000000003"], list(folder.iterdir())
assert code == 0, code

for k in range(8):
    folder = root / f"kill-{k}"
    hear, tell = os.pipe()
    pid = forked(saving, folder, tell)
    for _ in range(3):
        done = int.from_bytes(os.read(hear, 4), "big")
    time.sleep(0.0017 * k)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -9
    newest = load(latest(folder))
    assert newest.tensors["model/x"][7] == newest.step >= done
    print("kill", k)

write(root / "limit", 1)
assert ended(forked(limited, root / "limit")) == 0
print("limit", latest(root / "limit").name, sorted(path.name for path in (root / "limit").iterdir()))
"""


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("deaths"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return [line.split(maxsplit=2) for line in done.stdout.splitlines()]


def test_killed_at_every_single_file_operation_a_whole_checkpoint_is_left(deaths: list[list[str]]) -> None:
    steps = [rest for what, _, rest in (line for line in deaths if line[0] == "call")]
    assert len(steps) > 40
    assert set(steps) == {"1", "2"}
    assert steps == sorted(steps)  # the newer one counts from one moment on, the older one until then
    assert not [line for line in deaths if line[0] == "said"]  # and no half one ever bears a name that counts


def test_killed_at_random_moments_a_whole_checkpoint_is_left(deaths: list[list[str]]) -> None:
    assert len([line for line in deaths if line[0] == "kill"]) == 8


def test_a_real_limit_on_file_sizes(deaths: list[list[str]]) -> None:
    sentence, rest = [" ".join(line[1:]) for line in deaths if line[0] == "limit"]
    assert "File too large" in sentence
    assert rest == "step-000000001 ['latest', 'step-000000001']"


def test_every_file_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut only what was fsynced is there: files, their folder, then the name, then the parent folder."""
    happened: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def fsync(handle: int) -> None:
        happened.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        happened.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)

    def replaced(self: Path, target: Path) -> Path:
        happened.append(("replace", target.name))
        return replace(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    path = write(tmp_path, 7)
    at = happened.index(("rename", path.name))
    before = [name for what, name in happened[:at] if what == "sync"]
    assert before[:-1] == ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert before[-1].startswith(".writing-step-000000007")
    assert happened[at + 1] == ("sync", tmp_path.name)
    assert happened[at + 2][1].startswith(".latest.")
    assert happened[at + 3 :] == [("replace", "latest"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_save_that_fails_at_any_call_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(tmp_path, 1)
    left = 0

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **named)

        return call

    for owner, name in ((os, "fsync"), (Path, "open"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    errors = []
    for k in range(1, 30):
        left = k
        try:
            write(tmp_path, 2)
            break
        except SaveFailed as error:
            errors.append(error)
        left = 0
        assert set(there(tmp_path)) <= {"1", "2", "2.old"}
        newest = latest(tmp_path)
        assert newest is not None
        load(newest)
        load(tmp_path / "step-000000001")
    for each in errors:
        assert each.errno == number
        assert "could not save the checkpoint of step 2" in str(each)
        assert "the older checkpoints are untouched" in str(each)
        assert ("MB free" in str(each)) == (number != errno.EIO)
    assert 12 < k < 29
    assert there(tmp_path) == ["1", "2"]


# ---------------------------------------------------------------- which stay


def test_the_last_the_best_and_every_nth_stay(tmp_path: Path) -> None:
    for step in range(1, 13):
        write(tmp_path, step)
    gone = keep(tmp_path, last=2, every=5, best=3)
    assert there(tmp_path) == ["10", "11", "12", "3", "5"]
    assert len(gone) == 7
    assert keep(tmp_path, last=1) != []
    assert there(tmp_path) == ["12"]
    assert keep(tmp_path, last=1) == []


def test_nothing_is_deleted_before_the_newest_is_read_back_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    for path in paths[2:]:
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
    keep(tmp_path, last=1)
    assert there(tmp_path) == ["2", "3", "4"]  # 2 is the newest undamaged one; the damaged ones are no replacement
    assert "step-000000004/model.safetensors is damaged" in capsys.readouterr().err
    (paths[1] / "manifest.json").unlink()
    assert keep(tmp_path, last=1) == []
    write(tmp_path, 5)
    keep(tmp_path, last=1)
    assert there(tmp_path) == ["5"]
    keep(tmp_path / "nowhere", last=1)


# ---------------------------------------------------------------- one file


def test_atomic_write_is_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.atomic_write(path, "ä")
    assert path.read_bytes() == "ä".encode()
    (tmp_path / ".a.txt.0123abcd.tmp").write_text("left over")
    (tmp_path / ".mine").write_text("not ours")
    files.sweep(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            files.atomic_write(path, b"new")
    assert path.read_bytes() == "ä".encode()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".mine", "a.txt"]
    files.atomic_write(path, b"new")
    assert files.digest(path) == (3, "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437")
