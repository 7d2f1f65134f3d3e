"""Runs ranked without labels, and how sure the ranking is.

Every encoder answers the same images in the same random views, drawn as the first run drew its own, so that figures
stand beside each other whatever each run was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow.batches import Stream, split
from barlow.config import Config, read_toml
from barlow.draws import IntArray
from barlow.encoder import Encoder, load_encoder
from barlow.errors import NumbersError, UserError
from barlow.images import Images, open_images
from barlow.neighbours import view_information
from barlow.prepare import views_of
from barlow.progress import progress
from barlow.repeats import many_views

VIEWS, MOST, HALVES = 10, 512, 100
MEASURE = "view information"
Floats = NDArray[np.floating[Any]]


class Common(NamedTuple):
    """What all runs are asked about: images, which of them, and the settings whose views are drawn."""

    images: Images
    chosen: IntArray
    config: Config


def compare(runs: Sequence[str | Path], images: str | None = None) -> dict[str, Any]:
    """Ranks run folders by ``score``, the best first; plain values, ready for JSON.

    ``images``: anything that pretrain takes, up to 512 of them spread evenly; default: the held-out images of the first
    run. ``rows``: one a run with its ``value``, ``low`` and ``high`` (the middle 95 % over a hundred halves of the
    images) and ``before_next``: the share of the halves on which it stands before the next one (0.5 is a coin). Raises
    UserError, and NumbersError for features that are not finite.
    """
    if len(runs) < 2:
        raise UserError("Give two runs or more: one alone has nothing to be compared with.")
    about = common(Path(runs[0]), images)
    features = {str(run): seen(load_encoder(run), about) for run in progress(runs, "comparing", len(runs))}
    if len(features) < len(runs):
        raise UserError("A run is named twice.")
    values = {name: score(z) for name, z in features.items()}
    order = sorted(values, key=lambda name: -values[name])
    n = len(about.chosen)
    halves = [np.random.default_rng(seed).permutation(n)[: n // 2] for seed in range(HALVES)]
    drawn = {name: np.array([score(features[name][half]) for half in halves]) for name in order}
    rows = []
    for name, following in zip(order, [*order[1:], None], strict=True):
        low, high = np.quantile(drawn[name], [0.025, 0.975]) - drawn[name].mean() + values[name]
        before = float((drawn[name] > drawn[following]).mean()) if following else None
        rows.append({"run": name, "value": values[name], "low": low, "high": high, "before_next": before})
    return {"measure": MEASURE, "images": n, "views": VIEWS, "rows": rows}


def common(first: Path, images: str | None = None) -> Common:
    """The images and views that all runs are judged on."""
    path = first / "config.toml"
    if not path.is_file():
        raise UserError(f"{first} is no run folder: it holds no config.toml")
    config = read_toml(path)
    if images is not None:
        opened = open_images(images, channels=config.channels)
        return Common(opened, np.unique(np.linspace(0, len(opened) - 1, MOST).astype(np.int64)), config)
    index = first / "index.parquet"
    if config.images is None or not index.is_file():
        raise UserError(f"{first} was trained on images given from Python: name some with --images")
    opened = open_images(config.images, channels=config.channels, index=index)
    return Common(opened, split(config.seed or 0, len(opened), config.held_out or 2)[1][:MOST], config)


def seen(encoder: Encoder, about: Common) -> Floats:
    """Features of the common images' views, (images, views, d)."""
    if encoder.channels != about.images.channels:
        raise UserError(f"the runs differ in their channels: {encoder.channels} and {about.images.channels}")
    source = Stream(about.images, about.chosen, views_of(about.config), seed=about.config.seed or 0, size=encoder.size,
                    batch_size=len(about.chosen))  # fmt: skip
    mean, std = (cast(Tensor, value).flatten().tolist() for value in (encoder.mean, encoder.std))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    z = many_views(source, about.chosen, VIEWS, encoder.to(device), device=device, mean=mean, std=std)
    if not np.isfinite(z).all():
        raise NumbersError("an encoder gives features that are not finite")
    return z


def score(z: Floats) -> float:
    """How good features (images, views, d) are, without labels: higher is better."""
    spread = float(np.sqrt(z.reshape(-1, z.shape[-1]).var(axis=0).mean()))
    return view_information(z / spread) if spread > 0 else 0.0


def table(result: dict[str, Any]) -> str:
    """The ranking as lines of text."""
    rows = [["", "run", result["measure"], "95 %", "before the next"]]
    for place, row in enumerate(result["rows"], 1):
        sure = "" if row["before_next"] is None else f"{row['before_next']:.0%} of {HALVES} halves"
        interval = f"{row['low']:.2f} – {row['high']:.2f}"
        rows.append([f"{place}.", row["run"], f"{row['value']:.2f}", interval, sure])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{result['images']} images, {result['views']} views of each, no labels"
    return "\n".join([head, "", *lines])
