"""The prepared cache: every image decoded once, resized to just above the crop, and laid in one file.

Raw pixels where they fit, so that a read is one copy out of the page cache; JPEG bytes where they do not. The folder is
named by what it was made from (paths, lengths and times of the files, size, rules), so it is used again by every run to
which it applies, and never stale. The images keep their numbers; one that cannot be read stays a bad image.

The file is read at a place, not mapped: both copy out of the same page cache at the same speed
(``benchmarks/data.py``), but mapped pages count as memory of every worker that touched them, which would seem to grow
all through an epoch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from barlow.cores import cores
from barlow.decode import RULE
from barlow.draws import IntArray
from barlow.guard import BadImage
from barlow.index import OK, WORDS, in_threads, place
from barlow.reading import Images, RawPixels
from barlow.resources import readable
from barlow.sources import size_and_time
from barlow.store import content_name, free_bytes, made, store_root

Array = np.ndarray[Any, np.dtype[Any]]

MARGIN = 1.15  # short side of a prepared image over that of the crop
LAYOUT = 1  # of the folder; raise it whenever what is written changes
QUALITY = 90  # JPEG, with its usual halved colour: files are smaller and read faster, and most sources had that before
JPEG_SHARE = 0.2  # of the raw bytes, a cautious estimate for that quality
DISK_SHARE = 0.5  # of the free disk that a cache may take


@dataclass(frozen=True)
class CachePlan:
    """``form``: "raw", "jpeg", or "none" with the ``reason``. ``bytes``: of the file, an estimate for JPEG. ``name``:
    of the folder in the store. ``ready``: it is there already."""

    form: str
    bytes: int
    reason: str
    name: str = ""
    ready: bool = False


def prepared_sizes(sizes: IntArray, size: int) -> IntArray:
    """(n, 2) height and width of the prepared images: short side ``MARGIN`` × ``size`` rounded up, never enlarged."""
    short = math.ceil(MARGIN * size)
    factor = np.minimum(1.0, short / sizes.min(1, keepdims=True))
    prepared: IntArray = np.maximum(1, np.rint(sizes * factor)).astype(np.int64)
    return prepared


def plan_cache(images: Images, size: int, form: str | None = None) -> CachePlan:
    """Whether and how images would be prepared for crops of ``size``. ``form``: to insist on that of an earlier run."""
    if images.array is not None or images.held is not None:
        return CachePlan("none", 0, "the images are arrays already: there is nothing to decode")
    both = (images,) if images.second is None else (images, images.second)
    needs = _needs(both, size)
    forms = [one for one in needs if form in (None, one)]
    if not forms:
        kinds = " and ".join(f"{one.channels} channels of {one.dtype}" for one in both)
        return CachePlan("none", 0, f"images of {kinds} cannot be kept as {form}")
    names = {one: [_name(part, size, one, _files(part)) for part in both] for one in forms}
    for one, (name, *others) in names.items():
        if all((store_root() / folder).exists() for folder in (name, *others)):
            return CachePlan(one, needs[one], f"prepared before, in {store_root() / name}", name, True)
    free = free_bytes()
    for one, (name, *_) in names.items():
        if needs[one] < DISK_SHARE * free:
            return CachePlan(one, needs[one], f"{readable(needs[one])} in {store_root()}", name)
    least = min(needs[one] for one in forms)
    has = f"has {readable(free)} free" if free else "cannot be written in"
    return CachePlan("none", 0, f"it needs {readable(least)} and {store_root()} {has}")


def _needs(both: Sequence[Images], size: int) -> dict[str, int]:
    """The forms in which these images can be kept, and the bytes that each takes."""
    raw = [
        int(prepared_sizes(images.sizes, size).prod(1).sum()) * images.channels * np.dtype(images.dtype).itemsize
        for images in both
    ]
    photographs = all(images.dtype == "uint8" and images.channels in (1, 3) for images in both)
    return {"raw": sum(raw)} | ({"jpeg": int(sum(raw) * JPEG_SHARE)} if photographs else {})


def cached(images: Images, size: int, form: str | None = None) -> Images:
    """The same images, prepared for crops of ``size``; made with progress where they are not there yet.

    Where preparing is of no use or does not fit (``plan_cache`` says why), ``images`` as they are. The ``kind`` of
    the result is "raw" or "jpeg"; its sizes are the prepared ones.
    """
    plan = plan_cache(images, size, form)
    if plan.form == "none":
        return images
    folder = made(plan.name, lambda temporary: _make(images, size, plan.form, temporary))
    rows = pq.read_table(folder / "rows.parquet").combine_chunks()
    states = enumerate(rows["status"].to_pylist())
    raw = RawPixels(bytes(folder / "pixels.bin"), rows["offset"].to_numpy(), {i: s for i, s in states if s != OK})
    return replace(
        images,
        kind=plan.form,
        root=bytes(folder),
        rows=rows,
        sizes=np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1).astype(np.int64),
        raw=raw if plan.form == "raw" else None,
        second=None if images.second is None else cached(images.second, size, plan.form),
    )


def _files(images: Images) -> IntArray:
    """(n, 2) length and time of the files, as the index knows them."""
    return np.stack([images.rows["bytes"].to_numpy(), images.rows["modified"].to_numpy()], 1)


def _name(images: Images, size: int, form: str, files: IntArray) -> str:
    paths = b"\0".join(images.rows["path"].to_pylist())
    kind = [images.channels, images.dtype, images.value_range]
    rules = [RULE, LAYOUT, MARGIN, QUALITY, form, size, PIL.__version__]
    return f"{form}-{content_name(paths, files.tobytes(), kind, rules)}"


def _make(images: Images, size: int, form: str, folder: Path) -> str:
    """Fills the folder and returns the name that it deserves: by the files as they were when they were read."""
    sizes, files = prepared_sizes(images.sizes, size), _files(images)
    offsets, lengths, states = np.zeros(len(images), np.int64), np.zeros(len(images), np.int64), [OK] * len(images)

    def prepare(i: int) -> tuple[bytes, str]:
        file, _, length = place(images.rows, images.root, i)
        if length < 0:  # a file of its own may have changed since the index was made
            files[i] = size_and_time(file)
        height, width = (int(side) for side in sizes[i])
        try:
            array = shrink(images.read(i, (height, width)), height, width)
        except BadImage as bad:
            return b"", bad.reason
        return (array.tobytes() if form == "raw" else _jpeg(array)), OK

    with (folder / "pixels.bin").open("wb") as out:
        what = f"preparing images for {size}-pixel crops"
        for i, (data, states[i]) in enumerate(in_threads(prepare, len(images), what, cores(), 8)):
            offsets[i], lengths[i] = out.tell(), out.write(data)
    rows = {
        "path": images.rows["path"],
        "bytes": pa.array(lengths),
        "modified": pa.array(files[:, 1]),
        "width": pa.array(sizes[:, 1], pa.int32()),
        "height": pa.array(sizes[:, 0], pa.int32()),
        "mode": pa.array([f"{images.dtype}x{images.channels}"] * len(images), WORDS),
        "status": pa.array(states, WORDS),
        "file": pa.array(["pixels.bin"] * len(images), WORDS).cast(pa.dictionary(pa.int32(), pa.binary())),
        "offset": pa.array(offsets),
    }
    pq.write_table(pa.table(rows), folder / "rows.parquet", compression="zstd")
    return _name(images, size, form, files)


def shrink(array: Array, height: int, width: int) -> Array:
    """(h, w, c) of any kind → (height, width, c), antialiased (Pillow's bicubic); as it is where it fits already."""
    if array.shape[:2] == (height, width):
        return array
    if array.dtype == np.uint8 and array.shape[2] in (1, 3):
        image = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).reshape(height, width, -1)
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in array.astype(np.float32).transpose(2, 0, 1)
    ]
    small: Array = np.stack(planes, 2)
    if array.dtype == np.float32:
        np.clip(small, 0, 1, out=small)  # the bicubic kernel reaches a little over the ends
        return small
    whole: Array = np.clip(np.rint(small), 0, np.iinfo(array.dtype).max).astype(array.dtype)
    return whole


def _jpeg(array: Array) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
