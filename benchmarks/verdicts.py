"""Injected against diagnosed: embeddings with a known fault, from mild to total, and what ``barlow.health`` calls them.

    python benchmarks/verdicts.py [--seeds 3] [--first 0] [--misses]

Prints a confusion table in Markdown and the mildest dose of each fault in it. Healthy cases come with many spectra
(white, power laws to k^-2.5), after a ReLU, in classes, heavy-tailed, from untrained networks on the sample images, at
128 to 1,024 images and 16 to 8,192 numbers. Two cores, about a minute a seed. No case is left out of the table.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from barlow.health import diagnose
from barlow.progress import progress
from barlow.verdict import WORDS

Array = NDArray[np.float64]
SIZES = ((128, 64), (256, 512), (512, 128), (512, 512), (512, 2048))
ODD_SIZES = ((256, 8192), (1024, 16), (1024, 32), (128, 384))  # for the healthy only


class Case(NamedTuple):
    """``z_b`` is None for a single array; ``dose`` says how strong the fault is, in the words of its injection."""

    injected: str
    dose: str
    z: Array
    z_b: Array | None = None
    warm_up: bool = False


def spread(draw: np.random.Generator, n: int, d: int, variances: Array) -> Array:
    """Gaussian rows with the eigenvalues ``variances`` (r ≤ d,) along mixed directions of d numbers: signs and a
    Hartley transform, which is orthogonal and takes n d log d where a random rotation takes d³."""
    rows = np.zeros((n, d))
    rows[:, : len(variances)] = draw.standard_normal((n, len(variances))) * np.sqrt(variances)
    for _ in range(2):
        waves = np.fft.fft(rows * draw.choice([-1.0, 1.0], d), axis=1)
        rows = (waves.real - waves.imag) / np.sqrt(d)
    return np.asarray(rows)


def power(d: int, alpha: float) -> Array:
    """k^-α for k = 1 … d, sum 1."""
    values = np.arange(1, d + 1, dtype=np.float64) ** -alpha
    return np.asarray(values / values.sum())


def noise(draw: np.random.Generator, z: Array, share: float) -> Array:
    """z with white noise that makes up ``share`` of the variance."""
    size = np.sqrt(z.var(axis=0).sum() / z.shape[1] * share / (1 - share))
    return np.asarray(z + size * draw.standard_normal(z.shape))


def pair(draw: np.random.Generator, z: Array, diagonal: float) -> tuple[Array, Array]:
    """Two views of z that differ by noise with z's own covariance, so that the mean C_ii is near ``diagonal``."""
    mean = z.mean(axis=0)
    own = np.sqrt((1 - diagonal) / max(diagonal, 1e-12))
    a, b = (draw.standard_normal((len(z), len(z))) / np.sqrt(len(z)) @ (z - mean) for _ in "ab")
    keep = 1.0 if diagonal > 0 else 0.0
    return keep * z + (own if keep else 1.0) * a, keep * z + (own if keep else 1.0) * b


def classes(draw: np.random.Generator, n: int, d: int, k: int, within: float, even: bool = True) -> Array:
    """k classes with random centres; ``within`` is the share of the variance inside them, white."""
    weight = np.ones(k) if even else 1 / np.arange(1, k + 1)
    label = np.concatenate([np.repeat(np.arange(k), 4), draw.choice(k, n, p=weight / weight.sum())])[:n]
    centres = draw.standard_normal((k, d))[label]
    inside = draw.standard_normal((n, d)) * np.sqrt(centres.var(axis=0).sum() / d)
    return np.asarray(np.sqrt(1 - within) * centres + np.sqrt(within) * inside)


def pictures(n: int) -> Array:
    """The first n held-out images of the sample, one row each, in [0, 1]."""
    with as_file(files("barlow") / "sample" / "test.npz") as path:
        return np.asarray(np.load(path)["images"][:n].reshape(n, -1) / 255.0)


def untrained(draw: np.random.Generator, x: Array, widths: tuple[int, ...], bias: float) -> Array:
    """A random network with He weights and a ReLU after every layer, on standardised pixels."""
    h = (x - x.mean()) / x.std()
    for width in widths:
        h = np.maximum(h @ draw.standard_normal((h.shape[1], width)) * np.sqrt(2 / h.shape[1]) + bias, 0.0)
    return np.asarray(h)


def healthy(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES + ODD_SIZES:
        for alpha in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5):
            z = spread(draw, n, d, power(d, alpha))
            yield Case("healthy", f"power law {alpha}", z)
            yield Case("healthy", f"power law {alpha}, two views", *pair(draw, z, float(draw.choice([0.6, 0.8, 0.95]))))
        z = spread(draw, n, d, power(d, 1.0)) * np.sqrt(d)
        for mean in (0.0, 1.0, 3.0):
            yield Case("healthy", f"after a ReLU, mean {mean}", np.maximum(z + mean, 0.0))
        yield Case("healthy", "heavy tails", z * np.sqrt(3 / draw.chisquare(3, (n, 1))))
        odd = z.copy()
        odd[n // 3] *= 100
        yield Case("healthy", "one image a hundred times as long", odd)
        for k, within in ((5, 0.2), (10, 0.3), (10, 0.5), (20, 0.7)):
            yield Case("healthy", f"{k} classes, {within:.0%} within", classes(draw, n, d, k, within))
    for widths in ((256,), (512, 512), (512, 512, 512, 512), (1024, 128)):
        for bias in (0.0, 0.1):
            yield Case("healthy", f"untrained network {widths}", untrained(draw, pictures(512), widths, bias))
    yield Case("healthy", "raw pixels", pictures(512))


def complete(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES:
        for share in (1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 0.0):
            constant = draw.standard_normal(d)
            shake = draw.standard_normal((n, d)) * np.sqrt(share)
            yield Case("complete collapse", f"spread {share:g}, white", constant + shake)
            yield Case("complete collapse", f"spread {share:g}, white", np.maximum(constant + shake, 0.0))
            b = constant + draw.standard_normal((n, d)) * np.sqrt(share)
            yield Case("complete collapse", f"spread {share:g}, white", constant + shake, b)
        for share in (5e-4, 1e-6):
            z = np.sqrt(share) * spread(draw, n, d, power(d, 1.5))
            yield Case("complete collapse", f"spread {share:g}, power law", z + draw.standard_normal(d) / np.sqrt(d))
        yield Case("complete collapse", "zeros", np.zeros((n, d)))


def dimensional(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES:
        room = min(n - 1, d)
        for rank in sorted({1, 2, 4, room // 16, room // 8}):
            for dust in (0.0, 0.001, 0.002):
                z = spread(draw, n, d, power(rank, float(draw.choice([0.0, 1.0]))))
                z = noise(draw, z, dust) if dust else z
                yield Case("dimensional collapse", f"rank {rank} of {room}, noise {dust:.1%}", z)
                a, b = pair(draw, z, 0.6)
                yield Case("dimensional collapse", f"rank {rank} of {room}, two views", a, b)
        for alpha in (4.0, 5.0, 6.0):
            yield Case("dimensional collapse", f"power law {alpha}", spread(draw, n, d, power(d, alpha)))
        for length in (1.5, 1.0):
            steep = np.exp(-np.arange(d) / length)
            z = spread(draw, n, d, steep / steep.sum())
            yield Case("dimensional collapse", f"exponential, {length:g} directions", z)
        for dead in (0.5, 0.8, 0.97):
            z = np.maximum(spread(draw, n, d, power(d, 1.0)) * np.sqrt(d) + 1.0, 0.0)
            z[:, draw.permutation(d)[: int(np.ceil(dead * d))]] = 0.0
            yield Case("dimensional collapse", f"{dead:.0%} dead dimensions", z)


def redundant(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES:
        for copied in (0.6, 0.8, 1.0):
            for alike in (0.97, 1.0):
                for alpha in (0.0, 1.0):
                    group = int(draw.choice([2, 4])) if d >= 128 else 2
                    part = int(copied * d) // group
                    z = spread(draw, n, d, power(d, alpha))
                    z /= z.std(axis=0)
                    sign = draw.choice([-1.0, 1.0], d)
                    z[:, : part * group] = np.tile(z[:, :part], group)
                    z = (np.sqrt(alike) * z + np.sqrt(1 - alike) * draw.standard_normal((n, d))) * sign
                    z = z[:, draw.permutation(d)]
                    yield Case("redundant features", f"{copied:.0%} copied at ρ = {alike}", z)
                    if alike == 1.0:
                        yield Case("redundant features", f"{copied:.0%} copied, two views", *pair(draw, z, 0.9))


def cluster(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES:
        for k in (2, 5, 10, 20):
            for within in (0.03, 0.01, 1e-4, 0.0):
                z = classes(draw, n, d, k, within, even=bool(draw.integers(2)))
                yield Case("cluster collapse", f"{k} modes, {within:.2%} within", z)
                yield Case("cluster collapse", f"{k} modes, {within:.2%} within, ReLU", np.maximum(z + 0.5, 0.0))
        z = spread(draw, n, d, power(d, 1.0))
        z[: n // 2] = z[np.arange(n // 2) % 5]
        yield Case("cluster collapse", "half of the images on 5 points", z)


def identical(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES:
        for alpha in (0.0, 1.0, 2.0):
            for gap in (5e-4, 1e-4, 1e-8, 0.0):
                z = spread(draw, n, d, power(d, alpha))
                yield Case("identical views", f"gap {gap:g}", z, noise(draw, z, gap) if gap else z.copy())


def shortcut(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES:
        for rank in (1, 2, min(n - 1, d) // 8):
            for diagonal in (0.85, 0.95, 0.99, 0.999):
                a, b = pair(draw, noise(draw, spread(draw, n, d, power(rank, 0.0)), 0.005), diagonal)
                yield Case("shortcut", f"rank {rank}, C_ii {diagonal}", a, b)


def unlearned(draw: np.random.Generator) -> Iterator[Case]:
    for n, d in SIZES[1:]:
        for alpha in (0.0, 1.0, 2.0):
            yield Case("not learning yet", "unrelated views", *pair(draw, spread(draw, n, d, power(d, alpha)), 0.0))
        for diagonal in (0.05, 0.1):
            z = spread(draw, n, d, power(d, 2.0))
            yield Case("not learning yet", f"C_ii {diagonal}", *pair(draw, z, diagonal))
        z = noise(draw, spread(draw, n, d, power(3, 1.0)), 0.01)
        yield Case("not learning yet", "rank 3 in warm-up", *pair(draw, z, 0.6), warm_up=True)
        yield Case("not learning yet", "rank 3 in warm-up, C_ii 0.95", *pair(draw, z, 0.95), warm_up=True)


FAULTS = (healthy, complete, dimensional, redundant, cluster, identical, shortcut, unlearned)


def cases(seed: int) -> Iterator[Case]:
    """All cases of one seed, fault after fault; every fault has its own stream of random numbers."""
    for number, fault in enumerate(FAULTS):
        yield from fault(np.random.default_rng((seed, number)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=3, help="how often every case is drawn anew")
    options.add_argument("--misses", action="store_true", help="name every wrong verdict")
    options.add_argument("--first", type=int, default=0, help="the first seed")
    chosen = options.parse_args()
    table: Counter[tuple[str, str]] = Counter()
    total = sum(1 for _ in cases(0))
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        for case in progress(cases(seed), f"verdicts, seed {seed}", total):
            found = diagnose(case.z, case.z_b, warm_up=case.warm_up)
            table[case.injected, found.verdict] += 1
            if chosen.misses and found.verdict != case.injected:
                print(f"{case.injected} ({case.dose}, {case.z.shape}) was called {found.verdict}: {found.sentence}")
                print("   ", {k: float(f"{v:.3g}") for k, v in found.measures.items()})
    print("| injected \\ diagnosed | " + " | ".join(WORDS) + " |")
    print("|---|" + "---:|" * len(WORDS))
    for word in WORDS:
        print(f"| {word} | " + " | ".join(str(table[word, other] or "·") for other in WORDS) + " |")
    wrong = sum(count for (injected, called), count in table.items() if injected != called)
    print(f"\n{sum(table.values())} cases, {wrong} wrong verdicts, {chosen.seeds} seeds.")


if __name__ == "__main__":
    main()
