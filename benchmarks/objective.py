"""Times the loss, forward and backward, against the published formulation written out, and against its bare products.

    python benchmarks/objective.py [--quick] [--threads 2] [--device cpu|cuda] [--bf16]

Columns: the form chosen; median milliseconds of this package, of the reference, and of the bare products of matrices
that the chosen form needs (same library, same halved symmetric products, nothing else). The three run in turns in one
process, after a warm-up; ref/ours and ours/bare are medians of the paired ratios. So each begins with the caches as
another one left them, at small sizes most of the time of ours: the last column is ref/ours where an untimed run
of the same goes before each timed one. Below, peak extra memory.

Rows are Markdown, to be pasted into docs/log.md; after them stands which aims were met. Sizes at which a run of the
slowest takes more than a second are warmed up once instead of twice, and every size is run three times at least.

``--bf16``: the experiment with bfloat16 products: time and relative gradient error against float64, of both precisions.
The whole grid is meant to take under 20 minutes on two cores, and 10 GB of memory (for the reference).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from barlow import forms
from barlow.objective import barlow_twins_loss

QUICK = [(32, 128), (64, 2048), (256, 8192), (1024, 512), (1024, 8192), (2048, 8192)]
GRID = list(product((32, 64, 128, 256, 512, 1024, 2048, 4096), (128, 256, 512, 1024, 2048, 4096, 8192, 16384)))
LAMBDA = 0.0051
AIMS = {(64, 2048): 45.0, (256, 8192): 50.0, (1024, 8192): 4.0, (2048, 8192): 1.5}  # reference/ours, at least
WARM_MS = 500.0  # of one run of each: beyond, caches hardly count
SECONDS = 2.0  # spent on each contestant and size, but never fewer than 3 runs

MEMORY = """
import pathlib, torch
from barlow.objective import barlow_twins_loss
def step(n, d):
    z = [torch.randn(n, d).requires_grad_() for _ in range(2)]
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    barlow_twins_loss(*z).loss.backward()
    return status("VmHWM") - before
def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024
step(8, 64)  # libraries and threads
print(step({n}, {d}) / 1e6)
"""


class Published(nn.Module):
    """Algorithm 1 as the published code runs it: BatchNorm without affine, a D×D matrix, off-diagonal copied out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, affine=False)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        c = self.bn(z_a).T @ self.bn(z_b)
        c.div_(len(z_a))
        on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
        d = len(c)
        off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().pow_(2).sum()
        return on_diagonal + LAMBDA * off_diagonal


def bare_products(form: str, z_a: Tensor, z_b: Tensor) -> Callable[[], object]:
    """The products of one forward and backward pass with nothing around them, into memory that is there already."""
    n, d = z_a.shape
    out_a, out_b = torch.empty_like(z_a), torch.empty_like(z_b)
    square = z_a.new_zeros((n, n) if form == "gram" else (d, d))
    panels = forms.row_panels(n, z_a.device)

    def gram() -> None:
        for z, out in ((z_a, out_a), (z_b, out_b)):
            forms.multiply_symmetric(square, z, panels)
            torch.mm(square, z, out=out)

    def correlation() -> None:
        torch.mm(z_a.T, z_b, out=square)
        torch.mm(z_b, square.T, out=out_a)
        torch.mm(z_a, square, out=out_b)

    return gram if form == "gram" else correlation


def step(loss: Callable[[Tensor, Tensor], Tensor], z_a: Tensor, z_b: Tensor) -> Callable[[], None]:
    def run() -> None:
        z_a.grad = z_b.grad = None
        loss(z_a, z_b).backward()

    return run


def paired(contestants: list[Callable[[], object]], device: str, warm: bool = False) -> list[list[float]]:
    """Seconds of every run, one list per contestant; they take turns, if ``warm`` of two runs of which one counts."""

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    slowest = max(timed(run) for run in contestants)  # the warm-up
    if slowest < 1.0:
        slowest = max(timed(run) for run in contestants)
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(min(201, max(3, int(SECONDS / slowest)))):
        for place in range(len(contestants)):  # each comes after each: the one before leaves its own caches
            k = (place + turn) % len(contestants) if turn % 2 else (turn - place) % len(contestants)
            if warm:
                contestants[k]()
            times[k].append(timed(contestants[k]))
    return times


class Row(NamedTuple):
    n: int
    d: int
    form: str
    ours: float  # milliseconds, medians
    reference: float
    bare: float
    faster: float  # reference/ours, median of the pairs
    above: float  # ours/bare
    warm: float | None  # reference/ours, each after an untimed run of itself; only where that takes no time

    def __str__(self) -> str:
        times = f"{self.ours:.2f} | {self.reference:.2f} | {self.bare:.2f}"
        warm = "" if self.warm is None else f"{self.warm:.2f}"
        return f"| {self.n} | {self.d} | {self.form} | {times} | {self.faster:.2f} | {self.above:.2f} | {warm} |"


def row(n: int, d: int, device: str) -> Row:
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (torch.randn(n, d, generator=generator).to(device).requires_grad_() for _ in range(2))
    form = barlow_twins_loss(z_a, z_b, lambda_=LAMBDA).form
    ours = step(lambda a, b: barlow_twins_loss(a, b, lambda_=LAMBDA).loss, z_a, z_b)
    reference = step(Published(d).to(device), z_a, z_b)
    times = paired([ours, reference, bare_products(form, z_a.detach(), z_b.detach())], device)
    faster = statistics.median(r / o for o, r, _ in zip(*times, strict=True))
    above = statistics.median(o / b for o, _, b in zip(*times, strict=True))
    medians = [1e3 * statistics.median(each) for each in times]
    warm = None
    if sum(medians) < WARM_MS:
        again = paired([ours, reference], device, warm=True)
        warm = statistics.median(r / o for o, r in zip(*again, strict=True))
    return Row(n, d, form, *medians, faster, above, warm)


def summary(rows: list[Row]) -> Iterator[str]:
    """Which aims were met, from the rows alone."""
    slowest = min(rows, key=lambda row: row.faster)
    yield f"smallest reference/ours: {slowest.faster:.2f} at N={slowest.n}, D={slowest.d} (aim: 1)"
    below = [f"N={row.n}, D={row.d}: {row.faster:.2f}" for row in rows if row.faster < 1.0]
    yield f"sizes below 1: {'; '.join(below) or 'none'}"
    large = [row for row in rows if row.ours > 50.0]
    if large:
        worst = max(large, key=lambda row: row.above)
        beyond = [f"N={row.n}, D={row.d}: {row.above:.2f}" for row in large if row.above > 1.3]
        yield f"largest ours/bare above 50 ms: {worst.above:.2f} at N={worst.n}, D={worst.d} (aim: 1.3)"
        yield f"sizes above 50 ms beyond 1.3: {'; '.join(beyond) or 'none'}"
    for row in rows:
        aim = AIMS.get((row.n, row.d))
        if aim is not None:
            word = "met" if row.faster >= aim else "missed"
            warm = f"; {row.warm:.1f} warm" if row.warm else ""
            yield f"N={row.n}, D={row.d}: {row.faster:.1f} times faster (aim: {aim:g}), {word}{warm}"


@contextmanager
def bfloat16_products() -> Iterator[None]:
    def rounded(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
        product = left.bfloat16() @ right.bfloat16()
        (out.mul_(beta) if beta else out.zero_()).add_(product, alpha=alpha)

    with mock.patch.object(forms, "multiply", rounded):
        yield


def bfloat16_row(n: int, d: int, device: str) -> str:
    """Views that are partly the same, as in training: the gradient has a large and a small part."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(n, d, generator=generator)
    z = [(common + 0.5 * torch.randn(n, d, generator=generator)).to(device).requires_grad_() for _ in range(2)]
    exact = [view.detach().double().requires_grad_() for view in z]
    barlow_twins_loss(*exact, lambda_=LAMBDA).loss.backward()
    ours = step(lambda a, b: barlow_twins_loss(a, b, lambda_=LAMBDA).loss, *z)

    def rounded() -> None:
        with bfloat16_products():
            ours()

    errors = []
    for run in (ours, rounded):
        run()
        errors.append(max(float((v.grad - e.grad).norm() / e.grad.norm()) for v, e in zip(z, exact, strict=True)))
    t = [1e3 * statistics.median(each) for each in paired([ours, rounded], device)]
    return f"| {n} | {d} | {t[0]:.2f} | {t[1]:.2f} | {errors[0]:.1e} | {errors[1]:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six sizes instead of 64")
    parser.add_argument("--bf16", action="store_true", help="the experiment with bfloat16 products instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"torch {torch.__version__} · Python {platform.python_version()} · {platform.machine()} · {device}")
    print(f"{torch.backends.cpu.get_cpu_capability()} · {cpu_model()}")
    titles = ["float32 ms", "bf16 ms", "error float32", "error bf16"]
    if not options.bf16:
        titles = [
            "form",
            "ours ms",
            "published ms",
            "bare products ms",
            "published/ours",
            "ours/bare",
            "published/ours, warm",
        ]
    print("\n| N | D |", " | ".join(titles), "|\n|---|---|" + "---|" * len(titles), flush=True)
    rows: list[Any] = []
    start = time.perf_counter()
    for n, d in QUICK if options.quick else GRID:
        rows.append((bfloat16_row if options.bf16 else row)(n, d, options.device))
        print(rows[-1], flush=True)
    print(f"\n{len(rows)} sizes in {(time.perf_counter() - start) / 60:.1f} minutes")
    if not options.bf16:
        print(*summary(rows), sep="\n")
    if sys.platform == "linux" and options.device == "cpu" and not options.bf16:
        code = MEMORY.replace("{n}", "256").replace("{d}", "16384")
        extra = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        print(
            f"peak extra memory of forward and backward at N=256, D=16384: {float(extra):.0f} MB (gradients included)"
        )


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
