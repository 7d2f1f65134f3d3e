"""Kills a run (SIGKILL) at random moments, again and again, and compares what it ends with to an undisturbed run.

    python benchmarks/kill.py --count 50

Each start is a fresh process that knows nothing but the command; it is killed after a random time, saves included, and
the same command is repeated until it is through. The weights at the end, the optimiser's state and every line of
metrics.jsonl that tells of training must be those of the run that nobody killed, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

EARLY = 0.2  # share of the kills before training begins
SAVE_EVERY = 3  # steps; often, so that many kills land in a save


def settings(folder: Path, out: str, steps: int, workers: int) -> dict[str, Any]:
    """A network of 8 channels on bars of 16 pixels: about a hundred steps a second on one core."""
    return {
        "images": str(folder / "images.npy"), "out": str(folder / out), "encoder": "resnetv2_18",
        "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}, "image_size": 32,
        "projector": (32, 32), "lambda_": 0.02, "batch_size": 16, "steps": steps, "held_out": 16, "devices": 1,
        "precision": "float32", "workers": workers, "seed": 1, "checkpoint_every": SAVE_EVERY, "health_every": 20,
    }  # fmt: skip


def train(given: dict[str, Any]) -> None:
    """What one process does: the command, as the command line would run it."""
    import torch

    from barlow import Config, pretrain

    torch.set_num_threads(1)
    pretrain(Config(**given), quiet=True)


def start(given: dict[str, Any]) -> BaseProcess:
    """A process forked from a server that has torch loaded but has never trained."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["barlow.run"])
    process = context.Process(target=train, args=(given,))
    process.start()
    return process


def fingerprint(run: Path) -> dict[str, str]:
    """sha256 of the encoder, of the newest checkpoint's tensors, and of the lines of metrics.jsonl without times."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    told = [line for line in lines(run) if b'"kind": "train"' in line or b'"kind": "health"' in line]
    found = {"encoder": (run / "encoder" / "model.safetensors").read_bytes(), "metrics": b"\n".join(told)}
    found |= {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def lines(run: Path) -> list[bytes]:
    """The lines of metrics.jsonl so far."""
    return (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []


def until_it_trains(process: BaseProcess, run: Path) -> float:
    """Seconds until ``process`` has written its first line, or has ended."""
    begun, file = time.monotonic(), run / "metrics.jsonl"
    size = file.stat().st_size if file.exists() else 0
    while process.is_alive():
        before, size = size, file.stat().st_size if file.exists() else 0
        if size > before:  # a resume first takes lines back, which makes it smaller
            break
        time.sleep(0.005)
    return time.monotonic() - begun


def kill_again_and_again(folder: Path, count: int, steps: int, workers: int, seed: int) -> dict[str, Any]:
    """Runs once undisturbed and once killed ``count`` times; returns what happened, ``same`` among it."""
    np.save(folder / "images.npy", bars(96))
    run, whole = folder / "killed", folder / "whole"
    process = start(settings(folder, "whole", steps, workers))
    starting, begun = until_it_trains(process, whole), time.monotonic()
    process.join()
    training = time.monotonic() - begun
    random.seed(seed)
    found: dict[str, Any] = {"killed": 0, "in_save": 0, "starting": 0, "runs": 1, "seconds": training, "same": True}
    while found["killed"] < count:
        process = start(settings(folder, "killed", steps, workers))
        early = random.random() < EARLY
        if early:
            process.join(random.uniform(0, starting))
        else:
            until_it_trains(process, run)
            process.join(random.uniform(0, 2 * training / max(count, 4)))
        if process.is_alive():
            process.kill()
            process.join()
            found["killed"] += 1
            found["in_save"] += any((run / "checkpoints").glob(".writing-*"))
            found["starting"] += early
        else:  # through before its time: that one must be right too; begin another
            found["same"] &= process.exitcode == 0 and fingerprint(run) == fingerprint(whole)
            run.rename(folder / f"through-{found['runs']}")
            found["runs"] += 1
    last = start(settings(folder, "killed", steps, workers))
    last.join()
    found["same"] &= last.exitcode == 0 and fingerprint(run) == fingerprint(whole)
    return found | {"sha256": fingerprint(run)["encoder"]}


def bars(count: int) -> Any:
    """uint8 (count, 16, 16): a bright bar at a random angle and place."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16] / 16 - 0.5
    angle, shift = rng.uniform(0, np.pi, (count, 1, 1)), rng.uniform(-0.3, 0.3, (count, 1, 1))
    return (255 * np.exp(-(((np.cos(angle) * x + np.sin(angle) * y - shift) / 0.1) ** 2))).astype(np.uint8)


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_again_and_again(Path(folder), given.count, given.steps, given.workers, given.seed)
    print(
        f"{found['killed']} kills ({found['in_save']} in a save, {found['starting']} at the start) over "
        f"{found['runs']} runs of {given.steps} steps, {found['seconds']:.1f} s of training undisturbed: "
        + (f"the same bits, encoder sha256 {found['sha256'][:16]}…" if found["same"] else "NOT THE SAME")
    )
    raise SystemExit(not found["same"])


if __name__ == "__main__":
    main()
