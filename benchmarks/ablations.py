"""The paper's own experiments, at our scale: every row beside the paper's figure, and whether the order agrees.

    python benchmarks/ablations.py [--data data/fashion_mnist] [--images-a-run 40960] [--seeds 0 1 2] [--only WORD]
    python benchmarks/ablations.py --images-a-run 1280 --seeds 0 --images 600     # to see it work: no meaning

Loss ablations (Table 5), broken symmetry (Table 6), batch size (Fig. 2), augmentations (Fig. 3), dimension of the
embedding (Fig. 4), λ (Fig. 5), unshared networks; the same budget for SimCLR, BYOL-style and VICReg objectives (from
``lightly`` where this environment has it, else left out). None of the switches is in the product: they are put in from
here. `--data` is a folder with train.npz and test.npz (`benchmarks/quality.py prepare` makes one); default: the sample.
Every run sees the same number of images, so that a busy machine changes nothing but the time; rows that are the base
run share it. Resumable: a run that is done is not repeated. Writes ablations.md and ablations.png into
`--docs`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tiny import ARGS, MILD, one_thread, replaced, sample, train
from torch import Tensor, nn
from torch.nn import functional as F

import barlow.network
import barlow.prepare
import barlow.train
from barlow import Config
from barlow.embedding import embed_images
from barlow.encoder import Encoder, load_encoder, untrained
from barlow.images import open_images
from barlow.objective import Terms, barlow_twins_loss
from barlow.protocols import knn, linear_probe

Patch = Callable[[], AbstractContextManager[None]]
WIDTH, BATCH, RATE = 256, 128, 0.005
BASE: dict[str, Any] = {
    "encoder": "resnetv2_18", "encoder_args": ARGS, "image_size": 28, "projector": (512, 512, WIDTH),
    "batch_size": BATCH, "lambda_": 0.01, "optimizer": "muon", "lr": RATE, "twins": "shared", "views": (MILD, MILD),
}  # fmt: skip
UNTRAINED = "untrained encoder"
CROP: dict[str, Any] = {"crop": (0.4, 1.0), "ratio": (3 / 4, 4 / 3)}
FLIP: dict[str, Any] = {"flip": 0.5}
JITTER: dict[str, Any] = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4}


class Row(NamedTuple):
    """``paper``: its top-1 accuracy in per cent, None where it gives none; ``patch``: what is replaced."""

    group: str
    name: str
    paper: float | None
    changes: Mapping[str, Any] = MappingProxyType({})
    patch: Patch = nullcontext


def of_c(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Patch:
    """The objective with another loss of the two standardised views and λ."""

    def objective(a: Tensor, b: Tensor, *, lambda_: float) -> Terms:
        made = loss(standard(a.float()), standard(b.float()), lambda_)
        return dataclasses.replace(barlow_twins_loss(a, b, lambda_=lambda_), loss=made)

    return lambda: replaced(barlow.train, "barlow_twins_loss", objective)


def raw(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Patch:
    """The objective with another loss of the embeddings as they are."""

    def objective(a: Tensor, b: Tensor, *, lambda_: float) -> Terms:
        return dataclasses.replace(barlow_twins_loss(a, b, lambda_=lambda_), loss=loss(a.float(), b.float(), lambda_))

    return lambda: replaced(barlow.train, "barlow_twins_loss", objective)


def standard(z: Tensor) -> Tensor:
    """Every column with mean 0 and deviation 1 over the batch."""
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def parts(c: Tensor) -> tuple[Tensor, Tensor]:
    """(invariance, redundancy) of a cross-correlation matrix."""
    own = torch.diagonal(c)
    return (1 - own).square().sum(), c.square().sum() - own.square().sum()


def invariance_only(a: Tensor, b: Tensor, lambda_: float) -> Tensor:
    return parts(a.T @ b / len(a))[0]


def redundancy_only(a: Tensor, b: Tensor, lambda_: float) -> Tensor:
    return parts(a.T @ b / len(a))[1]


def along_features(a: Tensor, b: Tensor, lambda_: float) -> Tensor:
    """Rows at unit length instead of columns standardised; C scaled so that its diagonal can be 1."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    on, off = parts(a.T @ b * (a.shape[1] / len(a)))
    return on + lambda_ * off


def unnormalised(a: Tensor, b: Tensor, lambda_: float) -> Tensor:
    on, off = parts(a.T @ b / len(a))
    return on + lambda_ * off


def cross_entropy(a: Tensor, b: Tensor, lambda_: float, temperature: float = 0.1) -> Tensor:
    """−log Σ exp(Cᵢᵢ/τ) + λ log Σ exp(max(Cᵢⱼ, 0)/τ) (paper, section 4.1)."""
    c = a.T @ b / len(a)
    eye = torch.eye(len(c), dtype=torch.bool)
    off = torch.logsumexp(c[~eye].clamp(min=0) / temperature, 0)
    return lambda_ * off - torch.logsumexp(torch.diagonal(c) / temperature, 0)


def library(name: str, **arguments: Any) -> Patch:
    """A loss of lightly on the embeddings as they are."""

    def patch() -> AbstractContextManager[None]:
        import lightly.loss

        criterion = getattr(lightly.loss, name)(**arguments)
        return raw(lambda a, b, _: criterion(a, b))()

    return patch


class Predicted(nn.Module):
    """A projector with a predictor behind it for view A only; ``stop`` cuts the gradient of view B."""

    def __init__(self, inner: nn.Module, width: int, *, predictor: bool, stop: bool) -> None:
        super().__init__()
        self.inner, self.stop = inner, stop
        middle = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)]
        self.predictor = nn.Sequential(*middle) if predictor else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        z: Tensor = self.inner(h)
        if not self.training:
            return z
        a, b = z.chunk(2)  # one pass takes both views, view A first
        return torch.cat([self.predictor(a), b.detach() if self.stop else b])


def asymmetric(*, predictor: bool, stop: bool) -> Patch:
    own = barlow.network.build_projector

    def build(features: int, widths: Sequence[int]) -> nn.Module:
        return Predicted(own(features, widths), widths[-1], predictor=predictor, stop=stop)

    return lambda: replaced(barlow.network, "build_projector", build)


def no_norm() -> AbstractContextManager[None]:
    own = barlow.network.build_projector

    def build(features: int, widths: Sequence[int]) -> nn.Module:
        return nn.Sequential(*(layer for layer in own(features, widths) if not isinstance(layer, nn.BatchNorm1d)))

    return replaced(barlow.network, "build_projector", build)


@contextmanager
def both(*patches: Patch) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch())
        yield


def views(**view: Any) -> dict[str, Any]:
    return {"views": (view, view)}


LOSSES = (
    Row("Loss (Table 5)", "Barlow Twins", 71.4),
    Row("Loss (Table 5)", UNTRAINED, None),
    Row("Loss (Table 5)", "only the invariance term", 57.3, patch=of_c(invariance_only)),
    Row("Loss (Table 5)", "only the redundancy term", 0.1, patch=of_c(redundancy_only)),
    Row("Loss (Table 5)", "normalised along features", 69.8, patch=raw(along_features)),
    Row("Loss (Table 5)", "no BatchNorm in the projector", 71.2, patch=no_norm),
    Row("Loss (Table 5)", "that, and no normalisation", 53.4, patch=lambda: both(no_norm, raw(unnormalised))),
    Row("Loss (Table 5)", "cross-entropy with temperature", 63.3, patch=of_c(cross_entropy)),
    Row("Symmetry (Table 6)", "Barlow Twins", 71.4),
    Row("Symmetry (Table 6)", "stop-gradient", 70.5, patch=asymmetric(predictor=False, stop=True)),
    Row("Symmetry (Table 6)", "predictor", 70.2, patch=asymmetric(predictor=True, stop=False)),
    Row("Symmetry (Table 6)", "both", 61.3, patch=asymmetric(predictor=True, stop=True)),
)
BATCHES = {32: None, 64: None, 128: 69.7, 256: 70.7, 512: 71.4, 1024: 71.7}
WIDTHS = (16, 64, 256, 1024, 4096)
LAMBDAS = (0.0, 0.0005, 0.002, 0.01, 0.05, 0.2, 1.0)
SWEEPS = (
    *(Row("Batch size (Fig. 2)", str(b), top, {"batch_size": b, "lr": RATE * (b / BATCH) ** 0.5})
      for b, top in BATCHES.items()),
    *(Row("Dimension of the embedding (Fig. 4), λ = 2.56/D", str(w), None,
          {"projector": (512, 512, w), "lambda_": 2.56 / w}) for w in WIDTHS),
    *(Row("λ (Fig. 5)", f"{value:g}", None, {"lambda_": value}) for value in LAMBDAS),
    Row("Views (Fig. 3)", "crop, flip, brightness and contrast", None, views(**CROP, **FLIP, **JITTER)),
    Row("Views (Fig. 3)", "no flip", None, views(**CROP, **JITTER)),
    Row("Views (Fig. 3)", "no brightness and contrast", None, views(**CROP, **FLIP)),
    Row("Views (Fig. 3)", "crop alone", None, views(**CROP)),
    Row("Views (Fig. 3)", "no crop", None, views(**FLIP, **JITTER)),
    Row("Networks", "shared", 68.7, {"twins": "shared"}),
    Row("Networks", "unshared", 64.2, {"twins": "unshared"}),
)  # fmt: skip
OTHERS = (
    Row("Objective, same budget", "Barlow Twins", None),
    Row("Objective, same budget", "SimCLR (τ = 0.2)", None, patch=library("NTXentLoss", temperature=0.2)),
    Row("Objective, same budget", "VICReg", None, patch=library("VICRegLoss")),
    Row("Objective, same budget", "BYOL-style: negative cosine, predictor, stop-gradient", None,
        patch=lambda: both(asymmetric(predictor=True, stop=True), library("NegativeCosineSimilarity"))),
)  # fmt: skip
ROWS = (*LOSSES, *SWEEPS, *OTHERS)


Key = tuple[str, str]  # group and name of a row
Results = Mapping[Key, Sequence[dict[str, float]]]


class Data(NamedTuple):
    """Unlabelled training images, and the labelled ones that judge."""

    train: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test: NDArray[np.uint8]
    truth: NDArray[np.int64]


def data(folder: Path | None, most: int | None) -> Data:
    found = []
    for part in ("train", "test"):
        if folder is None:
            images, labels = sample(part)
        else:
            with np.load(folder / f"{part}.npz") as stored:
                images, labels = stored["images"], stored["labels"].astype(np.int64)
        found += [images[:most], labels[:most]]
    return Data(*found)


def one(row: Row, seed: int, given: argparse.Namespace, about: Data) -> dict[str, float] | str:
    """Accuracies of one run, in per cent, from its folder when it is done; a sentence when it could not be made."""
    config = Config(seed=seed, devices=1, workers=0, **(BASE | dict(row.changes)))
    is_base = row.patch is nullcontext and config == Config(seed=seed, devices=1, workers=0, **BASE)
    name = "base" if is_base else "".join(c if c.isalnum() else "-" for c in f"{row.group} {row.name}")
    folder = given.out / f"{name}-{seed}"
    if row.name == UNTRAINED:
        return judged(given.out / f"untrained-{seed}.json", lambda: untrained(folder, seed), given.bank, about)
    steps = given.images_a_run // config.batch_size
    if not (folder / "accuracy.json").is_file():
        try:
            with row.patch():
                train(dataclasses.replace(config, out=str(folder), steps=steps), images=about.train[..., None])
        except (ImportError, ValueError, ArithmeticError) as error:
            return f"{type(error).__name__}: {error}"
    return judged(folder / "accuracy.json", lambda: load_encoder(folder), given.bank, about)


def judged(stored: Path, load: Callable[[], Encoder], bank: int, about: Data) -> dict[str, float]:
    """k-NN and linear accuracy of an encoder with ``bank`` labels, in per cent; kept in the file ``stored``."""
    if stored.is_file():
        found: dict[str, float] = json.loads(stored.read_text())
        return found
    encoder, parts = load(), []
    for part in (about.train[:bank], about.test):
        features = embed_images(encoder, open_images(part[..., None]), 256, "embedding")
        parts.append(np.concatenate([z for _, z in features]))
    answers = {"k-NN": knn(parts[0], about.labels[:bank], parts[1])}
    answers["linear"] = linear_probe(parts[0], about.labels[:bank], parts[1])
    found = {name: 100 * float((a == about.truth).mean()) for name, a in answers.items()}
    stored.write_text(json.dumps(found))
    return found


def table(rows: Sequence[Row], results: Results, failed: Mapping[Key, str]) -> str:
    """Markdown: ours as mean ± sd beside the paper's figure; per group, how many pairs of rows stand in its order."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += [f"\n## {group}\n", "| | k-NN | linear | n | paper, top-1 |", "|---|---:|---:|---:|---:|"]
        inside = [row for row in rows if row.group == group]
        for row in inside:
            found = results.get(row[:2], ())
            cells = [spread([f[name] for f in found]) for name in ("k-NN", "linear")] if found else ["–", "–"]
            paper = "–" if row.paper is None else f"{row.paper:.1f}"
            note = f" ({failed[row[:2]]})" if row[:2] in failed else ""
            lines.append(f"| {row.name}{note} | {cells[0]} | {cells[1]} | {len(found)} | {paper} |")
        if agreed := order(inside, results):
            lines.append(f"\n{agreed}")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def order(rows: Sequence[Row], results: Results) -> str:
    """In words, how many pairs of rows, told apart in the paper, stand in its order here."""
    known = [(row.paper, statistics.mean(f["linear"] for f in results[row[:2]]))
             for row in rows if row.paper is not None and results.get(row[:2])]  # fmt: skip
    pairs = [(a, b) for i, a in enumerate(known) for b in known[i + 1 :] if a[0] != b[0]]
    agreed = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)  # type: ignore[operator]
    return f"Order of the paper (linear probe): {agreed} of {len(pairs)} pairs of rows agree." if pairs else ""


def plot(path: Path, rows: Sequence[Row], results: Results) -> None:
    """One panel a group: linear accuracy, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(row.group for row in rows if results.get(row[:2])))
    height = [sum(row.group == group for row in rows) for group in groups]
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(7, 0.34 * sum(height) + len(groups)), squeeze=False,
                                   gridspec_kw={"height_ratios": height}, layout="constrained")  # fmt: skip
    for axis, group in zip(axes[:, 0], groups, strict=True):
        inside = [row for row in rows if row.group == group and results.get(row[:2])]
        for place, row in enumerate(inside):
            values = [found["linear"] for found in results[row[:2]]]
            axis.plot(values, [place] * len(values), "o", color="#26619c", alpha=0.6, markersize=5)
        axis.set_yticks(range(len(inside)), [row.name for row in inside])
        axis.invert_yaxis()
        axis.set_title(group, loc="right", fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("linear probe, % of test images")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """See the head of this file."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, help="folder with train.npz and test.npz; default: the sample")
    options.add_argument("--images", type=int, help="of each part at most")
    options.add_argument("--bank", type=int, default=10_000, help="labelled images for k-NN and the probe")
    options.add_argument("--images-a-run", type=int, default=40_960, help="a run's steps are this by the batch size")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--only", default="", help="rows whose group or name holds this")
    options.add_argument("--out", type=Path, default=Path("runs/ablations"))
    options.add_argument("--docs", type=Path, default=Path("docs/explanation"))
    given = options.parse_args()
    one_thread()
    about = data(given.data, given.images)
    rows = [row for row in ROWS if given.only in f"{row.group} {row.name}"]
    results: dict[Key, list[dict[str, float]]] = {}
    failed: dict[Key, str] = {}
    for seed in given.seeds:  # a seed of every row first: a run that is cut short is a whole table still
        for row in rows:
            found = one(row, seed, given, about)
            if isinstance(found, str):
                failed[row[:2]] = found
            else:
                results.setdefault(row[:2], []).append(found)
            print(f"seed {seed}, {row.group}, {row.name}: {found}", flush=True)
    head = (f"{len(about.train):,} images without labels, of which every run sees {given.images_a_run:,} in batches of "
            f"{BATCH} unless said, a narrow network (resnetv2_18 of one block a stage, 28 px); k-NN and linear probe "
            f"with {given.bank:,} labels on {len(about.test):,} test images, in per cent: mean ± sd over n seeds. "
            "The paper's figures are of ImageNet; only their order can be compared.")  # fmt: skip
    given.docs.mkdir(parents=True, exist_ok=True)
    text = f"# The paper's experiments at our scale\n\n`python benchmarks/ablations.py`: {head}\n"
    text += "\n![Linear probe of every row, a dot a seed](ablations.png)\n"
    (given.docs / "ablations.md").write_text(text + table(rows, results, failed) + "\n", encoding="utf-8")
    if results:
        plot(given.docs / "ablations.png", rows, results)


if __name__ == "__main__":
    main()
