"""Runs ranked without labels, and how sure the ranking is.

Every encoder answers the same images in the same random views, drawn as the first run drew its own, so that figures
stand beside each other whatever each run was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from barlow import index as tables
from barlow.batches import Stream, split
from barlow.config import Config, read_toml
from barlow.console import say
from barlow.convert import FULL
from barlow.draws import IntArray
from barlow.embedding import load_on_device
from barlow.encoder import Encoder
from barlow.errors import NumbersError, UserError
from barlow.images import Images, open_images
from barlow.kinds import as_path
from barlow.prepare import views_of
from barlow.progress import progress
from barlow.repeats import many_views

VIEWS, MOST, DRAWS = 10, 512, 1000
MEASURE = "twins found"  # of twenty measures the one whose order agrees best with that of k-NN accuracy
TRUST = (
    "Over 26 short runs of one data set, trained twice, the order by this measure agreed with that of k-NN accuracy at "
    "Spearman's ρ = 0.72 and 0.64 (95 %: 0.30 to 0.87): it finds the bad runs, not the best of good ones."
)
Floats = NDArray[np.floating[Any]]


class Common(NamedTuple):
    """What all runs are asked about: images, which of them, and the settings whose views are drawn."""

    images: Images
    chosen: IntArray
    config: Config


def compare(runs: Sequence[str | Path], images: str | None = None) -> dict[str, Any]:
    """Ranks run folders by the twins that their encoders find, the best first; plain values, ready for JSON.

    ``images``: anything that pretrain takes, up to 512 of them spread evenly; default: the held-out images of the first
    run. ``rows``: one a run with its ``value`` (the mean of ``finds``), ``low`` and ``high`` (95 %, by drawing images
    with replacement) and ``before_next``: the share of these draws in which it stands before the next one (0.5 is a
    coin). Raises UserError, and NumbersError for features that are not finite.
    """
    if isinstance(runs, str | Path) or not isinstance(runs, Sequence):
        raise UserError(f"compare takes a list of run folders, not {runs!r}.")
    folders = [as_path(run, "a run") for run in runs]
    if len(runs) < 2:
        raise UserError("Give two runs or more: one alone has nothing to be compared with.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("A run is named twice.")
    about = common(folders[0], images)
    others = [str(run) for run in folders[1:] if not has_not_seen(run, about)] if images is None else []
    if others:
        say(f"note: {', '.join(others)} held out other images than {folders[0]} and may have trained on those that are "
            "asked about; name some that none has seen with --images")  # fmt: skip
    finding = {str(run): finds(seen(load_on_device(run), about)) for run in progress(runs, "comparing", len(runs))}
    values = {name: found.mean() for name, found in finding.items()}
    order = sorted(values, key=lambda name: -values[name])
    n = len(about.chosen)
    draws = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    drawn = {name: finding[name][draws].mean(axis=1) for name in order}
    rows = []
    for name, following in zip(order, [*order[1:], None], strict=True):
        low, high = np.quantile(drawn[name], [0.025, 0.975]).tolist()
        before = _ahead(drawn[name], drawn[following]) if following else None
        rows.append({"run": name, "value": float(values[name]), "low": low, "high": high, "before_next": before})
    return {"measure": MEASURE, "images": n, "views": VIEWS, "chance": 1 / n, "rows": rows}


def _ahead(one: Floats, other: Floats) -> float:
    """The share of draws in which ``one`` is larger; where they are equal, half."""
    return float((one > other).mean() + 0.5 * (one == other).mean())


def has_not_seen(run: Path, about: Common) -> bool:
    """Whether a run trained on none of the images asked about, as far as its folder tells; its pile may have been
    smaller or larger than theirs."""
    settings, index = run / "config.toml", run / "index.parquet"
    if not (settings.is_file() and index.is_file()):
        return False
    own, theirs = read_toml(settings), about.config.images
    if own.images is None or theirs is None or Path(own.images).absolute() != Path(theirs).absolute():
        return False
    try:
        paths = tables.usable(tables.read(index)[0])[0]["path"]
    except UserError:
        return False
    trained = paths.take(split(own.seed or 0, len(paths), own.held_out or 2)[0])
    return not pc.any(pc.is_in(about.images.rows["path"].take(about.chosen), value_set=trained)).as_py()


def common(first: Path, images: str | None = None) -> Common:
    """The images and views that all runs are judged on."""
    path = first / "config.toml"
    if not path.is_file():
        raise UserError(f"{first} is no run folder: it holds no config.toml")
    config = read_toml(path)
    if images is not None:
        opened = open_images(images, channels=config.channels)
        return Common(opened, spread(np.arange(len(opened))), config)
    index = first / "index.parquet"
    if config.images is None:
        raise UserError(f"{first} was trained on images given from Python: name some with --images")
    if not index.is_file():
        raise UserError(f"{index}, which names the images of the run, is gone: name some with --images")
    opened = open_images(config.images, channels=config.channels, index=index)
    opened = replace(opened, second=None)  # of given pairs: the encoder compared is that of the first images
    return Common(opened, spread(split(config.seed or 0, len(opened), config.held_out or 2)[1]), config)


def spread(numbers: IntArray) -> IntArray:
    """These, or of more than ``MOST`` as many evenly spread ones: names are often in the order of classes or days."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, MOST).astype(np.int64))]


def seen(encoder: Encoder, about: Common) -> Floats:
    """Features of the common images' views, (images, views, d)."""
    if encoder.channels != about.images.channels:
        raise UserError(f"the runs differ in their channels: {encoder.channels} and {about.images.channels}; compare "
                        "such as were trained on images of one kind")  # fmt: skip
    encoder.check_dtype(about.images.dtype)
    images = of_range(about.images, encoder.value_range)
    source = Stream(images, about.chosen, views_of(about.config), seed=about.config.seed or 0, size=encoder.size,
                    batch_size=len(about.chosen))  # fmt: skip
    mean, std = (cast(Tensor, value).flatten().tolist() for value in (encoder.mean, encoder.std))
    device = cast(Tensor, encoder.mean).device
    z = many_views(source, about.chosen, VIEWS, encoder, device=device, scales=[(mean, std)])
    if not np.isfinite(z).all():
        raise NumbersError("an encoder gives features that are not finite")
    return z


def of_range(images: Images, wanted: tuple[float, float]) -> Images:
    """The same images with the values that an encoder was trained to see as 0 and 1, which need not be those of the
    run that names the images."""
    low, high = images.value_range
    if wanted == (low, high):
        return images
    if images.array is None:
        return replace(images, value_range=wanted)
    unit = (images.array / np.float32(FULL[images.dtype]) * (high - low) + low - wanted[0]) / (wanted[1] - wanted[0])
    array = np.clip(unit, 0, 1) * FULL[images.dtype]
    return replace(images, array=array.astype(images.dtype), value_range=wanted)


def finds(z: Floats) -> Floats:
    """For each image of z (images, views, d), the share of all ordered pairs of views in which its own twin is nearer
    by cosine than the view of any other image: (images,), 0 … 1, by chance 1/images. A tie is not a find."""
    n, q, _ = z.shape
    lengths = np.linalg.norm(z, axis=2, keepdims=True)
    unit = (z / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    found = np.zeros(n)
    for a, b in combinations(range(q), 2):
        cosines = unit[:, a] @ unit[:, b].T
        own = np.diag(cosines).copy()
        np.fill_diagonal(cosines, -np.inf)
        found += own > cosines.max(axis=1)
        found += own > cosines.max(axis=0)
    return np.asarray(found / (q * (q - 1)))


def table(result: dict[str, Any]) -> str:
    """The ranking as lines of text."""
    rows = [["", "run", result["measure"], "95 %", "before the next"]]
    for place, row in enumerate(result["rows"], 1):
        sure = "" if row["before_next"] is None else f"{row['before_next']:.0%} sure"
        interval = f"{row['low']:.1%} – {row['high']:.1%}"
        rows.append([f"{place}.", row["run"], f"{row['value']:.1%}", interval, sure])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{result['images']} images, {result['views']} views of each, no labels; chance {result['chance']:.1%}"
    return "\n".join([head, "", *lines, "", TRUST])
