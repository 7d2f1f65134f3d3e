"""What a training step costs beside the bare network: views, objective, optimiser and all, against forward + backward.

    GOMP_SPINCOUNT=20000 python benchmarks/step.py [--quick]      # threads wait as the command line lets them

The bare network is encoder and projector, forward and backward on a batch that is ready, at the same precision, thread
count and batch size; the step is the one that `barlow pretrain` takes, from the batch as the loader hands it over, and
with the making of that batch (in memory, one process) in a column of its own. Runs are interleaved; medians are given.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

import barlow
from barlow.config import Config
from barlow.environment import cpu_model
from barlow.images import open_images
from barlow.launch import launch
from barlow.plan import resolve
from barlow.prepare import Ready, look, ready
from barlow.train import one_step

AIM = 1.10  # times the bare network: the rest of a step must be nearly free


def prepared(config: Config, images: Any, stack: ExitStack) -> Ready:
    """All parts of a run over ``images``, as `barlow pretrain` builds them."""
    opened = open_images(images)
    resolved, _ = resolve(config, look(opened))
    return ready(resolved, launch(resolved, stack), opened)


def compare(name: str, parts: Ready, rounds: int) -> None:
    """Prints one row: bare network, step, the making of a batch; their ratios; whether the aim is met."""
    batch = parts.source[0]
    views = parts.source.finish(batch, parts.fabric.device, parts.scales)
    ones: list[torch.Tensor] = []

    def bare() -> None:
        parts.optimizer.zero_grad()
        z = parts.wrapped(*views)
        ones[:] = ones or [torch.randn_like(each) for each in z]
        parts.fabric.backward(sum((a * b).sum() for a, b in zip(z, ones, strict=True)))

    def step() -> None:
        one_step(parts, batch, 10**6)

    def make() -> None:
        parts.source[1]

    times = interleaved([bare, step, make], rounds)
    ratio = statistics.median(b / a for a, b in zip(times[0], times[1], strict=True))
    total = statistics.median((b + c) / a for a, b, c in zip(*times, strict=True))
    a, b, c = (statistics.median(each) * 1e3 for each in times)
    print(
        f"{name:<34} {a:9.1f} {b:9.1f} {c:9.1f} {ratio:8.3f} {total:8.3f}  {'met' if ratio <= AIM else 'missed'}",
        flush=True,
    )


def interleaved(work: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each piece of work in ``rounds`` rounds, one after the other, after two rounds that do not count."""
    times: list[list[float]] = [[] for _ in work]
    for i in range(rounds + 2):
        for piece, row in zip(work, times, strict=True):
            start = time.perf_counter()
            piece()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:
                row.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Small images as the sample's automatic settings have them, and ResNet-50 at 224 px."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds, and no ResNet-50")
    quick = parser.parse_args().quick
    print(f"barlow {barlow.__version__}, torch {torch.__version__}, {platform.python_version()}, {cpu_model()}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':<34} {'bare ms':>9} {'step ms':>9} {'batch ms':>9} {'step/':>8} {'all/':>8}  aim {AIM}")
    small = [Config(out="-"), Config(out="-", optimizer="adamw"), Config(out="-", precision="bfloat16")]
    photos = np.random.default_rng(0).integers(0, 256, (80, 256, 256, 3), np.uint8)
    large = Config(out="-", encoder="resnet50", encoder_args={}, image_size=224, batch_size=16, held_out=8,
                   projector=(2048, 2048, 2048), optimizer="lars")  # fmt: skip
    with ExitStack() as stack:
        for name, config in zip(("automatic settings", "AdamW", "bfloat16"), small, strict=True):
            compare(f"sample, {name}", prepared(config, "sample", stack), 5 if quick else 25)
        if not quick:
            compare("ResNet-50, 224 px, batch 16, LARS", prepared(large, photos, stack), 6)


if __name__ == "__main__":
    main()
