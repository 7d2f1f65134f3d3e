from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from barlow import resources
from barlow.errors import UserError
from barlow.resources import (
    check_disk,
    explain_out_of_memory,
    fit_shared_memory,
    is_out_of_memory,
    largest_batch,
    memory_limit,
    peak_memory,
    readable,
)

Usage = namedtuple("Usage", "total used free")
GB = 1 << 30


def test_bytes_as_people_read_them() -> None:
    shown = [readable(n) for n in (0, 999, 1000, 12_345, 640_000_000, 2_140_000_000, 64e9)]
    assert shown == ["0 bytes", "999 bytes", "1.0 kB", "12 kB", "640 MB", "2.1 GB", "64 GB"]


def test_as_many_checkpoints_as_lie_there_at_a_time_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(place: Path) -> Usage:
        asked.append(place)
        return Usage(10**10, 0, 3_999_999_999)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    for folder in ("", "not", "not/yet"):  # the folder need not exist yet
        check_disk(tmp_path / folder, 999_999_999, 0)
    assert asked == [tmp_path] * 3
    with pytest.raises(UserError, match=r"has 4\.0 GB free, and a run needs 4\.0 GB \(4 checkpoints of 1\.0 GB\)"):
        check_disk(tmp_path, 1_000_000_000, 0)
    check_disk(tmp_path, 1_300_000_000, 1)  # of a run that is continued those that it has are on the disk already
    check_disk(tmp_path, 3_900_000_000, 3)
    with pytest.raises(UserError, match=r"needs 5\.0 GB \(1 checkpoint of 5\.0 GB\)"):  # and the next one is to come
        check_disk(tmp_path, 5_000_000_000, 7)


def test_a_real_disk_is_asked(tmp_path: Path) -> None:
    check_disk(tmp_path, 1, 0)
    with pytest.raises(UserError, match="free, and a run needs"):
        check_disk(tmp_path, 1 << 60, 0)


def test_small_shared_memory_means_fewer_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(64 << 20, 0, 64 << 20))  # docker's default
    fit, advice = fit_shared_memory(8, 4 << 20, prefetch=2, place=tmp_path)
    assert fit == 4
    assert advice is not None
    assert "has 67 MB free and 8 workers need 101 MB: reading with 4 (in a container" in advice
    assert "--shm-size=1g" in advice
    assert fit_shared_memory(4, 4 << 20, place=tmp_path) == (4, None)
    assert fit_shared_memory(2, 1 << 40, place=tmp_path)[0] == 0
    assert fit_shared_memory(0, 1 << 40, place=tmp_path) == (0, None)
    assert fit_shared_memory(8, 1 << 40, place=tmp_path / "none") == (8, None)


def test_the_peak_is_measured() -> None:
    words = Path("/proc/self/status").read_text().split()
    kernel = int(words[words.index("VmHWM:") + 1]) * 1024
    assert 0.98 * kernel <= peak_memory() <= 1.1 * kernel  # the kernel counts in rounds


def test_the_limit_is_the_least_of_machine_container_and_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = memory_limit()
    assert machine is not None
    assert machine > 1 << 28
    real = Path.read_text
    for text, expected in (("123456789\n", 123456789), ("max\n", machine), (f"{1 << 62}\n", machine)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text if "cgroup" in str(self) else real(self))
        assert memory_limit() == expected
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1000, 2000))
    assert memory_limit() == 1000


def test_out_of_memory_is_recognised_in_all_its_words() -> None:
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        assert is_out_of_memory(error)  # noqa: PT017
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(OSError("out of memory"))


def test_the_largest_batch_by_proportion() -> None:
    assert largest_batch(before=2 * GB, peak=4 * GB, batch=64, limit=12 * GB) == 256  # 0.8 · 10 GB / (2 GB / 64)
    assert largest_batch(before=2 * GB, peak=4 * GB, batch=64, limit=11 * GB) == 128
    assert largest_batch(before=2 * GB, peak=4 * GB, batch=1, limit=4 * GB) == 0
    assert largest_batch(before=4 * GB, peak=4 * GB, batch=1, limit=3 * GB) == 0


def test_out_of_memory_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_limit", lambda device: 24 * GB)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has a total")
    sentence = explain_out_of_memory(error, batch=512, before=4 * GB, device="cuda:0", peak=20 * GB)
    assert sentence == (
        "out of memory on cuda:0: 21 GB were in use at the peak, 6.4 GB more were asked for, 26 GB are there; "
        "the largest batch that should fit is 256: use --micro-batch 256 --allow micro_batch (the loss of the whole "
        "batch, in two passes a step)"
    )
    sentence = explain_out_of_memory(error, batch=512, before=22 * GB, peak=23 * GB)
    assert "should fit is 64: use --micro-batch 64" in sentence
    assert explain_out_of_memory(error, batch=1, before=4 * GB, peak=20 * GB).endswith(
        "26 GB are there: use a smaller --image-size, --encoder or --projector"
    )
    try:
        torch.empty(1 << 50)
    except RuntimeError as failed:
        sentence = explain_out_of_memory(failed, batch=64, before=4 * GB)
    assert "4503600 GB more were asked for" in sentence
    monkeypatch.setattr(resources, "memory_limit", lambda device: None)
    assert "use --micro-batch 32" in explain_out_of_memory(MemoryError(), batch=64, before=0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_in_the_end() -> None:
    """Kills: every step paying for each of its pages anew; and a program that holds the memory of a run for good."""
    program = """
import resource, torch
from barlow.resources import freed_memory_kept
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(2**20) for _ in range(8)]  # 4 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with freed_memory_kept():
    print(*(new_pages() for _ in range(8)))
print(new_pages())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *steps, after = map(int, done.stdout.split())
    assert steps[0] > 8_000
    assert max(steps[4:]) < 100  # it takes a few until all pieces are large enough
    assert after > 8_000
