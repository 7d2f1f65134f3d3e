"""Health of an encoder, told from its output alone: all measures of an array at once, and the verdict in words.

Works alone on any (n, d) array of features or embeddings, from any model; no labels. The measures stand in
``barlow.measures`` and ``barlow.neighbours``, the rules and their thresholds in ``barlow.verdict``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from barlow.errors import UserError
from barlow.measures import (
    Sample,
    as_array,
    dead_dimensions,
    duplicate_dimensions,
    effective_rank,
    forced_duplicates,
    mean_cosine,
    off_diagonal_excess,
    participation,
    rank_cliff,
    rank_me,
    relative_spread,
    spectrum,
    spectrum_alpha,
)
from barlow.neighbours import (
    duplicate_neighbour_rate,
    lidar,
    mean_diagonal,
    modes,
    occupancy,
    paired,
    self_cluster,
    twins,
    twins_found,
    twins_near,
    view_gap,
)
from barlow.verdict import Diagnosis, judge

__all__ = [
    "Diagnosis",
    "dead_dimensions",
    "diagnose",
    "duplicate_dimensions",
    "duplicate_neighbour_rate",
    "effective_rank",
    "forced_duplicates",
    "lidar",
    "mean_cosine",
    "mean_diagonal",
    "measure",
    "measure_pair",
    "modes",
    "occupancy",
    "off_diagonal_excess",
    "participation",
    "rank_cliff",
    "rank_me",
    "relative_spread",
    "self_cluster",
    "spectrum",
    "spectrum_alpha",
    "twins_found",
    "twins_near",
    "view_gap",
]

ROWS = 2048  # images looked at when more are given: measures of pairs grow with n²


def measure(z: ArrayLike, z_b: ArrayLike | None = None) -> dict[str, float]:
    """All measures of z (n, d), and those of the pair of views where z_b (n, d), row i the same image, is given.

    Of more than 2,048 rows, that many evenly spaced ones are used; "n" says how many. A measure that is not defined for
    this array (too few rows or dimensions) is left out, so every value is a finite number. One odd image
    does not decide: rows that lie more than five median lengths from the mean are drawn in to that first
    (``Sample.tempered``), except for the measures of the pair. Raises UserError for other shapes and for numbers that
    are not finite.
    """
    plain = Sample(_rows(z))
    s = plain.tempered
    tightest = modes(s)
    values = {
        "n": float(s.n),
        "d": float(s.d),
        "deviation": math.sqrt(s.variance / s.d) * s.scale,
        "relative_spread": relative_spread(s),
        "mean_cosine": mean_cosine(s),
        "effective_rank": effective_rank(s),
        "participation": participation(s),
        "rank_me": rank_me(s),
        "rank_cliff": float(rank_cliff(s)),
        "spectrum_alpha": spectrum_alpha(s),
        "off_diagonal_excess": off_diagonal_excess(s),
        "dead_dimensions": dead_dimensions(s),
        "duplicate_dimensions": duplicate_dimensions(s),
        "self_cluster": self_cluster(s),
        "duplicate_neighbour_rate": duplicate_neighbour_rate(s),
        "occupancy": occupancy(s),
        "modes": float(tightest.groups),
        "modes_within": tightest.within,
    }
    if values["duplicate_dimensions"] >= 0.5:  # seldom, and costly
        values["forced_duplicates"] = forced_duplicates(s)
    if z_b is not None:
        values |= measure_pair(plain, _rows(z_b, beside=z))
    return {name: value for name, value in values.items() if math.isfinite(value)}


def measure_pair(z_a: ArrayLike | Sample, z_b: ArrayLike) -> dict[str, float]:
    """The measures of two views (n, d) of the same images alone: mean_diagonal, twins_found, twins_near, view_gap."""
    a, b = paired(z_a if isinstance(z_a, Sample) else _rows(z_a, beside=z_b), _rows(z_b))
    found, near = twins(a, b)
    return {"mean_diagonal": mean_diagonal(a, b), "twins_found": found, "twins_near": near, "view_gap": view_gap(a, b)}


def diagnose(
    z: ArrayLike, z_b: ArrayLike | None = None, *, warm_up: bool = False, embedding: bool = False
) -> Diagnosis:
    """The verdict on embeddings or features z (n, d) of n different images; with z_b, on two views of the same images.

    ``warm_up``: training has only just begun, so a low rank is no alarm. ``embedding``: z is what the objective is
    decorrelating, the projector's output in training, so copied dimensions are a fault whatever the spectrum. The words
    and the rules, each with its threshold and reason, stand at the head of ``barlow.verdict``. Give it 128 images or
    more: from fewer, a rank or a cluster can hardly be told. Raises UserError as ``measure`` does.
    """
    return judge(measure(z, z_b), warm_up=warm_up, embedding=embedding)


def _rows(z: ArrayLike, beside: ArrayLike | None = None) -> ArrayLike:
    array = as_array(z)
    if beside is not None and (shape := as_array(beside).shape) != array.shape:  # else other rows would be chosen
        raise UserError(f"the two views must have one shape; got {array.shape} and {shape}")
    if array.ndim == 2 and len(array) > ROWS:
        array = array[np.linspace(0, len(array) - 1, ROWS).astype(np.intp)]
    return array
