"""What a collapse looks like: pictures of an embedding before training and after, healthy and broken in four ways.

    python benchmarks/collapse_pictures.py [--out docs/pictures] [--runs runs/collapse]

Trains the narrow network of `provoked.py` on the sample, by its faults and settings, for 300 of its 600 steps or fewer
(some 30 s each on one core; a run that is there is not trained again), and draws for each what its held-out images
became:

1. the embedding itself, 32 images down, sorted by what they show, and all of its numbers across;
2. its first two principal directions, every image a point coloured by what it shows (labels serve the picture alone);
3. the cross-correlation matrix of two views.

The first two are in units of the embedding's root mean square: one vector for every image is then a point.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from provoked import BUDGET, FAULTS, Fault, run
from tiny import one_thread, sample

ROWS, REACH = 32, 1.0  # images drawn as rows; half the side of the scatter, in root mean squares
CASES = {  # name of the picture: the fault, and the step that is drawn
    "healthy": ("nothing, seed 0", 300),
    "complete-collapse": ("weight decay × 10,000", 60),
    "dimensional-collapse": ("learning rate × 3,000", 300),
    "redundant-features": ("tied weights in the projector", 300),
    "shortcut": ("λ = 0", 300),
}
TITLES = ("embedding: 32 images × 128 numbers", "two principal directions", "cross-correlation of two views")
Floats = NDArray[np.floating[Any]]


def looks(folder: Path, last: int) -> list[tuple[Floats, Floats]]:
    """Embeddings of the two views of the held-out images, (n, d) each: before training, and at step ``last``."""
    made = []
    for step in (0, last):
        with np.load(folder / "snapshots" / f"step-{step:07d}.npz") as stored:
            made.append((stored["embedding_a"].astype(np.float64), stored["embedding_b"].astype(np.float64)))
    return made


def classes(folder: Path) -> NDArray[np.int64]:
    """What the held-out images show, a number from 0 to 9 each."""
    with np.load(folder / "snapshots" / "held_out.npz") as stored:
        return sample("train")[1][[int(key) for key in stored["keys"]]]


def correlation(a: Floats, b: Floats) -> Floats:
    """C, of columns standardised with the objective's eps."""
    hats = [(z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (a, b)]
    made: Floats = hats[0].T @ hats[1] / len(a)
    return made


def directions(z: Floats) -> Floats:
    """(n, 2): the images along the two directions in which they differ most, in units of the root mean square."""
    centred = z - z.mean(0)
    _, _, turned = np.linalg.svd(centred, full_matrices=False)
    length = np.sqrt(np.square(z).sum(1).mean())
    made: Floats = centred @ turned[:2].T / length
    return made


def picture(seen: list[tuple[Floats, Floats]], shown: NDArray[np.int64], last: int) -> Figure:
    """Two rows, before and after, of three panels."""
    figure, panels = plt.subplots(2, 3, figsize=(8, 4.9), width_ratios=(1.9, 1, 1), layout="constrained")
    some = np.argsort(shown, kind="stable")[:: max(1, len(shown) // ROWS)][:ROWS]
    for row, (a, b), when in zip(panels, seen, ("step 0", f"step {last}"), strict=True):
        rows = a[some] / np.sqrt(np.square(a).mean())
        row[0].imshow(rows, aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
        x, y = directions(a).T
        row[1].scatter(x, y, c=shown, cmap="tab10", s=7, linewidths=0)
        row[1].set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), box_aspect=1)
        row[2].imshow(correlation(a, b), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        row[0].set_ylabel(when)
    for panel, title in zip(panels[0], TITLES, strict=True):
        panel.set_title(title, fontsize=9)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    return figure


def draw(name: str, fault: Fault, cut: int, runs: Path, out: Path) -> str:
    """Trains, draws out/collapse-NAME.webp, and returns what the run said at its last look."""
    lines = run(fault, runs, cut, "adamw")
    last = max(line["step"] for line in lines)
    folder = runs / "".join(letter if letter.isalnum() else "-" for letter in fault.name)
    figure = picture(looks(folder, last), classes(folder), last)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"collapse-{name}.webp", dpi=110, pil_kwargs={"quality": 88, "method": 6})
    plt.close(figure)
    said = [f"{line['of']}: {line['verdict']} ({line['sentence']})" for line in lines if line["step"] == last]
    return f"{name}: {fault.name}, step {last} of {BUDGET}\n  " + "\n  ".join(said)


def main() -> None:
    """See the head of this file."""
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options.add_argument("--runs", type=Path, default=Path("runs/collapse"))
    chosen = options.parse_args()
    one_thread()
    plt.switch_backend("agg")
    by_name = {fault.name: fault for fault in FAULTS}
    for name, (fault, cut) in CASES.items():
        print(draw(name, by_name[fault], cut, chosen.runs, chosen.out), flush=True)


if __name__ == "__main__":
    main()
