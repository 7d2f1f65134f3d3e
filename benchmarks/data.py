"""The data side: decoding, the prepared cache, the index of a million files, the memory of workers over epochs.

    OMP_NUM_THREADS=1 python benchmarks/data.py [decode cache index memory] [--json FILE]
    python benchmarks/data.py waiting --images 5000

`decode` and `cache`: medians over rounds, one thread, every image of a made set of 500 x 375 JPEGs once a round, files
in the page cache; first epoch = decoding alone, second epoch = from the cache. `index`: a fresh process starts from an
existing index of a million files; seconds, and the growth of its memory. `memory`: two workers read 300,000 paths for
some epochs; proportional memory (PSS) of all processes over each epoch. `waiting`: `barlow pretrain` as a user does,
with all cores: the sample, and the JPEGs with ResNet-18 at 64 px and with ResNet-50 at 224 px; the share of the time
that the loop waits for data, by metrics.jsonl, without its first line, whose steps warm up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image

from barlow.cache import cached
from barlow.decode import RULE
from barlow.images import open_images
from barlow.index import WORDS, write

MILLION = 1_000_000
FLAT_MB = 1.0  # of memory that may be added in an epoch

START = """
import sys, time
from pathlib import Path
from barlow.images import open_images

def memory(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(word)) / 1000

before, start = memory("VmRSS"), time.perf_counter()
images = open_images(sys.argv[1], index=sys.argv[2])
print(len(images), time.perf_counter() - start, memory("VmRSS") - before, memory("VmHWM") - before)
"""


def photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 with structure at every scale, about 60 KB each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        layers = [rng.integers(0, 256, (s, s, 3), dtype=np.uint8) for s in (3, 12, 48)]
        sized = [np.asarray(Image.fromarray(v).resize((500, 375), Image.Resampling.BICUBIC)) for v in layers]
        grain = np.mean(sized, axis=0) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(folder / f"{k:05}.jpg", quality=90)


def rate(read: Callable[[int], Any], count: int, rounds: int) -> dict[str, float]:
    """Images a second: median over the rounds, and the slowest and fastest."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for i in range(count):
            read(i)
        rates.append(count / (time.perf_counter() - start))
    rates = rates[1:]  # the first warms up
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def decode_part(folder: Path, rounds: int) -> dict[str, Any]:
    images = open_images(folder)
    out = {"whole": rate(images.read, len(images), rounds)}
    for size in (64, 224):
        out[f"at least {size}"] = rate(lambda i, s=size: images.read(i, (s, s)), len(images), rounds)  # type: ignore[misc]
    return out


def cache_part(folder: Path, rounds: int) -> dict[str, Any]:
    images, out = open_images(folder), {}
    first = rate(images.read, len(images), rounds)
    for size in (64, 224):
        for form in ("raw", "jpeg"):
            start = time.perf_counter()
            ready = cached(images, size, form)
            made = time.perf_counter() - start
            second = rate(ready.read, len(ready), rounds)
            times = second["median"] / first["median"]
            out[f"{size} px, {form}"] = {"made, images/s": len(images) / made, **second, "times the first epoch": times}
            if form == "raw" and ready.raw is not None:
                out[f"{size} px, mapped"] = rate(mapped(ready), len(ready), rounds)
    return {"first epoch": first, **out}


def mapped(ready: Any) -> Callable[[int], Any]:
    """The other way to read the same file: a copy out of a memory map."""
    pixels = np.memmap(os.fsdecode(ready.raw.file), np.uint8, "r")
    shapes, offsets = [(*size, ready.channels) for size in ready.sizes.tolist()], ready.raw.offsets.tolist()

    def read(i: int) -> Any:
        length = int(np.prod(shapes[i]))
        return np.array(pixels[offsets[i] : offsets[i] + length].reshape(shapes[i]))

    return read


def fake_index(path: Path, names: list[bytes], side: int) -> None:
    """An index of images that were never looked at."""
    count = len(names)
    rng = np.random.default_rng(0)
    columns = {"path": pa.array(names, pa.large_binary())}
    columns |= {name: pa.array(rng.integers(1, 10**6, count)) for name in ("bytes", "modified")}
    columns |= {name: pa.array(np.full(count, side, np.int32)) for name in ("width", "height")}
    columns |= {name: pa.array([word] * count, WORDS) for name, word in (("mode", "RGB"), ("status", "ok"))}
    settings = {"rule": RULE, "kind": "folder", "channels": 3, "dtype": "uint8", "value_range": (0.0, 1.0)}
    write(pa.table(columns), settings, path)


def index_part(folder: Path, rounds: int) -> dict[str, Any]:
    names = [b"n%08d/camera-%02d/2026-05-%02d/IMG_%09d.jpg" % (i // 1300, i % 40, i % 31, i) for i in range(MILLION)]
    fake_index(folder / "million.parquet", names, 300)
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-c", START, str(folder), str(folder / "million.parquet")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append([float(word) for word in done.stdout.split()])
    count, seconds, held, peak = (statistics.median(column) for column in zip(*found, strict=True))
    return {"images": count, "seconds": seconds, "memory held, MB": held, "at most on the way, MB": peak}


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [pid, *(p for child in children for p in tree(child))]


def pss() -> float:
    """Proportional memory of this process and its workers, MB."""
    total = 0
    for pid in tree(os.getpid()):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # workers end before their last batch is used
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


def memory_part(folder: Path, epochs: int, paths: int) -> dict[str, Any]:
    from barlow.batches import Stream
    from barlow.readers import batches
    from barlow.views import PRESETS

    images = []
    rng = np.random.default_rng(0)
    for k in range(100):  # few files under many names: what grows would be names, not pixels
        images.append(b"%02d.png" % k)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k:02}.png")
    fake_index(folder / "many.parquet", [b"./" * (i % 20) + images[i % 100] for i in range(paths)], 16)
    opened = open_images(folder, index=folder / "many.parquet")
    source = Stream(opened, np.arange(paths), PRESETS["small"], seed=0, size=16, batch_size=500)
    steps = paths // 500
    seen: list[list[float]] = [[] for _ in range(epochs)]
    for k, _ in enumerate(batches(source, 0, epochs * steps, 2)):
        if k % 25 == 24:  # what workers have on the way differs from one moment to the next by 30 MB
            seen[k // steps].append(pss())
    medians = [statistics.median(some) for some in seen]
    slope = float(np.polyfit(range(1, epochs), medians[1:], 1)[0])  # the first epoch warms up
    return {
        "paths": paths,
        "MB, median of each epoch": medians,
        "added in an epoch, MB": slope,
        "flat": slope < FLAT_MB,
    }


def waiting_part(photos: Path, folder: Path) -> dict[str, Any]:
    runs = {
        "sample": ["sample", "--steps", "120"],
        "ResNet-18, 64 px": [photos, "--encoder", "resnet18", "--image-size", "64", "--batch-size", "128",
                             "--steps", "60"],
        "ResNet-50, 224 px": [photos, "--encoder", "resnet50", "--image-size", "224", "--batch-size", "16",
                              "--steps", "16", "--held-out", "32"],
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    out = {}
    for number, (name, words) in enumerate(runs.items()):
        run = folder / str(number)
        command = [sys.executable, "-m", "barlow", "pretrain", *map(str, words), "--out", str(run)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        every = [line for line in lines if line["kind"] == "speed"]
        speeds = every[1:] or every
        seen = [line["images_per_s"] for line in speeds]
        share = statistics.mean(line["data_wait"] for line in speeds)
        out[name] = {"waiting": share, "images/s": statistics.median(seen), "lines": len(speeds)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["decode", "cache", "index", "memory"])
    parser.add_argument("--images", type=int, default=500, help="JPEGs to make")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="of the memory part")
    parser.add_argument("--paths", type=int, default=300_000, help="of the memory part")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["BARLOW_CACHE"] = str(folder / "store")
        if {"decode", "cache", "waiting"} & set(args.parts):
            photographs(folder / "in", args.images)
        for part in args.parts:
            (folder / part).mkdir()
            found[part] = {
                "decode": lambda: decode_part(folder / "in", args.rounds),
                "cache": lambda: cache_part(folder / "in", args.rounds),
                "waiting": lambda: waiting_part(folder / "in", folder / "waiting"),
                "index": lambda: index_part(folder / "index", args.rounds),
                "memory": lambda: memory_part(folder / "memory", args.epochs, args.paths),
            }[part]()
            print(json.dumps({part: found[part]}, indent=1, default=float), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
