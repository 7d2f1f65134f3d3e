"""Kills a run (SIGKILL) at random moments, again and again, and compares what it ends with to an undisturbed run.

    python benchmarks/kill.py --count 50

Each start is a fresh process that knows nothing but the command; it is killed, and the same command is repeated until
it is through. A fifth of the kills comes before the first checkpoint, from the first instruction on; a third while a
checkpoint is being written; the others at any time. The weights at the end, the optimiser's state, the index, the
choices and every line of metrics.jsonl that tells of training must be those of the run that nobody killed, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

BIRTHS = 5  # of so many kills one comes before the first checkpoint
SAVES = 3  # and one inside a save
SAVE_EVERY = 3  # steps; often, so that many kills land in a save
LOOK = 0.0005  # seconds between two looks at whether a save is under way


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
    """sha256 of what a run ends with, by a name that says what it is; of metrics.jsonl each kind without times."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    found = {"encoder": (run / "encoder" / "model.safetensors").read_bytes()}
    found |= {"weights": (newest / "model.safetensors").read_bytes()}
    found |= {"optimiser": (newest / "optimizer.safetensors").read_bytes()}
    found |= {"index": (run / "index.parquet").read_bytes()}
    for kind in ("train", "health", "event"):
        found[f"{kind} lines"] = b"".join(line for line in lines(run) if b'"kind": "%s"' % kind.encode() in line)
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def lines(run: Path) -> list[bytes]:
    """The lines of metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def until(process: BaseProcess, seen: Callable[[], object], patience: float = 60.0) -> bool:
    """Waits until something is ``seen``: True; False when ``process`` ends before, or nothing comes."""
    end = time.monotonic() + patience
    while process.is_alive() and time.monotonic() < end:
        if seen():
            return True
        time.sleep(LOOK)
    return False


def trains(run: Path) -> bool:
    """Whether there is a line of a step, or of the look before it."""
    return any(b'"kind": "event"' not in line for line in lines(run))


def kill_at(process: BaseProcess, run: Path, moment: str, whole: Mapping[str, float]) -> bool:
    """Kills ``process`` at a "birth", in a "save", or at "any" time; False when it is through before."""
    if moment == "birth":  # evenly over the time before training and the steps before the first save
        if random.random() < 0.5:
            until(process, lambda: trains(run), random.uniform(0, whole["starting"]))
        elif until(process, lambda: trains(run)):
            saving = random.uniform(0, SAVE_EVERY * whole["step"])  # it may be faster than the one that was measured
            until(process, lambda: any((run / "checkpoints").glob("*")), saving)
    elif moment == "save":
        until(process, lambda: any((run / "checkpoints").glob(".writing-*")))
        process.join(random.uniform(0, 0.003))
    else:
        process.join(random.uniform(0, whole["starting"] + whole["training"] / 2))
    if not process.is_alive():
        return False
    process.kill()
    process.join()
    return True


def kill_again_and_again(folder: Path, count: int, steps: int, workers: int, seed: int) -> dict[str, Any]:
    """Runs once undisturbed, and others killed ``count`` times in all; returns what happened, and what ``differs``."""
    np.save(folder / "images.npy", bars(96))
    run, undisturbed = folder / "killed", folder / "whole"
    process, begun = start(settings(folder, "whole", steps, workers)), time.monotonic()
    until(process, lambda: trains(undisturbed))
    whole = {"starting": time.monotonic() - begun}
    process.join()
    whole["training"] = time.monotonic() - begun - whole["starting"]
    whole["step"] = whole["training"] / steps
    random.seed(seed)
    wanted = fingerprint(undisturbed)
    found: dict[str, Any] = {"killed": 0, "birth": 0, "save": 0, "runs": 0, "differs": set(), **whole}

    def end() -> None:
        """The run is through, and must be right; the next one begins in an empty folder."""
        if process.exitcode:
            found["differs"].add(f"exit code {process.exitcode}")
        else:
            ended = fingerprint(run)
            found["differs"] |= {name for name in wanted if ended[name] != wanted[name]}
        found["runs"] += 1
        run.rename(folder / f"through-{found['runs']}")

    while found["killed"] < count:
        number = found["killed"]
        moment = "birth" if number % BIRTHS == 0 else "save" if number % SAVES == 1 else "any"
        if moment == "birth" and run.exists() and any((run / "checkpoints").glob("step-*")):
            process = start(settings(folder, "killed", steps, workers))
            process.join()
            end()
        process = start(settings(folder, "killed", steps, workers))
        if not kill_at(process, run, moment, whole):
            end()
            continue
        found["killed"] += 1
        found["birth"] += not any((run / "checkpoints").glob("step-*"))
        found["save"] += any((run / "checkpoints").glob(".writing-*"))
    process = start(settings(folder, "killed", steps, workers))
    process.join()
    end()
    return found | {"sha256": wanted["encoder"]}


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
    same = not found["differs"]
    print(
        f"{found['killed']} kills ({found['save']} in a save, {found['birth']} before the first) over "
        f"{found['runs']} runs of {given.steps} steps, {found['training']:.1f} s of training undisturbed: "
        + (f"the same bits, encoder sha256 {found['sha256'][:16]}…" if same else "NOT THE SAME: ")
        + ", ".join(sorted(found["differs"]))
    )
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
