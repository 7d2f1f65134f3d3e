"""Planted copies and outliers: how many does ``barlow curate`` find, and how much of what it finds was planted?

    python benchmarks/curation.py RUN … [--seeds 10 11 12]

1,500 images of the sample's test part, 60 copies of six kinds (10 each) and 30 images of nothing (noise, mosaic,
stripes; 10 each). For each run: recall of each kind, precision of the groups and of the outliers, and the classes among
the first 20 picks beside as many at random. An image that is called an outlier counts as wrong when it was not planted,
though some of the sample's are odd.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from barlow.curate import looked_at
from barlow.curation import FAR, curate_features
from barlow.embedding import load_on_device, open_for

SAMPLE = Path(__file__).parents[1] / "src" / "barlow" / "sample" / "test.npz"
IMAGES, EACH, PICKS = 1500, 10, 20
KINDS = ("exact", "JPEG", "brighter", "shifted", "mirrored", "cropped")
Pixels = NDArray[np.uint8]


def copy(kind: str, image: Pixels) -> Pixels:
    """A copy of an image (h, w)."""
    height, width = image.shape
    if kind == "JPEG":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        return np.asarray(Image.open(file))
    if kind == "brighter":
        return np.clip(image * 1.15, 0, 255).astype(np.uint8)
    if kind == "shifted":
        return np.roll(image, 1, axis=1)
    if kind == "mirrored":
        return image[:, ::-1]
    if kind == "cropped":
        return np.asarray(Image.fromarray(image[1:-1, 1:-1]).resize((width, height), Image.Resampling.BICUBIC))
    return image


def nothing(rng: np.random.Generator, kind: int, side: int) -> Pixels:
    """Noise, a mosaic, or stripes."""
    if kind == 0:
        return rng.integers(0, 256, (side, side), np.uint8)
    if kind == 1:
        return np.kron(rng.integers(0, 256, (side // 4, side // 4), np.uint8), np.ones((4, 4), np.uint8))
    line = ((np.arange(side) + rng.integers(0, 12)) // rng.integers(2, 6) % 2 * 255).astype(np.uint8)
    stripes = np.tile(line, (side, 1))
    return stripes if rng.random() < 0.5 else stripes.T


def planted(seed: int) -> tuple[Pixels, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(images, class or -1, number of the original of each copy or -1, 1 for an outlier)."""
    rng = np.random.default_rng(seed)
    with np.load(SAMPLE) as arrays:
        every, labels = arrays["images"], arrays["labels"]
    chosen = rng.choice(len(every), IMAGES, replace=False)
    images = every[chosen].reshape(IMAGES, *every.shape[1:3])
    origin = rng.choice(IMAGES, EACH * len(KINDS), replace=False)
    copies = [copy(KINDS[k // EACH], images[i]) for k, i in enumerate(origin)]
    strange = [nothing(rng, k // EACH, images.shape[1]) for k in range(3 * EACH)]
    more = len(copies) + len(strange)
    return (
        np.concatenate([images, np.stack(copies), np.stack(strange)]),
        np.r_[labels[chosen], np.full(more, -1)].astype(np.int64),
        np.r_[np.full(IMAGES, -1), origin, np.full(len(strange), -1)],
        np.r_[np.zeros(IMAGES + len(copies)), np.ones(len(strange))].astype(np.int64),
    )


def judge(run: Path, seed: int) -> dict[str, float]:
    """All figures of one run and one seed."""
    images, labels, origin, strange = planted(seed)
    encoder = load_on_device(run)
    _, features, before = looked_at(encoder, open_for(encoder, images))
    found = curate_features(features, PICKS, seed, before)
    figures = {}
    copies = np.flatnonzero(origin >= 0)
    together = (found.group[copies] > 0) & (found.group[copies] == found.group[origin[copies]])
    for k, kind in enumerate(KINDS):
        figures[f"found, {kind}"] = float(together[k * EACH : (k + 1) * EACH].mean())
    meant = np.zeros(len(images), bool)
    meant[copies] = meant[origin[copies]] = True
    grouped = found.group > 0
    figures["copies: precision"] = float(meant[grouped].mean()) if grouped.any() else 1.0
    figures["copies: recall"] = float(together.mean())
    far = found.outlier >= FAR
    figures["outliers: precision"] = float(strange[far].mean()) if far.any() else 1.0
    figures["outliers: others called so"] = float(far[strange == 0].mean())
    figures["outliers: area under the curve"] = float(roc_auc_score(strange, found.outlier))
    figures["outliers: recall"] = float(far[strange == 1].mean())
    picked = np.flatnonzero(found.pick)
    figures[f"classes in {PICKS} picks"] = len(set(labels[picked].tolist()) - {-1})
    rng = np.random.default_rng(seed)
    random = [len(set(rng.choice(labels[:IMAGES], PICKS, replace=False).tolist())) for _ in range(200)]
    figures[f"classes in {PICKS} at random"] = float(np.mean(random))
    return figures


def main() -> None:
    """Prints a table: mean over the seeds, and each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    given = parser.parse_args()
    for run in given.runs:
        print(f"{run}, seeds {given.seeds}")
        rows = [judge(run, seed) for seed in given.seeds]
        for name in rows[0]:
            values = [row[name] for row in rows]
            print(f"  {name:<31} {np.mean(values):6.3f}   {' '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
