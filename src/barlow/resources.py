"""What a machine gives: room on the disk, shared memory, memory that is kept; in a sentence where it gives out."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from barlow.errors import UserError

MOST = 4  # checkpoints that lie there at a time: the last two, the best, and the one being written
SAFE = 0.8  # share of the memory that an estimate may plan with: allocators round up, others need some
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|cannot allocate memory", re.IGNORECASE)
TRIM, MAP = -1, -3  # glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
LARGEST = 32 << 20  # bytes: what is larger glibc maps by itself, and gives back, in any case
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
BYTES = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def readable(count: float) -> str:
    """Bytes as people read them: ``850 bytes``, ``640 MB``, ``2.1 GB``."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} bytes"


def check_disk(folder: Path, checkpoint: int, there: int) -> None:
    """Raises UserError when as many checkpoints of ``checkpoint`` bytes as lie there at a time, of which ``there`` are
    written already, do not fit where ``folder`` is or will be.

    Sees what the file system has free for this user; quotas it cannot see.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free, more = shutil.disk_usage(place).free, max(1, MOST - there)
    if free < more * checkpoint:
        raise UserError(
            f"{place} has {readable(free)} free, and a run needs {readable(more * checkpoint)} "
            f"({more} checkpoint{'s' * (more > 1)} of {readable(checkpoint)}): make room or choose another --out"
        )


def fit_shared_memory(
    workers: int, batch: int, prefetch: int = 2, place: Path = Path("/dev/shm")
) -> tuple[int, str | None]:
    """How many of ``workers`` may run when each holds ``prefetch`` batches (and one on its way) of ``batch`` bytes.

    Returns that number and, when it is smaller, the sentence to tell. Without room for one worker it is 0: the main
    process then reads by itself, which needs no shared memory. Where there is no ``place``, nothing is known.
    """
    if workers < 1 or not place.is_dir():
        return workers, None
    free = shutil.disk_usage(place).free
    each = (prefetch + 1) * batch
    fit = min(workers, int(SAFE * free) // max(each, 1))
    if fit == workers:
        return workers, None
    return fit, (
        f"{place} has {readable(free)} free and {workers} workers need {readable(workers * each)}: "
        f"reading with {fit} (in a container give it more, docker run --shm-size={-(-2 * workers * each >> 30)}g)"
    )


def peak_memory(device: str = "cpu") -> int:
    """The most bytes this process has held so far: in main memory, or on ``device`` when that is an accelerator."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_limit(device: str = "cpu") -> int | None:
    """The most bytes this process can hold: the device's memory; or main memory, or less where a container says so."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError):
        return None
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            limits.append(int(path.read_text()))  # the word "max" is no number: no limit
        except (OSError, ValueError):
            continue
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(limits if soft == resource.RLIM_INFINITY else [*limits, soft])


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, memory that is freed stays with this process and is taken again; after it, what is free is given back.

    A step on a processor frees what it computed and needs as much at the next one. glibc gives much of that to the
    system and asks for it again, page by page, each cleared once more: a fifteenth of a step (docs/log.md, "Pages that
    are given back"). Elsewhere nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(MAP, LARGEST)
    library.mallopt(TRIM, -1)
    try:
        yield
    finally:
        library.mallopt(TRIM, 2 * LARGEST)
        library.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """True for the ways in which Python, torch on the CPU and torch on an accelerator say it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def largest_batch(before: int, peak: int, batch: int, limit: int) -> int:
    """The batch that fits in ``limit`` bytes when ``batch`` images took the memory from ``before`` to ``peak``.

    Planned with 80 % of what is left, rounded down to a power of two; 0 when not even one image fits.
    """
    each = max(peak - before, 1) / batch
    fit = int(SAFE * max(limit - before, 0) / each)
    return 1 << (fit.bit_length() - 1) if fit else 0


def explain_out_of_memory(
    error: BaseException, *, batch: int, before: int, device: str = "cpu", peak: int | None = None
) -> str:
    """One sentence: what was held, what was asked for, the largest batch that fits, and the way out.

    ``batch``: images in the pass that failed; ``before``: bytes held before it (``peak_memory`` before the first step).
    The pass stopped half way, so its need is only known from below; the advice is therefore at most half of ``batch``.
    """
    peak = peak_memory(device) if peak is None else peak
    asked = ASKED.search(str(error))
    more = int(float(asked[1].rstrip(".")) * BYTES[(asked[2] or "bytes").lower()]) if asked else 0
    limit = memory_limit(device)
    fit = min(largest_batch(before, peak + more, batch, limit) if limit else batch // 2, batch // 2)
    way = f"--micro-batch {fit} --allow micro_batch" if fit else "a smaller --image-size, --encoder or --projector"
    same = " (the loss of the whole batch, in two passes a step)" if fit else ""
    return (
        f"out of memory on {device}: {readable(peak)} were in use at the peak"
        + (f", {readable(more)} more were asked for" if more else "")
        + (f", {readable(limit)} are there" if limit else "")
        + (f"; the largest batch that should fit is {fit}" if fit else "")
        + f": use {way}{same}"
    )
