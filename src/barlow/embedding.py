"""Images in, one row of features an image out: to memory, Parquet or .npy, streaming."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import nn

from barlow.decode import BadImage
from barlow.encoder import Encoder, load_encoder
from barlow.errors import UserError
from barlow.images import Images, open_images
from barlow.progress import progress
from barlow.samples import Samples
from barlow.sources import shown

Rows = Iterator[tuple[list[str], NDArray[np.float32]]]


def embed_images(encoder: Encoder, images: Images, batch_size: int = 256, what: str = "embedding") -> Rows:
    """(keys, features (n, features) float32) of consecutive images, a batch at a time, on the encoder's device.

    An unreadable image is left out and named on standard error; ``what`` names the job in the progress line.
    """
    device = next(encoder.parameters()).device
    keys: list[str] = []
    batch: list[NDArray[Any]] = []
    for i in progress(range(len(images)), what, len(images)):
        try:
            batch.append(images.read(i))
            keys.append(images.key(i))
        except BadImage as error:
            print(f"left out {images.key(i)}: {error.reason}", file=sys.stderr)
        if batch and (len(batch) == batch_size or i == len(images) - 1):
            with torch.inference_mode():
                features = encoder(encoder.preprocess(batch).to(device))
            yield keys, features.float().cpu().numpy()
            keys, batch = [], []


def embed(
    run: str | Path, images: Any, *, batch_size: int = 256, model: nn.Module | None = None
) -> tuple[list[str], NDArray[np.float32]]:
    """Keys and features (n, features) of all images, in memory.

    ``run`` is a run folder or an encoder folder; ``images`` is anything that ``pretrain`` takes, or an array
    (n, h, w, c); ``model`` as in ``load_encoder``.
    """
    encoder = load_encoder(run, model)
    parts = list(embed_images(encoder, _open(images, encoder), batch_size))
    if not parts:
        return [], np.empty((0, encoder.features), np.float32)
    return [key for keys, _ in parts for key in keys], np.concatenate([features for _, features in parts])


def _open(images: Any, encoder: Encoder) -> Images:
    """The images as the encoder was trained on them; those that the index leaves out are named on standard error."""
    if encoder.shape:
        source = open_images(images if isinstance(images, Samples) else Samples(images))
        if source.shape != encoder.shape:
            raise UserError(f"the encoder takes samples of shape {encoder.shape}, not {source.shape}")
        return source
    source = open_images(images, channels=encoder.channels, value_range=encoder.value_range)
    for row in source.bad.to_pylist():
        print(f"left out {shown(row['path'])}: {row['status']}", file=sys.stderr)
    return source


def embed_to_file(run: str | Path, images: Any, output: Path, *, batch_size: int = 256) -> int:
    """Writes one row an image and returns their number: path and embedding, in the order of the images.

    ``.parquet``: columns ``path`` (string) and ``embedding`` (fixed-size list of float32), a row group a batch.
    ``.npy``: float32 (n, features), with the paths beside it in a text file of the same name, one a line.
    The file appears when it is complete.
    """
    writers = {".parquet": _write_parquet, ".npy": _write_npy}
    if output.suffix not in writers:
        raise UserError(f"The output {output} must end in .parquet or .npy.")
    if not output.parent.is_dir():
        raise UserError(f"The folder {output.parent} of the output does not exist; make it first.")
    encoder = load_encoder(run)
    source = _open(images, encoder)
    beside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        count = writers[output.suffix](beside, output, embed_images(encoder, source, batch_size), encoder, len(source))
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _write_parquet(path: Path, _: Path, rows: Rows, encoder: Encoder, __: int) -> int:
    vector = pa.list_(pa.float32(), encoder.features)
    schema = pa.schema([("path", pa.string()), ("embedding", vector)])
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for keys, features in rows:
            column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), encoder.features)
            writer.write_table(pa.table([pa.array(keys), column], schema=schema))
            count += len(keys)
    return count


def _write_npy(path: Path, output: Path, rows: Rows, encoder: Encoder, total: int) -> int:
    count = 0
    with output.with_suffix(".txt").open("w", encoding="utf-8") as names:
        out = open_memmap(path, mode="w+", dtype=np.float32, shape=(total, encoder.features))
        for keys, features in rows:
            out[count : count + len(keys)] = features
            names.writelines(key.replace("\n", "\\n") + "\n" for key in keys)
            count += len(keys)
        out.flush()
    if count < total:  # unreadable images were left out: the file must hold no empty rows
        kept = np.array(out[:count])
        with path.open("wb") as file:
            np.save(file, kept)
    return count
