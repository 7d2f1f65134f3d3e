"""Ranking runs without labels: how well does the order of each label-free measure agree with that of accuracy?

    python benchmarks/compare.py [--out runs/compare]

Trains 26 short runs on the sample's images that differ in one thing each (λ, learning rate, views, width, length,
batch, seed; some are bound to fail), measures every encoder on the same held-out images and the same draws of the same
views, and with labels: weighted k-NN, 2,000 labels, 1,500 test images. Prints Spearman's ρ of every measure with the
accuracy, with 95 % bootstrap intervals over the runs. Resumable: what is in the folder is not done again. About ten
seconds a run on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tiny import accuracy, one_thread, settings, train

from barlow.compare import MEASURE, Common, common, finds, seen
from barlow.encoder import load_encoder
from barlow.health import lidar, measure
from barlow.neighbours import between_over_within, twins

DRAWS = 2000  # of the bootstrap
CROP: dict[str, Any] = {"ratio": (3 / 4, 4 / 3), "flip": 0.5}
JITTER: dict[str, Any] = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4}
BASE: dict[str, Any] = {"steps": 120, "lr": 0.0015, "lambda_": 0.02, "optimizer": "adamw"}  # Muon bears any rate


def twice(**view: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return view, view


RUNS: dict[str, dict[str, Any]] = {
    "base": {}, "base-seed-1": {"seed": 1}, "base-seed-2": {"seed": 2},
    "lambda-0": {"lambda_": 0.0}, "lambda-0.002": {"lambda_": 0.002}, "lambda-0.2": {"lambda_": 0.2},
    "lambda-2": {"lambda_": 2.0}, "lambda-20": {"lambda_": 20.0},
    "lr-0.00001": {"lr": 1e-5}, "lr-0.0001": {"lr": 1e-4}, "lr-0.0005": {"lr": 5e-4}, "lr-0.005": {"lr": 5e-3},
    "lr-0.02": {"lr": 0.02}, "lr-0.1": {"lr": 0.1}, "lr-0.5": {"lr": 0.5},
    "views-none": {"views": twice()}, "views-weak": {"views": twice(crop=(0.8, 1.0), **CROP)},
    "views-crop": {"views": twice(crop=(0.4, 1.0), **CROP)},
    "views-hard": {"views": twice(crop=(0.05, 0.2), **CROP, **JITTER)},
    "views-no-crop": {"views": twice(**JITTER)},
    "width-16": {"projector": (16, 16, 16), "lambda_": 0.16}, "width-512": {"projector": (512,) * 3, "lambda_": 0.005},
    "steps-15": {"steps": 15}, "steps-50": {"steps": 50}, "steps-300": {"steps": 300},
    "batch-8": {"batch_size": 8},
}  # fmt: skip


def trained(out: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every run; trains those that are not there."""
    for name, changes in RUNS.items():
        folder = out / name
        if not (folder / "encoder" / "config.json").is_file():
            train(settings(out=str(folder), **(BASE | {"health_every": 10**6} | changes)))
        yield name, folder


def labelled(folder: Path) -> float:
    """k-NN accuracy of a run's encoder, kept in its folder."""
    path = folder / "accuracy.json"
    if not path.is_file():
        path.write_text(json.dumps(accuracy(load_encoder(folder))))
    return float(json.loads(path.read_text()))


def measured(folder: Path, about: Common) -> dict[str, float]:
    """Every label-free measure of a run's encoder on the common images and views, higher meant to be better."""
    path = folder / "seen.npz"
    if not path.is_file():
        np.savez(path, z=seen(load_encoder(folder), about))
    with np.load(path) as stored:
        z = stored["z"].astype(np.float64)
    z /= max(float(np.sqrt(z.reshape(-1, z.shape[-1]).var(axis=0).mean())), 1e-30)
    m = measure(z[:, 0], z[:, 1])
    m |= {f"{name}, one pair": m.pop(name) for name in ("twins_found", "twins_near")}
    signs = {"mean_cosine": -1, "self_cluster": -1, "spectrum_alpha": -1, "off_diagonal_excess": -1, "view_gap": -1,
             "duplicate_dimensions": -1, "dead_dimensions": -1, "duplicate_neighbour_rate": -1}  # fmt: skip
    skipped = ("n", "d", "deviation", "rank_cliff", "modes", "modes_within", "forced_duplicates")
    found = {name: signs.get(name, 1) * value for name, value in m.items() if name not in skipped}
    kept = between_over_within(z)
    return found | {
        "lidar": lidar(z),
        "lidar participation": float(kept.sum() ** 2 / np.square(kept).sum()),
        "twins by whitened distance": whitened_twins(z),
        # what survives the views, in nats, were images and views Gaussian
        "view information": float(0.5 * np.log1p(kept).sum()),
        MEASURE: float(finds(z).mean()),
        "twins near": float(np.mean([twins(z[:, a], z[:, b]).near for a, b in combinations(range(z.shape[1]), 2)])),
    }


def whitened_twins(z: NDArray[np.float64]) -> float:
    """Share of images whose view 0 lies nearest to the mean of its own other views, distances in units of the views'
    own spread (linear discriminant analysis without labels)."""
    means = z[:, 1:].mean(axis=1)
    inside = (z[:, 1:] - means[:, None]).reshape(-1, z.shape[-1])
    values, vectors = np.linalg.eigh(inside.T @ inside / len(inside))
    whiten = vectors / np.sqrt(values + 1e-4)
    a, b = z[:, 0] @ whiten, means @ whiten
    apart = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None, :] - 2 * a @ b.T
    return float((apart.argmin(axis=1) == np.arange(len(a))).mean())


def agreement(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """Spearman's ρ with its 95 % interval over runs drawn with replacement."""
    draw, rhos = np.random.default_rng(0), []
    for _ in range(DRAWS):
        rows = draw.integers(len(x), size=len(x))
        if len(set(x[rows])) > 1 and len(set(y[rows])) > 1:
            rhos.append(float(spearmanr(x[rows], y[rows]).statistic))
    low, high = np.quantile(rhos, [0.025, 0.975]) if rhos else (np.nan, np.nan)
    rho = float(spearmanr(x, y).statistic) if len(set(x)) > 1 else 0.0
    return rho, float(low), float(high)


def main() -> None:
    """See the head of this file."""
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, default=Path("runs/compare"))
    chosen = options.parse_args()
    one_thread()
    runs = dict(trained(chosen.out))
    about = common(runs["base"])
    truth = {name: labelled(folder) for name, folder in runs.items()}
    found = {name: measured(folder, about) for name, folder in runs.items()}
    print(f"| run | k-NN | {MEASURE} |\n|---|---:|---:|")
    for name in sorted(runs, key=lambda name: -truth[name]):
        print(f"| {name} | {truth[name]:.3f} | {found[name][MEASURE]:.3f} |")
    print("\n| measure | Spearman's ρ with k-NN | 95 % |\n|---|---:|---|")
    lines = []
    for one in sorted(set.intersection(*(set(m) for m in found.values()))):
        rho, low, high = agreement(np.array([found[name][one] for name in runs]), np.array(list(truth.values())))
        lines.append((rho, f"| {one} | {rho:.2f} | {low:.2f} … {high:.2f} |"))
    print("\n".join(line for _, line in sorted(lines, reverse=True)))


if __name__ == "__main__":
    main()
