"""Trainings that are made to fail, each in its own way, and what the run says of them before a tenth of its budget.

    python benchmarks/provoked.py [--only WORD] [--optimizer muon] [--seed 0] [--out runs/provoked]

Short trainings on the sample's images with a budget of 600 steps, looked at every 10 steps and cut off at a tenth
(`--cut` for later). Settings provoke most faults; those that the product has no switch for are put in from here.
Prints a table in Markdown: what was done to the run, which verdicts are right, what was said, and the step from which
every look gave a right verdict. For the healthy ones any alarm after the warm-up is wrong. Some 10 s a run on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny import one_thread, replaced, sample, settings, train
from torch import Tensor, nn

import barlow.network
import barlow.train
from barlow.objective import Terms, barlow_twins_loss
from barlow.runlog import read_metrics
from barlow.verdict import judge

BUDGET, LOOK, WARM_UP = 600, 10, 0.05
COLLAPSES = {"complete collapse", "dimensional collapse"}
RUINED = COLLAPSES | {"cluster collapse", "redundant features"}


class Fault(NamedTuple):
    """``right``: the verdicts that name the fault; ``muon``: with Muon, where they are others. ``changes`` to the
    settings, ``images`` and ``views`` in place of the sample's, ``patch``: what is replaced while it runs."""

    name: str
    right: set[str]
    changes: Mapping[str, Any] = MappingProxyType({})
    images: Callable[[], Any] | None = None
    views: Sequence[Any] | None = None
    patch: Callable[[], AbstractContextManager[None]] = nullcontext
    muon: set[str] | None = None


def unstandardised(a: Tensor, b: Tensor, *, lambda_: float) -> Terms:
    """The objective on raw products, C = AᵀB/N with nothing subtracted or divided."""
    terms = barlow_twins_loss(a, b, lambda_=lambda_)
    c = a.float().T @ b.float() / len(a)
    own = torch.diagonal(c)
    loss = (1 - own).square().sum() + lambda_ * (c.square().sum() - own.square().sum())
    return dataclasses.replace(terms, loss=loss)


def distance(a: Tensor, b: Tensor, *, lambda_: float) -> Terms:
    """Plain distance of the two views: nothing keeps the embeddings apart."""
    return dataclasses.replace(barlow_twins_loss(a, b, lambda_=lambda_), loss=(a - b).float().square().sum(1).mean())


def strangers(a: Tensor, b: Tensor, *, lambda_: float) -> Terms:
    """View B belongs to the next image: a mix-up in the loader."""
    return barlow_twins_loss(a, b.roll(1, 0), lambda_=lambda_)


class Copies(nn.Module):
    """Every number of the embedding four times: tied weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        z: Tensor = self.inner(h)
        return z[:, : z.shape[1] // 4].repeat(1, 4)


def objective(other: Callable[..., Terms]) -> Callable[[], AbstractContextManager[None]]:
    return lambda: replaced(barlow.train, "barlow_twins_loss", other)


def tied() -> AbstractContextManager[None]:
    own = barlow.network.build_projector
    return replaced(barlow.network, "build_projector", lambda *given: Copies(own(*given)))


@contextmanager
def bare() -> Iterator[None]:
    own = barlow.network.build_projector

    def without_norm(features: int, widths: Sequence[int]) -> nn.Sequential:
        return nn.Sequential(*(layer for layer in own(features, widths) if not isinstance(layer, nn.BatchNorm1d)))

    with objective(unstandardised)(), replaced(barlow.network, "build_projector", without_norm):
        yield


def few_scenes() -> Any:
    """2,000 pictures of 12 scenes, with a little noise of the sensor."""
    draw = np.random.default_rng(0)
    scenes = sample("train")[0][:12].astype(np.float64)
    noisy = scenes[draw.integers(12, size=2000)] + draw.normal(0, 2, (2000, 28, 28))
    return np.clip(noisy, 0, 255).astype(np.uint8)[..., None]


def stamped() -> Any:
    """Pure noise with a bright frame of one of 64 strengths: the frame is all that two views share."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2000, 28, 28), dtype=np.uint8)
    frame = np.ones((28, 28), bool)
    frame[4:-4, 4:-4] = False
    return np.where(frame, draw.integers(64, size=(2000, 1, 1)) * 4, images).astype(np.uint8)[..., None]


def one_picture() -> Any:
    """2,000 times the same picture, a thousandth of its range apart."""
    draw = np.random.default_rng(0)
    return (sample("train")[0][0] / 255 + draw.normal(0, 1e-3, (2000, 28, 28))).clip(0, 1).astype(np.float32)[..., None]


NONE: dict[str, Any] = {}
FAULTS = (
    *(Fault(f"nothing, seed {seed}", {"healthy"}, {"seed": seed}) for seed in range(3)),
    Fault("nothing, two unshared networks", {"healthy"}, {"twins": "unshared"}),
    Fault("nothing, batch 32", {"healthy"}, {"batch_size": 32}),
    # Muon's steps are of one length whatever the gradient: by k-NN these two end as good as those nothing was done to.
    Fault("learning rate × 300", RUINED, {"lr": 0.45}, muon={"healthy"}),
    Fault("learning rate × 3,000", RUINED, {"lr": 4.5}, muon={"healthy"}),
    # All weights die in ten steps; with Muon what grows back learns nothing, and is not finite in the end.
    Fault("weight decay × 10,000", COLLAPSES, {"weight_decay": 500.0}, muon=COLLAPSES | {"not learning yet"}),
    Fault("λ = 0", {"shortcut", "dimensional collapse", "redundant features"}, {"lambda_": 0.0}),
    Fault("λ × 500", {"not learning yet"}, {"lambda_": 10.0}),
    Fault("λ × 50,000", {"not learning yet"}, {"lambda_": 1000.0}),
    Fault("no augmentation: the same view twice", {"identical views"}, {"views": (NONE, NONE)}),
    Fault("view B of another image", {"not learning yet"}, patch=objective(strangers)),
    Fault("learning rate / 1,000,000", {"not learning yet"}, {"lr": 1.5e-9}),
    Fault("batch of 4", {"not learning yet"} | COLLAPSES, {"batch_size": 4}),
    Fault("batch of 8", {"not learning yet"} | COLLAPSES, {"batch_size": 8}),
    Fault("tied weights in the projector", {"redundant features"}, patch=tied),
    Fault("12 scenes in 2,000 images", {"cluster collapse"}, images=few_scenes),
    Fault("one picture 2,000 times", {"complete collapse", "not learning yet"}, images=one_picture),
    # The rest is noise: the views share next to nothing that tells one image from another.
    Fault("all that views share is a frame", {"shortcut", "dimensional collapse", "not learning yet"}, images=stamped),
    Fault("distance of views only, not standardised", COLLAPSES | {"not learning yet"}, patch=objective(distance)),
    # Raw products still ask the dimensions to differ; whether it learns as much has not been measured with labels.
    Fault("no standardisation", {"healthy"}, patch=objective(unstandardised)),
    Fault(
        "no standardisation, no BatchNorm in the projector", COLLAPSES | {"shortcut", "not learning yet"}, patch=bare
    ),
)


def run(fault: Fault, out: Path, cut: int, optimizer: str) -> list[dict[str, Any]]:
    """The health lines of the run; trained only where the folder holds none so far."""
    folder = out / "".join(letter if letter.isalnum() else "-" for letter in fault.name)
    # The rates are multiples of AdamW's usual one; Muon bears one 3,000 times as high.
    usual: dict[str, Any] = {"steps": BUDGET, "health_every": LOOK, "warmup": WARM_UP, "optimizer": optimizer}
    config = settings(out=str(folder), **(usual | dict(fault.changes)))
    if not folder.exists():
        with fault.patch():
            train(config, images=fault.images() if fault.images else None, views=fault.views, cut=cut)
    lines = [
        line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "health" and line["step"] <= cut
    ]
    for line in lines:  # by today's rules, from the measures that were stored
        m = {key: value for key, value in line.items() if isinstance(value, float | int)}
        early = line["step"] < max(30, WARM_UP * BUDGET)
        line["verdict"] = judge(m, warm_up=early, embedding=line["of"] == "embedding").verdict
    return lines


def told(lines: list[dict[str, Any]], fault: Fault) -> tuple[str, int | None]:
    """(what was said at the last look, step from which every look gave a right verdict)."""
    steps = sorted({line["step"] for line in lines})
    words = {step: {line["of"]: line["verdict"] for line in lines if line["step"] == step} for step in steps}
    if fault.right == {"healthy"}:
        wrong = [step for step in steps if set(words[step].values()) - {"healthy", "not learning yet"}]
        since = max(wrong, default=-1)
    else:
        since = max((step for step in steps if not set(words[step].values()) & fault.right), default=-1)
    last = words[steps[-1]]
    said = (
        last["embedding"]
        if last["embedding"] == last["features"]
        else ", ".join(f"{of}: {w}" for of, w in last.items())
    )
    return said, next((step for step in steps if step > since), None)


def main() -> None:
    """See the head of this file."""
    options = argparse.ArgumentParser()
    options.add_argument("--only", default="", help="faults whose name holds this")
    options.add_argument("--out", type=Path, default=Path("runs/provoked"))
    options.add_argument("--cut", type=int, default=BUDGET // 10)
    options.add_argument("--optimizer", default="adamw", help="adamw, or muon, which is chosen on processors")
    options.add_argument("--seed", type=int, default=0, help="added to the seed of every run")
    chosen = options.parse_args()
    one_thread()
    print("| done to the run | right verdicts | said at the end | right from step |\n|---|---|---|---:|", flush=True)
    missed, faults = 0, [fault for fault in FAULTS if chosen.only in fault.name]
    for fault in faults:
        if chosen.optimizer == "muon":
            fault = fault._replace(right=fault.muon or fault.right)
        fault = fault._replace(changes=dict(fault.changes) | {"seed": fault.changes.get("seed", 0) + chosen.seed})
        folder = chosen.out / f"{chosen.optimizer}-{chosen.seed}"
        said, since = told(run(fault, folder, chosen.cut, chosen.optimizer), fault)
        missed += since is None or since > BUDGET // 10
        print(
            f"| {fault.name} | {', '.join(sorted(fault.right))} | {said} | {'never' if since is None else since} |",
            flush=True,
        )
    print(f"\n{len(faults)} trainings, {missed} not diagnosed before a tenth of the budget ({BUDGET // 10} steps).")


if __name__ == "__main__":
    main()
