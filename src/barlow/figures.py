"""What the report shows of a run's snapshots: arrays in, pictures and rows for the page out."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from barlow.console import say
from barlow.health import spectrum
from barlow.pictures import Line, apart, chart, diverging, thumbnail

Array = NDArray[Any]

SHOWN = 256  # dimensions of the cross-correlation matrix that are drawn
STRIP = 96  # features of an image that are drawn side by side
QUERIES, NEIGHBOURS = 8, 5
THUMBS = 110  # images drawn on the map itself; the others are dots


class Snapshot(NamedTuple):
    """The held-out images' ``features`` (m, d), ``embedding_a`` and ``embedding_b`` (m, D) after ``step`` steps."""

    step: int
    features: Array
    embedding_a: Array
    embedding_b: Array


def cross_correlation(a: Array, b: Array) -> Array:
    """C = ÂᵀB̂/N of the first ``SHOWN`` dimensions, columns standardised without an eps; a dead dimension gives 0."""
    left, right = (z[:, :SHOWN].astype(np.float64) for z in (a, b))
    left, right = ((z - z.mean(axis=0)) / np.maximum(z.std(axis=0), 1e-12) for z in (left, right))
    return np.asarray(left.T @ right / len(left))


def matrices(snapshots: list[Snapshot]) -> list[dict[str, Any]]:
    """The cross-correlation matrix of the first and the last snapshot: picture, caption, mean of diagonal and rest."""
    rows = []
    for s in dict.fromkeys((0, len(snapshots) - 1)):
        c = cross_correlation(snapshots[s].embedding_a, snapshots[s].embedding_b)
        off = np.sqrt(np.mean(np.square(c[~np.eye(len(c), dtype=bool)]))) if len(c) > 1 else 0.0
        rows.append({
            "picture": diverging(c), "when": when(snapshots[s].step), "side": len(c),
            "diagonal": f"{np.diag(c).mean():.2f}", "off": f"{off:.2f}",
        })  # fmt: skip
    return rows


def when(step: int) -> str:
    """How a snapshot is called on the page."""
    return "before training" if step == 0 else f"after {step:,} steps"


def spectra(snapshots: list[Snapshot]) -> list[Markup]:
    """Eigenvalue charts of the features and of the embedding at every snapshot, as shares of the variance."""
    charts = []
    for title, field in (("Encoder output", "features"), ("Embedding", "embedding_a")):
        lines = []
        for s in snapshots:
            values = spectrum(getattr(s, field))
            share = values / (values.sum() or 1.0)
            share = share[share > 1e-7]
            tone = "one" if s is snapshots[-1] else "faint" if s is snapshots[0] else "between"
            name = f"{s.step:,}" if tone == "between" else when(s.step)
            lines.append(Line(name, np.arange(1, len(share) + 1), share, tone))
        charts.append(chart(lines, title=title, x_label="direction, strongest first", x_log=True, y_log=True, low=1e-7))
    return charts


def spectrum_over_time(steps: list[int], spectra: list[Array]) -> dict[str, Any]:
    """The spectra (r,) of every look as one picture: a column a look, a row a direction, the strongest on top and the
    rows closer together towards the weak end; the darker the larger its share of the variance, from 1e-5 to 1."""
    room = min(len(values) for values in spectra)
    rows = np.unique(np.geomspace(1, room, min(room, 64)).astype(np.int64)) - 1
    shares = np.stack([values[rows] / (values.sum() or 1.0) for values in spectra], axis=1)
    strength = 1 + np.log10(np.maximum(shares, 1e-5)) / 5
    return {"picture": diverging(-strength), "first": f"{steps[0]:,}", "last": f"{steps[-1]:,}", "room": f"{room:,}"}


def varied(features: Array, count: int) -> list[int]:
    """Images as different as possible: from the most typical one, always the one farthest from those chosen."""
    unit = _unit(features)
    chosen = [int((unit @ unit.mean(axis=0)).argmax())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < min(count, len(unit)):
        # the very farthest are odd ones out; of the farther half the middle one shows what is ordinary, too
        order = np.argsort(nearest)
        order = order[~np.isin(order, chosen)]
        chosen.append(int(order[len(order) // 8]))
        nearest = np.maximum(nearest, unit @ unit[chosen[-1]])
    return chosen


def _unit(features: Array) -> Array:
    z = features.astype(np.float64)
    return np.asarray(z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-30))


def neighbours(snapshots: list[Snapshot], images: Array, keys: list[str]) -> list[dict[str, Any]]:
    """Rows of a query image with its nearest others by cosine of the features, after and before training."""
    rows = []
    unit = {s: _unit(snapshots[s].features) for s in {0, len(snapshots) - 1}}
    for query in varied(snapshots[-1].features, QUERIES):
        row: dict[str, Any] = {"query": {"picture": thumbnail(images[query]), "key": keys[query]}}
        for name, s in (("after", len(snapshots) - 1), ("before", 0)):
            cosine = unit[s] @ unit[s][query]
            cosine[query] = -np.inf
            nearest = np.argsort(-cosine, kind="stable")[: min(NEIGHBOURS, len(cosine) - 1)]
            row[name] = [
                {"picture": thumbnail(images[i]), "key": f"{keys[i]} (cosine {cosine[i]:.2f})"} for i in nearest
            ]
        rows.append(row)
    return rows


def strips(snapshots: list[Snapshot], images: Array, keys: list[str]) -> list[dict[str, Any]]:
    """Rows of an image with what the encoder says of it before and after: its first features as a strip of colours.

    One scale for all rows (the 98th percentile of the sizes), and nothing subtracted: equal rows are equal outputs.
    """
    chosen = varied(snapshots[-1].features, QUERIES)
    rows: list[dict[str, Any]] = [{"picture": thumbnail(images[i]), "key": keys[i], "strips": []} for i in chosen]
    for s in dict.fromkeys((0, len(snapshots) - 1)):
        part = snapshots[s].features[chosen, :STRIP].astype(np.float64)
        scale = float(np.quantile(np.abs(part), 0.98)) or 1.0
        for row, values in zip(rows, part, strict=True):
            row["strips"].append(diverging(values[None, :] / scale))
    return rows


def mistakes(stored: Any, arrays: Array) -> list[dict[str, Any]]:
    """Rows of a test image that k-NN was surest of and wrong, with the training images that voted (``mistakes.py``).

    ``stored``: of evaluation.json; ``arrays``: their pictures (m, 1 + neighbours, s, s, c), one row for each.
    """
    rows = []
    for found, drawn in zip(stored, arrays, strict=True):
        near = [
            {"picture": thumbnail(array), "key": f"{n['image']}, cosine {n['cosine']:.2f}", "label": str(n["label"]),
             "right": n["label"] == found["label"]}
            for n, array in zip(found["neighbours"], drawn[1:], strict=False)
        ]  # fmt: skip
        said = {name: str(found[name]) for name in ("image", "label", "answer")}
        rows.append({**said, "sure": f"{found['certainty']:.0%}", "picture": thumbnail(drawn[0]), "near": near})
    return rows


def strongest(features: Array) -> tuple[Array, str]:
    """(places (m, 2) on the two strongest directions (PCA), their share of the variance in words)."""
    z = features.astype(np.float64)
    z -= z.mean(axis=0)
    u, sigma, _ = np.linalg.svd(z, full_matrices=False)
    plane = np.zeros((len(z), 2))
    plane[:, : min(2, len(sigma))] = (u * sigma)[:, :2]
    total = float(np.square(sigma).sum()) or 1.0
    return plane, f"{float(np.square(sigma[:2]).sum()) / total:.0%}"


def umap(features: Array) -> Array | None:
    """Places (m, 2) by UMAP (McInnes et al. 2018, arXiv:1802.03426) with the cosine, always the same ones; None where
    the package is not installed or cannot cope."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies, and that one seed means one thread
            from umap import UMAP

            near = max(2, min(15, len(features) - 1))
            return np.asarray(UMAP(n_neighbors=near, metric="cosine", random_state=0).fit_transform(features))
    except ImportError:
        return None
    except Exception as error:  # an extra picture never costs the report
        say(f"warning: no map by UMAP in the report ({type(error).__name__}: {error})")
        return None


def embedding_map(plane: Array, keys: list[str], cells: int) -> list[dict[str, Any]]:
    """Images at their places (m, 2): one point an image, 0..100, with its cell of a sheet of ``cells`` a row."""
    low, high = np.quantile(plane, 0.005, axis=0), np.quantile(plane, 0.995, axis=0)
    places = 3 + 94 * np.clip((plane - low) / np.maximum(high - low, 1e-30), 0, 1)
    # images in order of their distance from the middle, so that the rim is shown as pictures first
    order = np.argsort(-np.square(places - 50).sum(axis=1), kind="stable")
    shown = np.zeros(len(plane), dtype=bool)
    shown[order] = apart(places[order], 5.6, THUMBS)
    return [
        {"x": f"{x:.1f}", "y": f"{100 - y:.1f}", "column": i % cells, "row": i // cells, "big": big, "key": key}
        for i, ((x, y), big, key) in enumerate(zip(places, shown, keys, strict=True))
    ]
