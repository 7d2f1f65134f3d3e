"""Quality on Fashion-MNIST: the recipe (or the demo) with several seeds, evaluated with labels, mean ± sd.

    apt install dataset-fashion-mnist            # Debian's copy of the 60,000 + 10,000 images
    python benchmarks/quality.py prepare data/fashion_mnist
    python benchmarks/quality.py recipe data/fashion_mnist --minutes 10 --seeds 3
    python benchmarks/quality.py demo --minutes 2 --seeds 3

`recipe` trains on the 60,000 images without labels for so many minutes and evaluates with the 10,000 as test set;
`demo` does the same with the sample that ships. Every run is `barlow pretrain` and `barlow evaluate` as a user types
them, in a process of its own, into runs/quality-…; a run that is complete is not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

IDX = Path("/usr/share/datasets/fashion-mnist")
ROOT = Path(__file__).parent.parent


def prepare(folder: Path) -> None:
    """Debian's IDX files as train.npz and test.npz with images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("train", "train"), ("t10k", "test")):
        images = np.frombuffer(
            gzip.decompress((IDX / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
        )
        labels = np.frombuffer(gzip.decompress((IDX / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        np.savez_compressed(folder / f"{name}.npz", images=images.reshape(-1, 28, 28), labels=labels)


def barlow(*words: object) -> str:
    """Runs one command as a user would and returns what it prints."""
    command = [sys.executable, "-m", "barlow", *map(str, words)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def one(name: str, seed: int, minutes: float, data: Path | None, extra: list[str]) -> dict[str, Any]:
    """Trains and evaluates one seed; returns the evaluation with the seconds that training took."""
    run = ROOT / "runs" / f"quality-{name}-{minutes:g}min-{seed}"
    begun = time.monotonic()
    if data is None:
        barlow("pretrain", "sample", "--out", run, "--seed", seed, "--minutes", minutes, *extra)
    else:
        barlow("pretrain", data / "train.npz", "--config", ROOT / "recipes" / "fashion_mnist.toml", "--out", run,
               "--seed", seed, "--minutes", minutes, *extra)  # fmt: skip
    seconds = time.monotonic() - begun
    labels = ["sample"] if data is None else [data / "train.npz", "--test", data / "test.npz"]
    result: dict[str, Any] = json.loads(barlow("evaluate", run, "--json", "--labels", *labels))
    print(f"seed {seed}: trained in {seconds:.0f} s", flush=True)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One line a protocol: mean ± sd over the seeds, for the trained encoder and its two baselines."""
    lines = [f"{'protocol':<14} {'trained':>16} {'untrained':>16} {'raw pixels':>16}   n = {len(results)}"]
    for i, row in enumerate(results[0]["rows"]):
        cells = []
        for column in ("trained", "untrained", "raw pixels"):
            values = [result["rows"][i][column] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        lines.append(f"{row['protocol']:<14} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prepare", "recipe", "demo"])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    given, extra = parser.parse_known_args()
    if given.what == "prepare":
        prepare(given.data)
        return
    data = given.data if given.what == "recipe" else None
    print(table([one(given.what, seed, given.minutes, data, extra) for seed in range(given.seeds)]))


if __name__ == "__main__":
    main()
