"""A day in minutes: many steps of a tiny network on images of random sizes, one in a hundred broken.

    python benchmarks/soak.py --steps 20000

Watched from outside, as a supervisor would: memory (the resident set) and open files of the process, at ten moments
after the first tenth. Memory must stay flat within 5 %, open files must not grow, and
metrics.jsonl must tell of every step it promises. Prints a table and exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def train(given: dict[str, Any]) -> None:
    import torch

    from barlow import Config, pretrain

    torch.set_num_threads(1)
    pretrain(Config(**given), quiet=True)


def make_images(folder: Path, count: int) -> None:
    """PNG files of 9 to 40 pixels; every hundredth is cut off after its header."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        size = rng.integers(9, 41, 2)
        file = folder / f"{number:05d}.png"
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).resize((int(size[1]), int(size[0]))).save(file)
        if number % 100 == 50:
            file.write_bytes(file.read_bytes()[:60])


def resident(pid: int) -> int:
    """Bytes that a process holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def progress(run: Path) -> int:
    """The newest step that metrics.jsonl tells of; 0 at the start."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 20000))
        steps = [json.loads(line)["step"] for line in lines.read().splitlines()[1:-1] if b'"train"' in line]
    return max(steps, default=0)


def soak(folder: Path, steps: int, images: int, workers: int) -> dict[str, Any]:
    """Trains, watches, and returns the samples (step, bytes, open files) and the lines of kind train."""
    make_images(folder / "images", images)
    run = folder / "run"
    given = {
        "images": str(folder / "images"), "out": str(run), "encoder": "resnetv2_18", "image_size": 16,
        "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8}, "projector": (16, 16),
        "batch_size": 8, "steps": steps, "held_out": 16, "devices": 1, "precision": "float32", "workers": workers,
        "cache": False, "checkpoint_every": max(1, steps // 50), "health_every": max(1, steps // 50), "seed": 0,
    }  # fmt: skip
    process = multiprocessing.get_context("spawn").Process(target=train, args=(given,))
    process.start()
    samples: list[tuple[int, int, int]] = []
    while process.is_alive() and process.pid:
        try:
            step = progress(run)
            if step >= (len(samples) + 1) * steps // 11:
                samples.append((step, resident(process.pid), open_files(process.pid)))
        except (OSError, ValueError, IndexError):
            pass  # it is ending, or a line was half written
        time.sleep(0.05)
    process.join()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    quarantined = len((run / "quarantine.jsonl").read_text().splitlines())
    told = [line["step"] for line in lines if line["kind"] == "train"]
    return {"code": process.exitcode, "samples": samples, "told": told, "quarantined": quarantined}


def verdict(found: dict[str, Any], steps: int) -> dict[str, bool]:
    """What must hold."""
    memory = [sample[1] for sample in found["samples"]]
    files = [sample[2] for sample in found["samples"]]
    every = max(1, steps // 2000)
    return {
        "it ended well": found["code"] == 0,
        "memory is flat": max(memory[1:]) <= 1.05 * memory[0],
        "no open file is left": min(files[-3:]) <= min(files[:3]),  # the least of three: a save may have some open
        "the metrics are complete": found["told"] == [s for s in range(1, steps + 1) if s % every == 0 or s == steps],
        "broken images are quarantined": found["quarantined"] > 0,
    }


def main() -> None:
    """Prints the samples and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        found = soak(Path(folder), given.steps, given.images, given.workers)
    print(f"{given.steps:,} steps in {time.monotonic() - begun:.0f} s")
    for step, held, files in found["samples"]:
        print(f"step {step:>7,}: {held / 1e6:7.1f} MB, {files} open files")
    results = verdict(found, given.steps)
    for what, holds in results.items():
        print(f"{'yes' if holds else 'NO ':<4}{what}")
    print(f"{len(found['told']):,} lines of kind train, {found['quarantined']} images in quarantine")
    raise SystemExit(not all(results.values()))


if __name__ == "__main__":
    main()
