"""``barlow curate``: near-duplicates, outliers and what to label first, as a table and a contact sheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow.console import say
from barlow.curation import FAR, Curated, Floats, curate_features
from barlow.embedding import embed_images, load_on_device, open_for
from barlow.encoder import Encoder, encoder_folder
from barlow.errors import DataError, UserError
from barlow.files import atomic_write, check_output, keep_foreign
from barlow.guard import BadImage
from barlow.images import Images
from barlow.kinds import as_whole
from barlow.runlog import read_metrics
from barlow.sheet import Cell, cell, strips
from barlow.sources import companion, keep_apart

COLUMNS = ("path", "group", "outlier", "is_outlier", "pick")
SHOWN = 8  # pictures a row of the contact sheet
BATCH = 32  # images that go through the encoder together: all maps on the way are held


def curate(run: str | Path, images: Any, output: str | Path, *, picks: int = 100, seed: int = 0) -> str:
    """Writes ``output`` (.csv) and a contact sheet beside it (.png); returns what was found in one line.

    Columns: path; group (of near-duplicates, empty where there is none); outlier (in deviations); is_outlier (0 or 1);
    pick (1 is the first to label; empty where the image was not chosen). One row an image, in the order of the images.
    An earlier table of this kind is replaced; any other file of the name is left, with UserError.
    """
    output = check_output(output)
    if output.suffix != ".csv":
        raise UserError(f"The output {output} must end in .csv.")
    as_whole(picks, "picks", 0)
    as_whole(seed, "seed", 0, 2**32 - 1)  # scikit-learn's
    sheet_file = companion(output, ".png")
    keep_apart(images, output, sheet_file)
    keep_foreign(output, lambda there: there.read_text(encoding="utf-8").startswith(",".join(COLUMNS) + "\n"))
    encoder = load_on_device(run)
    if doubt := verdict_of(run):
        say(f"warning: {doubt}")
    source = open_for(encoder, images)
    keys, features, before = looked_at(encoder, source)
    if len(keys) < 2:
        raise DataError(f"{len(keys)} usable image in {images}: there is nothing to compare.")
    found = curate_features(features, picks, seed, before)
    atomic_write(output, _table(keys, found))
    rows = _rows(found)
    where = {source.key(i): i for i in range(len(source))} if rows else {}
    sheet = strips([(title, [_cell(source, where[keys[i]], keys[i], text) for i, text in row]) for title, row in rows])
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    atomic_write(sheet_file, buffer.getvalue())
    groups, double = int(found.group.max()), int((found.group > 0).sum())
    far, chosen = int((found.outlier >= FAR).sum()), int((found.pick > 0).sum())
    copies = f"{groups:,} groups of near-duplicates ({double:,} images)"
    return f"{len(keys):,} images: {copies}, {far:,} outliers, {chosen:,} to label first"


def looked_at(encoder: Encoder, images: Images) -> tuple[list[str], Floats, list[Floats]]:
    """(keys, features, what lies before them on the way through the encoder) of all images."""
    widths = list[int]()

    def every(x: Tensor) -> Tensor:
        depths = encoder.depths(x)
        widths[:] = [depth.shape[1] for depth in depths]
        return torch.cat(depths, 1)

    parts = list(embed_images(encoder, images, BATCH, through=every))
    if not parts:
        return [], np.empty((0, encoder.features), np.float32), []
    *before, features = np.split(np.concatenate([rows for _, rows in parts]), np.cumsum(widths)[:-1], axis=1)
    return [key for keys, _ in parts for key in keys], features, before


def verdict_of(run: str | Path) -> str | None:
    """What the run itself last said of its encoder, where that is not "healthy"; None where it was, or is not known."""
    lines = read_metrics(encoder_folder(run).parent / "metrics.jsonl")
    looks = [line for line in lines if line.get("kind") == "health" and line.get("of") == "features"]
    if not looks or looks[-1].get("verdict") == "healthy":
        return None
    verdict, step = looks[-1].get("verdict"), looks[-1]["step"]
    return (
        f"the run's last verdict on this encoder, at step {step:,}, is {verdict!r}: do not trust what it finds alike "
        "or unusual; train longer, or see the report"
    )


def _table(keys: list[str], found: Curated) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for key, group, outlier, pick in zip(keys, found.group, found.outlier, found.pick, strict=True):
        writer.writerow((key, group or "", f"{outlier:.3f}", int(outlier >= FAR), pick or ""))
    return text.getvalue()


def _rows(found: Curated) -> list[tuple[str, list[tuple[int, str]]]]:
    """What the sheet shows, (title, images with a word each): large groups, the worst outliers, the first picks."""
    rows = []
    sizes = np.bincount(found.group)[1:]
    for number in np.argsort(-sizes, kind="stable")[:SHOWN] + 1:
        members = np.flatnonzero(found.group == number)
        title = f"near-duplicates, group {number}: {len(members)} images"
        rows.append((title, [(int(i), "") for i in members[:SHOWN]]))
    far: NDArray[np.int64] = np.flatnonzero(found.outlier >= FAR)
    far = far[np.argsort(-found.outlier[far], kind="stable")]
    picked: NDArray[np.int64] = np.flatnonzero(found.pick)
    picked = picked[np.argsort(found.pick[picked], kind="stable")]
    outlier = [(int(i), f"{found.outlier[i]:.1f} deviations") for i in far]
    first = [(int(i), f"number {found.pick[i]}") for i in picked]
    for title, chosen in (("outliers", outlier), ("label these first", first)):
        for at in range(0, min(len(chosen), 3 * SHOWN), SHOWN):
            part = chosen[at : at + SHOWN]
            rows.append((f"{title}, {at + 1} to {at + len(part)} of {len(chosen):,}", part))
    return rows


def _cell(source: Images, i: int, key: str, text: str) -> Cell:
    try:
        array = source.read(i)
    except BadImage:  # it was read a moment ago
        array = np.zeros((8, 8, source.channels), np.uint8)
    return cell(array, key, text)
