"""Views of one image pair: barlow beside the paper's pipeline (torchvision and Pillow) and, where installed, kornia.

    OMP_NUM_THREADS=1 python benchmarks/views.py

All run the paper's pair of views on the same decoded images, one thread each, in turns within every round, so that a
slower minute of the machine slows all alike. What is printed is the median over the rounds, in ms per pair of views of
one image, normalised float32 tensors in both cases; warm-up rounds are not counted. Ours is `draw`, `crop` and `finish`
on batches of 32, from one array of images. --device adds the pairs per second of `finish` alone on that device, at 224
pixels in batches of 256, the crops being there. --json FILE keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from barlow.views import PRESETS, crop, draw, finish

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = {  # height, width, size of the views, how many times the official speed is the least we want
    "32 px from 32": (32, 32, 32, 5.0),
    "64 px from 96": (96, 96, 64, 3.0),
    "224 px from 500 x 375": (375, 500, 224, 1.6),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Pairs = Callable[[], Any]


def photos(n: int, height: int, width: int) -> list[np.ndarray]:
    """Colour images with structure at every scale, uint8 (height, width, 3)."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        layers = [rng.integers(0, 256, (k, k, 3), dtype=np.uint8) for k in (3, 9, 27)]
        sized = [np.asarray(Image.fromarray(v).resize((width, height), Image.Resampling.BICUBIC)) for v in layers]
        made.append(np.mean(sized, axis=0).astype(np.uint8))
    return made


def ours(images: Sequence[np.ndarray], size: int) -> Pairs:
    images = np.stack(images)
    index, epochs = np.arange(len(images)), np.zeros(len(images), np.int64)
    sizes = np.array([v.shape[:2] for v in images])

    def run() -> list[torch.Tensor]:
        epochs[:] += 1  # fresh draws every round
        made = []
        for number, view in enumerate(PRESETS["natural"]):
            drawn = draw(view, 0, epochs, index, number, sizes, 3)
            made.append(finish(torch.from_numpy(crop(images, drawn, size)), drawn, MEAN, STD))
        return made

    return run


def official(images: Sequence[np.ndarray], size: int) -> Pairs:
    """The transforms of the published code, rebuilt from torchvision and Pillow operations."""
    pictures = [Image.fromarray(v) for v in images]

    def blur(probability: float) -> Callable[[Image.Image], Image.Image]:
        def run(image: Image.Image) -> Image.Image:
            if random.random() < probability:
                return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
            return image

        return run

    def solarize(probability: float) -> Callable[[Image.Image], Image.Image]:
        return lambda image: ImageOps.solarize(image) if random.random() < probability else image

    def view(blurred: float, solarized: float) -> Any:
        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                blur(blurred),
                solarize(solarized),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    pair = view(1.0, 0.0), view(0.1, 0.2)
    return lambda: [[v(picture) for v in pair] for picture in pictures]


def kornia(images: Sequence[np.ndarray], size: int) -> Pairs | None:
    """The same in kornia, batched; its blur has one kernel size, and its images must be of one size."""
    try:
        import kornia.augmentation as K
    except ImportError:
        return None
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    def view(blurred: float, solarized: float) -> Any:
        return K.AugmentationSequential(
            K.RandomResizedCrop((size, size), scale=(0.08, 1.0), resample="bicubic", cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blurred),
            K.RandomSolarize(0.0, 0.0, p=solarized),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

    pair = view(1.0, 0.0), view(0.1, 0.2)
    return lambda: [v(batch) for v in pair]


def measure(candidates: dict[str, Pairs], rounds: int, n: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median ms per pair over the rounds, every candidate once a round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 2):
        for name, run in candidates.items():
            start = clock()
            run()
            if turn >= 2:
                times[name].append((clock() - start) / n * 1e3)
    return {name: statistics.median(v) for name, v in times.items()}


def on_device(device: torch.device, rounds: int, n: int = 256, size: int = 224) -> float:
    """Pairs per second of everything after the crop."""
    crops = torch.from_numpy(np.stack(photos(n, size, size))).to(device)
    sizes, index = np.full((n, 2), size), np.arange(n)
    times = []
    for turn in range(rounds + 2):
        drawn = [draw(v, 0, np.full(n, turn), index, k, sizes, 3) for k, v in enumerate(PRESETS["natural"])]
        start = time.perf_counter()
        for d in drawn:
            made = finish(crops, d, MEAN, STD)
        made.flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return n / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=32, help="images a round")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other processes share the core")
    parser.add_argument("--device", type=torch.device, help="as cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    print(f"{platform.processor() or platform.machine()}, one thread, {versions}, {options.clock} clock")
    rows = []
    for name, (height, width, size, target) in CASES.items():
        images = photos(options.images, height, width)
        built = {"ours": ours(images, size), "official": official(images, size), "kornia": kornia(images, size)}
        times = measure(
            {k: v for k, v in built.items() if v is not None}, options.rounds, options.images, CLOCKS[options.clock]
        )
        ratios = {k: v / times["ours"] for k, v in times.items() if k != "ours"}
        print(f"{name:24}" + "".join(f"  {k} {v:7.3f} ms" for k, v in times.items()), end="")
        print("".join(f"  {k} / ours {v:5.1f}" for k, v in ratios.items()) + f"  (target {target} against official)")
        rows.append({"case": name, "ms_per_pair": times, "ratio": ratios, "target": target})
    record = {"versions": versions, "rounds": options.rounds, "images": options.images, "cases": rows}
    if options.device:
        record["pairs_per_s"] = {str(options.device): on_device(options.device, options.rounds)}
        print(f"after the crop, 224 px on {options.device}: {record['pairs_per_s'][str(options.device)]:,.0f} pairs/s")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
