"""Images in, one row of features an image out: to memory, Parquet or .npy, streaming."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor, nn

from barlow.console import say
from barlow.convert import convert
from barlow.crops import UNIT, in_unit
from barlow.encoder import Encoder, load_encoder
from barlow.errors import DataError, UserError
from barlow.files import atomic_write, check_output, keep_foreign
from barlow.guard import BadImage
from barlow.images import Images, open_images
from barlow.index import in_threads
from barlow.kinds import as_whole, fits, plain
from barlow.progress import progress
from barlow.samples import Samples
from barlow.sources import companion, keep_apart, shown

Rows = Iterator[tuple[list[str], NDArray[np.float32]]]
Part = tuple[int, int]  # (k, n): the k-th of n parts of the images, k from 1 to n

WHOLE: Part = (1, 1)
COLUMNS = ["path", "embedding"]  # of a Parquet file of rows
BATCH = 256  # images that go through the encoder together
GROUP = 8192  # rows of a row group of a Parquet file, about
AHEAD = 8  # images that a thread prepares at a time


def embed_images(
    encoder: Encoder, images: Images, batch_size: int = BATCH, what: str = "embedding", part: Part = WHOLE,
    through: Callable[[Tensor], Tensor] | None = None, told: bool = False,
) -> Rows:  # fmt: skip
    """(keys, features (n, features) float32) of consecutive images, a batch at a time, on the encoder's device.

    An unreadable image is left out and, but for ``told``, named on standard error; ``what`` names the job. Of a
    ``part``, the images of ``numbers``: which images go through the encoder together does not depend on the parts, nor
    therefore does a bit of their features. ``through``: what becomes of a batch, if not what ``encoder`` makes of it.
    """
    as_whole(batch_size, "batch_size", 1)
    device = next(encoder.parameters()).device
    mine = numbers(len(images), batch_size, part)

    def prepare(k: int) -> Tensor | BadImage:
        try:
            # at once: many large images are not held in memory
            return encoder.normalised([read_for(encoder, images, mine[k])])
        except BadImage as error:
            return error

    keys, batch = list[str](), list[Tensor]()
    if images.root:
        prepared = in_threads(prepare, len(mine), what, chunk=AHEAD)
    else:  # arrays need no waiting for, and a Dataset may not bear being read by threads
        prepared = progress(map(prepare, range(len(mine))), what, len(mine))
    for i, pixels in zip(mine, prepared, strict=True):
        if isinstance(pixels, BadImage):
            if not told:
                say(f"left out {images.key(i)}: {pixels.reason}")
        else:
            keys.append(images.key(i))
            batch.append(pixels)
        if batch and ((i + 1) % batch_size == 0 or i == mine[-1]):
            x = torch.cat(batch).to(device)
            with torch.inference_mode():
                x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
                features = (through or encoder)(x)
            yield keys, features.float().cpu().numpy()
            keys, batch = [], []


def read_for(encoder: Encoder, images: Images, i: int) -> NDArray[Any]:
    """Image ``i`` as ``encoder.normalised`` takes it; raises BadImage. UserError, as ``encoder.preprocess``, for real
    numbers beyond 0 to 1 where the encoder was trained on bytes: only their company could tell their range."""
    if encoder.value_dtype != "uint8":
        return images.read(i)
    if images.array is not None:
        image, sound = images.read(i), images.beyond is None or images.beyond[i] == 0
    else:
        plain = images.decoded(i, fill=False)
        image, sound = convert(plain, images.channels, images.dtype), plain.dtype != np.float32 or in_unit(plain)
    if not sound:
        raise UserError(f"{images.key(i)}: {UNIT}")
    return image


def numbers(count: int, batch_size: int, part: Part) -> range:
    """The images of a part of ``count`` images: whole batches, and consecutive ones, so that parts join in order."""
    k, n = part
    batches = -(-count // batch_size)
    first, last = batches * (k - 1) // n, batches * k // n
    return range(min(first * batch_size, count), min(last * batch_size, count))


def check_part(part: Part) -> None:
    """UserError for a part that there is not."""
    if not isinstance(part, tuple | list) or len(part) != 2 or not all(fits(plain(number), int) for number in part):
        raise UserError(f"part = {part!r} is not two whole numbers such as (2, 8), the second of eight parts.")
    k, n = part
    if not 1 <= k <= n:
        raise UserError(f"There is no part {k} of {n}: parts are numbered from 1, such as 1/{max(n, 1)}.")


def embed(
    run: str | Path, images: Any, *, batch_size: int = BATCH, model: nn.Module | None = None, part: Part = WHOLE
) -> tuple[list[str], NDArray[np.float32]]:
    """Keys and features (n, features) of all images, in memory.

    ``run`` is a run folder or an encoder folder; ``images`` is anything that ``pretrain`` takes, or an array
    (n, h, w, c); ``model`` as in ``load_encoder``. ``part``: (k, n) for the k-th of n parts of the images, k from 1
    on; the parts, joined in their order, are the whole to the bit. UserError for another part.
    """
    check_part(part)
    encoder = load_on_device(run, model)
    parts = list(embed_images(encoder, open_for(encoder, images, part), batch_size, part=part))
    if not parts:
        return [], np.empty((0, encoder.features), np.float32)
    return [key for keys, _ in parts for key in keys], np.concatenate([features for _, features in parts])


def load_on_device(run: str | Path, model: nn.Module | None = None) -> Encoder:
    """``load_encoder``, on a GPU where there is one."""
    return on_device(load_encoder(run, model))


def on_device(encoder: Encoder) -> Encoder:
    """``encoder``, on a GPU where there is one."""
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def open_for(encoder: Encoder, images: Any, part: Part = WHOLE) -> Images:
    """The images as the encoder was trained on them; those that the index leaves out are named on standard error, by
    the first of several parts. UserError for none, and for samples where it takes images."""
    if images is None:
        raise UserError("there is nothing to embed: give images, such as a folder, a list of paths or an array.")
    if encoder.shape:
        source = open_images(images if isinstance(images, Samples) else Samples(images))
        if source.shape != encoder.shape:
            raise UserError(f"the encoder takes samples of shape {encoder.shape}, not {source.shape}")
        return source
    if isinstance(images, Samples):
        raise UserError("the encoder takes images, and Samples are none: give an array (n, h, w, c).")
    source = open_images(images, channels=encoder.channels, value_range=encoder.value_range)
    encoder.check_dtype(source.dtype)
    if source.second is not None and part[0] == 1:
        say("note: of a table of pairs the first images are taken; for the second encoder give a table of the others")
    for row in source.bad.to_pylist() if part[0] == 1 else ():
        say(f"left out {shown(row['path'])}: {row['status']}")
    return source


def embed_to_file(run: str | Path, images: Any, output: str | Path, *, batch_size: int = BATCH) -> int:
    """Writes one row an image and returns their number: path and embedding, in the order of the images.

    ``.parquet``: columns ``path`` (string) and ``embedding`` (fixed-size list of float32).
    ``.npy``: float32 (n, features), with the paths beside it in a text file of the same name, one a line.
    The file appears when it is complete, in place of one that was written so before; any other is left, with UserError.
    DataError where not one image can be used.
    """
    writers = {".parquet": _write_parquet, ".npy": _write_npy}
    output = check_output(output)
    if output.suffix not in writers:
        raise UserError(f"The output {output} must end in .parquet or .npy (or be a folder, with --part).")
    keep_apart(images, output, *([companion(output, ".txt")] if output.suffix == ".npy" else []))
    keep_foreign(output, _is_former)
    encoder = load_on_device(run)
    source = open_for(encoder, images)
    beside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        count = writers[output.suffix](beside, output, embed_images(encoder, source, batch_size), encoder, len(source))
        if not count:
            raise DataError(f"none of the {len(source):,} images can be used; each is named above with its reason")
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _is_former(output: Path) -> bool:
    """Whether a file is what ``embed_to_file`` writes."""
    if output.suffix == ".parquet":
        return bool(pq.read_schema(output).names == COLUMNS)
    array, names = np.load(output, mmap_mode="r", allow_pickle=False), output.with_suffix(".txt")
    alike = array.ndim == 2 and array.dtype == np.float32
    return bool(alike and names.is_file() and names.read_bytes().count(b"\n") == len(array))


def _write_parquet(path: Path, _: Path, rows: Rows, encoder: Encoder, __: int) -> int:
    return write_parquet(path, rows, encoder.features, {})


def write_parquet(path: Path, rows: Rows, features: int, about: Mapping[str, str]) -> int:
    """Writes rows as ``embed_to_file`` describes it, with ``about`` in the metadata of the file and a checksum with
    each page; returns how many there were."""
    kinds = (pa.string(), pa.list_(pa.float32(), features))
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)), metadata=dict(about))
    count = 0
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_page_checksum=True) as writer:
        for keys, z in _groups(rows):
            column = pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), features)
            writer.write_table(pa.table([pa.array(keys, pa.string()), column], schema=schema))
            count += len(keys)
    return count


def _groups(rows: Rows) -> Rows:
    """The same rows, about ``GROUP`` at a time."""
    keys, parts = list[str](), list[NDArray[np.float32]]()
    for some, features in rows:
        keys += some
        parts.append(features)
        if len(keys) >= GROUP:
            yield keys, np.concatenate(parts)
            keys, parts = [], []
    if keys:
        yield keys, np.concatenate(parts)


def _write_npy(path: Path, output: Path, rows: Rows, encoder: Encoder, total: int) -> int:
    count = 0
    names = list[str]()
    out = open_memmap(path, mode="w+", dtype=np.float32, shape=(total, encoder.features))
    for keys, features in rows:
        out[count : count + len(keys)] = features
        names += keys
        count += len(keys)
    out.flush()
    if count < total:  # unreadable images were left out: the file must hold no empty rows
        kept = np.array(out[:count])
        with path.open("wb") as file:
            np.save(file, kept)
    if count:
        atomic_write(output.with_suffix(".txt"), "".join(name.replace("\n", "\\n") + "\n" for name in names))
    return count
